"""Subcommands of `san` that write, check and run recipes."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from san_bench.config.strict import san_error

KIND = Literal["image", "language", "vision-language"]
VALUES = arg(metavar="KEY=VALUE ...")
TRACKERS = Literal["wandb", "trackio", "tensorboard"]


@dataclass(frozen=True)
class Init:
    """Write a short recipe from four answers: kind of data, where the data is, model and method."""

    kind: KIND | None = None
    """Kind of data."""
    data: str | None = None
    """Folder, file or hub name of the data; empty for data that ships with the package."""
    model: str | None = None
    """Name or folder of the model; a small one that ships with the package by default."""
    method: str | None = None
    """san, san-lora, san-dora, ssf, lora, dora or full."""
    out: Path = Path("recipe.yaml")
    """File to write."""
    yes: bool = False
    """Ask nothing, and take the default of every option that is not given."""

    def run(self) -> None:
        """Asks for the options that are not given, and writes the recipe."""
        from san_bench.config.draft import DATA_KINDS, METHODS, draft_recipe, write_draft

        kind = self._answer(self.kind, f"Kind of data ({', '.join(DATA_KINDS)})", "image")
        defaults = DATA_KINDS.get(kind)
        example = f" (such as {defaults.example}; empty: data that ships with the package)" if defaults else ""
        data = self._answer(self.data, f"Data{example}", "")
        model = self._answer(self.model, "Model", defaults.model if defaults else "")
        method = self._answer(self.method, f"Method ({', '.join(METHODS)})", "san")
        write_draft(self.out, draft_recipe(kind, data, model, method))
        print(f"{self.out}. Next: san check {self.out}, san train {self.out} --dry-run, san train {self.out}")

    def _answer(self, given: str | None, question: str, default: str) -> str:
        if given is not None or self.yes:
            return default if given is None else given
        try:
            return input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError as error:
            raise san_error("The input ended before the last answer. Give --yes, or all options.") from error


@dataclass(frozen=True)
class Train:
    """Train a recipe and evaluate it once, or resume an interrupted run."""

    recipe: Positional[str]
    """A YAML file, or the name of a shipped recipe such as demo/san."""
    overrides: Annotated[Positional[tuple[str, ...]], VALUES] = ()
    """Values to override, such as optimizer.lr=1e-3 seed=1."""
    set: Annotated[tuple[str, ...], VALUES] = ()
    """Another way to give the values."""
    track: tuple[TRACKERS, ...] = ()
    """Experiment trackers to log to, beside log.jsonl."""
    dry_run: bool = False
    """Load data and model, measure memory and time on a few steps, print them, and write nothing."""
    gpus: int | None = None
    """Number of GPUs of this machine to train on, in one process each; without a GPU, processes on the CPU."""
    shard: Literal["fsdp2", "zero2", "zero3"] | None = None
    """Shard the model across the GPUs with FSDP2 or DeepSpeed, instead of replicating it."""

    def run(self) -> None:
        """Trains, evaluates once, and prints the result."""
        from san_bench.config.recipe import load_recipe
        from san_bench.models.start import check_start

        recipe = load_recipe(self.recipe, (*self.overrides, *self.set))
        check_start(recipe.method)
        if self.gpus is not None or self.shard is not None:
            self._launch(recipe.precision)
        first = os.environ.get("RANK", "0") == "0"  # under accelerate launch or torchrun, rank 0 alone prints
        if self.dry_run:
            from san_bench.run.dry import dry_run

            needs = dry_run(recipe)
            if first:
                print_facts(needs)
            return
        from san_bench.run.train import train

        finished = (Path(recipe.output) / "result.json").exists()
        result = train(recipe, self.track)
        if first:
            keys = ("method", "trainable_parameters", "train_seconds", "steps", "split", "accuracy", "n_test")
            print_facts({key: result[key] for key in keys} | by_task_and_way(result))
            print(self._next(recipe, finished))

    def _next(self, recipe: Any, finished: bool) -> str:
        folder = shlex.quote(recipe.output)
        if not finished:
            return f"Run: {folder}\nNext: san export {folder} --merged --out {shlex.quote(f'{recipe.output}-merged')}"
        name = shlex.quote(self.recipe)
        more = f"method.from={folder} optimizer.epochs=1 output={folder}-more"
        return f"Run: {folder}, which had finished before.\nTo train its adapter on: san train {name} {more}"

    def _launch(self, precision: str) -> None:
        """Replaces this process by the launcher of several processes."""
        import torch

        from san_bench.run.launch import launch_command

        found, cpus = torch.cuda.device_count(), os.cpu_count() or 1
        if self.gpus is None:
            raise san_error(f"--shard {self.shard} needs the number of GPUs. Add --gpus {found or 8}.")
        if not 1 <= self.gpus <= (found or cpus):
            here = f"{found} GPUs" if found else f"no GPU, and {cpus} CPUs"
            raise san_error(f"--gpus {self.gpus} does not fit this machine, which has {here}.")
        if not found and self.shard:
            raise san_error(f"--shard {self.shard} needs a GPU, and this machine has none. Leave it out.")
        if not found:
            print(f"There is no GPU: {self.gpus} processes train on the CPU.", flush=True)
        words = ["train", self.recipe, *self.overrides, *self.set]
        words += ["--dry-run"] if self.dry_run else []
        words += ["--track", *self.track] if self.track else []
        command = launch_command(words, self.gpus, self.shard, precision, cpu=not found)
        os.execv(command[0], command)  # so that signals reach the launcher


@dataclass(frozen=True)
class Check:
    """Validate a recipe, suite or protocol, and report all errors at once, each with its line and key."""

    recipe: Positional[str]
    """A YAML file, or the name of a shipped recipe, suite or protocol."""
    overrides: Annotated[Positional[tuple[str, ...]], VALUES] = ()
    """Values to override."""
    set: Annotated[tuple[str, ...], VALUES] = ()
    """Another way to give the values."""

    def run(self) -> None:
        """Validates the file, and the tokenizer or processor of a recipe's local model, and prints what it is."""
        from san_bench.config.document import check_document

        said, recipe = check_document(self.recipe, (*self.overrides, *self.set))
        if recipe is not None:
            from san_bench.models import local_model
            from san_bench.models.start import check_start

            check_start(recipe.method)
            shipped = recipe.model.partition("/")[0] == "embedded"  # shipped models are complete
            if not shipped and (local_model(recipe.model) or Path(recipe.model)).is_dir():  # download nothing here
                from san_bench.run.domain import check_companions

                check_companions(recipe)
        print(said)


@dataclass(frozen=True)
class Runs:
    """List the runs in a folder: finished with their score, interrupted at which step, or failed."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")] = Path("runs")
    """Folder to search."""

    def run(self) -> None:
        """Prints a table of the runs."""
        from san_bench.run.listing import list_runs

        found = list_runs(self.folder)
        if not found:
            print(f"There are no runs in {self.folder}.")
            return
        titles = ("run", "task", "method", "state", "score")
        rows = [titles, *((str(run.folder), run.task, run.method, run.state, run.score) for run in found)]
        lines = [[" ".join(word.split()) for word in row] for row in rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        for line in lines:
            print("  ".join(f"{word:<{width}}" for word, width in zip(line, widths, strict=True)).rstrip())


def by_task_and_way(result: dict[str, Any]) -> dict[str, str]:
    """Returns the score of each task and scoring method, if a result has several tasks."""
    from san_bench.run.results import by_task

    rows = by_task(result) if "tasks" in result else []
    return {f"{row['task']} by {row['way']}": f"{row['accuracy']:.4g} of {row['n_test']}" for row in rows}


def print_facts(facts: dict[str, Any]) -> None:
    """Prints facts as two columns."""
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")

"""The `san` command: a thin layer of verbs, each of which imports what it needs when it runs."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from san_bench.cli_report import Plot, Report, Table
from san_bench.cli_vqa import LmmsEval, Submission


class Verb(Protocol):
    """What a command does."""

    def run(self) -> None:
        """Does it, and prints."""


@dataclass(frozen=True)
class Demo:
    """Fine-tune the embedded ViT on handwritten digits with SAN and its peers, and compare them."""

    out: Path = Path("runs/demo")
    """Folder of the runs, table, plots and rows."""
    methods: tuple[str, ...] = ("san", "linear", "ssf", "lora-equal", "lora-r8", "full")
    """Names of recipes under demo/, in the order to run them; with fewer, the demo is shorter."""

    def run(self) -> None:
        """Runs the demo and prints its table."""
        from san_bench.suites.demo import demo

        demo(self.out, self.methods)


@dataclass(frozen=True)
class Train:
    """Run a recipe, or resume the run that was interrupted."""

    recipe: Positional[str]
    """A YAML file, or the name of a shipped recipe such as demo/san."""
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Values in place of the file's, such as optimizer.lr=1e-3 seed=1."""
    track: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Trackers that also get the log."""

    def run(self) -> None:
        """Trains, scores once, and prints the result."""
        from san_bench.config.recipe import load_recipe

        recipe = load_recipe(self.recipe, self.set)
        from san_bench.run.train import train

        result = train(recipe, self.track)
        keys = ("run", "split", "accuracy", "n_test", "trainable_parameters", "train_seconds", "recipe_fingerprint")
        if os.environ.get("RANK", "0") == "0":  # of the processes that accelerate or torchrun started
            _table({key: result[key] for key in keys} | _of_tasks(result))


@dataclass(frozen=True)
class Bench:
    """Run a suite: methods, tasks, models and seeds; what is done is skipped, and what fails does not stop the rest."""

    suite: Positional[str]
    """Name of a shipped suite such as mini-vision, or a YAML file."""
    out: Path | None = None
    """Folder to write to; runs/SUITE by default."""
    data: Path | None = None
    """Folder of the data, for suites that have none inside the package."""
    methods: tuple[str, ...] = ()
    """Some of the suite's methods; all by default."""
    models: tuple[str, ...] = ()
    """Some of its models."""
    tasks: tuple[str, ...] = ()
    """Some of its tasks."""
    seeds: int = 1
    """How many seeds, from 0."""
    search: bool = False
    """Search for learning rates first, on validation images, with the same effort for every method."""
    protocol: str | None = None
    """Another protocol than the suite's."""
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Values in place of the protocol's, such as optimizer.epochs=10."""
    engine: Literal["local", "ray"] = "local"
    """Where to run: on this machine, or on a Ray cluster."""
    workers: int = 1
    """Runs at the same time on this machine, or in a Ray of its own."""
    threads: int | None = None
    """Threads, or on Ray processors, of each run; by default torch's choice, or 1 with several workers."""
    gpus_per_run: float = 0.0
    """With Ray, GPUs that a run takes, such as 0.5."""
    keep_models: bool = False
    """Keep the whole models that methods without an adapter save."""

    @property
    def command(self) -> str:
        """What to type to get the same once more."""
        words = ["san", "bench", self.suite]
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            if value != option.default:
                words += [
                    f"--{option.name.replace('_', '-')}",
                    *([] if value is True else map(str, value if isinstance(value, tuple) else [value])),
                ]
        return shlex.join(words)

    def run(self) -> None:
        """Runs the suite and prints where the results are."""
        from san_bench.config.suite import Choice, load_suite
        from san_bench.suites.engines import LocalEngine
        from san_bench.suites.ray import RayEngine
        from san_bench.suites.suite import bench

        suite, name = load_suite(self.suite), Path(self.suite).stem
        choice = Choice(self.methods, self.models, self.tasks, self.seeds, self.data, self.protocol, self.set)
        threads = self.threads or (1 if self.workers > 1 else None)
        engine = (
            RayEngine(self.workers, threads or 1, self.gpus_per_run)
            if self.engine == "ray"
            else LocalEngine(self.workers, threads)
        )
        out = self.out or Path("runs") / name
        rows = bench(suite, name, choice, out, engine, self.search, self.keep_models, self.command)
        print(f"{len(rows)} runs are done: {out / 'rows.jsonl'}. `san table {out}` compares them.")


@dataclass(frozen=True)
class Eval:
    """Load a run that has finished, and score it."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run."""
    split: str | None = None
    """Name of a split; the recipe's eval_split by default."""
    mode: Literal["both", "neuron", "synapse", "off"] = "both"
    """What of an adapter of SAN acts: its own scales, the propagated ones, both or none."""

    def run(self) -> None:
        """Scores and prints."""
        from san_bench.run.evaluate import evaluate

        _table(_scores(evaluate(self.folder, self.split, self.mode)))


@dataclass(frozen=True)
class Check:
    """Check a recipe: all errors at once, each with its line and place."""

    recipe: Positional[str]
    """A YAML file, or the name of a shipped recipe."""
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Values in place of the file's."""

    def run(self) -> None:
        """Checks the recipe and what lies beside a model that is on this machine, and prints the fingerprint."""
        from san_bench.config.recipe import load_recipe

        recipe = load_recipe(self.recipe, self.set)
        if recipe.model.partition("/")[0] != "embedded":  # what ships is complete
            from san_bench.models import local_model

            if (local_model(recipe.model) or Path(recipe.model)).is_dir():  # of the hub nothing is downloaded here
                from san_bench.run.domain import check_companions

                check_companions(recipe)
        print(f"{self.recipe} is fine. Fingerprint {recipe.fingerprint}")


@dataclass(frozen=True)
class Recipes:
    """List the recipes, suites and protocols that come with the package, or copy one."""

    copy: str | None = None
    """Name of one to copy."""
    out: Path | None = None
    """File to copy it to; its own name in this folder by default."""

    def run(self) -> None:
        """Lists or copies."""
        from san_bench.config.recipe import find, shipped

        if self.copy is None:
            for name, path in shipped(None).items():
                print(f"{name:<22} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
            return
        source = find(self.copy, None)
        target = self.out or Path(source.name)
        if target.exists():
            raise FileExistsError(f"{target} is there already. Choose another file with --out.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        print(target)


@dataclass(frozen=True)
class Env:
    """Print versions, commit and machine, as they are written beside every result."""

    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Prints."""
        from san_bench.run.provenance import provenance

        facts = provenance()
        print(json.dumps(facts, indent=2)) if self.json else _table({**facts.pop("versions"), **facts})


@dataclass(frozen=True)
class Trace:
    """Show which layer of a model feeds which."""

    name: Positional[str]
    """Name of a timm or transformers model, or a folder."""
    scheme: Literal["all", "exact", "feedforward", "reference", "none"] = "all"
    """Which of the edges to show."""
    json: bool = False
    """Print the graph as JSON."""
    dot: bool = False
    """Print it for Graphviz."""
    svg: bool = False
    """Draw it."""
    html: bool = False
    """Draw it as a page."""
    placement: bool = False
    """Print where each propagated scale acts: in a norm, at the anterior's output or at the posterior's input."""
    out: Path | None = None
    """File to write to."""

    def run(self) -> None:
        """Traces and shows."""
        from san_bench.graph.command import trace_command  # type: ignore[import-not-found, unused-ignore]
        from san_peft.errors import SanError

        chosen = [name for name in ("json", "dot", "svg", "html", "placement") if getattr(self, name)]
        if len(chosen) > 1:
            raise SanError(f"Choose one of --json, --dot, --svg, --html and --placement, not {len(chosen)} of them.")
        trace_command(self.name, self.scheme, chosen[0] if chosen else "tree", self.out)


@dataclass(frozen=True)
class Export:
    """Write what needs no san_peft: a run's model with its adapter merged, or the closest LoRA adapter."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run."""
    out: Path
    """Folder to write."""
    merged: bool = field(default=False)
    """Merge the adapter into the weights: a plain transformers folder, which computes the same."""
    as_lora: Annotated[int | None, arg(metavar="RANK")] = None
    """Write the closest LoRA adapter of this rank, and say what it loses."""

    def run(self) -> None:
        """Merges or converts, compares outputs and writes."""
        from san_bench.run.evaluate import export, export_lora
        from san_peft.errors import SanError

        if self.merged == (self.as_lora is not None):
            raise SanError(
                f"Choose --merged or --as-lora RANK. The adapter as it is lies in {self.folder / 'adapter'} already."
            )
        _table(
            export(self.folder, self.out) if self.merged else export_lora(self.folder, self.out, int(self.as_lora or 0))
        )


@dataclass(frozen=True)
class Data:
    """Check the data of a suite, every image and every problem at once, or fetch what may be fetched."""

    action: Positional[Literal["check", "fetch"]]
    """What to do."""
    suite: Positional[str]
    """vtab, fgvc, gic or commonsense, or one data set such as vtab/cifar; to check also folder or datasets for images
    of your own, llava, llava/gqa or conversations; to fetch also the name of a data set on the Hugging Face hub."""
    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of the data."""
    images: bool = True
    """Read and decode every image, and look for those that occur twice."""
    workers: int | None = None
    """Threads that read images; as many as processors by default, up to eight."""
    write_checksums: Path | None = None
    """File to write checksums to, as sha256sum does."""
    checksums: Path | None = None
    """File of checksums to compare with."""

    def run(self) -> None:
        """Checks or fetches, prints, and exits with code 1 where something is missing or wrong."""
        if self.action == "fetch":
            from san_bench.datacheck.fetch import fetch_command

            fetch_command(self.suite, self.folder)
        else:
            from san_bench.datacheck.check import check_command

            check_command(self.suite, self.folder, self.images, self.workers, self.write_checksums, self.checksums)


EXTRAS = {
    "sklearn": "demo",
    "matplotlib": "plot",
    "timm": "vision",
    "datasets": "vision",
    "torchvision": "vision",
    "scipy": "vision",
    "jinja2": "plot",
}
"""Which extra brings a module that a verb may need."""

WORK = (Demo, Train, Bench, Eval, Check, Recipes, Env, Trace, Export, Submission, LmmsEval, Data)
VERBS: tuple[type[Verb], ...] = (*WORK, Table, Plot, Report)


def name_of(verb: type[Verb]) -> str:
    """Returns what a verb is called on the command line."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", verb.__name__).lower()


def parse(words: Sequence[str] | None = None) -> Verb:
    """Reads the words of a command line into the verb they call, without running it."""
    verbs: Any = None
    for verb in VERBS:
        named = Annotated[verb, subcommand(name_of(verb), prefix_name=False)]  # type: ignore[valid-type]
        verbs = named if verbs is None else verbs | named
    return tyro.cli(
        verbs, prog="san", args=words, config=(OmitArgPrefixes,), description="Fine-tune with SAN, and compare."
    )


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command; a mistake of the user's is one message and exit code 2, Ctrl-C is one and exit code 130."""
    verb = parse(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait crawl on a busy machine
    try:
        verb.run()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        print("san: stopped. The same command goes on from what is finished.", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        print(f'san: {error.name} is missing: pip install "san-peft[{extra}]"', file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        from san_peft.errors import SanError

        if _is_disk_full(error):
            hint = "Free some space; the same command goes on from what is finished."
            print(f"san: No space is left to write to: {error}. {hint}", file=sys.stderr)
        elif isinstance(error, SanError | FileExistsError):
            print(f"san: {error}", file=sys.stderr)
        else:
            raise
        sys.exit(2)


def _is_disk_full(error: Exception) -> bool:
    """Whether a disk, a quota or the size of files is exhausted; safetensors, in Rust, says so in its text alone."""
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    """A result with a line for each task, where it has several."""
    return {key: value for key, value in result.items() if key not in ("tasks", "ways")} | _of_tasks(result)


def _of_tasks(result: dict[str, Any]) -> dict[str, str]:
    from san_bench.run.results import by_task

    rows = by_task(result) if "tasks" in result else []
    return {f"{row['task']} by {row['way']}": f"{row['accuracy']:.4g} of {row['n_test']}" for row in rows}


def _table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()

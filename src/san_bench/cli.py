"""The `san` command-line interface; each subcommand imports its dependencies when it runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from san_bench.cli_report import Plot, Report, Table
from san_bench.cli_train import Check, Init, Runs, Train, by_task_and_way, print_facts
from san_bench.cli_vqa import LmmsEval, Submission
from san_bench.config.errors import reported


class Verb(Protocol):
    """A subcommand of `san`."""

    def run(self) -> None:
        """Runs the subcommand and prints its output."""


@dataclass(frozen=True)
class Demo:
    """Fine-tune the embedded ViT on handwritten digits with SAN and baselines, and compare them."""

    out: Path = Path("runs/demo")
    """Output folder for runs, results, table and plots."""
    methods: tuple[str, ...] = ()
    """Methods of the suite demo to run, in this order, such as san ssf; all six by default."""

    def run(self) -> None:
        """Runs the suite demo, prints its table, and exits with code 1 if runs failed."""
        from san_bench.suites.demo import demo

        _finish(demo(self.out, self.methods), self.out)


@dataclass(frozen=True)
class Bench:
    """Run a benchmark suite: methods x tasks x models x seeds. Finished runs are skipped; failures don't stop it."""

    suite: Positional[str]
    """Name of a shipped suite such as mini-vision, or a YAML file."""
    out: Path | None = None
    """Output folder; runs/SUITE by default."""
    data: Path | None = None
    """Folder of the datasets, for suites whose data is not shipped with the package."""
    methods: tuple[str, ...] = ()
    """Run only these methods of the suite; all by default."""
    models: tuple[str, ...] = ()
    """Run only these models; all by default."""
    tasks: tuple[str, ...] = ()
    """Run only these tasks; all by default."""
    seeds: int = 1
    """Number of seeds, counted from 0."""
    search: bool = False
    """First search the learning rate of each method on the validation split, over equally large grids."""
    protocol: str | None = None
    """Training protocol to use instead of the suite's."""
    set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Override values of the protocol, such as optimizer.epochs=10."""
    engine: Literal["local", "ray"] = "local"
    """Execute runs on this machine (local) or on a Ray cluster (ray)."""
    workers: int = 1
    """Number of parallel runs on this machine, or in a local Ray instance."""
    threads: int | None = None
    """CPU threads per run (CPUs with Ray); by default torch's own number, or 1 with several workers."""
    gpus_per_run: float = 0.0
    """GPUs per run with Ray; may be a fraction such as 0.5."""
    keep_models: bool = False
    """Keep the full models that methods without an adapter save."""

    @property
    def command(self) -> str:
        """The command line that reproduces this call."""
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
        """Runs the suite, prints the path of the results, and exits with code 1 if runs failed."""
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
        _finish(bench(suite, name, choice, out, engine, self.search, self.keep_models, self.command), out)


@dataclass(frozen=True)
class Eval:
    """Load a finished run and evaluate it."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run."""
    split: str | None = None
    """Split to evaluate on; the recipe's eval_split by default."""
    mode: Literal["both", "neuron", "synapse", "off"] = "both"
    """Active scales of a SAN adapter: its own (neuron), the propagated ones (synapse), both, or none (off)."""

    def run(self) -> None:
        """Evaluates and prints the scores."""
        from san_bench.run.evaluate import evaluate

        print_facts(_scores(evaluate(self.folder, self.split, self.mode)))


@dataclass(frozen=True)
class Recipes:
    """List the shipped recipes, suites and protocols, or copy one to edit it."""

    copy: str | None = None
    """Name of the recipe, suite or protocol to copy."""
    out: Path | None = None
    """File to copy to; by default the same file name in the current folder."""

    def run(self) -> None:
        """Lists all, or copies one."""
        from san_bench.config.recipe import find, shipped

        if self.copy is None:
            for name, path in shipped(None).items():
                print(f"{name:<22} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
            return
        source = find(self.copy, None)
        target = self.out or Path(source.name)
        if target.exists():
            raise FileExistsError(f"{target} already exists. Choose another file with --out.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        print(target)


@dataclass(frozen=True)
class Env:
    """Print the environment that is recorded with every result: versions, commit, CPU, threads and device."""

    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        """Prints the environment."""
        from san_bench.run.provenance import provenance

        facts = provenance()
        print(json.dumps(facts, indent=2)) if self.json else print_facts({**facts.pop("versions"), **facts})


@dataclass(frozen=True)
class Trace:
    """Trace the propagation graph of a model: which layer's scale propagates to which layers. No weights are loaded."""

    name: Positional[str]
    """Name of a timm or transformers model, or a folder with its config.json."""
    scheme: Literal["all", "exact", "feedforward", "reference", "none"] = "all"
    """Propagation scheme: the subset of edges to show."""
    json: bool = False
    """Write the graph as JSON."""
    dot: bool = False
    """Write the graph in Graphviz's DOT language."""
    svg: bool = False
    """Draw the graph as SVG."""
    html: bool = False
    """Write a self-contained HTML page with the drawing and tables of edges and barriers."""
    placement: bool = False
    """List where each propagated scale is applied: in a norm, at the anterior's output or at the posterior's input."""
    out: Path | None = None
    """File to write to; standard output by default."""

    def run(self) -> None:
        """Traces the model and shows its graph."""
        from san_bench.graph.command import trace_command  # type: ignore[import-not-found, unused-ignore]
        from san_peft.errors import SanError

        chosen = [name for name in ("json", "dot", "svg", "html", "placement") if getattr(self, name)]
        if len(chosen) > 1:
            raise SanError(f"Choose one of --json, --dot, --svg, --html and --placement; {len(chosen)} were given.")
        trace_command(self.name, self.scheme, chosen[0] if chosen else "tree", self.out)


@dataclass(frozen=True)
class Export:
    """Export a run for use without san_peft: merge its adapter, convert it to LoRA, or detach SAN from its host."""

    folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run."""
    out: Path
    """Output folder."""
    merged: bool = field(default=False)
    """Merge the adapter into the weights and save a plain transformers checkpoint with the same outputs."""
    as_lora: Annotated[int | None, arg(metavar="RANK")] = None
    """Save the closest LoRA adapter of this rank, and print the approximation error."""
    detach: bool = False
    """Save the host of san-lora or san-dora as an ordinary LoRA or DoRA adapter, without propagated scales."""

    def run(self) -> None:
        """Merges, converts or detaches the adapter, compares the outputs and saves the model."""
        from san_bench.run.evaluate import export, export_host, export_lora
        from san_peft.errors import SanError

        if self.merged + self.detach + (self.as_lora is not None) != 1:
            raise SanError(
                f"Choose one of --merged, --as-lora RANK and --detach. The unmerged adapter is in "
                f"{self.folder / 'adapter'}."
            )
        if self.as_lora is not None:
            print_facts(export_lora(self.folder, self.out, self.as_lora))
        else:
            print_facts((export if self.merged else export_host)(self.folder, self.out))


@dataclass(frozen=True)
class Data:
    """Validate the datasets of a suite and report all problems at once, or download them where licences allow it."""

    action: Positional[Literal["check", "fetch"]]
    """Validate (check) or download (fetch)."""
    suite: Positional[str]
    """vtab, fgvc, gic or commonsense, or one dataset such as vtab/cifar. Check also takes folder or datasets (your own
    images), instructions (your own text), llava, llava/gqa and conversations; fetch also takes a dataset name on the
    Hugging Face hub."""
    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of the data; for instructions also a file, or the name of a dataset on the Hugging Face hub."""
    images: bool = True
    """Decode every image, and look for duplicates."""
    workers: int | None = None
    """Threads that decode images; by default the number of CPUs, at most eight."""
    write_checksums: Path | None = None
    """File to write checksums to, in the format of sha256sum."""
    checksums: Path | None = None
    """File of checksums to verify against."""
    recipe: str | None = None
    """Recipe whose tokenizer, chat template and cutoff apply to instructions, to report truncated records."""

    def run(self) -> None:
        """Validates or downloads, prints, and exits with code 1 if anything is missing or invalid."""
        if self.action == "fetch":
            from san_bench.datacheck.fetch import fetch_command

            fetch_command(self.suite, self.folder)
        else:
            from san_bench.datacheck.check import check_command

            checksums = (self.write_checksums, self.checksums)
            check_command(self.suite, self.folder, self.images, self.workers, *checksums, self.recipe)


EXTRAS = {
    "sklearn": "demo",
    "matplotlib": "plot",
    "timm": "vision",
    "datasets": "vision",
    "torchvision": "vision",
    "scipy": "plot",
    "jinja2": "plot",
}
"""The extra that installs an optional module."""

WORK = (Demo, Init, Check, Train, Eval, Runs, Bench, Recipes, Env, Trace, Export, Submission, LmmsEval, Data)
VERBS: tuple[type[Verb], ...] = (*WORK, Table, Plot, Report)


def name_of(verb: type[Verb]) -> str:
    """Returns the name of a subcommand."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", verb.__name__).lower()


def parse(words: Sequence[str] | None = None) -> Verb:
    """Parses a command line into its subcommand, without running it."""
    verbs: Any = None
    for verb in VERBS:
        named = Annotated[verb, subcommand(name_of(verb), prefix_name=False)]  # type: ignore[valid-type]
        verbs = named if verbs is None else verbs | named
    return tyro.cli(
        verbs,
        prog="san",
        args=words,
        config=(OmitArgPrefixes,),
        description=(
            "Fine-tune models with SAN and other PEFT methods, and compare the results. `san --version` prints the "
            "version, `san VERB --help` the options of a subcommand."
        ),
    )


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command. An error is one message and exit code 2; SIGINT exits with 130, SIGTERM with 143."""
    if (sys.argv[1:] if words is None else [*words]) == ["--version"]:
        print(f"san-peft {version('san-peft')}")
        return
    verb = parse(words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are slow on a busy machine
    with reported(EXTRAS):
        verb.run()


def _finish(found: Any, out: Path) -> None:
    """Prints what `bench` finished and where, and exits with code 1 if runs failed."""
    finished, failed = len({row["run"] for row in found.rows}), len(found.failures)
    of = f"of {finished + failed} {'run' if finished + failed == 1 else 'runs'}"
    if finished:
        print(f"{finished} {of} finished: {out / 'rows.jsonl'}. Compare them with `san table {out}`.", flush=True)
    if failed:
        print(f"san: {failed} {of} failed: {out / 'failures.jsonl'}", file=sys.stderr)
        sys.exit(1)


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    """Returns a result with one entry per task, if it has several."""
    return {key: value for key, value in result.items() if key not in ("tasks", "ways")} | by_task_and_way(result)


if __name__ == "__main__":
    main()

"""Subcommands of `san` for benchmarks of vision-language models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Submission:
    """Write a submission file for the evaluation server of a benchmark whose test labels are not public."""

    source: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run that generates the answers, or a .jsonl file of answers in LLaVA's format."""
    benchmark: Annotated[Positional[str], arg(metavar="BENCHMARK")]
    """vqav2 or mmbench."""
    questions: Annotated[Positional[Path], arg(metavar="QUESTIONS")]
    """Questions of the test split: LLaVA's .jsonl, VQAv2's own .json, or MMBench's .tsv."""
    out: Path
    """File to write: .json, or .xlsx for mmbench."""
    images: Path | None = None
    """Folder of the images; by default test2015 (vqav2) next to the questions."""

    def run(self) -> None:
        """Generates answers, writes the file and prints its path."""
        from san_bench.vision_language.submission import submission

        print(submission(self.source, self.benchmark, self.questions, self.out, self.images))


@dataclass(frozen=True)
class LmmsEval:
    """Print the lmms-eval command that evaluates a merged LLaVA export, with comments on differences to `san eval`."""

    folder: Annotated[Positional[Path], arg(metavar="EXPORT")]
    """Folder that `san export --merged` wrote for a LLaVA run."""
    out: Path = Path("lmms-eval")
    """Output folder of lmms-eval."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks to run, out of vqav2, gqa, vizwiz, sqa, textvqa, pope and mmbench; all by default."""
    processes: int = 1
    """Number of processes, one GPU each."""

    def run(self) -> None:
        """Prints the shell command."""
        from san_bench.vision_language.vqa.benchmarks import lmms_command

        print(lmms_command(self.folder, self.out, self.benchmarks, self.processes), end="")

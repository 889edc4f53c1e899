"""Verbs of the `san` command about the benchmarks of models that see and speak."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Submission:
    """Write the file that a benchmark's server takes: a run's answers to questions whose answers are secret."""

    source: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, which is loaded and asked; or a file of answers as LLaVA writes them (.jsonl)."""
    benchmark: Annotated[Positional[str], arg(metavar="BENCHMARK")]
    """vqav2 or mmbench."""
    questions: Annotated[Positional[Path], arg(metavar="QUESTIONS")]
    """LLaVA's .jsonl of the test split, VQAv2's own .json, or MMBench's .tsv."""
    out: Path
    """File to write: .json, of mmbench .xlsx."""
    images: Path | None = None
    """Folder of the images; test2015 beside the questions by default (vqav2)."""

    def run(self) -> None:
        """Asks, writes and names the file."""
        from san_bench.vision_language.submission import submission

        print(submission(self.source, self.benchmark, self.questions, self.out, self.images))


@dataclass(frozen=True)
class LmmsEval:
    """Print the command that scores a merged export with lmms-eval, with a comment for what differs."""

    folder: Annotated[Positional[Path], arg(metavar="EXPORT")]
    """Folder that `san export --merged` wrote of a run of LLaVA."""
    out: Path = Path("lmms-eval")
    """Folder that lmms-eval writes to."""
    benchmarks: tuple[str, ...] = ()
    """Some of vqav2, gqa, vizwiz, sqa, textvqa, pope and mmbench; all by default."""
    processes: int = 1
    """Number of processes, one GPU each."""

    def run(self) -> None:
        """Prints lines for a shell."""
        from san_bench.vision_language.vqa.benchmarks import lmms_command

        print(lmms_command(self.folder, self.out, self.benchmarks, self.processes), end="")

"""Subcommands of `san` that report results: tables, figures and HTML pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Table:
    """Print tables of results: mean ± std with n, paired differences, cost, and published numbers for comparison."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR ...")]
    """Folders of suites or runs, or .jsonl files."""
    format: Literal["rich", "markdown", "latex", "csv"] = "rich"
    """Output format; rich is for the terminal."""
    published: bool = True
    """Add published numbers for the same suite and backbone."""
    reference: str | None = None
    """Baseline of the paired differences; san by default."""
    only: tuple[str, ...] = ()
    """Print only the tables whose names start with one of these, such as means, difference, natural or cost."""
    out: Path | None = None
    """File to write to; standard output by default."""

    def run(self) -> None:
        """Reads the results and prints the tables."""
        from san_bench.report.tables.table import table_command

        table_command(self.folders, self.format, self.published, self.reference, self.only, self.out)


@dataclass(frozen=True)
class Plot:
    """Plot the results of a suite or run: accuracy, training loss, variance and similarity of trained scales."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of the suite or run."""
    out: Path | None = None
    """Folder for the figures and analysis.json; DIR/plots by default."""
    format: Literal["png", "svg", "pdf"] = "png"
    """File format of the figures."""

    def run(self) -> None:
        """Draws the figures and prints the paths of their files."""
        from san_bench.report.figures.analysis import write_pictures

        for path in write_pictures(self.folder, self.out or self.folder / "plots", self.format):
            print(path)


@dataclass(frozen=True)
class Report:
    """Write a self-contained HTML report of a suite: tables, figures, recipes, failures and provenance."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of the suite or run."""
    out: Path | None = None
    """HTML file to write; DIR/report.html by default."""

    def run(self) -> None:
        """Writes the report and prints its path."""
        from san_bench.report.page.html import write_report

        out = self.out or self.folder / "report.html"
        write_report(self.folder, out)
        print(out)

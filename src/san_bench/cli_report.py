"""Verbs of the `san` command about results: tables, pictures, pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Table:
    """Make tables of results: means with spread and n, paired differences, cost, published lines beside ours."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR ...")]
    """Folders of suites or of runs, or .jsonl files."""
    format: Literal["rich", "markdown", "latex", "csv"] = "rich"
    """Of the text; rich is for the terminal."""
    published: bool = True
    """Add published numbers where suite and backbone are theirs."""
    reference: str | None = None
    """Method that the others are compared with; san by default."""
    only: tuple[str, ...] = ()
    """Which tables, by how their names begin, such as means, difference, natural, cost; all by default."""
    out: Path | None = None
    """File to write to."""

    def run(self) -> None:
        """Reads, compares and prints."""
        from san_bench.report.tables.table import table_command

        table_command(self.folders, self.format, self.published, self.reference, self.only, self.out)


@dataclass(frozen=True)
class Plot:
    """Draw what a suite, or a run, has data for: accuracy, curves, and all that trained scales tell."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of the suite or run."""
    out: Path | None = None
    """Folder of the pictures and their numbers; `plots` in the same folder by default."""
    format: Literal["png", "svg", "pdf"] = "png"
    """Of the pictures."""

    def run(self) -> None:
        """Draws and names the files."""
        from san_bench.report.figures.analysis import write_pictures

        for path in write_pictures(self.folder, self.out or self.folder / "plots", self.format):
            print(path)


@dataclass(frozen=True)
class Report:
    """Write a suite as one page that needs nothing else: tables, pictures, recipes, failures, provenance."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of the suite."""
    out: Path | None = None
    """File to write; `report.html` in the same folder by default."""

    def run(self) -> None:
        """Writes the page and names it."""
        from san_bench.report.page.html import write_report

        out = self.out or self.folder / "report.html"
        write_report(self.folder, out)
        print(out)

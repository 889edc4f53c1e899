"""Run the demo: the suite `demo`, with its table, curves and scales in one folder."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from san_bench.config.strict import san_error
from san_bench.config.suite import Choice, load_suite
from san_bench.run.provenance import write_atomically
from san_bench.suites.engines import LocalEngine
from san_bench.suites.suite import Benched, Row, bench

NEEDED = ("sklearn", "matplotlib")
"""Modules of the extra `demo`."""


def demo(out: Path, methods: Sequence[str] = ()) -> Benched:
    """Runs the suite `demo` and compares the methods.

    Besides the files of a suite, the folder gets `table.md`, `curves.png` and, if any method has scales, `scales.png`.

    Args:
        out: Folder to write to.
        methods: Methods of the suite, in the order of the table; all by default.

    Returns:
        The rows and failures of `bench`.

    Raises:
        SanError: If a method is unknown or the extra `demo` is not installed.
    """
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        raise san_error(f'The demo needs {" and ".join(missing)}: pip install "san-peft[demo]"')
    command = shlex.join(["san", "demo", *(["--methods", *methods] if methods else [])])
    choice = Choice(tuple(dict.fromkeys(methods)))
    found = bench(load_suite("demo"), "demo", choice, out, LocalEngine(1, None), command=command)
    if found.rows:
        _report(out, found.rows, command)
    return found


def _report(out: Path, rows: Sequence[Row], command: str) -> None:
    """Writes and prints the table, and draws the figures of the chosen methods."""
    from san_bench.report.figures.analysis import draw
    from san_bench.report.figures.plots import write_figure
    from san_bench.report.groups import read_groups
    from san_bench.report.tables.render import show, to_markdown
    from san_bench.report.tables.table import demo_table

    table = demo_table(rows, command)
    write_atomically(out / "table.md", to_markdown(table))
    methods = {row["method"] for row in rows}
    pictures = {picture.name: picture for picture in draw([g for g in read_groups(out) if g.method in methods])}
    names = ["rows.jsonl", "table.md"]
    for name, file in (("curves-vit", "curves.png"), ("histograms-own-vit", "scales.png")):
        if name in pictures:
            write_figure(pictures[name].figure, out / file)
            names.append(file)
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    show([table], console)
    console.print(f"Written to {out}: {', '.join(names)}, and a folder per run.", markup=False, highlight=False)

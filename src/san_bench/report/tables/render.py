"""Render tables for the terminal, as Markdown, as LaTeX with booktabs, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import rich.table
from rich.console import Console
from rich.text import Text

from san_bench.run.results import ResultTable

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "`": r"\textasciigrave{}",
        "[": "{[}",  # after a line break, LaTeX would read a bracket as its argument
        "<": "$<$",
        ">": "$>$",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "≤": r"$\le$",
        "†": r"$\dagger$",
    }
)
"""Characters to escape in LaTeX, or that not every font has."""


def numeric(table: ResultTable) -> list[bool]:
    """Returns for each column whether it is numeric, and so right-aligned."""
    return [any(row[place].value is not None for row in table.rows) for place in range(len(table.columns))]


def to_rich(table: ResultTable) -> rich.table.Table:
    """Renders a table for the terminal, without its notes; published rows are dim."""
    shown = rich.table.Table(title=Text(table.title) if table.title else None, title_justify="left")
    for column, right in zip(table.columns, numeric(table), strict=True):
        shown.add_column(Text(column), justify="right" if right else "left")
    for row in table.rows:
        shown.add_row(*(Text(cell.text, style="dim" if cell.published else "") for cell in row))
    return shown


def show(tables: Sequence[ResultTable], console: Console) -> None:
    """Prints tables with their notes."""
    for table in tables:
        console.print(to_rich(table))
        console.print("\n".join(table.notes), markup=False, highlight=False)
        console.print()


def to_markdown(table: ResultTable) -> str:
    r"""Renders a table as Markdown, with its notes below.

    Example:
        >>> from san_bench.run.results import Cell
        >>> print(to_markdown(ResultTable("", ("Method", "n"), ((Cell("a|b"), Cell("3", 3)),), ("Made up.",))))
        | Method | n |
        | :-- | --: |
        | a\|b | 3 |
        <BLANKLINE>
        Made up.
        <BLANKLINE>
    """
    rule = ["--:" if right else ":--" for right in numeric(table)]
    lines = [table.columns, rule, *([cell.text for cell in row] for row in table.rows)]
    grid = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    title = [f"**{' '.join(table.title.split())}**"] if table.title else []
    return "\n\n".join([*title, grid, *table.notes]) + "\n"


def _cell(text: str) -> str:
    """Returns a text as a cell of a Markdown table, which has no line breaks."""
    return " ".join(text.split()).replace("|", r"\|")


def to_latex(table: ResultTable) -> str:
    """Renders a table as LaTeX with `booktabs`, with a rule above the published rows."""
    lines = [
        r"\begin{table}",
        *([rf"\caption{{{table.title.translate(LATEX)}}}"] if table.title else []),
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric(table))}}}",
        r"\toprule",
        " & ".join(column.translate(LATEX) for column in table.columns) + r" \\",
        r"\midrule",
    ]
    before = False
    for row in table.rows:
        if row[0].published and not before and row is not table.rows[0]:
            lines.append(r"\midrule")
        before = row[0].published
        lines.append(" & ".join(cell.text.translate(LATEX) for cell in row) + r" \\")
    notes = "\\par\n".join(note.translate(LATEX) for note in table.notes)
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"] if notes else []
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def to_csv(tables: Sequence[ResultTable]) -> str:
    """Renders tables as one CSV in long format: a line for every cell, and one for every note.

    `row` counts from 1 within a table, and is 0 for notes; `name` is the row's first cell.

    Example:
        >>> from san_bench.run.results import Cell
        >>> row = (Cell("SAN"), Cell("90.1", 90.12))
        >>> print(to_csv([ResultTable("T", ("Method", "Accuracy"), (row,), ("Made up.",))]))
        table,row,name,column,text,value,published
        T,1,SAN,Method,SAN,,False
        T,1,SAN,Accuracy,90.1,90.12,False
        T,0,,note,Made up.,,False
        <BLANKLINE>
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "name", "column", "text", "value", "published"])
    for table in tables:
        for number, row in enumerate(table.rows, 1):
            for column, cell in zip(table.columns, row, strict=True):
                value = "" if cell.value is None else cell.value
                writer.writerow([table.title, number, row[0].text, column, cell.text, value, cell.published])
        writer.writerows([table.title, 0, "", "note", note, "", False] for note in table.notes)
    return text.getvalue()

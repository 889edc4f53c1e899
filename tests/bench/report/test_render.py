"""Tables in Markdown with names that a user may choose."""

from __future__ import annotations

from san_bench.report.tables.render import to_markdown
from san_bench.run.results import Cell, ResultTable


def test_a_line_break_in_a_name_stays_in_its_cell():
    table = ResultTable("a\nb", ("Method", "n\n"), ((Cell("evil\n| name"), Cell("3\r\n4")),), ())
    assert to_markdown(table).splitlines() == [
        "**a b**",
        "",
        "| Method | n |",
        "| :-- | :-- |",
        r"| evil \| name | 3 4 |",
    ]

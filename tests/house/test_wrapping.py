"""Line lengths in docs/: prose wraps at 120 columns, code at 88."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts]
PROSE, CODE = 120, 88
OPENED = re.compile(r" *```+(?P<language>\S*)")
UNBREAKABLE = re.compile(r"https?://|\]\(\S+\)|<img |^\s*\|")  # URLs, links, images, rows of tables


def long_lines(text: str) -> Iterator[tuple[int, int]]:
    """Yields the number and the length of every line that is too long."""
    limit, generated, code = PROSE, False, False
    for number, line in enumerate(text.splitlines(), 1):
        if mark := re.match(r"<!-- \S+:(start|end) -->", line):
            generated = mark[1] == "start"
        elif fence := OPENED.match(line):
            code = not code and bool(fence["language"]) and not fence["language"].startswith("{")
            limit = CODE if code and fence["language"] != "text" else PROSE  # `text` is what a program printed
        elif len(line) > limit and not generated and (code or not UNBREAKABLE.search(line)):
            yield number, len(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_wrapped(page):
    for number, length in long_lines(page.read_text(encoding="utf-8")):
        pytest.fail(f"{page.relative_to(ROOT)}:{number} has {length} columns")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x" * 120, []),
        ("x" * 121, [(1, 121)]),
        ("| " + "x" * 121 + " |", []),
        ("see [here](" + "x" * 121 + ")", []),
        ("```python\n" + "x" * 89 + "\n```\n" + "x" * 100, [(2, 89)]),
        ("```text\n" + "x" * 100 + "\n```", []),
        ("```{warning}\n" + "x" * 121 + "\n```", [(2, 121)]),
        ("<!-- results:start -->\n" + "x" * 121 + "\n<!-- results:end -->\n" + "x" * 121, [(4, 121)]),
    ],
)
def test_what_is_too_long(text, found):
    assert list(long_lines(text)) == found

"""README and docs: every Python block runs, every `san` command parses, every link leads somewhere.

The Python blocks of one page run in order, share their names, and start in an empty folder. A `text` block that follows
a Python block directly is what that block prints.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
KNOWN = {"python", "bash", "text", "yaml", "json", "toml", "bibtex", "math"}
FENCE = re.compile(r"^(?P<indent> *)```+(?P<language>\S*).*$")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    line: int
    text: str
    printed: str | None = None


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    between: list[str] = ["start"]
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    for number, line in lines:
        if not (fence := FENCE.match(line)):
            between.append(line)
            continue
        indent, body = len(fence["indent"]), []
        for _, inside in lines:
            if inside.strip().startswith("```"):
                break
            body.append(inside[indent:])
        text = "\n".join(body)
        if fence["language"] == "text" and found and found[-1].language == "python" and not "".join(between).strip():
            found[-1] = Block("python", found[-1].line, found[-1].text, printed=text)
        else:
            found.append(Block(fence["language"], number, text))
        between = []
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        directive = block.language.startswith("{")
        assert directive or block.language in KNOWN, f"{name(page)}:{block.line}: unknown block {block.language!r}"


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            program = compile("\n" * block.line + block.text, str(page), "exec")  # so tracebacks name the page's line
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program, names)
            if block.printed is not None:
                assert printed.getvalue().strip() == block.printed.strip(), f"{name(page)}:{block.line}"


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    for block in blocks(page):
        if block.language == "bash":
            for offset, line in enumerate(block.text.replace("\\\n", " ").splitlines(), 1):
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words and words[0] == "san":
                    cut = next((i for i, word in enumerate(words) if word in {"|", ">", "&&", ";"}), len(words))
                    yield block.line + offset, words[1:cut]


COMMANDS = [pytest.param(w, id=f"{name(p)}:{line}") for p in PAGES for line, w in commands(p)]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words):
    from san_bench import cli

    cli.parse(words)


def anchors_and_links(page: Path) -> Iterator[str]:
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    yield from re.findall(r"\]\(([^)\s]+)", prose)
    yield from re.findall(r"<img[^>]+src=\"([^\"]+)\"", prose)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_project_lead_somewhere(page):
    for link in anchors_and_links(page):
        target = link.split("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{name(page)} points to {target}, which is not there"

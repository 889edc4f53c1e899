"""The front door: README, contributing guide, changelog, pictures, workflows, and the check of commit subjects."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from tests.house.test_architecture import RUNNER, SOURCES

import check_subject
import draw_readme

ROOT = Path(__file__).parents[2]
FRONT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
WORKFLOWS = ROOT / ".github" / "workflows"


def wide_lines(text: str) -> list[str]:
    """Lines over 120 columns outside tables, links, HTML tags and result blocks; in blocks of code over 88."""
    found, inside = [], False
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.lstrip().startswith("```")
        inside ^= fence
        shown = line if inside else re.sub(r"\]\([^)]*\)", "]()", line)
        free = not inside and line.lstrip().startswith(("|", "<"))
        if len(shown) > (88 if inside and not fence else 120) and not free:
            found.append(f"{number}: {len(line)} columns: {line[:60]}...")
    return found


def test_wide_lines_are_found():
    text = f"{'a' * 121}\n| {'a' * 121} |\n[b]({'a' * 121})\n```python\n{'a' * 89}\n{'a' * 88}\n```\n{'a' * 120}\n"
    assert [line.partition(":")[0] for line in wide_lines(text)] == ["1", "5"]


@pytest.mark.parametrize("name", FRONT)
def test_lines_wrap(name):
    assert not wide_lines((ROOT / name).read_text(encoding="utf-8"))


def test_the_readme_fits_on_some_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 90


def test_pictures_have_a_dark_form():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sources = re.findall(r'<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)-dark\.svg">', text)
    assert sources == [image.removesuffix(".svg") for image in re.findall(r'<img src="([^"]+)"', text)]
    assert sources
    assert all((ROOT / f"{name}-dark.svg").is_file() for name in sources)


def test_pictures_show_the_kept_results():
    stale = [
        name
        for name, svg in draw_readme.pictures().items()
        if (ROOT / "docs" / "img" / name).read_text(encoding="utf-8") != svg
    ]
    assert not stale, f"{', '.join(stale)}: run python scripts/draw_readme.py"


def test_contributing_has_the_table_of_imports():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| in `src/san_bench/`.*\n\|.*\n((?:\|.*\n)+)", text, re.M)
    rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in table.splitlines()]
    found = {name.strip("`"): set(re.findall(r"`(\w+)`", imports)) for name, _, imports in rows}
    assert found == {name: imports for name, imports in RUNNER.items() if name != "__init__"}


def test_no_remote_code_is_trusted():
    assert not [str(path) for path in SOURCES if "trust_remote_code" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_forms_are_yaml(path):
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent == WORKFLOWS:
        assert set(data["permissions"]) == {"contents"}
        assert data["jobs"]
    elif path.name != "config.yml":
        names = [field["id"] for field in data["body"]]
        assert len(names) == len(set(names))


def test_the_workflow_tests_the_oldest_python():
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    jobs = yaml.safe_load((WORKFLOWS / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert floor == f">={jobs['newest']['strategy']['matrix']['python'][0]}"


@pytest.mark.parametrize(
    "message",
    [
        "Trace einsum",
        "a" * 72,
        "Trace einsum\n\nBecause it is there.\n",
        "\n# a comment\nTrace einsum\n# another\n",
        f"Trace einsum\n{check_subject.SCISSORS}\n{'+' * 100}\n",
        "",
    ],
)
def test_good_subjects(message):
    assert check_subject.problem(message) is None


@pytest.mark.parametrize(("message", "number"), [("a" * 73, "73"), ("Trace einsum\nand sum\n", "and sum")])
def test_bad_subjects(message, number, tmp_path, monkeypatch):
    file = tmp_path / "message"
    file.write_text(message, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["check_subject.py", str(file)])
    with pytest.raises(SystemExit, match=number):
        check_subject.main()

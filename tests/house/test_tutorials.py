"""Tutorials: their commands run in order, in an empty folder, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.house.test_documents import Block, blocks, name

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
ONLINE = "\n## With a real"
"""Start of the section that needs a network or a GPU, which is not run."""


def steps(page: Path) -> list[Block]:
    """The Python and bash blocks before the section that needs a network, without installing."""
    offline = page.read_text(encoding="utf-8").partition(ONLINE)[0].count("\n")
    found = [block for block in blocks(page) if block.line < offline and block.language in ("python", "bash")]
    return [block for block in found if not block.text.startswith("pip ")]


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=name)
def test_a_tutorial_runs(page, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    for command, words in {"san": "-m san_bench", "python": ""}.items():
        program = tmp_path / "bin" / command
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        program.chmod(0o755)
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
    }
    run = steps(page)
    assert any(block.language == "bash" for block in run)
    for block in run:
        words = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-ec", block.text]
        done = subprocess.run(
            words, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name(page)}:{block.line}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_a_tutorial_on_own_chats_has_few_commands():
    page = ROOT / "docs" / "tutorials" / "own-chat-data.md"
    lines = [line for block in steps(page) for line in block.text.splitlines() if line.startswith("san ")]
    assert 1 <= len(lines) <= 6

"""The pages on one's own images: their commands run in the order of the page, on made images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.house.test_documents import ROOT, blocks

TUTORIAL = ROOT / "docs" / "tutorials" / "own-photos.md"
DATA = ROOT / "docs" / "how-to" / "data.md"
SHELL = f'san() {{ "{sys.executable}" -m san_bench "$@"; }}\npython() {{ "{sys.executable}" "$@"; }}\n'


def shell(text: str, folder: Path) -> str:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        ["bash", "-euc", SHELL + text],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.mark.slow
def test_from_own_photos_to_a_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = TUTORIAL.read_text(encoding="utf-8").splitlines().index("## With a real model")
    page = [block for block in blocks(TUTORIAL) if block.line < last]
    for block in page:
        if block.language == "python":
            exec(block.text, {})
    commands = [block.text for block in page if block.language == "bash" and not block.text.startswith("pip ")]
    lines = [line for text in commands for line in text.splitlines() if line.startswith(("san ", "python "))]
    assert len(lines) <= 6
    printed = [shell(text, tmp_path) for text in commands]
    (checked,) = [block.text for block in page if block.text.startswith("folder: ")]
    assert printed[0].startswith(checked)
    result = json.loads((tmp_path / "runs" / "photos" / "result.json").read_text())
    assert result["accuracy"] >= 0.85
    guesses = [line.split() for line in printed[1].splitlines()]
    assert sorted(name for name, _ in guesses) == ["apple", "lemon", "lime"]
    assert guesses[0][0] == "lemon"


@pytest.mark.slow
def test_a_suite_over_several_own_folders(tmp_path):
    (suite,) = [block.text for block in blocks(DATA) if block.text.startswith("# mine.yaml")]
    (tmp_path / "mine.yaml").write_text(suite)
    random = np.random.default_rng(0)
    for data, classes in {"fruits": ("apple", "lime"), "tools": ("saw", "axe", "file")}.items():
        for label, name in enumerate(classes):
            for number in range(10):
                file = tmp_path / "my_data" / data / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                noise = random.integers(60 * label, 60 * label + 40, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(noise).save(file)
    (commands,) = [block.text for block in blocks(DATA) if block.text.startswith("san bench mine.yaml")]
    assert "fruits" in shell(commands, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "rows.jsonl").read_text().splitlines()]
    assert {(row["task"], row["method"]) for row in rows} == {
        (f"folder/{data}", method) for data in ("fruits", "tools") for method in ("linear", "lora")
    }
    assert {tuple(row["class_names"]) for row in rows} == {("apple", "lime"), ("axe", "file", "saw")}
    assert {row["n_test"] for row in rows} == {4, 9}

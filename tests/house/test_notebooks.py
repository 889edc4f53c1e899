"""Every notebook is valid nbformat 4, holds its outputs, and runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from run_notebook import execute

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
KEYS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "id", "metadata", "source", "execution_count", "outputs"},
}
OUTPUTS = {"stream": {"output_type", "name", "text"}, "display_data": {"output_type", "data", "metadata"}}


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"lora", "vision"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_is_valid_nbformat_4(path):
    notebook = load(path)
    assert (set(notebook), notebook["nbformat"]) == ({"cells", "metadata", "nbformat", "nbformat_minor"}, 4)
    assert notebook["nbformat_minor"] >= 5
    for cell in notebook["cells"]:
        assert set(cell) == KEYS[cell["cell_type"]]
        for output in cell.get("outputs", ()):
            assert set(output) == OUTPUTS[output["output_type"]]
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_its_outputs_are_stored(path):
    cells = [cell for cell in load(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}


def test_execution_replaces_outputs():
    pytest.importorskip("matplotlib")
    cell = {"cell_type": "code", "execution_count": 7, "outputs": ["old"]}
    sources = [["x = 1\n", "print(x)"], ["from matplotlib import pyplot as plt\n", "plt.plot([x])"]]
    notebook = {"cells": [{**cell, "source": source} for source in sources]}
    execute(notebook)
    first, second = notebook["cells"]
    assert first["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}]
    assert [output["output_type"] for output in second["outputs"]] == ["display_data"]
    assert [first["execution_count"], second["execution_count"]] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = copy.deepcopy(load(path))
    stored = [bool(cell.get("outputs")) for cell in notebook["cells"]]
    execute(notebook)
    assert [bool(cell.get("outputs")) for cell in notebook["cells"]] == stored

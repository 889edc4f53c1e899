"""The commands of a tutorial run, one after another, on small data."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftConfig
from safetensors.torch import load_file
from tests.bench.small import small_scale
from tests.house.test_documents import ROOT, commands

from san_bench import cli
from san_bench.run.listing import list_runs


@pytest.mark.slow
def test_a_trained_lora_becomes_san_and_a_lora_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [words for _, words in commands(ROOT / "docs/tutorials/san-over-a-trained-lora.md")]
    assert len(words) <= 6
    with small_scale():
        for command in words:
            cli.main(command)
    assert [(run.state, run.method) for run in list_runs(Path("runs"))] == [
        ("finished", "lora"),
        ("finished", "san-lora"),
    ]
    assert "max_abs_difference" in capsys.readouterr().out
    assert PeftConfig.from_pretrained("back").peft_type == "LORA"
    first, back = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("runs/lora/adapter", "back"))
    assert back.keys() == first.keys()
    assert any((back[name] != first[name]).any() for name in first), "it was trained in between"
    assert Path("merged/model.safetensors").is_file()

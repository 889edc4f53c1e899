"""Adapters that older versions saved give the outputs that they gave then; `scripts/freeze_adapters.py` adds more."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.regression.subject import FOLDER, base, outputs

from san_peft import AdapterError, hotswap, merge_and_verify

FROZEN = sorted(path.parent for path in FOLDER.glob("*/*/adapter_config.json"))


def name_of(folder) -> str:
    return str(folder.relative_to(FOLDER))


@pytest.mark.parametrize("folder", FROZEN, ids=name_of)
def test_a_frozen_adapter_gives_its_outputs(folder):
    expected = load_file(folder / "outputs.safetensors")["logits"]
    assert (outputs(base()) - expected).abs().max() > 0.01, "an adapter without an effect says nothing"
    model = PeftModel.from_pretrained(base(), folder)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    bare: Any = base()
    bare.load_adapter(str(folder))
    torch.testing.assert_close(outputs(bare), expected, rtol=1e-4, atol=1e-5)


def test_every_format_is_frozen():
    formats = {json.loads((folder / "adapter_config.json").read_text())["format"] for folder in FROZEN}
    assert formats == {1, 2}
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 300_000


def test_a_frozen_adapter_is_swapped_and_merged():
    first, second = FOLDER / "0.2.0" / "lora", FOLDER / "0.2.0" / "scales"
    model = PeftModel.from_pretrained(base(), second)
    with pytest.raises(AdapterError, match="differs from 'default' in inner"):
        hotswap(model, first)
    hotswap(model, second)
    expected = load_file(second / "outputs.safetensors")["logits"]
    torch.testing.assert_close(outputs(merge_and_verify(model).model), expected, rtol=1e-4, atol=1e-5)

"""How many operations a decoder layer adds to a pass, and that nothing in it makes a GPU's host wait."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

LAYERS = (2, 3)
LIMITS = {
    "bf16-autocast": {"san": 0.80, "san-lora": 0.95, "san-dora": 0.70},
    "float32": {"san": 0.92, "san-lora": 1.05, "san-dora": 0.75},
}


@pytest.fixture(scope="module", params=LIMITS)
def counts(request) -> Any:
    """What each decoder layer adds to every phase, by method, in one setting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        operations = importlib.import_module("operations")
    dtype, autocast = operations.SETTINGS[request.param]
    found = {}
    for method in ("lora", "dora", *LIMITS[request.param]):
        models = [operations.build(method, dtype, "recipe", n) for n in LAYERS]
        for phase in operations.PHASES if method.startswith("san") else ("step",):
            few, many = (operations.count_model(model, phase, autocast) for model in models)
            found[method, phase] = many.per_layer(few, LAYERS[1] - LAYERS[0])
    return request.param, found


def test_operations_of_a_training_step(counts):
    setting, found = counts
    for method, limit in LIMITS[setting].items():
        against = found["dora" if method == "san-dora" else "lora", "step"].operations
        assert found[method, "step"].operations <= limit * against, (method, against)


def test_nothing_waits(counts):
    for (method, phase), one in counts[1].items():
        if method.startswith("san"):
            assert one.synchronisations == 0, (method, phase, one.waiting)

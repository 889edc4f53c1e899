"""A plugin of pytest that puts SAN's cases in the place of PEFT's in PEFT's own tests; see `test_peft_suite.py`."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
from peft import LoraConfig

from san_peft import PropagationGraph, SanConfig
from san_peft.propagation.graph import ChannelMap, Edge


def edge(anterior: str, posterior: str, size: int) -> dict[str, Any]:
    return {"propagation": PropagationGraph([Edge(anterior, posterior, ChannelMap.identity(size))]).to_dict()}


ALONE = {"propagation": "none"}
MLP = edge("lin0", "lin1", 20)
CASES: list[tuple[str, str, type, dict[str, Any]]] = [
    ("MLP 1", "MLP", SanConfig, {"target_modules": "lin0", **ALONE}),
    ("MLP 2", "MLP", SanConfig, {"target_modules": ["lin0"], **MLP}),
    ("MLP 3", "MLP", SanConfig, {"target_modules": ["lin1"], **ALONE}),
    ("MLP 4", "MLP", SanConfig, {"target_modules": ["lin0", "lin1"], **MLP}),
    ("MLP 5", "MLP", SanConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **MLP}),
    ("MLP 6", "MLP", SanConfig, {"target_modules": ["lin0"], "shift": True, **MLP}),
    ("MLP norm", "MLP_LayerNorm", SanConfig, {"target_modules": ["lin0"], "train_norms": True, **ALONE}),
    ("MLP over LoRA", "MLP", SanConfig, {"target_modules": ["lin0"], "own_scale": True, "inner": LoraConfig(), **MLP}),
    ("Embedding and Conv1D", "EmbConv1D", SanConfig, {"target_modules": ["conv1d"], **ALONE}),
    ("Conv1d", "Conv1d", SanConfig, {"target_modules": ["conv1d"], **ALONE}),
    ("Conv1d bigger", "Conv1dBigger", SanConfig, {"target_modules": ["conv1d", "lin0"], **ALONE}),
    ("Conv1d groups", "Conv1dGroups", SanConfig, {"target_modules": ["conv1d"], "shift": True, **ALONE}),
    ("Conv2d 1", "Conv2d", SanConfig, {"target_modules": ["conv2d"], **edge("conv2d", "lin0", 10)}),
    ("Conv2d 2", "Conv2d", SanConfig, {"target_modules": ["conv2d", "lin0"], **edge("conv2d", "lin0", 10)}),
    ("Conv2d 3", "Conv2d", SanConfig, {"target_modules": ["conv2d"], "modules_to_save": ["lin0"], **ALONE}),
    ("Conv2d 1x1", "Conv2d1x1", SanConfig, {"target_modules": ["conv2d"], **ALONE}),
    ("Conv2d groups", "Conv2dGroups", SanConfig, {"target_modules": ["conv2d"], **edge("conv2d", "lin1", 16)}),
    ("Conv2d groups 2", "Conv2dGroups2", SanConfig, {"target_modules": ["conv2d"], **ALONE}),
]
"""Name, model, configuration and its options, as PEFT's tables have them."""
RANDOM = {"init_weights": False}
FIRST, LAST = {"target_modules": ["lin0"], **MLP, **RANDOM}, {"target_modules": ["lin1"], **ALONE, **RANDOM}
SEVERAL = [
    ("Same", "san", SanConfig, FIRST, FIRST),
    ("Different", "san", SanConfig, FIRST, LAST),
]
"""Two adapters of one model, as PEFT's table has them."""


@dataclass
class Alone(SanConfig):
    """A configuration that needs no inputs to trace with, for tests that take a class alone."""

    propagation: Any = "none"


TABLES = {
    "TEST_CASES": CASES,
    "ALL_PEFT_CONFIG_CLASSES": [Alone],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": SEVERAL,
    "REQUIRES_GRAD_TEST_CASES": [],
    "MIXED_ADAPTER_TEST_CASES": [(name, kind(**first), kind(**second)) for name, _, kind, first, second in SEVERAL],
}

SKIPPED = {
    (
        "test_safe_merge",
        "Conv2d groups 2",
    ): "activations of 80,000: rounding alone is more than 1e-6, as LoHa's and LoKr's",
    ("test_active_adapter", "MLP norm"): "two adapters that train one norm cannot be active together",
    ("test_training_custom_models", "MLP over LoRA"): "the host's parameters do not start with san_",
    ("test_only_params_are_updated", "MLP over LoRA"): "the host's parameters do not start with san_",
    ("test_parameters_after_loading_model", "MLP over LoRA"): "the host's parameters do not start with san_",
}
"""What does not apply to a case, with the reason."""

if importlib.util.find_spec("diffusers") is None:  # imported at the top of PEFT's tests for one of them
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    sys.modules["diffusers"] = stub


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> None:
    """Fills the tables of a module before its first test is made."""
    module = getattr(collector, "obj", None)
    if isinstance(module, types.ModuleType) and not hasattr(module, "san_cases"):
        module.san_cases = True
        for table, rows in TABLES.items():
            if hasattr(module, table):
                getattr(module, table)[:] = rows


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what does not apply."""
    for item in items:
        for (test, case), reason in SKIPPED.items():
            if item.name.startswith(f"{test}[{case}-"):
                item.add_marker(pytest.mark.skip(reason=reason))

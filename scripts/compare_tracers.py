"""Compares `san_peft.trace` with `torch.export` (`strict=False`): does it succeed, and how long does it take?

    python scripts/compare_tracers.py            # the models of tests/golden/models.py, and some of real size
    python scripts/compare_tracers.py llama t5   # some of them

Prints Markdown tables. Both get the inputs that `san_peft` derives for the model, without a cache for keys and values.
The models of real size are on the meta device, without weights.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.golden.models import MODELS

from san_bench.models.architectures import empty_model
from san_peft import trace
from san_peft.propagation.inputs import derive_inputs

LARGE = ("gpt2", "llama", "vit_base_patch16_224", "swin_tiny_patch4_window7_224", "resnet50")


def inputs_of(model: nn.Module) -> Any:
    """Example inputs; transformers' language models are asked for no cache, whose class export does not know."""
    inputs = derive_inputs(model)
    return {**inputs, "use_cache": False} if isinstance(inputs, dict) and "input_ids" in inputs else inputs


def export(model: nn.Module) -> int:
    """Exports a model; returns the number of operations in its graph."""
    device = next(model.parameters()).device
    inputs = tree_map_only(torch.Tensor, lambda x: x.to(device), inputs_of(model))
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=False)
    return sum(node.op == "call_function" for node in program.graph.nodes)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds that a call took, and its result or the exception that it raised."""
    start = time.perf_counter()
    try:
        result = run()
    except Exception as error:
        result = error
    return time.perf_counter() - start, result


def row(name: str, build: Callable[[], nn.Module]) -> str:
    """One line of a table; each tracer gets a model of its own."""
    first, second = build().eval(), build().eval()
    export_seconds, exported = timed(lambda: export(first))
    trace_seconds, traced = timed(lambda: trace(second, inputs_of(second)))
    if isinstance(exported, Exception):
        print(f"{name}: {type(exported).__name__}: {exported}", file=sys.stderr)
        exported = f"no: {type(exported).__name__}"
    found = f"{len(traced.edges)} edges, {len(traced.barriers)} barriers"
    return f"| {name} | {exported} | {export_seconds:.2f} | {found} | {trace_seconds:.2f} |"


def table(models: dict[str, Callable[[], nn.Module]]) -> None:
    """Prints a table, line by line."""
    print("| model | operations in export's graph | export, s | trace finds | trace, s |")
    print("|---|---:|---:|---|---:|")
    for name, build in models.items():
        print(row(name, build), flush=True)


def main(names: list[str]) -> None:
    """Prints the versions and the tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    first = next(iter(MODELS.values()))
    row("warm up", first)
    print(f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, timm {timm.__version__}")
    print("\nTiny, as in tests/golden:\n")
    table({name: build for name, build in MODELS.items() if name in (names or MODELS)})
    if not names:
        print("\nOf real size, on the meta device:\n")
        table({name: partial(empty_model, name) for name in LARGE})


if __name__ == "__main__":
    main(sys.argv[1:])

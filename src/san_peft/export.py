"""Merges adapters and verifies the result; dequantizes models so that they can be merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from san_peft.errors import MergeError
from san_peft.tuner import layerwise
from san_peft.tuner._peft import make_dense
from san_peft.tuner.frozen import stored_bias
from san_peft.tuner.layer import SanLayer
from san_peft.tuner.quantized import forget_quantization, is_quantized, make_dense_layer
from san_peft.tuner.verify import FEW, jittered, judge, reached

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Default tolerance for comparing two outputs, relative to the largest output (at least 1), by dtype.
`merge_and_verify` uses a stricter criterion, because it also measures the effect of the adapter."""


@dataclass(frozen=True)
class MergeReport:
    """Reports how much merging changed the outputs.

    Attributes:
        max_abs_difference: Largest absolute difference between the outputs before and after merging.
        where: Name and index of the output with the largest difference.
        tolerance: Tolerance at this output.
        layers: Number of merged layers.
        made_biases: Layers that got a bias to hold the shift.
        model: The merged model, without SAN or PEFT.
        effect: Largest absolute difference that the adapter makes to the outputs.
        relative: RMS of the difference divided by the RMS of the effect, over all outputs.
        unreached: Layers that did not run on the probe, such as experts without tokens. They were only compared layer
            by layer.
        unchecked: Layers that could not be compared layer by layer. They were only compared by the model's outputs.
    """

    max_abs_difference: float
    where: str
    tolerance: float
    layers: int
    made_biases: tuple[str, ...]
    model: nn.Module = field(repr=False, compare=False)
    effect: float = 0.0
    relative: float = 0.0
    unreached: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


def merge_and_verify(model: PeftModel, probe: Any = None, tolerance: float | None = None) -> MergeReport:
    """Merges the active adapters, verifies that the outputs did not change, and returns the merged model with a report.

    Folding is computed in at least float32 and rounded once to the dtype of the weight.

    Verification has two parts. *Layer by layer*, every merged layer is compared with its unmerged version on random
    inputs in float64. This also covers layers that the probe does not reach or that hardly influence the outputs. *By
    the outputs*, the change due to merging is compared with the effect of the adapter: the outputs with the adapter
    minus those without (`effect`). An adapter with a small effect is thus held to a small tolerance. The effect of
    rounding is measured by extra passes that perturb the output of every adapted layer by a rounding error. A
    difference is accepted if it is at most 1e-4 of the effect (0.5 % in bfloat16), or as small as the measured
    rounding. In half precision, where rounding may be as large as the effect, the effect must also be preserved on
    average. The model runs five times on the probe.

    Args:
        model: A `PeftModel` with SAN adapters.
        probe: Inputs to compare on: a dict of keyword arguments, a tuple of arguments, or a tensor. `None` derives
            them from the model's configuration.
        tolerance: Largest accepted difference of the outputs, instead of the criterion above.

    Returns:
        The report, which holds the merged model.

    Raises:
        MergeError: If the outputs or a layer's outputs differ by more, or are not finite. The model is then restored
            bit for bit.
        TraceError: If no probe is given and none can be derived.
    """
    tuner: Any = model.base_model
    tuner.wire_on(probe)
    layers = {name: m for name, m in tuner.model.named_modules() if isinstance(m, SanLayer)}
    if not layers:
        raise MergeError("The model has no SAN layers to merge.")
    if any(layer.merged for layer in layers.values()):
        raise MergeError("The model is already merged. Call unmerge_adapter() first, to have outputs to compare with.")
    for layer in layers.values():
        layer.check_dense()
    if probe is None:
        from san_peft.propagation.inputs import derive_inputs

        probe = derive_inputs(tuner.model)
    training = {module: module.training for module in model.modules()}
    biases = {name: stored_bias(layer.get_base_layer()) for name, layer in layers.items()}
    records: dict[str, layerwise.Record | None] = {}
    try:
        model.eval()
        with reached(layers) as called:
            before = _outputs(model, probe)
        with tuner.set_mode("off"):
            frozen = _outputs(model, probe)
        rounded = None
        if tolerance is None:
            rounded = []
            few = min((x.numel() for x in before.values() if x.numel()), default=FEW) < FEW
            for seed in range(4 if few else 1):  # few numbers estimate rounding errors poorly
                with jittered(layers.values(), seed * 1_000_003):
                    again = _outputs(model, probe)
                    with tuner.set_mode("off"):
                        rounded.append((again, _outputs(model, probe)))
            for seed, (name, layer) in enumerate(layers.items()):
                records[name] = layerwise.record(layer, layer.active_adapters, seed)
        tuner.merge_adapter(safe_merge=True)
        _check_layers(layers, records)
        verdict = judge(before, _outputs(model, probe), frozen, rounded, tolerance)
        if verdict.fault:
            raise MergeError(
                f"{verdict.fault}. The model is unchanged. Three ways out: pass real inputs as probe=..., merge a "
                "float32 copy, or pass a larger tolerance to accept this difference."
            )
    except BaseException as error:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
        if isinstance(error, ValueError) and not isinstance(error, MergeError) and "NaN" in str(error):
            raise MergeError(f"{error}. The model is unchanged.") from error
        raise
    finally:
        for module, state in training.items():
            module.training = state
    made = tuple(
        name
        for name, layer in layers.items()
        if biases[name] is None and stored_bias(layer.get_base_layer()) is not None
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        plain = tuner.merge_and_unload()  # already merged: only unwraps, and keeps trained modules_to_save
    return MergeReport(
        max_abs_difference=verdict.difference,
        where=verdict.where,
        tolerance=verdict.accepted,
        layers=len(layers),
        made_biases=made,
        model=plain,
        effect=verdict.effect,
        relative=verdict.relative,
        unreached=tuple(name for name in layers if name not in called),
        unchecked=tuple(name for name, one in records.items() if one is None),
    )


def _check_layers(layers: Mapping[str, SanLayer], records: Mapping[str, layerwise.Record | None]) -> None:
    """Raises `MergeError` if a merged layer does not reproduce its recorded outputs."""
    faults = [layerwise.fault(name, layers[name], one) for name, one in records.items() if one is not None]
    found = [fault for fault in faults if fault]
    if found:
        others = f" {len(found) - 1} other layers differ as well." if len(found) > 1 else ""
        raise MergeError(
            f"{found[0]}.{others} The model is unchanged. The layer does more than multiply with its weight, or "
            "this is a bug: leave it out of target_modules, or report it."
        )


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Replaces all quantized layers by dense ones, so that SAN can be merged, and removes the quantization config.

    The dense weights are the dequantized ones: the outputs stay the same up to rounding, and the quantization error
    remains. To get a small model, merge, verify, and quantize the merged model again.

    Args:
        model: A model with or without SAN, not merged, quantized by bitsandbytes, torchao or quanto. A model that
            transformers loaded from a GGUF file is dense already; only its quantization config is removed.
        dtype: Dtype of the dense weights; `None` is the dtype of the model's other weights.

    Returns:
        The number of replaced layers.

    Raises:
        MergeError: If a weight cannot be dequantized. The model is then unchanged.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_quantized(m)]
    dtype = dtype or _dtype_beside(model)
    dense = {name: make_dense_layer(model.get_submodule(name), dtype) for name in names}
    for name, layer in dense.items():
        parent, _, last = name.rpartition(".")
        holder: Any = model.get_submodule(parent)
        if isinstance(holder, BaseTunerLayer) and not isinstance(holder, SanLayer):
            make_dense(holder, layer)
        else:
            setattr(holder, last, layer)
    forget_quantization(model)
    return len(dense)


def _dtype_beside(model: nn.Module) -> torch.dtype | None:
    """Returns the dtype of the first frozen, unquantized weight, or `None`: the dtype of the first activations."""
    for module in model.modules():
        inside = isinstance(module, nn.Linear) and is_quantized(module)
        for name, parameter in () if inside else module.named_parameters(recurse=False):
            if parameter.dtype.is_floating_point and not parameter.requires_grad and name in ("weight", "bias"):
                return parameter.dtype
    return None


@torch.no_grad()
def _outputs(model: nn.Module, probe: Any) -> dict[str, Tensor]:
    if isinstance(probe, Mapping):
        out = model(**probe)
    else:
        out = model(*probe) if isinstance(probe, tuple) else model(probe)
    return {name: value.detach().clone() for name, value in _tensors(out, "output") if value.is_floating_point()}


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _tensors(item, f"{name}[{position}]")

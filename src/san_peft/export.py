"""Merging with proof, and dense layers in the place of quantised ones."""

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
"""Largest accepted difference of two outputs of which nothing else is known, relative to the largest output (1 at
least), by their type. `merge_and_verify` knows more and is stricter."""


@dataclass(frozen=True)
class MergeReport:
    """What merging changed in the outputs.

    Attributes:
        max_abs_difference: Largest difference between the outputs before and after.
        where: Name and index of the output with the largest difference.
        tolerance: Largest difference that was accepted there.
        layers: How many layers were folded.
        made_biases: Layers that got a bias because a shift had none to go into.
        model: The merged model, without SAN or PEFT.
        effect: Largest difference that the adapter makes to the outputs.
        relative: Root mean square of the difference over that of the effect, over all outputs.
        unreached: Layers that the probe did not run, such as experts without tokens. They were compared on inputs of
            their own alone.
        unchecked: Layers that could not be compared on inputs of their own, and were compared by the outputs alone.
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
    """Merges the active adapters, compares the outputs before and after, and returns the plain model with the proof.

    Folding is computed in float32 at least and rounded to the weight's type last.

    The proof has two parts. *Layer by layer*, every merged layer is compared with what it computes unmerged, on inputs
    of its own and in float64: no layer is hidden by what the probe reaches, or by a small influence on the outputs.
    *By the outputs*, merging is held against what the adapter does: the outputs with it minus those of the frozen
    layers (`effect`), so that an adapter with a small effect may lose no more of it than one with a large effect. What
    rounding does is measured, by passes in which the output of every adapted layer is off by a rounding error. A
    difference is accepted if it is a ten-thousandth of the effect at most (half a percent in bfloat16), or of the size
    of that measured rounding. In half precision, where rounding may be as large as the effect, the effect must also be
    kept on average. The model runs five times on the probe.

    Args:
        model: A `PeftModel` with SAN adapters.
        probe: Inputs to compare on: a dict of keyword arguments, a tuple of arguments, or a tensor. `None` derives
            them from the model's configuration.
        tolerance: Largest accepted difference of the outputs, in place of all that.

    Returns:
        The report, which holds the merged model.

    Raises:
        MergeError: If a layer or the outputs differ by more, or are not finite. The model is then as it was, bit for
            bit.
        TraceError: If no probe is given and none can be derived.
    """
    tuner: Any = model.base_model
    tuner.wire_on(probe)
    layers = {name: m for name, m in tuner.model.named_modules() if isinstance(m, SanLayer)}
    if not layers:
        raise MergeError("The model has no SAN layer to merge.")
    if any(layer.merged for layer in layers.values()):
        raise MergeError("The model is merged already; unmerge it first, so that there is something to compare with.")
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
            for seed in range(4 if few else 1):  # a handful of numbers says little about the size of rounding errors
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
                f"{verdict.fault}. The model was left as it was. Three ways out: pass inputs that the model was made "
                "for as probe=..., merge a float32 copy, or pass a larger tolerance if you accept this."
            )
    except BaseException as error:
        for layer in layers.values():
            if layer.merged:
                layer.unmerge()
        if isinstance(error, ValueError) and not isinstance(error, MergeError) and "NaN" in str(error):
            raise MergeError(f"{error}. The model was left as it was.") from error
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
        plain = tuner.merge_and_unload()  # merges nothing more: unwraps, and keeps the trained heads and norms
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
    """Raises `MergeError` where a layer, merged, does not compute what was recorded of it before."""
    faults = [layerwise.fault(name, layers[name], one) for name, one in records.items() if one is not None]
    found = [fault for fault in faults if fault]
    if found:
        others = f" {len(found) - 1} other layers are off as well." if len(found) > 1 else ""
        raise MergeError(
            f"{found[0]}.{others} The model was left as it was. The layer does not compute what its weight says, or it "
            "was merged wrongly: report it, or leave it out of target_modules."
        )


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Puts dense layers in the place of all quantised ones, so that SAN can be merged, and forgets the quantisation.

    The dense weights are the quantised ones, unpacked: what the model computes stays the same up to rounding, and the
    rounding of quantisation is in them. Merge, verify, and quantise the merged model again if you want it small.

    Args:
        model: A model with or without SAN, not merged. What quantised it is bitsandbytes, torchao or quanto. A GGUF
            file that transformers has unpacked is dense already; then its mark alone is taken off.
        dtype: Type of the dense weights; `None` is that of the model's other weights.

    Returns:
        How many layers were replaced.

    Raises:
        MergeError: If a weight cannot be unpacked. The model is then as it was.
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
    """Type of the first weight that is neither an adapter's nor quantised, or `None`: activations start in it."""
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

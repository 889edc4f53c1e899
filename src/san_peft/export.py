"""Merging with proof, swapping one trained adapter for another in place, and turning one into LoRA."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from san_peft.errors import AdapterError, MergeError
from san_peft.tuner._peft import make_dense
from san_peft.tuner.decompose import unfit
from san_peft.tuner.frozen import stored_bias
from san_peft.tuner.layer import SanLayer
from san_peft.tuner.quantized import is_quantized, make_dense_layer
from san_peft.tuner.verify import jittered, judge

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
    """

    max_abs_difference: float
    where: str
    tolerance: float
    layers: int
    made_biases: tuple[str, ...]
    model: nn.Module = field(repr=False, compare=False)
    effect: float = 0.0
    relative: float = 0.0


def merge_and_verify(model: PeftModel, probe: Any = None, tolerance: float | None = None) -> MergeReport:
    """Merges the active adapters, compares the outputs before and after, and returns the plain model with the proof.

    Folding is computed in float32 at least and rounded to the weight's type last.

    Merging is held against what the adapter does: the outputs with it minus those of the frozen layers (`effect`), so
    that an adapter with a small effect may lose no more of it than one with a large effect. What rounding does is
    measured, by passes in which the output of every adapted layer is off by a rounding error. A difference is accepted
    if it is a ten-thousandth of the effect at most (half a percent in bfloat16), or of the size of that measured
    rounding. In half precision, where rounding may be as large as the effect, the effect must also be kept on average.
    The model runs five times on the probe.

    Args:
        model: A `PeftModel` with SAN adapters.
        probe: Inputs to compare on: a dict of keyword arguments, a tuple of arguments, or a tensor. `None` derives
            them from the model's configuration.
        tolerance: Largest accepted difference, in place of all that.

    Returns:
        The report, which holds the merged model.

    Raises:
        MergeError: If the outputs differ by more, or are not finite. The model is then as it was, bit for bit.
        TraceError: If no probe is given and none can be derived.
    """
    tuner: Any = model.base_model
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
    try:
        model.eval()
        before = _outputs(model, probe)
        with tuner.set_mode("off"):
            frozen = _outputs(model, probe)
        rounded = None
        if tolerance is None:
            with jittered(layers.values(), seed=0):
                rounded = _outputs(model, probe), frozen
                with tuner.set_mode("off"):
                    rounded = rounded[0], _outputs(model, probe)
        tuner.merge_adapter(safe_merge=True)
        verdict = judge(before, _outputs(model, probe), frozen, rounded, tolerance)
        if verdict.fault:
            raise MergeError(
                f"{verdict.fault}. The model was left as it was. Merge a float32 copy, or pass a larger tolerance if "
                "you accept this."
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
        verdict.difference, verdict.where, verdict.accepted, len(layers), made, plain, verdict.effect, verdict.relative
    )


def hotswap(model: PeftModel, path: str, adapter_name: str = "default", **kwargs: Any) -> None:
    """Replaces a loaded adapter's vectors by those of a saved one, in place: nothing is rebuilt, compiled code stays.

    Args:
        model: The model with the adapter to replace.
        path: Folder or hub name of the saved adapter; it must have the same targets, edges and exponent.
        adapter_name: Name of the adapter to replace.
        kwargs: Passed to PEFT's `load_peft_weights`, such as `device` or `revision`.

    Raises:
        AdapterError: If the saved adapter does not fit; nothing was changed then.
    """
    here, there = model.peft_config[adapter_name], PeftConfig.from_pretrained(path)
    for name in ("peft_type", "edges", "exponent", "bound", "shift", "gate", "inner", "decomposition", "own_scale"):
        if getattr(here, name) != getattr(there, name, None):
            raise AdapterError(f"The adapter in {path} differs from {adapter_name!r} in {name}; load it instead.")
    old = get_peft_model_state_dict(model, adapter_name=adapter_name)
    new = load_peft_weights(path, **kwargs)
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise AdapterError(
            f"The adapter in {path} differs from {adapter_name!r} in {len(odd)} tensors, such as {odd[0]}."
        )
    for name, value in new.items():
        if value.shape != old[name].shape:
            raise AdapterError(f"{name} has shape {tuple(value.shape)} in {path}, {tuple(old[name].shape)} here.")
    if any(layer.merged for layer in model.modules() if isinstance(layer, SanLayer)):
        raise AdapterError("The model is merged; unmerge it before swapping its adapter.")
    with torch.no_grad():
        for name, value in new.items():
            old[name].copy_(value)


@dataclass(frozen=True)
class LoraReport:
    """What turning an adapter into LoRA has lost.

    Attributes:
        error: Size of what was lost over the size of the change, both as Frobenius norms over all layers.
        worst: The same of the worst layer.
        where: Name of that layer.
        rank: The rank of every layer.
        layers: How many layers were converted.
        config: The `LoraConfig` of the result.
    """

    error: float
    worst: float
    where: str
    rank: int
    layers: int
    config: LoraConfig = field(repr=False, compare=False)


@torch.no_grad()
def save_as_lora(model: PeftModel, path: str | os.PathLike, rank: int, adapter_name: str = "default") -> LoraReport:
    r"""Writes the closest LoRA adapter of a rank, for tools that load nothing else, and reports what is lost.

    A scale changes a weight by $\operatorname{diag}(g) W \operatorname{diag}(s) - W$, which has full rank, so this is
    an approximation: the truncated singular value decomposition of each layer's change, the best there is of that rank.
    Where biases change, the result has `lora_bias=True`. Saved modules are written with it.

    Args:
        model: A `PeftModel` with a SAN adapter, not merged.
        path: Folder to write, which `PeftModel.from_pretrained` loads without `san_peft`.
        rank: Rank of the result.
        adapter_name: Which adapter.

    Returns:
        The report.

    Raises:
        MergeError: If a layer is quantised, merged, or a convolution in groups, which LoRA cannot change.
        AdapterError: If there is no such adapter, or the rank is not positive.
    """
    tuner: Any = model.base_model
    if adapter_name not in model.peft_config:
        raise AdapterError(f"There is no adapter {adapter_name!r}; there are {', '.join(model.peft_config)}.")
    if rank < 1:
        raise AdapterError(f"The rank must be at least 1, got {rank}.")
    tensors, losses = {}, {}
    biased = False
    layers = {name: m for name, m in tuner.model.named_modules() if isinstance(m, SanLayer)}
    for name, layer in layers.items():
        if layer.groups > 1:
            raise MergeError(f"{name} is a convolution in {layer.groups} groups, whose change LoRA cannot make.")
        if reason := unfit("LORA", layer.get_base_layer()):
            raise MergeError(f"{name} is {reason}, so no LoRA can hold its change: save the merged model.")
        delta, bias = layer.get_delta(adapter_name)
        rows = delta.t() if layer.transposed else delta.flatten(1)
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        kept = min(rank, values.numel())  # the others are zeros: servers take every layer to have the same rank
        total, lost = values.square().sum().item(), values[kept:].square().sum().item()
        losses[name] = (lost, total)
        down, up = rows.new_zeros(rank, rows.shape[1]), rows.new_zeros(rows.shape[0], rank)
        down[:kept], up[:, :kept] = right[:kept], left[:, :kept] * values[:kept]
        if layer.channel_dim != -1:
            down, up = down.view(rank, *delta.shape[1:]), up.view(*up.shape, *[1] * (delta.dim() - 2))
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
        tensors[f"base_model.model.{name}.lora_B.bias"] = bias
        biased = biased or bool(bias.any())
    config: Any = model.peft_config[adapter_name]
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(layers),
        lora_bias=biased,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    if not biased:
        tensors = {key: value for key, value in tensors.items() if not key.endswith(".bias")}
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    inside = tuple(f"base_model.model.{name}." for name in layers)
    tensors |= {key: value for key, value in saved.items() if not key.startswith(inside)}
    _write_adapter(Path(path), lora, tensors)
    relative = {name: math.sqrt(lost / total) if total else 0.0 for name, (lost, total) in losses.items()}
    where = max(relative, key=lambda name: relative[name])
    lost, total = (sum(pair[i] for pair in losses.values()) for i in (0, 1))
    return LoraReport(math.sqrt(lost / total) if total else 0.0, relative[where], where, rank, len(layers), lora)


def _write_adapter(folder: Path, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{SAFETENSORS_WEIGHTS_NAME}.tmp"
    save_file({key: value.contiguous() for key, value in tensors.items()}, draft, metadata={"format": "pt"})
    draft.replace(folder / SAFETENSORS_WEIGHTS_NAME)
    config.save_pretrained(str(folder))


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Puts dense layers in the place of all quantised ones, so that SAN can be merged, and forgets the quantisation.

    The dense weights are the quantised ones, unpacked: what the model computes stays the same up to rounding, and the
    rounding of quantisation is in them. Merge, verify, and quantise the merged model again if you want it small.

    Args:
        model: A model with or without SAN, not merged. What quantised it is bitsandbytes, torchao or quanto.
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
    if dense:
        for module in model.modules():
            _forget_quantization(module)
    return len(dense)


def _dtype_beside(model: nn.Module) -> torch.dtype | None:
    """Type of the first weight that is neither an adapter's nor quantised, or `None`: activations start in it."""
    for module in model.modules():
        inside = isinstance(module, nn.Linear) and is_quantized(module)
        for name, parameter in () if inside else module.named_parameters(recurse=False):
            if parameter.dtype.is_floating_point and not parameter.requires_grad and name in ("weight", "bias"):
                return parameter.dtype
    return None


def _forget_quantization(module: Any) -> None:
    """Takes off what transformers notes on a quantised model, which it would save and trust."""
    own = vars(module)
    if own.get("hf_quantizer") is not None:
        own["hf_quantizer"].remove_quantization_config(module)
    for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        if flag in own:
            setattr(module, flag, False)
    config = own.get("config")
    if hasattr(config, "_is_quantized"):
        del config._is_quantized


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

"""Hotswaps adapters in place, and exports an adapter as LoRA."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from san_peft.errors import AdapterError, MergeError
from san_peft.tuner.decompose import unfit
from san_peft.tuner.layer import SanLayer
from san_peft.tuner.loading import AdapterSource, check_tensors
from san_peft.tuner.sharded import is_sharded

COMPARED = (
    "peft_type",
    "edges",
    "exponent",
    "exponent_pattern",
    "bound",
    "shift",
    "gate",
    "inner",
    "decomposition",
    "own_scale",
    "trainable_token_indices",
)
"""Config fields that must be equal for two adapters to be interchangeable."""


def hotswap(
    model: PeftModel,
    path: str | os.PathLike,
    adapter_name: str = "default",
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> None:
    """Replaces a loaded adapter by a saved one in place, without recompiling the model.

    Replaces scales, inner adapters, and `modules_to_save` with their buffers. PEFT's `hotswap_adapter` supports LoRA
    only and raises for a SAN adapter.

    Args:
        model: The model with the adapter to replace; may be compiled.
        path: Folder or Hub name of the saved adapter, which must have the same targets, edges and exponent.
        adapter_name: Name of the adapter to replace.
        subfolder: Folder inside `path`. PEFT saves an adapter that is not named `default` in a subfolder of its name.
        revision: Revision of the Hub repository.
        device: Device to load the tensors to; `None` is PEFT's default.
        kwargs: Further download options, such as `token` and `cache_dir`.

    Raises:
        AdapterError: If the model has no such adapter, or the saved one is incompatible. The model is then unchanged.
    """
    model = getattr(model, "_orig_mod", model)
    if adapter_name not in model.peft_config:
        raise AdapterError(f"Adapter {adapter_name!r} does not exist; the model has {', '.join(model.peft_config)}.")
    if any(layer.merged for layer in model.modules() if isinstance(layer, SanLayer)):
        raise AdapterError("The model is merged. Call unmerge_adapter() before swapping its adapter.")
    place: Any = kwargs | {name: v for name, v in (("subfolder", subfolder), ("revision", revision)) if v is not None}
    source = AdapterSource(os.fspath(path), None, place)
    here, there = model.peft_config[adapter_name], source.config()
    for name in COMPARED:
        ours, theirs = getattr(here, name, None), getattr(there, name, None)
        if ours != theirs:
            raise AdapterError(
                f"The adapter in {source} differs from {adapter_name!r} in {name}{_what(ours, theirs)}. "
                "Load it with load_adapter instead."
            )
    old = get_peft_model_state_dict(model, adapter_name=adapter_name)
    new = source.read(None if device is None else str(device))
    check_tensors(model, adapter_name, new, source)
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise AdapterError(
            f"The adapter in {source} differs from {adapter_name!r} in {len(odd)} tensors, such as {odd[0]}."
        )
    for name, target in old.items():
        if target.is_meta or is_sharded(target):
            raise AdapterError(f"{name} is offloaded or sharded, so it cannot be replaced in place.")
    with torch.no_grad():
        for name, value in new.items():
            old[name].copy_(value)


def _what(ours: Any, theirs: Any) -> str:
    """Describes the fields in which the configs of two inner adapters differ."""
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ""
    odd = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    return f" ({', '.join(f'{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here' for name in odd)})"


@dataclass(frozen=True)
class LoraReport:
    """Reports the approximation error of an adapter exported as LoRA.

    Attributes:
        error: Frobenius norm of the approximation error over that of the weight update, over all layers.
        worst: The largest such relative error of a single layer.
        where: Name of that layer.
        rank: Rank of every layer.
        layers: Number of converted layers.
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
    r"""Exports the closest LoRA adapter of a given rank, for tools that only load LoRA, and reports the error.

    A scale changes a weight by $\operatorname{diag}(g) W \operatorname{diag}(s) - W$, which has full rank, so this is
    an approximation: the truncated singular value decomposition of each weight update, optimal for its rank. If biases
    change, the result has `lora_bias=True`. `modules_to_save` are exported too.

    Args:
        model: A `PeftModel` with a SAN adapter, not merged.
        path: Output folder, which `PeftModel.from_pretrained` loads without `san_peft`.
        rank: Rank of the result.
        adapter_name: Name of the adapter to export.

    Returns:
        The report.

    Raises:
        MergeError: If a layer is quantized, merged, or a grouped convolution, which LoRA does not support.
        AdapterError: If the model has no such adapter, or the rank is not positive.
    """
    tuner: Any = model.base_model
    if adapter_name not in model.peft_config:
        raise AdapterError(f"Adapter {adapter_name!r} does not exist; the model has {', '.join(model.peft_config)}.")
    if rank < 1:
        raise AdapterError(f"The rank must be at least 1, got {rank}.")
    tensors, losses = {}, {}
    biased = False
    layers = {name: m for name, m in tuner.model.named_modules() if isinstance(m, SanLayer)}
    for name, layer in layers.items():
        if layer.groups > 1:
            raise MergeError(
                f"{name} is a convolution in {layer.groups} groups, which LoRA does not support. Save the merged model."
            )
        if reason := unfit("LORA", layer.get_base_layer()):
            raise MergeError(f"{name} is {reason}, so it cannot be exported as LoRA. Save the merged model.")
        delta, bias = layer.get_delta(adapter_name)
        rows = delta.t() if layer.transposed else delta.flatten(1)
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        kept = min(rank, values.numel())  # the rest is zero: inference servers expect one rank for all layers
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
        trainable_token_indices=config.trainable_token_indices,
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

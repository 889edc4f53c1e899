"""Checks that each merged layer computes what its unmerged layer computes.

A SAN layer is an affine map, so two of them can be compared on the zero input and a few random inputs. These cover
every row and column, unlike the inputs of the model. All is computed in float64, so the only expected difference is
the rounding of the merged weight and bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

SAMPLES = 4
"""Number of random inputs of a layer, in addition to the zero input."""

ROUNDING = 2.0
"""Accepted error of an output channel, as a multiple of the effect of one rounding step in each of its weights."""

LOST = 0.1
"""Accepted loss of one component of the adapter, such as the input scale, in addition to rounding."""


class Record(NamedTuple):
    """Holds the outputs of an unmerged layer on generated inputs, of which the first is zero.

    Outputs have the axes (input, channel, position); dense layers have one position.
    """

    inputs: Tensor
    outputs: Tensor
    parts: dict[str, Tensor]
    """Change of the outputs by each component of the adapter."""
    steps: Tensor
    """Change of the outputs by one rounding step in the bias, then in each weight."""


@torch.no_grad()
def record(layer: Any, adapter_names: list[str], seed: int) -> Record | None:
    """Runs an unmerged layer on generated inputs, by its equation rather than its forward pass.

    Args:
        layer: An unmerged `SanLayer`.
        adapter_names: The adapters that will be merged.
        seed: The seed of the inputs.

    Returns:
        The record, or `None` if the layer does not map one tensor to one tensor.
    """
    base = layer.get_base_layer()
    if not isinstance(getattr(base, "weight", None), Tensor):
        return None
    with onload_layer(layer), torch.autocast(base.weight.device.type, enabled=False), ExitStack() as stack:
        for name in adapter_names:  # else the rounding of DoRA's norms would count as part of its effect
            layer._lend_dora_norm(name, base.weight.data, stack)
        x = _inputs(layer, base, seed)
        scale, shift = layer._output_vectors(adapter_names)
        input_scale = layer._input_vector(adapter_names)
        host = base if layer.host is None else layer.host
        try:
            scaled = x if input_scale is None else x * _along(input_scale, x)
            out = _run(host, scaled)
            whole = _finished(out, scale, shift)
            without: dict[str, Tensor] = {}
            if scale is not None:
                without["scale"] = _finished(out, None, shift)
            if shift is not None:
                without["shift"] = _finished(out, scale, None)
            if input_scale is not None:
                without["input scale"] = _finished(_run(host, x), scale, shift)
            if host is not base:
                without["host"] = _finished(_run(base, scaled), scale, shift)
        except (RuntimeError, TypeError, ValueError):  # the layer needs other inputs than one tensor
            return None
    parts = {name: _with_axes(base, whole - other) for name, other in without.items()}
    whole = _with_axes(base, whole)
    parts = {name: part for name, part in parts.items() if part.any()}
    return Record(x, whole, parts, _steps(layer, base, whole, parts))


@torch.no_grad()
def fault(name: str, layer: Any, before: Record) -> str | None:
    """Returns why a merged layer differs from its record, or `None` if it does not.

    Args:
        name: The name of the layer.
        layer: The merged layer.
        before: The record of the unmerged layer.
    """
    base = layer.get_base_layer()
    with onload_layer(layer), torch.autocast(base.weight.device.type, enabled=False):
        merged = _run(base, before.inputs)
    change = _apart(_with_axes(base, merged) - before.outputs)
    parts = {part: _apart(effect) for part, effect in before.parts.items()}
    for number, place in enumerate(("bias", "weight")):
        size, step = _rms(change[number]), before.steps[number]
        if not bool((size <= ROUNDING * step).all()):
            channel = int((size / step).nan_to_num(math.inf, math.inf).argmax())
            return (
                f"Merging changes channel {channel} of {name} by {size[channel]:.3g} through its {place} on random "
                f"inputs, more than the tolerance of {ROUNDING * step[channel]:.3g}"
            )
        for part, effects in parts.items():
            kept, spread = _kept(change[number], effects[number], step)
            if abs(kept - 1) > spread:
                return (
                    f"Merging keeps {kept:.2f} times the {part} in the {place} of {name}, where rounding explains "
                    f"{1 - spread:.2f} to {1 + spread:.2f}"
                )
    return None


def _kept(change: Tensor, effect: Tensor, step: Tensor) -> tuple[float, float]:
    """Returns how much of one component of the adapter is left after merging, and the accepted deviation from one."""
    scale = torch.where(step > 0, step, torch.ones_like(step))[:, None]
    change, effect = change / scale, effect / scale
    size = effect.norm().item()
    if not size:
        return 1.0, LOST
    # errors are at most half a step and correlated within a channel; allow four standard deviations
    spread = LOST + 2 * math.sqrt(effect[:, 0].numel()) / size
    return 1 + (change * effect).sum().item() / size**2, spread


def _apart(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Splits outputs into the contributions of bias and weight."""
    return outputs[:1], outputs[1:] - outputs[:1]


def _rms(outputs: Tensor) -> Tensor:
    """Returns the root mean square of each channel."""
    return outputs.square().mean((0, 2)).sqrt()


def _steps(layer: Any, base: Any, outputs: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Returns the effect on each channel of one rounding step in the bias, and in every weight."""
    weight, bias = base.weight, getattr(base, "bias", None)
    bias = weight if bias is None else bias
    fan_in = 1 if isinstance(base, nn.Embedding) else max(1, weight.numel() // outputs.shape[1])
    found = []
    for place, tensor in enumerate((bias, weight)):
        size = _rms(_apart(outputs)[place])
        if place:  # a few random inputs can underestimate the size of the output
            size = torch.maximum(size, _norms(layer, base).to(size))
        others = sum((_rms(_apart(part)[place]) for part in parts.values()), torch.zeros_like(size))
        # folding is computed in at least float32 before the final rounding
        exact = torch.finfo(torch.promote_types(tensor.dtype, torch.float32)).eps
        facts = torch.finfo(tensor.dtype)
        step = facts.eps * (size + (others if tensor.dtype.itemsize < 4 else 0))
        step = step + exact * (8 + math.sqrt(fan_in) / 8) * (size + others)
        found.append(step + facts.tiny * facts.eps * math.sqrt(fan_in) * bool(size.any()))
    return torch.stack(found)


def _norms(layer: Any, base: Any) -> Tensor:
    """Returns the expected root mean square of each channel of a frozen layer."""
    weight = base.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(base, nn.Embedding):
        return torch.linalg.vector_norm(weight, dim=0, dtype=wide) / math.sqrt(len(weight))
    if layer.transposed:
        grouped = weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)
        return torch.linalg.vector_norm(grouped, dim=(1, 3), dtype=wide).flatten()
    return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=wide)


def _inputs(layer: Any, base: Any, seed: int) -> Tensor:
    """Returns the zero input and random inputs with two output positions per dimension, or token indices."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(base, nn.Embedding):
        return torch.randint(len(base.weight), (16 * SAMPLES,), generator=generator).to(base.weight.device)
    sizes = []
    if base.weight.dim() > 2:
        facts = zip(base.kernel_size, base.dilation, base.stride, strict=True)
        sizes = [dilation * (kernel - 1) + 1 + stride for kernel, dilation, stride in facts]
    x = torch.randn(1 + SAMPLES, layer.in_features, *sizes, generator=generator, dtype=torch.float64)
    x[0] = 0
    return x.to(base.weight.device, _wide(base.weight.device))


def _wide(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _with_axes(base: Any, outputs: Tensor) -> Tensor:
    """Reshapes outputs to (input, channel, position); prepends zeros to those of an embedding as the zero input."""
    if isinstance(base, nn.Embedding):
        outputs = torch.cat([torch.zeros_like(outputs[:1]), outputs])
    return outputs.reshape(*outputs.shape[:2], -1)


def _run(module: nn.Module, x: Tensor) -> Tensor:
    """Runs a module in float64."""
    tensors: Iterator[tuple[str, Tensor]] = chain(module.named_parameters(), module.named_buffers())
    wide = {name: t.detach().to(_wide(x.device)) for name, t in tensors if t.is_floating_point()}
    out = torch.func.functional_call(module, wide, (x,))
    if not isinstance(out, Tensor):
        raise TypeError(f"A {type(module).__name__} returns a {type(out).__name__}.")
    return out


def _finished(out: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    out = out if scale is None else out * _along(scale, out)
    return out if shift is None else out + _along(shift, out)


def _along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 2))

"""What half precision does to propagated scales: how many would round to one, and how many are lost when applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from san_peft.errors import SanError
from san_peft.functional import propagate
from san_peft.propagation.placement import OUTPUT
from san_peft.rounding import HALF
from san_peft.scaling import SALT, Factor, scale_channels
from san_peft.tuner.frozen import stored_weight
from san_peft.tuner.layout import NORM, places
from san_peft.tuner.norms import FORMS, norm_at
from san_peft.tuner.quantized import is_quantized
from san_peft.tuner.vectors import total_scale

PROBES = 1024
"""On how many values of every channel a scale is tried."""


@dataclass(frozen=True)
class EdgePrecision:
    """How the scale of one edge fares in the type of the activation that it multiplies.

    Attributes:
        anterior: Layer that the scale comes from.
        posterior: Layer that it is propagated to.
        place: Where it acts at present: `norm:` and the norm's name, `output` of the anterior, or `input` of the
            posterior.
        dtype: Type of the activation there, as the frozen weights have it.
        channels: How many channels the scale multiplies.
        near_one: Channels whose factor is not one, but would be, rounded to that type.
        lost: Of these, the channels that stay as they are when the factor is applied.
        adapter: The adapter.
    """

    anterior: str
    posterior: str
    place: str
    dtype: torch.dtype
    channels: int
    near_one: int
    lost: int
    adapter: str = "default"


@dataclass(frozen=True)
class PrecisionReport:
    """How the propagated scales of the active adapters fare in the types of a model; printing it gives a table.

    Attributes:
        edges: One row for each edge that acts.
    """

    edges: tuple[EdgePrecision, ...]

    @property
    def channels(self) -> int:
        """How many channels all edges multiply."""
        return sum(edge.channels for edge in self.edges)

    @property
    def near_one(self) -> int:
        """How many of their factors would round to one."""
        return sum(edge.near_one for edge in self.edges)

    @property
    def lost(self) -> int:
        """How many change nothing when they are applied."""
        return sum(edge.lost for edge in self.edges)

    def __str__(self) -> str:
        head = ("anterior", "posterior", "acts at", "dtype", "channels", "near one", "lost")
        rows = [
            (
                *(edge.anterior, edge.posterior, edge.place, str(edge.dtype).removeprefix("torch.")),
                *map(str, (edge.channels, edge.near_one, edge.lost)),
            )
            for edge in self.edges
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                text.rjust(n) if i > 3 else text.ljust(n) for i, (text, n) in enumerate(zip(row, widths, strict=True))
            )
            for row in ((head, *rows) if rows else ())
        ]
        edges = f"{len(rows)} edge{'' if len(rows) == 1 else 's'}"
        total = f"{self.near_one} of {self.channels} channels of {edges} would round to one; {self.lost} are lost"
        return "\n".join([*lines, total])


@torch.no_grad()
def report(scales: Any) -> PrecisionReport:
    """Says how many propagated scales half precision would round to one, and how many are lost when applied.

    A factor near one, rounded to bfloat16, is one. Scales are therefore multiplied in float32, before a norm rounds its
    output, or rounded by dithering (`san_peft.rounding`). What is lost of them nevertheless is tried out, on `PROBES`
    random values of each channel: it counts as lost if none of these changes, as with a scale so near to one that not
    one value in a thousand is to move. Several edges into one layer are tried one by one.

    Args:
        scales: The scales of the model's adapters.

    Returns:
        The report, with one row for each edge of the active adapters that acts at present. Its types are those of the
        frozen weights; what autocast makes of them is not known.

    Raises:
        SanError: If frozen weights are offloaded or partitioned.

    Example:
        >>> from torch import nn
        >>> from peft import get_peft_model
        >>> from san_peft import SanConfig, trace
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 2))
        >>> config = SanConfig(target_modules=["0", "2"], propagation=trace(net, torch.zeros(1, 4)))
        >>> model = get_peft_model(net.bfloat16(), config)
        >>> _ = nn.init.constant_(model.get_submodule("base_model.model.0.san_scale.default").weight, 0.001)
        >>> print(model.base_model.precision_report())
        anterior  posterior  acts at  dtype     channels  near one  lost
        0         2          norm:1   bfloat16         8         8     0
        2         3          output   bfloat16         6         0     0
        8 of 14 channels of 2 edges would round to one; 0 are lost
    """
    names = scales._names()
    if names is None:
        raise SanError("Weights are offloaded or partitioned, so their scales cannot be read; load the whole model.")
    rows: list[EdgePrecision] = []
    for name in names:
        where = places(scales, name, len(names) == 1 and not scales.mixed)
        sources: dict[str, Tensor] = {}
        tried: dict[Any, tuple[int, int, int]] = {}
        for fqn, layer in scales.layers.items():
            if layer.san_mode not in ("both", "synapse") or name in layer.merged_adapters:
                continue
            for edge in layer.san_incoming.get(name, ()):
                if edge.anterior not in sources:
                    sources[edge.anterior] = total_scale(edge.banks, name)  # type: ignore[assignment]
                place = where[edge.anterior, fqn]
                holder, apply = _site(scales, place, edge.anterior, fqn)
                key = (edge.anterior, place) if place.startswith(NORM) else (edge.anterior, fqn)
                if key not in tried:  # all readers of a norm get the same
                    factor, channels = _factor(edge, sources[edge.anterior], place)
                    tried[key] = channels, *_try(factor, holder, apply)
                rows.append(EdgePrecision(edge.anterior, fqn, place, _dtype(holder), *tried[key], name))
    return PrecisionReport(tuple(rows))


def _factor(edge: Any, source: Tensor, place: str) -> tuple[Tensor, int]:
    """What an edge multiplies where it acts, and how many channels it reaches there."""
    index = None if edge.index is None else edge.index.to(source.device)
    if place == OUTPUT and index is not None:  # the anterior's channels that are read, not the posterior's
        read = torch.zeros(source.numel(), dtype=torch.bool, device=source.device)
        read[index[index >= 0]] = True
        factor = propagate(source, None, edge.exponent, edge.bound)
        return torch.where(read, factor, torch.ones_like(factor)), int(read.sum())
    factor = propagate(source, index, edge.exponent, edge.bound)
    return factor, factor.numel() if index is None else int((index >= 0).sum())


Apply = Callable[[Tensor, Factor], Tensor]
"""Multiplies a tensor with a factor, as is done where it acts."""


def _site(scales: Any, place: str, anterior: str, posterior: str) -> tuple[Any, Apply]:
    """The module whose activation a scale multiplies, and how it does that."""
    if place.startswith(NORM):
        norm: Any = norm_at(scales.model, place.removeprefix(NORM))
        form = FORMS.get(norm.san_norm.form)
        return norm, _after if form is None else lambda probe, factor: form(norm, probe, factor)
    return scales.layers[anterior if place == OUTPUT else posterior].get_base_layer(), _after


def _after(probe: Tensor, factor: Factor) -> Tensor:
    return scale_channels(probe, factor, None, -1)


def _dtype(holder: Any) -> torch.dtype:
    """The type in which a frozen module computes, as far as its weight says."""
    if not is_quantized(holder):
        return stored_weight(holder).dtype
    found = getattr(holder, "compute_dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _try(factor: Tensor, holder: Any, apply: Apply) -> tuple[int, int]:
    """How many channels of a factor would round to one, and how many of these change nothing on a probe."""
    dtype = _dtype(holder)
    near = (factor != 1) & (factor.to(dtype) == 1)
    count = int(near.sum())
    if not count or dtype not in HALF:
        return count, 0
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBES, factor.numel(), generator=generator).to(stored_weight(holder).device, dtype)
    wide = factor.to(probe.device)
    plain = apply(probe, Factor(torch.ones_like(wide), salt=SALT["input_scale"]))
    same = (apply(probe, Factor(wide, salt=SALT["input_scale"])) == plain).all(0) & (plain != 0).any(0)
    return count, int((near.to(same.device) & same).sum())

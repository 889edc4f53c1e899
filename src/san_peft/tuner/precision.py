"""Reports the effect of half precision on propagated scales: how many round to one, and how many have no effect."""

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
"""Number of random values per channel to which a scale is applied."""


@dataclass(frozen=True)
class EdgePrecision:
    """Reports the precision of the scale of one edge.

    Attributes:
        anterior: The layer that the scale comes from.
        posterior: The layer that the scale is propagated to.
        place: Where the scale is applied: `norm:` and the norm's name, `output` of the anterior layer, or `input` of
            the posterior layer.
        dtype: The dtype of the activation there, taken from the frozen weights.
        channels: The number of channels that are multiplied.
        near_one: The number of channels whose factor is not one, but rounds to one in `dtype`.
        lost: The number of these channels that do not change when the factor is applied.
        adapter: The name of the adapter.
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
    """Reports the precision of the propagated scales of the active adapters; prints as a table.

    Attributes:
        edges: One row per edge in use.
    """

    edges: tuple[EdgePrecision, ...]

    @property
    def channels(self) -> int:
        """Returns the number of channels that all edges multiply."""
        return sum(edge.channels for edge in self.edges)

    @property
    def near_one(self) -> int:
        """Returns the number of channels whose factor rounds to one."""
        return sum(edge.near_one for edge in self.edges)

    @property
    def lost(self) -> int:
        """Returns the number of channels whose factor has no effect."""
        return sum(edge.lost for edge in self.edges)

    def __str__(self) -> str:
        head = ("anterior", "posterior", "applied at", "dtype", "channels", "near one", "lost")
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
    """Reports how many propagated scales half precision rounds to one, and how many have no effect.

    A factor near one rounds to one in bfloat16. Scales are therefore applied in float32 before a norm rounds its
    output, or with dithered rounding (`san_peft.rounding`). To find scales that still have no effect, each is applied
    to `PROBES` random values per channel; it counts as lost if none of them changes. Several edges into one layer are
    tested one by one.

    Args:
        scales: The scales of the model's adapters.

    Returns:
        The report, with one row per edge that the active adapters use. Dtypes are those of the frozen weights; autocast
        is not considered.

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
        anterior  posterior  applied at  dtype     channels  near one  lost
        0         2          norm:1      bfloat16         8         8     0
        2         3          output      bfloat16         6         0     0
        8 of 14 channels of 2 edges would round to one; 0 are lost
    """
    names = scales._names()
    if names is None:
        raise SanError(
            "Weights are offloaded or partitioned, so scales cannot be read; load the model without offloading."
        )
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
                if key not in tried:  # all readers of a norm share the factor
                    factor, channels = _factor(edge, sources[edge.anterior], place)
                    tried[key] = channels, *_try(factor, holder, apply)
                rows.append(EdgePrecision(edge.anterior, fqn, place, _dtype(holder), *tried[key], name))
    return PrecisionReport(tuple(rows))


def _factor(edge: Any, source: Tensor, place: str) -> tuple[Tensor, int]:
    """Returns the factor of an edge where it is applied, and the number of channels it multiplies."""
    index = None if edge.index is None else edge.index.to(source.device)
    if place == OUTPUT and index is not None:  # channels of the anterior layer, not of the posterior
        read = torch.zeros(source.numel(), dtype=torch.bool, device=source.device)
        read[index[index >= 0]] = True
        factor = propagate(source, None, edge.exponent, edge.bound)
        return torch.where(read, factor, torch.ones_like(factor)), int(read.sum())
    factor = propagate(source, index, edge.exponent, edge.bound)
    return factor, factor.numel() if index is None else int((index >= 0).sum())


Apply = Callable[[Tensor, Factor], Tensor]
"""Multiplies a tensor by a factor, as at the place where it is applied."""


def _site(scales: Any, place: str, anterior: str, posterior: str) -> tuple[Any, Apply]:
    """Returns the module whose activation a scale multiplies, and the function that applies it."""
    if place.startswith(NORM):
        norm: Any = norm_at(scales.model, place.removeprefix(NORM))
        form = FORMS.get(norm.san_norm.form)
        return norm, _after if form is None else lambda probe, factor: form(norm, probe, factor)
    return scales.layers[anterior if place == OUTPUT else posterior].get_base_layer(), _after


def _after(probe: Tensor, factor: Factor) -> Tensor:
    return scale_channels(probe, factor, None, -1)


def _dtype(holder: Any) -> torch.dtype:
    """Returns the compute dtype of a frozen module according to its weight."""
    if not is_quantized(holder):
        return stored_weight(holder).dtype
    found = getattr(holder, "compute_dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _try(factor: Tensor, holder: Any, apply: Apply) -> tuple[int, int]:
    """Counts the channels of a factor that round to one, and those of them that have no effect on a probe."""
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

"""Collects what layers read: the source layer and channel of each input channel, over all calls of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from san_peft.propagation import rules
from san_peft.propagation.channels import ChannelMap
from san_peft.propagation.codes import NONE, STRIDE, ZERO
from san_peft.propagation.follow import Follow
from san_peft.propagation.graph import Barrier, Edge

MIXED = "one input channel holds different channels, or layers, at different positions"
UNKNOWN = "it depends on earlier layers, but could not be followed to any of them"


@dataclass
class Reads:
    """The sources of a layer's input channels, in one call or joined over all calls.

    Attributes:
        size: Number of input channels.
        sources: For each input channel, `STRIDE` * source layer number (see `Follow`) + source channel, or `NONE`;
            `None` if nothing was read yet.
        via: Operations on the path from each source layer.
        barriers: (operation, reason) of each place at which channels were lost.
        within: Whether the layer's own channels are among the sources, as in attention.
    """

    size: int
    sources: Int64[Tensor, " size"] | None = None
    via: dict[str, tuple[str, ...]] = field(default_factory=dict)
    barriers: dict[tuple[str, str], None] = field(default_factory=dict)
    within: bool = False

    def read(self, follow: Follow, name: str, x: Tensor, dim: int) -> None:
        """Records the source of each input channel in one call.

        Args:
            follow: Provides the states of tensors.
            name: Name of this layer.
            x: Its input.
            dim: Channel axis of `x`.
        """
        if not x.numel():
            return
        state = follow.find(x)
        self.sources = sources = torch.full((self.size,), NONE)
        if state is None and follow.memory.reach([x]):
            self.barriers["input", UNKNOWN] = None
        if state is None:
            return
        rows = state.codes.movedim(dim, -1).reshape(-1, self.size)
        high = rows.amax(0)
        other = rows != high
        bad = (other & (rows >= 0)).any(0)
        follow.ledger.consume(rows, name)
        follow.ledger.consume(rows[:, (other & (rows != ZERO)).any(0)])
        writers = torch.where(high < 0, NONE, high // STRIDE)
        beside = set(writers[((rows == NONE) & (high >= 0)).any(0)].tolist())
        for number in dict.fromkeys(writers.tolist()):
            if number < 0:
                continue
            layer, own = follow.ledger.writers[number], writers == number
            if isinstance(layer, tuple):
                self.barriers[layer] = None
                continue
            if bool((own & bad).any()):
                self.barriers["input", MIXED] = None
            kept = own & ~bad
            sources[kept] = follow.numbers[layer] * STRIDE + high[kept] % STRIDE
        for number, path in state.via.items():
            layer = follow.ledger.writers[number]
            if isinstance(layer, str):
                offset = (rules.OFFSET,) if number in beside else ()  # some positions come from elsewhere
                self.via[layer] = rules.join(self.via.get(layer, ()), *path, *offset)

    def join(self, other: Reads) -> Reads:
        """Joins the reads of another call; channels keep a source only if all calls agree on it."""
        for layer, path in other.via.items():
            self.via[layer] = rules.join(self.via.get(layer, ()), *path)
        self.barriers |= other.barriers
        if self.sources is None or other.sources is None:
            self.sources = other.sources if self.sources is None else self.sources
        elif not torch.equal(self.sources, other.sources):
            self.barriers["call", "its calls read from different layers"] = None
            self.sources = torch.where(self.sources == other.sources, self.sources, NONE)
        return self

    def anteriors(self, follow: Follow) -> dict[str, Int64[Tensor, " size"]]:
        """Returns the source layers, each with the source channel of each input channel, `NONE` for other sources."""
        if self.sources is None:
            return {}
        numbers = torch.where(self.sources < 0, NONE, self.sources // STRIDE)
        found = {number: numbers == number for number in dict.fromkeys(numbers.tolist()) if number >= 0}
        names = list(follow.numbers)
        return {names[n]: torch.where(own, self.sources % STRIDE, NONE) for n, own in found.items()}

    def edges(self, follow: Follow, name: str, sizes: dict[str, int]) -> tuple[list[Edge], list[Barrier]]:
        """Returns the edges into this layer, and its barriers.

        Args:
            follow: Provides the numbers of layers.
            name: Name of this layer.
            sizes: Number of output channels of each layer.
        """
        edges, barriers = [], []
        for anterior, index in self.anteriors(follow).items():
            if anterior == name and not self.within:
                barriers.append(Barrier("call", name, "it reads its own output in a later call"))
            else:
                channels = ChannelMap.from_index(index, sizes[anterior])
                edges.append(Edge(anterior, name, channels, self.via.get(anterior, ())))
        if self.sources is None:
            barriers.append(Barrier("input", name, "it was called with empty inputs; trace larger inputs"))
        return edges, [*barriers, *(Barrier(operation, name, reason) for operation, reason in self.barriers)]

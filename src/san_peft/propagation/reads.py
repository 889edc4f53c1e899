"""What layers read: for every input channel the layer and the channel it came from, over all calls of a layer."""

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
UNKNOWN = "it depends on layers that ran before, and could not be followed to any of them"


@dataclass
class Reads:
    """What a layer read, in one call or in all of them.

    Attributes:
        size: Number of input channels.
        sources: For every input channel `STRIDE` * the number of a layer (see `Follow`) + its channel, `NONE` where
            there is none; `None` before it read anything.
        via: For every layer among them the operations on the way.
        barriers: (operation, reason) of every place where the way was lost.
        within: Whether channels of its own are among the sources, as an attention's values are.
    """

    size: int
    sources: Int64[Tensor, " size"] | None = None
    via: dict[str, tuple[str, ...]] = field(default_factory=dict)
    barriers: dict[tuple[str, str], None] = field(default_factory=dict)
    within: bool = False

    def read(self, follow: Follow, name: str, x: Tensor, dim: int) -> None:
        """Notes the source of every input channel of one call.

        Args:
            follow: Knows where the entries of tensors come from.
            name: The layer that reads.
            x: What it reads.
            dim: The axis of its channels.
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
                offset = (rules.OFFSET,) if number in beside else ()  # positions that the layer did not write
                self.via[layer] = rules.join(self.via.get(layer, ()), *path, *offset)

    def join(self, other: Reads) -> Reads:
        """Returns what a layer read in this call and in the calls before, of which channels keep what all agree on."""
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
        """Returns the layers that it reads, each with the channel of every input channel, `NONE` where another is."""
        if self.sources is None:
            return {}
        numbers = torch.where(self.sources < 0, NONE, self.sources // STRIDE)
        found = {number: numbers == number for number in dict.fromkeys(numbers.tolist()) if number >= 0}
        names = list(follow.numbers)
        return {names[n]: torch.where(own, self.sources % STRIDE, NONE) for n, own in found.items()}

    def edges(self, follow: Follow, name: str, sizes: dict[str, int]) -> tuple[list[Edge], list[Barrier]]:
        """Returns the edges into this layer, and its barriers.

        Args:
            follow: Knows the layers by number.
            name: This layer.
            sizes: The number of output channels of every layer.
        """
        edges, barriers = [], []
        for anterior, index in self.anteriors(follow).items():
            if anterior == name and not self.within:
                barriers.append(Barrier("call", name, "it reads its own output in a later call"))
            else:
                channels = ChannelMap.from_index(index, sizes[anterior])
                edges.append(Edge(anterior, name, channels, self.via.get(anterior, ())))
        if self.sources is None:
            barriers.append(Barrier("input", name, "it was called without a single entry to read; trace larger inputs"))
        return edges, [*barriers, *(Barrier(operation, name, reason) for operation, reason in self.barriers)]

"""Who wrote channels, and who else than layers read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from san_peft.propagation import rules
from san_peft.propagation.codes import STRIDE, State, thin


class Ledger:
    """Numbers the writers of channels in the order in which they wrote, and notes what becomes of their channels.

    Attributes:
        writers: By number, the layer that wrote, or (operation, reason) where an axis was lost.
        sizes: By number, how many channels it wrote; none where an axis was lost.
        consumed: By number, which channels which layer read; under "" those that anything else did more with than to
            move them or to scale them, and those that the model returns.
        joined: Pairs of writers whose outputs were added to each other with nothing in between, as two heads are.
        unwritten: The numbers that stand for memory that no operation was seen to write.
        beside: Parameters that operations outside of layers multiplied channels with, and the operation.
    """

    def __init__(self) -> None:
        self.writers: list[str | tuple[str, str]] = []
        self.sizes: list[int] = []
        self.consumed: list[dict[str, Tensor]] = []
        self.joined: set[tuple[int, int]] = set()
        self.beside: dict[str, str] = {}
        self.unwritten: set[int] = set()

    def write(self, writer: str | tuple[str, str], size: int) -> int:
        """Returns the number of something that now writes so many channels."""
        self.writers.append(writer)
        self.sizes.append(size)
        self.consumed.append({})
        return len(self.writers) - 1

    def lose(self, shape: Any, operation: str, reason: str, statistic: bool = False) -> State:
        """Returns the state of a tensor whose channels cannot be followed."""
        writer = self.write((operation, reason), 0)
        return State(torch.full((), writer * STRIDE).expand(shape), {writer: ()}, statistic)

    def consume(self, codes: Tensor, reader: str = "") -> None:
        """Notes that a layer read the channels of these codes, or, without a name, that something else did."""
        codes = thin(codes)[0]
        codes = codes[codes >= 0]
        for writer in (codes >> 32).unique().tolist():
            mask = self._read_by(writer, reader)
            if len(mask):
                mask[codes[codes >> 32 == writer] % STRIDE] = True

    def consume_all(self) -> None:
        """Notes that something that cannot be seen may have read all that has been written so far."""
        for writer in range(len(self.writers)):
            self._read_by(writer, "")[:] = True

    def spend(self, before: list[State], after: list[State]) -> None:
        """Notes the channels that an operation read and does not carry on, scaled at most."""
        exact = [s.codes for s in after if all(rules.kind_of(path) == "exact" for path in s.via.values())]
        kept = [thin(codes)[0].flatten() for codes in exact]
        for state in before:
            codes = thin(state.codes)[0].flatten()
            for others in kept:
                codes = codes[~torch.isin(codes, others)]
            self.consume(codes)

    def _read_by(self, writer: int, reader: str) -> Tensor:
        return self.consumed[writer].setdefault(reader, torch.zeros(self.sizes[writer], dtype=torch.bool))

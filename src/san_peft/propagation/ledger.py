"""Keeps a ledger of the writers of channels, and of what reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from san_peft.propagation import rules
from san_peft.propagation.codes import STRIDE, State, thin


class Ledger:
    """Numbers the writers of channels in order, and records the readers of their channels.

    Attributes:
        writers: The layer behind each writer, or (operation, reason) if channels were lost there.
        sizes: Number of channels of each writer; zero if they were lost.
        consumed: For each writer, masks of the channels that each layer read. The key "" holds the channels that
            anything else used for more than moving or scaling, and those that the model returns.
        joined: Pairs of writers whose outputs were added directly, such as two heads.
        unwritten: Writers that stand for memory that no operation was seen to write.
        beside: Parameters that were multiplied with channels outside of layers, with the operation.
    """

    def __init__(self) -> None:
        self.writers: list[str | tuple[str, str]] = []
        self.sizes: list[int] = []
        self.consumed: list[dict[str, Tensor]] = []
        self.joined: set[tuple[int, int]] = set()
        self.beside: dict[str, str] = {}
        self.unwritten: set[int] = set()

    def write(self, writer: str | tuple[str, str], size: int) -> int:
        """Adds a writer of `size` channels and returns its number."""
        self.writers.append(writer)
        self.sizes.append(size)
        self.consumed.append({})
        return len(self.writers) - 1

    def lose(self, shape: Any, operation: str, reason: str, statistic: bool = False) -> State:
        """Adds a writer for lost channels and returns the state of a tensor that holds them."""
        writer = self.write((operation, reason), 0)
        return State(torch.full((), writer * STRIDE).expand(shape), {writer: ()}, statistic)

    def consume(self, codes: Tensor, reader: str = "") -> None:
        """Records that a layer, or with an empty name anything else, read the channels of these codes."""
        codes = thin(codes)[0]
        codes = codes[codes >= 0]
        for writer in (codes >> 32).unique().tolist():
            mask = self._read_by(writer, reader)
            if len(mask):
                mask[codes[codes >> 32 == writer] % STRIDE] = True

    def consume_all(self) -> None:
        """Records that all channels so far may have been read by something that the trace cannot see."""
        for writer in range(len(self.writers)):
            self._read_by(writer, "")[:] = True

    def spend(self, before: list[State], after: list[State]) -> None:
        """Records the channels that an operation reads and does not pass on exactly."""
        exact = [s.codes for s in after if all(rules.path_kind(path) == "exact" for path in s.via.values())]
        kept = [thin(codes)[0].flatten() for codes in exact]
        for state in before:
            codes = thin(state.codes)[0].flatten()
            for others in kept:
                codes = codes[~torch.isin(codes, others)]
            self.consume(codes)

    def _read_by(self, writer: int, reader: str) -> Tensor:
        return self.consumed[writer].setdefault(reader, torch.zeros(self.sizes[writer], dtype=torch.bool))

"""What is known of the memory behind tensors: which layers reach it, and what was written into parts of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef

from san_peft.propagation import rules
from san_peft.propagation.codes import Lost, State, carries

DATA = 1
"""Bit of a reach: the values depend on a layer, perhaps by way of integers, through which no gradient passes."""


@dataclass(slots=True)
class Block:
    """One storage.

    Attributes:
        storage: Keeps its number from being given to another.
        reach: The layers that have an influence on it that a gradient can follow, as bits from the second on, and
            `DATA`.
        layer: The layer whose output it holds.
        parameter: The parameter that it holds, if that has more than one axis.
        zeros: Whether it holds nothing but zeros.
        empty: Whether no operation was seen to write into it: what is there came from elsewhere, or is arbitrary.
        parts: `State` of every place of the storage, since parts of it were written; `None` before.
        unwritten: State of what no operation was seen to write, a single code.
        unit: Size of an entry of `parts` in bytes.
        views: The tensors with a state of their own that share it.
    """

    storage: StorageWeakRef
    reach: int = 0
    layer: str | None = None
    parameter: str | None = None
    zeros: bool = False
    empty: bool = False
    parts: State | None = None
    unwritten: State | None = None
    unit: int = 0
    views: list[WeakIdRef] = field(default_factory=list)


class Memory:
    """The storages that were seen, by number."""

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}

    def block(self, tensor: Tensor, new: bool = False) -> Block | None:
        """Returns what is known of a tensor's memory: `None` if it was never seen, or has none (a sparse tensor).

        Args:
            tensor: The tensor.
            new: Take note of memory that was never seen.
        """
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError, ValueError):
            return None
        block = self.blocks.get(storage._cdata)
        if block is None and new:
            block = self.blocks[storage._cdata] = Block(StorageWeakRef(storage))
        return block

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Takes note of tensors that are there before the model runs."""
        for tensor in tensors:
            self.block(tensor, new=True)

    def reach(self, tensors: Iterable[Tensor]) -> int:
        """Returns the layers that have an influence on any of these tensors."""
        reach = 0
        for tensor in tensors:
            block = self.block(tensor)
            if block is not None:
                reach |= block.reach
        return reach

    def made(self, name: str, given: list[Tensor], outs: list[Tensor], reach: int, writes: bool) -> None:
        """Notes the results of an operation.

        Args:
            name: Its name.
            given: Its arguments.
            outs: Its results, and what it wrote into.
            reach: The layers that have an influence on its arguments.
            writes: Whether it wrote into any of them.
        """
        blocks = [self.block(tensor) for tensor in given] if not writes and name not in rules.BLIND else []
        empty = name in rules.EMPTY or any(block is not None and block.empty for block in blocks)
        for tensor in outs:
            block = self.block(tensor)
            if block is None:
                block = self.block(tensor, new=True)
                if block is not None:
                    block.zeros, block.empty = name in rules.ZEROS, empty
            elif writes:
                block.zeros = block.empty = False
            if block is not None:
                block.reach |= reach if carries(tensor) else reach and DATA

    def write(self, tensor: Tensor, state: State, states: Any, untouched: State) -> None:
        """Notes that a part of a storage was written.

        Args:
            tensor: The view that was written into.
            state: What it holds now.
            states: The states of the views that have one.
            untouched: State of what nothing was written into, a single code.
        """
        block = self.block(tensor, new=True)
        if block is None:
            raise Lost("it writes into a tensor without memory of its own")
        unit = tensor.element_size()
        if block.parts is None:
            size = tensor.untyped_storage().nbytes() // unit
            parts = State(untouched.codes.expand(size), untouched.via)
            block.unit = unit
            views = [view for view in (reference() for reference in block.views) if view is not None]
            written = [(view, states[view]) for view in views if view is not tensor and view in states]
        else:
            parts, written = block.parts, []
        codes, via = parts.codes.clone(), dict(parts.via)
        for view, there in (*written, (tensor, state)):
            if view.element_size() != block.unit:
                raise Lost("it writes into memory that is read as numbers of another size")
            codes.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(there.codes)
            for writer, path in there.via.items():
                via[writer] = rules.join(via.get(writer, ()), *path)
        block.parts = State(codes, via, state.statistic and not (parts.via or written))
        block.views.clear()

    def forget(self, tensor: Tensor, lost: State) -> None:
        """Notes that nothing is known any more of a storage, whose every place has one code from now on."""
        block = self.block(tensor, new=True)
        assert block is not None
        block.unit = block.unit or tensor.element_size()
        size = tensor.untyped_storage().nbytes() // block.unit
        block.parts = State(lost.codes.expand(size), dict(lost.via))
        block.views.clear()

    def covers(self, tensor: Tensor) -> bool:
        """Whether a tensor is all of its storage."""
        return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()

    def part(self, tensor: Tensor, block: Block) -> State:
        """Returns the state of a view of a storage into whose parts something was written."""
        parts = block.parts
        assert parts is not None
        if tensor.element_size() != block.unit:
            raise Lost("it reads memory as numbers of another size")
        codes = parts.codes.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        state = State(codes, parts.via, parts.statistic)
        if len(parts.via) > 1:
            present = state.present()
            state.via = {writer: path for writer, path in parts.via.items() if writer in present} or parts.via
        return state

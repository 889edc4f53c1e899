"""Tracks the storages behind tensors: which layers influence them, and what was written into parts of them."""

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
"""Bit of a reach: the values depend on a layer, possibly through integers, which pass no gradient."""


@dataclass(slots=True)
class Block:
    """State of one storage.

    Attributes:
        storage: Weak reference, which prevents the reuse of the storage's id.
        reach: Bitmask of the layers that influence it differentiably, from the second bit on, and `DATA`.
        layer: The layer whose output it holds.
        parameter: The parameter that it holds, if it has more than one axis.
        zeros: Whether it holds only zeros.
        empty: Whether no operation was seen to write into it, so that its values are external or uninitialised.
        parts: State of each entry of the storage, once a part of it was written; `None` before.
        unwritten: State of entries that no operation was seen to write, a single code.
        unit: Size of an entry of `parts` in bytes.
        views: Tensors that share the storage and have their own state.
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
    """All known storages, by id."""

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}

    def block(self, tensor: Tensor, new: bool = False) -> Block | None:
        """Returns the block of a tensor; `None` if its storage is unknown or it has none (a sparse tensor).

        Args:
            tensor: The tensor.
            new: Whether to add a block for an unknown storage.
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
        """Adds the storages of tensors that exist before the model runs."""
        for tensor in tensors:
            self.block(tensor, new=True)

    def reach(self, tensors: Iterable[Tensor]) -> int:
        """Returns the combined reach of some tensors."""
        reach = 0
        for tensor in tensors:
            block = self.block(tensor)
            if block is not None:
                reach |= block.reach
        return reach

    def made(self, name: str, given: list[Tensor], outs: list[Tensor], reach: int, writes: bool) -> None:
        """Records the results of an operation.

        Args:
            name: Name of the operation.
            given: Its tensor arguments.
            outs: Its results and the tensors that it wrote into.
            reach: Combined reach of its arguments.
            writes: Whether it wrote into an argument.
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
        """Records a write into a part of a storage.

        Args:
            tensor: The view that was written into.
            state: Its new state.
            states: States of all tensors that have one.
            untouched: State of entries that were not written, a single code.

        Raises:
            Lost: If the tensor has no storage, or the storage is viewed with another entry size.
        """
        block = self.block(tensor, new=True)
        if block is None:
            raise Lost("it writes into a tensor without storage")
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
                raise Lost("it writes into memory that is viewed with another entry size")
            codes.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(there.codes)
            for writer, path in there.via.items():
                via[writer] = rules.join(via.get(writer, ()), *path)
        block.parts = State(codes, via, state.statistic and not (parts.via or written))
        block.views.clear()

    def forget(self, tensor: Tensor, lost: State) -> None:
        """Marks all entries of a storage as lost."""
        block = self.block(tensor, new=True)
        assert block is not None
        block.unit = block.unit or tensor.element_size()
        size = tensor.untyped_storage().nbytes() // block.unit
        block.parts = State(lost.codes.expand(size), dict(lost.via))
        block.views.clear()

    def covers(self, tensor: Tensor) -> bool:
        """Returns whether a tensor covers its whole storage."""
        return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()

    def part(self, tensor: Tensor, block: Block) -> State:
        """Returns the state of a view of a storage with `parts`; raises `Lost` for another entry size."""
        parts = block.parts
        assert parts is not None
        if tensor.element_size() != block.unit:
            raise Lost("it views memory with another entry size")
        codes = parts.codes.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        state = State(codes, parts.via, parts.statistic)
        if len(parts.via) > 1:
            present = state.present()
            state.via = {writer: path for writer, path in parts.via.items() if writer in present} or parts.via
        return state

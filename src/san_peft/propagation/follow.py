"""Follows channels through a forward pass: a dispatch mode that stores the origin of each entry of each tensor."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from san_peft.propagation import rules
from san_peft.propagation.codes import NONE, STRIDE, ZERO, Lost, State, carries
from san_peft.propagation.ledger import Ledger
from san_peft.propagation.memory import DATA, Block, Memory
from san_peft.propagation.norms import Norms
from san_peft.propagation.operations import Operations
from san_peft.propagation.schema import overwritten, schema_of, tensors


class Follow(TorchDispatchMode):
    """Keeps a `State` for each tensor while a model runs.

    Args:
        model: The model. Its parameters and buffers are registered as known memory.
        norms: Follows the outputs of norms in the same pass.
        layers: The layers to follow, by name.

    Attributes:
        ledger: Writers of channels and their readers.
        memory: State of the storages behind tensors.
        numbers: Number of each layer, by name.
        bits: Bit of each layer in a reach.
        calls: Number of calls of each layer.
        overwritten: Layers whose output was overwritten in place.
        paused: Nesting depth of running layers. Operations inside a layer are not followed.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, norms: Norms, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.states: Any = WeakTensorKeyDictionary()
        self.ledger, self.memory = Ledger(), Memory()
        self.numbers = {name: number for number, name in enumerate(layers)}
        self.bits = {name: DATA << 1 + number for name, number in self.numbers.items()}
        self.overwritten: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.norms = norms
        self.paused = 0
        self.operations = Operations(self.ledger, self.find, self.follows_layers, self.parameter)
        for module in model.modules():
            self.memory.see(value for value in vars(module).values() if isinstance(value, Tensor))
        self.memory.see(model.buffers())
        for name, parameter in model.named_parameters():
            block = self.memory.block(parameter, new=True)
            if block is not None and parameter.dim() > 1:
                block.parameter = name

    # ---------------------------------------------------------------- layers

    def write(self, tensor: Tensor, layer: str, dim: int, first: int = 0, size: int | None = None) -> None:
        """Marks a tensor as a layer's output, channels along `dim` numbered from `first` out of `size` in total."""
        writer, shape = self.ledger.write(layer, size or tensor.shape[dim]), [1] * tensor.dim()
        shape[dim] = tensor.shape[dim]
        codes = writer * STRIDE + first + torch.arange(tensor.shape[dim]).view(shape)
        self._set(tensor, State(codes.expand(tensor.shape), {writer: ()}))
        block = self.memory.block(tensor)
        if block is not None:
            block.layer = layer

    def lose(self, tensor: Tensor, operation: str, reason: str) -> None:
        """Marks the channels of a tensor as lost."""
        self._set(tensor, self.ledger.lose(tensor.shape, operation, reason))

    def enter(self, layer: str, given: Iterable[Tensor]) -> int:
        """Pauses following while a layer runs; returns the reach of its results."""
        self.calls[layer] += 1
        self.paused += 1
        return 0 if self.paused > 1 else self.memory.reach(given) | self.bits[layer] | DATA

    def overwrite(self, tensors: Iterable[Tensor]) -> None:
        """Records that the outputs of layers that share memory with these tensors are overwritten."""
        for tensor in tensors:
            block = self.memory.block(tensor)
            if block is not None and block.layer is not None:
                self.overwritten.add(block.layer)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Records that these tensors are read by something that is not followed, such as the caller of the model."""
        for tensor in tensors:
            state = None if self.memory.block(tensor) is None else self.find(tensor)
            if state is not None:
                self.ledger.consume(state.codes)
            self.norms.open(tensor)

    # ---------------------------------------------------------------- states of tensors

    def find(self, tensor: Tensor) -> State | None:
        """Returns the state of a tensor, or `None` for a constant."""
        block = self.memory.block(tensor)
        if block is None:
            return self._outside(tensor)
        if block.parts is not None:
            try:
                return self.memory.part(tensor, block)
            except Lost as lost:
                return self.ledger.lose(tensor.shape, "memory", str(lost))
        state = self.states.get(tensor)
        if state is None and block.zeros:
            return State(torch.full((), ZERO).expand(tensor.shape))
        if state is None and block.empty and carries(tensor):
            return self._unwritten(tensor, block)
        return state

    def follows_layers(self, value: Any) -> bool:
        """Returns whether a tensor of integers or booleans depends on a layer."""
        return isinstance(value, Tensor) and not carries(value) and bool(self.memory.reach([value]))

    def parameter(self, tensor: Tensor) -> str | None:
        """Returns the name of the parameter whose memory a tensor shares."""
        block = self.memory.block(tensor)
        return None if block is None else block.parameter

    def _outside(self, tensor: Tensor) -> State | None:
        """Registers a tensor that no operation returned: a constant before the first layer ran, lost afterwards."""
        block = self.memory.block(tensor, new=True)
        if self.ledger.writers and carries(tensor) and tensor.numel() > 1 and block is not None:
            self.ledger.consume_all()
            block.reach = DATA
            self.lose(tensor, "input", "its values come from outside of torch, such as a list or numpy")
        return self.states.get(tensor)

    def _unwritten(self, tensor: Tensor, block: Block) -> State | None:
        """Returns the state of memory that no operation was seen to write: a constant before the first layer ran."""
        if not self.ledger.writers:
            return None
        if block.unwritten is None:
            block.unwritten = self.ledger.lose((), "input", "no operation was seen to write its values")
            self.ledger.unwritten |= set(block.unwritten.via)
        return State(block.unwritten.codes.expand(tensor.shape), block.unwritten.via)

    def _set(self, tensor: Tensor, state: State) -> None:
        """Sets the state of a result."""
        block = self.memory.block(tensor, new=True)
        if block is not None and block.parts is not None:
            return
        self.states[tensor] = state
        if block is not None:
            block.views.append(WeakIdRef(tensor))

    def _overwrite(self, tensor: Tensor, state: State) -> None:
        """Sets the state of a tensor that was written into, and updates the other views of its memory."""
        block = self.memory.block(tensor, new=True)
        if block is None:
            self.states[tensor] = state
            return
        views = [view for view in (reference() for reference in block.views) if view is not None]
        alone = all(view is tensor for view in views) and tensor in self.states
        if block.parts is None and alone and self.memory.covers(tensor):
            self.states[tensor] = state
            return
        untouched = block.unwritten or State(torch.full((), ZERO if block.zeros else NONE))
        try:
            self.memory.write(tensor, state, self.states, untouched)
        except Lost as lost:
            self.memory.forget(tensor, self.ledger.lose((), "memory", str(lost)))

    # ---------------------------------------------------------------- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = schema_of(func)
        given = tensors((args, kwargs))
        there = _on_one_device(func, given, args, kwargs)
        targets = overwritten(func, args, kwargs)
        self.overwrite(targets)
        if self.paused:
            return func(*there[0], **there[1])
        name = schema.name if not schema.inplace or isinstance(args[0], Tensor) else f"{schema.name}_"
        blind = name in rules.BLIND
        states = [None if blind else self.find(tensor) for tensor in given]
        known = [state for state in states if state is not None and state.via]
        reach = 0 if blind else self.memory.reach(given)
        out = func(*there[0], **there[1])
        outs = tensors(out)
        self.norms.see(name, func, args, kwargs, given, outs, bool(targets))
        if any(not set(state.via) <= self.ledger.unwritten for state in known):
            self._follow(name, func, args, kwargs, out, targets, known)
        elif reach and not known:
            self._derive(name, given, states, [*outs, *targets])
        self.memory.made(name, given, [*outs, *targets], reach, bool(targets))
        return out

    def _derive(self, name: str, given: list[Tensor], states: list[State | None], outs: list[Tensor]) -> None:
        """Sets the states of results that depend on layers, but have no channels: constant or lost."""
        lost = self.memory.reach(tensor for tensor, state in zip(given, states, strict=True) if state is None)
        weight = self.parameter(given[0]) if name in rules.MOVES else None  # expert weights chosen by a router
        for tensor in filter(carries, outs):
            if lost:
                self.lose(tensor, name, "its values depend on layers through integers")
            else:
                self._set(tensor, State(torch.full((), NONE).expand(tensor.shape)))
            block = self.memory.block(tensor)
            if block is not None and weight is not None:
                block.parameter = weight

    def _follow(
        self, name: str, func: Any, args: Any, kwargs: Any, out: Any, targets: list[Tensor], known: list[State]
    ) -> None:
        """Sets the states of the results of an operation and of the tensors that it wrote into."""
        outs = tensors(out)
        reason: str = ""
        states: list[State] = []
        try:
            if not any(map(carries, outs)):
                raise Lost("its result carries no channels")
            states = self.operations.apply(name, func, args, kwargs, out)
        except Lost as lost:
            reason = str(lost)
        except Exception as error:  # a bug in a rule must not break a model that runs
            reason = f"its rule raised {type(error).__name__}; please report this"
        if reason or targets or name not in rules.MOVES | rules.KEEPS:
            self.ledger.spend(known, [] if reason or targets else states)
        found = dict(zip(map(id, outs), states, strict=False))
        for tensor in {id(tensor): tensor for tensor in (*outs, *targets)}.values():
            state, written_to = found.get(id(tensor)), any(tensor is target for target in targets)
            if not carries(tensor):
                continue
            if state is not None and state.codes.shape != tensor.shape:
                self.ledger.spend(known, [])
                state, reason = None, "its rule returned another shape; please report this"
            if state is None:
                if not reason and not written_to:
                    continue
                state = self.ledger.lose(tensor.shape, name, reason or "it writes into one of its arguments")
            (self._overwrite if written_to else self._set)(tensor, state)


def _on_one_device(func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Lets a model with weights on the meta device compute real positions and masks, which control flow may need.

    Creates factory tensors on the CPU instead of meta, and moves them to meta where they meet weights. Converts boolean
    indices to positions, because the shape of the result depends on their values.
    """
    on_meta = [tensor.is_meta for tensor in given]
    if kwargs.get("device") is not None and (any(on_meta) or torch.device(kwargs["device"]).type == "meta"):
        kwargs = {**kwargs, "device": torch.device("meta" if any(on_meta) else "cpu")}
    if all(on_meta) or not any(on_meta):
        return args, kwargs
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
        where = [[i] if i is None or i.dtype != torch.bool else list(i.nonzero().unbind(1)) for i in args[1]]
        args = (args[0], list(itertools.chain(*where)), *args[2:])
    return tree_map_only(Tensor, lambda leaf: leaf.to("meta"), (args, kwargs))

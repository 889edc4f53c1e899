"""Follows the outputs of norms: which layers read them, and whether anything else does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from san_peft.propagation import rules
from san_peft.propagation.codes import STRIDE, ZERO, Lost, State, carries, move
from san_peft.propagation.graph import Norm


class Norms:
    """Finds the norms of a model, and the layers that read the output of each channel by channel.

    Marks each tensor that comes from a norm with codes, like `Follow` does for layers: norm * STRIDE + channel. The
    weight and bias of a norm are marked before the model runs, so that the operations inside the norm reveal its
    channel axis. A norm is *open* once anything but a layer or a movement of entries uses its output.

    Args:
        model: The model; its norms are identified by their parameters.
        layers: Names of adaptable layers, which are not norms.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        layers = set(layers)
        self.modules = {n: m for n, m in model.named_modules() if n and n not in layers and _may_be_norm(m)}
        self.sizes = [len(module.get_parameter("weight")) for module in self.modules.values()]
        self.marks: Any = WeakTensorKeyDictionary()
        self.opened: set[int] = set()
        self.calls: Counter[int] = Counter()
        self.reads: dict[str, list[int | None]] = {}
        self.inside: int | None = None
        self.ran_norm = False
        for number, module in enumerate(self.modules.values()):
            for parameter in module.parameters():
                if parameter in self.marks:  # shared by two norms
                    self.opened |= {number, *self.marks[parameter].via}
                self.marks[parameter] = State(number * STRIDE + torch.arange(self.sizes[number]), {number: ()})

    def enter(self, number: int, paused: bool) -> None:
        """Records that a norm starts to run. A norm inside a layer is open, because it cannot be followed there."""
        self.calls[number] += 1
        self.inside, self.ran_norm = number, False
        if paused or self.calls[number] > 1:
            self.opened.add(number)

    def leave(self, number: int, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Checks that a norm mapped one tensor to a new one of the same shape that holds all its channels."""
        self.inside = None
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        state = self.marks.get(out) if isinstance(out, Tensor) else None
        fits = (
            (self.ran_norm or "norm" in type(module).__name__.lower())
            and len(given) == 1
            and state is not None
            and out.shape == given[0].shape
            and out.untyped_storage()._cdata != given[0].untyped_storage()._cdata
            and set(state.via) == {number}
            and bool((state.codes >= 0).all())
        )
        if not fits:
            self.opened.add(number)

    def open(self, value: Any) -> None:
        """Records that something other than an adaptable layer uses a tensor."""
        if isinstance(value, Tensor) and value in self.marks:
            self.opened |= set(self.marks[value].via)

    def read(self, layer: str, x: Tensor, dim: int) -> None:
        """Records the input of a layer in one call, with channels along `dim`."""
        state, number = self.marks.get(x), None
        if state is not None:
            number, size = next(iter(state.via)), x.shape[dim]
            rows = state.codes.movedim(dim, -1)
            as_written = (rows == number * STRIDE + torch.arange(size)) | (rows == ZERO)
            if len(state.via) > 1 or size != self.sizes[number] or not bool(as_written.all()):
                self.open(x)
        self.reads.setdefault(layer, []).append(number)

    def see(self, name: str, func: Any, args: Any, kwargs: Any, given: list[Tensor], outs: list[Tensor], writes: bool):
        """Carries the marks through an operation outside of layers.

        Args:
            name: Name of the operation, without the underscore of in-place operations.
            func: The operation.
            args: Its arguments.
            kwargs: Its keyword arguments.
            given: The tensors among them.
            outs: The tensors that it returned.
            writes: Whether it wrote into an argument.
        """
        self.ran_norm = self.ran_norm or any(norm in name for norm in rules.NORM_OPS)
        marked = [tensor for tensor in given if tensor in self.marks]
        if not marked or name in rules.BLIND:
            return
        moved: list[State] = []
        if not writes and name in rules.MOVES:
            try:
                moved = move(name, func, args, kwargs, self.marks.get)
            except Lost:
                moved = []  # an index on the meta device: the norm becomes open
        elif not writes and name in rules.KEEPS:
            moved = [self.marks[marked[0]]]
        elif not writes and self.inside is not None:
            moved = self._affine(name, given, outs)
        kept = {number for state in moved for number in state.via}
        for tensor in marked:
            if not writes and set(self.marks[tensor].via) == {self.inside}:
                continue
            self.opened |= set(self.marks[tensor].via) - kept
        for tensor, state in zip(outs, moved, strict=False):
            if carries(tensor) and state.codes.shape == tensor.shape:
                self.marks[tensor] = state
            else:
                self.opened |= set(state.via)

    def norms(self, order: Iterable[str]) -> tuple[Norm, ...]:
        """Returns the norms whose output only layers read, with these layers in the given order."""
        order, found = list(order), []
        for number, name in enumerate(self.modules):
            calls = {layer: set(self.reads.get(layer, ())) for layer in order}
            readers = tuple(layer for layer in order if number in calls[layer])
            if readers and number not in self.opened and all(calls[layer] == {number} for layer in readers):
                found.append(Norm(name, readers))
        return tuple(found)

    def _affine(self, name: str, given: list[Tensor], outs: list[Tensor]) -> list[State]:
        """Carries the marks of a norm's weight and bias to the tensors that they are combined with, inside the norm."""
        own = [self.marks[x].codes for x in given if x in self.marks and set(self.marks[x].via) == {self.inside}]
        if not own or not outs or self.inside is None:
            return []
        shape, via = outs[0].shape, {self.inside: ()}
        if any(norm in name for norm in rules.NORM_OPS):
            after = 0 if "layer_norm" in name or "rms_norm" in name else len(shape) - 2
            codes = own[0].reshape(-1, *[1] * after)
            return [State(codes.expand(shape), via)] if len(codes) == shape[-1 - after] else []
        if name in ("add", "sub") and len(own) < sum(x.dim() > 0 for x in given):
            return []  # such as a global response norm, which adds its input
        if name not in ("mul", "add", "sub", "div", "addcmul"):
            return []
        while len(own) > 1:
            own.append(torch.maximum(*torch.broadcast_tensors(own.pop(), own.pop())))
        return [State(torch.broadcast_to(own[0], shape), via)]


def _may_be_norm(module: nn.Module) -> bool:
    parameters = module._parameters
    one_axis = all(p is None or (not is_lazy(p) and p.dim() == 1) for p in parameters.values())
    return (
        one_axis
        and parameters.get("weight") is not None
        and set(parameters) <= {"weight", "bias"}
        and next(module.children(), None) is None
    )

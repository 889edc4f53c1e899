"""Applies rules of operations that combine entries: sums, matrix products, attention, convolutions, pooling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from san_peft.propagation import rules
from san_peft.propagation.codes import NONE, STRIDE, Lost, State, constant, highest, thin, varies
from san_peft.propagation.ledger import Ledger
from san_peft.propagation.schema import argument


class Contractions:
    """Implements the rules of operations that combine several entries.

    Args:
        ledger: Records writers and readers of channels.
        find: Returns the state of a tensor, or `None` for a constant.
        follows_layers: Returns whether a tensor of integers or booleans depends on a layer.
        parameter: Returns the name of the parameter whose memory a tensor shares, or `None`.
    """

    def __init__(
        self,
        ledger: Ledger,
        find: Callable[[Tensor], State | None],
        follows_layers: Callable[[Any], bool],
        parameter: Callable[[Tensor], str | None],
    ) -> None:
        self.ledger, self.find = ledger, find
        self.follows_layers, self.parameter = follows_layers, parameter

    def state(self, value: Any) -> State:
        """Returns the state of a tensor or number; returns a state unchanged."""
        if isinstance(value, State):
            return value
        state = self.find(value) if isinstance(value, Tensor) else None
        return constant(value) if state is None else state

    def contract(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> list[State]:
        """Returns the states of the results of an operation, like `Operations.apply`."""
        whole = out if isinstance(out, Tensor) else out[0]
        if name.startswith("_scaled_dot_product") or name == "flex_attention":
            return [self._attention(args, whole)]
        if name in ("mm", "bmm"):
            return [self._matmul(name, *args[:2])]
        if name in ("addmm", "baddbmm", "addmv"):
            product = (self._vector if name == "addmv" else self._matmul)(name, *args[1:3])
            return [product if kwargs.get("beta", 1) == 0 else self.sum(args[0], product)]
        if name in ("mv", "dot"):
            return [self._vector(name, *args[:2])]
        if name in rules.POOLS:
            last = range(self.state(args[0]).codes.dim())[-rules.POOLS[name] :]
            window = argument(func, args, kwargs, "kernel_size", None) or [0] * len(last)
            step = argument(func, args, kwargs, "stride", None) or window
            axes = [dim for dim, *one in zip(last, window, step, strict=True) if one != [1, 1]]
            return [self._pool(self.state(args[0]), whole, axes, name if "max" in name else rules.POOL)]
        if name in rules.ALONG:
            return self._along(name, func, args, kwargs, out)
        if name == "convolution":
            return [self._convolution(args, whole)]
        tensors = [value for value in args if isinstance(value, Tensor)]
        weights = [weight for weight in map(self.parameter, tensors) if weight is not None]
        for weight in weights:
            self.ledger.beside.setdefault(weight, name)
        raise Lost(f"there is no rule for {name}{f', which reads {_short(weights[0])}' if weights else ''}")

    # ---------------------------------------------------------------- sums

    def sum(self, a: Any, b: Any) -> State:
        """Returns the state of a sum. Where two streams meet, the more recent writer is kept."""
        left, right = self.state(a), self.state(b)
        if left.statistic or right.statistic:
            return self._beside(left, right)
        shape = torch.broadcast_shapes(left.codes.shape, right.codes.shape)
        x, y = thin(torch.broadcast_to(left.codes, shape), torch.broadcast_to(right.codes, shape))
        both = (x >= 0) & (y >= 0)
        differ = both & (x != y)
        if bool((differ & ((x ^ y) < STRIDE)).any()):
            raise Lost("it adds different channels of one layer")
        alone = ((x >= 0) & (y == NONE)) | ((y >= 0) & (x == NONE))
        name: tuple[str, ...] = ()
        if bool(differ.any()):
            name = (rules.RESIDUAL,)
        elif bool(alone.any()):
            added = b if left.via else a
            vector = isinstance(added, Tensor) and added.numel() == max(added.shape, default=1)
            name = (rules.BIAS if vector else rules.OFFSET,)
        codes = torch.maximum(x, y)
        self.ledger.consume(codes[alone])
        if name == (rules.RESIDUAL,) and len(left.via) == len(right.via) == 1:
            if all(rules.path_kind(path) == "exact" for state in (left, right) for path in state.via.values()):
                self.ledger.joined.add((max(*left.via, *right.via), min(*left.via, *right.via)))
        writers = codes >> 32
        present = {w for w in {**left.via, **right.via} if bool((writers == w).any())}
        via: dict[int, tuple[str, ...]] = {}
        for writer, path in itertools.chain(left.via.items(), right.via.items()):
            if writer in present:
                via[writer] = rules.join(via.get(writer, ()), *path, *name)
        return State(codes.expand(shape), via)

    def _beside(self, left: State, right: State) -> State:
        """Returns the state of a sum with a statistic, such as the mean in a norm or attention scores."""
        shape = torch.broadcast_shapes(left.codes.shape, right.codes.shape)
        kept, other = (right, left) if left.statistic else (left, right)
        if kept.statistic or not kept.tracked:
            codes = torch.maximum(torch.broadcast_to(left.codes, shape), torch.broadcast_to(right.codes, shape))
            return State(codes, {**left.via, **right.via}, True)
        missing = len(shape) - other.codes.dim()
        wide = torch.broadcast_to(kept.codes, shape)
        shared = [dim for dim in range(len(shape)) if dim < missing or other.codes.shape[dim - missing] == 1]
        axes = [dim for dim in range(len(shape)) if varies(wide, dim)]
        if axes and not set(axes) & set(shared):
            raise Lost("it adds a tensor whose channels were contracted")
        return State(wide, kept.passed("norm"))

    def alike(self, state: State, high: Tensor, *names: str) -> dict[int, tuple[str, ...]]:
        """Returns the paths after equal entries were combined into one; constants among them count as an offset."""
        beside = (state.codes == NONE) & (high >= 0)
        if not state.statistic and bool(beside.any()):
            self.ledger.consume(high.expand_as(state.codes)[beside])
            names = (*names, rules.OFFSET)
        return state.passed(*names)

    def _collapse(self, state: State, dims: Iterable[int]) -> Tensor | None:
        """Reduces axes along which all entries but constants have the same code; returns `None` if they differ."""
        high, only = highest(state.codes, dims)
        return high if only else None

    # ---------------------------------------------------------------- products of matrices

    def _attention(self, args: Any, out: Tensor) -> State:
        query, value = args[0], self.state(args[2])
        if not (value.codes >= 0).any():
            return State(torch.full((), NONE).expand(out.shape))
        high = self._collapse(value, [value.codes.dim() - 2])
        if high is None:
            raise Lost("the values of different tokens come from different channels")
        via = self.alike(value, high, rules.ATTENTION)
        if high.shape[-3] != out.shape[-3]:
            high = high.repeat_interleave(query.shape[-3] // high.shape[-3], -3)
        return State(high.expand(out.shape), via, value.statistic)

    def _vector(self, name: str, a: Any, b: Any) -> State:
        left, right = self.state(a), self.state(b)
        left = State(left.codes.view(-1, left.codes.shape[-1]), left.via, left.statistic)
        right = State(right.codes.unsqueeze(1), right.via, right.statistic)
        product = self._matmul(name, left, right, b)
        return State(product.codes.squeeze(1), product.via, product.statistic)

    def _matmul(self, name: str, a: Any, b: Any, weight: Any = None) -> State:
        left, right = self.state(a), self.state(b)
        weights = [self.parameter(x) if isinstance(x, Tensor) else None for x in (a, b if weight is None else weight)]
        shape = (*left.codes.shape[:-1], right.codes.shape[-1])
        sides = ((left, left.codes.dim() - 1), (right, right.codes.dim() - 2))
        tracked = [state.tracked and own is None for (state, _), own in zip(sides, weights, strict=True)]
        if not any(tracked):
            if not left.via and not right.via:
                return State(torch.full((), NONE).expand(shape))
            return self.ledger.lose(shape, name, "it contracts channels", statistic=True)
        parameter = next((own for own in weights if own is not None), None)
        if parameter is not None and any(t and self._lost(s) for (s, _), t in zip(sides, tracked, strict=True)):
            raise self._ended(name, parameter)
        scores = left.statistic or right.statistic or all(tracked)
        label = rules.ATTENTION if scores else rules.MIX
        found = [self._along_axis(*side, label) for side, one in zip(sides, tracked, strict=True) if one]
        carried = [(high, via) for high, via in found if via is not None]
        if len(carried) == 2:  # a lost stream has one code everywhere
            carried = [one for one, (state, _) in zip(carried, sides, strict=True) if not self._lost(state)]
            if len(carried) != 1:
                lost = "it multiplies two streams whose channels are already lost"
                raise Lost("both factors could carry the channels" if carried else lost)
        if not carried and all(tracked):
            return self.ledger.lose(shape, name, "it contracts the channels of two streams", statistic=True)
        if not carried:
            raise self._ended(name, parameter)
        ((high, via),) = carried
        return State(high.expand(shape), via)

    def _along_axis(self, state: State, dim: int, label: str) -> tuple[Tensor, dict[int, tuple[str, ...]] | None]:
        """Contracts an axis as a weighted sum over tokens or streams; the path is `None` if it contracts channels."""
        try:
            return self.combine(state, [dim], (label,), (label,))
        except Lost:
            return state.codes, None

    def _ended(self, name: str, parameter: str | None) -> Lost:
        """Returns the reason why a product loses the channels, and records the parameter that it multiplies with."""
        if parameter is None:
            return Lost("it contracts the channel axis with a tensor that is not the weight of an adaptable layer")
        self.ledger.beside.setdefault(parameter, name)
        return Lost(f"it multiplies channels with the parameter {_short(parameter)} outside of a layer")

    def _lost(self, state: State) -> bool:
        return all(isinstance(self.ledger.writers[writer], tuple) for writer in state.via)

    def _convolution(self, args: Any, out: Tensor) -> State:
        state, weight, bias, transposed, groups = self.state(args[0]), args[1], args[2], args[6], args[8]
        if self.state(weight).via:
            raise Lost("its kernel is computed from the output of a layer")
        channels = weight.dim() - 2
        if transposed or groups != state.codes.shape[-1 - channels]:
            raise self._ended("convolution", self.parameter(weight))
        pixels = list(range(state.codes.dim()))[-channels:]
        mixed = self._pool(state, out, pixels, rules.MIX, weight.shape[0] // groups)
        if bias is None:
            return mixed
        return self.sum(bias.view(-1, *[1] * channels), mixed)

    # ---------------------------------------------------------------- along axes that hold no channels

    def _pool(self, state: State, out: Tensor, axes: list[int], label: str, times: int = 1) -> State:
        """Combines entries along some axes, and repeats each channel along the axis before them."""
        high = self._collapse(state, axes)
        if high is None:
            raise Lost("pixels of one channel come from different channels")
        via = self.alike(state, high, label)
        if times > 1:
            high = high.repeat_interleave(times, axes[0] - 1)
        return State(high.expand(out.shape), via, state.statistic)

    def _along(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> list[State]:
        state = self.state(args[0])
        dims = argument(func, args, kwargs, "dim", -1)
        dims = [dims] if isinstance(dims, int) else list(dims)
        dims = [dim % state.codes.dim() for dim in dims]
        results = out if isinstance(out, tuple | list) else [out]
        high = self._collapse(state, dims)
        if high is not None:
            via = self.alike(state, high, rules.ALONG[name])
            return [State(high.expand(result.shape), via, state.statistic) for result in results]
        raise Lost("it mixes or sorts channels, or streams of several layers")

    def combine(
        self, state: State, dims: list[int], alone: tuple[str, ...], summed: tuple[str, ...] | None
    ) -> tuple[Tensor, dict[int, tuple[str, ...]] | None]:
        """Reduces axes: to their common code, or as a sum of streams.

        Args:
            state: The state to reduce.
            dims: The axes, which are kept with size one.
            alone: Names to add to the path if all entries along the axes have the same code.
            summed: Names to add besides `residual` if they belong to several streams; `None` to reject this case.

        Returns:
            The codes and the path. The path is `None` if channels are reduced.

        Raises:
            Lost: If several streams cannot be combined.
        """
        high, only = highest(state.codes, dims)
        if only or state.statistic:
            return high, self.alike(state, high, *alone)
        small = thin(state.codes)[0]
        writers, mixed, found = small >> 32, [], state.present()
        if bool(((writers == writers.amax(dims, keepdim=True)) | (small < 0)).all()):
            return high, None  # different channels of one writer
        for writer in found:
            own = torch.where(writers == writer, small, NONE)
            mixed.append(bool(((own != own.amax(dims, keepdim=True)) & (own >= 0)).any()))
        if all(mixed):
            return high, None
        if any(mixed) or summed is None:
            raise Lost("it combines the streams of several layers")
        if not summed and len(found) == 2 and all(rules.path_kind(path) == "exact" for path in state.via.values()):
            self.ledger.joined.add((max(found), min(found)))
        present = State(high, state.via).present()
        named = state.passed(rules.RESIDUAL, *summed)
        return high, {writer: path for writer, path in named.items() if writer in present}


def _short(parameter: str) -> str:
    """Returns the last two parts of a parameter name, so that all blocks of a model share one barrier reason."""
    return ".".join(parameter.split(".")[-2:])

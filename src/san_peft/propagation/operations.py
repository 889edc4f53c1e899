"""Applies the rules of operations to codes: products, reductions, selections, and indexed writes and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from san_peft.propagation import rules
from san_peft.propagation.codes import NONE, ZERO, Lost, State, constant, move, pile, varies
from san_peft.propagation.contractions import Contractions
from san_peft.propagation.schema import argument, tensors

DECIDED = "the values of layer outputs decide which layer's entries are at which position"


class Operations(Contractions):
    """Dispatches to the rule of an operation by its name; the tables are in `rules`."""

    def apply(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> list[State]:
        """Returns the states of the results of an operation; trailing results without channels may be omitted.

        Args:
            name: Name of the operation, without the underscore of in-place operations.
            func: The operation.
            args: Its arguments.
            kwargs: Its keyword arguments.
            out: Its result.

        Raises:
            Lost: If channels cannot be followed through it.
        """
        first = self.state(args[0] if args else None)
        whole = out if isinstance(out, Tensor) else out[0]
        if name in rules.MOVES:
            self._check_taken(name, func, args, kwargs, first)
            return move(name, func, args, kwargs, self.find)
        if name in rules.KEEPS:
            return [first]
        if name in rules.ACTIVATIONS or name in rules.CHOICES:
            return [self._bend(name, args, whole)]
        if name in rules.COMPARISONS:
            return []
        for norm in rules.NORM_OPS:
            if norm in name:
                return [State(first.codes, first.passed(norm), first.statistic)]
        if name in ("add", "sub", "rsub", "complex"):
            return [self.sum(*args[:2])]
        if name == "lerp" and not self.state(args[2]).via:
            return [self.sum(*args[:2])]
        if name in ("addcmul", "addcdiv"):
            return [self.sum(args[0], self._product("mul" if name == "addcmul" else "div", *args[1:3]))]
        if name in ("mul", "div") and not kwargs.get("rounding_mode"):
            return [self._product(name, *args[:2])]
        if name == "glu":
            return [self._glu(first, argument(func, args, kwargs, "dim", -1))]
        if name in rules.REDUCTIONS:
            return self._reduce(name, func, args, kwargs, out)
        if name in ("_softmax", "_log_softmax", "_safe_softmax"):
            return [self._softmax(first, argument(func, args, kwargs, "dim", -1))]
        if name in rules.PILES or (name == "index_put" and argument(func, args, kwargs, "accumulate", False)):
            return [self._pile(name, func, args, kwargs)]
        if name in rules.WRITES:
            return self._write(name, func, args, kwargs)
        if name in ("masked_fill", "copy", "where", "fill", "zero"):
            return [self._choose(name, args, whole)]
        if name == "as_strided":
            return [self._strided(args, first)]
        if name == "view_as_complex":
            return [self._complex(first)]
        if name == "view_as_real":
            return [State(first.codes.unsqueeze(-1).expand(*first.codes.shape, 2), first.via, first.statistic)]
        return self.contract(name, func, args, kwargs, out)

    # ---------------------------------------------------------------- sums and products

    def _product(self, name: str, a: Any, b: Any) -> State:
        left, right = self.state(a), self.state(b)
        x, y = _broadcast(left, right)
        if not left.tracked and not right.tracked:
            kept = right if right.statistic else left
            return State(y if kept is right else x, kept.via, kept.statistic)
        for one, other, codes, factor in ((left, right, x, b), (right, left, y, a)):
            if one.tracked and not other.tracked:
                label = ("norm",) if other.statistic else ("mask",) if self.follows_layers(factor) else ()
                turned = ("reciprocal",) if name == "div" and one is right else ()
                return State(codes, one.passed(*label, *turned))
        if torch.equal(x, y):
            return State(x, {**right.passed(rules.SELF_GATE), **left.passed(rules.SELF_GATE)})
        if _is_factor(right, left):
            return State(x, left.passed(rules.GATED))
        if _is_factor(left, right):
            return State(y, right.passed(rules.GATED, *(("reciprocal",) if name == "div" else ())))
        bent_left, bent_right = (any(rules.is_activation(p) for p in s.via.values()) for s in (left, right))
        if bent_right and not bent_left:
            return State(x, left.passed(rules.GATED))
        if bent_left and not bent_right and name == "mul":
            return State(y, right.passed(rules.GATED))
        raise Lost("it combines two branches of which neither or both pass an activation")

    def _glu(self, state: State, dim: int) -> State:
        half = state.codes.shape[dim] // 2
        linear = State(state.codes.narrow(dim, 0, half), state.via, state.statistic)
        return self._product("mul", linear, State(state.codes.narrow(dim, half, half), state.passed("sigmoid")))

    def _bend(self, name: str, args: Any, out: Tensor) -> State:
        states = [self.state(value) for value in args[:2] if isinstance(value, Tensor)]
        tracked = [state for state in states if state.tracked]
        label = rules.ACTIVATIONS.get(name, name)
        if name in rules.CHOICES and len(states) == 2:
            both = self.sum(*states)
            return State(both.codes, both.passed(label), both.statistic)
        if len(tracked) > 1:
            raise Lost("it combines two streams")
        state = next((s for s in (*tracked, *states) if s.via), states[0])
        return State(torch.broadcast_to(state.codes, out.shape), state.passed(label), state.statistic)

    # ---------------------------------------------------------------- reductions

    def _reduce(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> list[State]:
        state = self.state(args[0])
        dims = argument(func, args, kwargs, "dim", None)
        dims = [] if dims is None else [dims] if isinstance(dims, int) else list(dims)
        size = state.codes.dim()
        dims = [d % size for d in dims] if dims and size else list(range(size))
        alone = (rules.POOL if name in ("mean", "sum") else name,)
        codes, path = self.combine(state, dims, alone, rules.SUMS.get(name))
        shape = next(o.shape for o in (out if isinstance(out, tuple | list) else [out]) if isinstance(o, Tensor))
        outs = len(out) if isinstance(out, tuple | list) else 1
        if path is None:
            return [self.ledger.lose(shape, name, "it contracts channels", statistic=True) for _ in range(outs)]
        return [State(codes.reshape(shape), path, state.statistic) for _ in range(outs)]

    def _softmax(self, state: State, dim: int) -> State:
        reason = "it compares channels" if varies(state.codes, dim) else "it compares positions"
        return self.ledger.lose(state.codes.shape, "softmax", reason, statistic=True)

    # ---------------------------------------------------------------- indexing, writes, selections, indexed sums

    def _check_taken(self, name: str, func: Any, args: Any, kwargs: Any, state: State) -> None:
        """Raises `Lost` if layer outputs decide which of several sources an operation reads."""
        if name not in rules.TAKES or not any(map(self.follows_layers, tensors((args[1:], kwargs)))):
            return
        dims = range(state.codes.dim())
        if name == "index":
            dims = [dim for dim, index in enumerate(args[1]) if index is not None]
        elif name in ("gather", "index_select", "repeat_interleave"):
            dims = [argument(func, args, kwargs, "dim", 0) or 0]
        elif name == "embedding":
            dims = [0]
        if not state.statistic and any(varies(state.codes, dim) for dim in dims):
            raise Lost(DECIDED)

    def _check_written(self, target: State, codes: Tensor, args: Any) -> None:
        """Raises `Lost` if layer outputs decide which positions are written, and the positions differ."""
        if any(map(self.follows_layers, tensors(args[1:]))):
            rest = [dim for dim in range(codes.dim() - 1) if varies(codes, dim)]
            if not set(target.via) <= self.ledger.unwritten or rest or bool((codes < 0).any()):
                raise Lost(DECIDED)

    def _write(self, name: str, func: Any, args: Any, kwargs: Any) -> list[State]:
        if kwargs.get("reduce") or (len(args) > 4 and isinstance(args[4], str)):
            raise Lost("it multiplies or adds when it writes")
        (moved,) = move(name, func, args, kwargs, self.find)
        if not moved.statistic:
            self._check_written(self.state(args[0]), moved.codes, args)
            if bool((moved.codes == NONE).any()):
                raise Lost("it writes some entries of one stream into another")
        return [moved]

    def _pile(self, name: str, func: Any, args: Any, kwargs: Any) -> State:
        """Sums entries that are written to the same position, and adds them to the target."""
        if argument(func, args, kwargs, "reduce", "sum") not in ("sum", "mean"):
            raise Lost("it reduces by a maximum, a minimum or a product")
        if name == "col2im":
            target, source, place = self._folded(args)
        else:
            target, source, place = self._placed(name, func, args, kwargs)
        size = target.codes.numel()
        source_codes = torch.broadcast_to(source.codes, place.shape).flatten()
        codes, met = pile(source_codes, place.flatten(), size)
        self.ledger.consume(codes[place.flatten()][source_codes == NONE])
        label = (rules.RESIDUAL,) if met else ()
        if bool((source_codes == NONE).any()) and source.via:
            label = (*label, rules.OFFSET)
        added = State(codes.view(target.codes.shape), source.passed(*label), source.statistic)
        if not source.statistic:
            self._check_written(target if not met else source, added.codes, args)
        return self.sum(target, added) if target.via or (target.codes == NONE).any() else added

    def _placed(self, name: str, func: Any, args: Any, kwargs: Any) -> tuple[State, State, Tensor]:
        target = self.state(args[0])
        numbers = torch.arange(target.codes.numel()).view(target.codes.shape)
        where = [x for x in ([*args[1]] if name == "index_put" else [args[2]]) if isinstance(x, Tensor)]
        if any(x.is_meta for x in where):
            raise Lost(f"{name} has an index on the meta device")
        source = self.state(args[2] if name == "index_put" else args[3])
        if name == "index_put":
            return target, source, numbers[tuple(slice(None) if x is None else x.cpu() for x in args[1])]
        if name == "index_add":
            return target, source, numbers.index_select(args[1], args[2].cpu())
        index = args[2].cpu()
        source = State(source.codes[tuple(slice(0, n) for n in index.shape)], source.via, source.statistic)
        return target, source, numbers.gather(args[1], index)

    def _folded(self, args: Any) -> tuple[State, State, Tensor]:
        state, (height, width), kernel, *rest = self.state(args[0]), *args[1:]
        batch, rows = state.codes.shape[:-2], state.codes.shape[-2]
        channels = rows // (kernel[0] * kernel[1])
        size = channels * height * width * (batch[0] if batch else 1)
        numbers = torch.arange(1.0, size + 1, dtype=torch.float64).view(*batch, channels, height, width)
        place = torch.ops.aten.im2col(numbers, kernel, *rest).long()  # zero at padding
        codes = torch.full((*batch, channels, height, width), ZERO)
        inside = place > 0
        return State(codes), State(state.codes[inside], state.via, state.statistic), place[inside] - 1

    def _choose(self, name: str, args: Any, out: Tensor) -> State:
        if name in ("fill", "zero"):
            value = constant(args[1] if name == "fill" and not isinstance(args[1], Tensor) else 0)
            if name == "fill" and isinstance(args[1], Tensor):
                value = self.state(args[1])
            return State(value.codes.expand(out.shape), value.via, value.statistic)
        if name == "copy":
            state = self.state(args[1])
            return State(torch.broadcast_to(state.codes, args[0].shape), state.via, state.statistic)
        if name == "masked_fill":
            condition, left, right = args[1], self.state(args[2]), self.state(args[0])
        else:
            condition, left, right = args[0], self.state(args[1]), self.state(args[2])
        x, y = (torch.broadcast_to(state.codes, out.shape) for state in (left, right))
        if bool(((x >= 0) & (y >= 0) & (x != y)).any()):
            raise Lost("it chooses between two streams")
        self.ledger.consume(torch.maximum(x, y)[(x == NONE) != (y == NONE)])
        statistic = any(s.statistic for s in (left, right))
        labels: list[str] = []
        if not statistic and bool(((x == NONE) & (y >= 0) | (x >= 0) & (y == NONE)).any()):
            labels.append(rules.OFFSET)
        if self.follows_layers(condition):
            labels.append(name)
        via = {**left.passed(*labels), **right.passed(*labels)}
        return State(torch.maximum(x, y), via, statistic)

    # ---------------------------------------------------------------- reinterpreted memory

    def _strided(self, args: Any, state: State) -> State:
        tensor, size, stride = args[:3]
        start = (
            args[3] if len(args) > 3 and args[3] is not None else tensor.storage_offset()
        ) - tensor.storage_offset()
        if tuple(size) == tuple(state.codes.shape) and tuple(stride) == tensor.stride() and not start:
            return state
        if not tensor.is_contiguous() or start < 0:
            raise Lost("it views memory with other strides")
        return State(state.codes.contiguous().as_strided(size, stride, start), state.via, state.statistic)

    def _complex(self, state: State) -> State:
        real, imaginary = state.codes.unbind(-1)
        if not torch.equal(real, imaginary) and not state.statistic:
            raise Lost("one complex number holds two channels")
        return State(real, state.via, state.statistic)


def _broadcast(left: State, right: State) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(left.codes.shape, right.codes.shape)
    return torch.broadcast_to(left.codes, shape), torch.broadcast_to(right.codes, shape)


def _is_factor(one: State, other: State) -> bool:
    """Returns whether the first has a single value for all channels of the second, such as a gate per token."""
    missing = other.codes.dim() - one.codes.dim()
    if one.codes.shape == other.codes.shape:
        return False
    axes = [dim for dim in range(other.codes.dim()) if varies(other.codes, dim)]
    return bool(axes) and all(dim < missing or one.codes.shape[dim - missing] == 1 for dim in axes)

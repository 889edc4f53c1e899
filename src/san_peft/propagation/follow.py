"""Follows channels through the operations that really run: a dispatch mode that carries their origin beside tensors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from san_peft.propagation import rules
from san_peft.propagation.codes import STRIDE, Lost, State, carries, move, thin
from san_peft.propagation.norms import Norms


class Follow(TorchDispatchMode):
    """Carries `State` beside every tensor while a model runs.

    Attributes:
        writers: By number, the layer that wrote, or (operation, reason) where an axis was lost.
        joined: Pairs of writers whose outputs were added to each other with nothing in between, as two heads are.
        consumed: By number, which channels which layer read; under "" those that anything else did more with than to
            move them or to scale them, and those that the model returns.
        calls: How often each layer ran.
        overwritten: Layers whose output was written into in place.
        norms: Where the outputs of norms go, followed beside the channels.
        paused: Above zero while a layer, whose inside is not followed, runs.
    """

    def __init__(self, norms: Norms) -> None:
        super().__init__()
        self.states: Any = WeakTensorKeyDictionary()
        self.storages: dict[int, list[Any]] = {}
        self.writers: list[str | tuple[str, str]] = []
        self.joined: set[tuple[int, int]] = set()
        self.sizes: list[int] = []
        self.consumed: list[dict[str, Tensor]] = []
        self.outputs: dict[StorageWeakRef, str] = {}
        self.overwritten: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.norms = norms
        self.paused = 0

    def write(self, tensor: Tensor, layer: str, dim: int, first: int = 0, size: int | None = None) -> None:
        """Marks a tensor as freshly written by a layer, channels along `dim`: from number `first`, of `size` in all."""
        writer, shape = self._writer(layer, size or tensor.shape[dim]), [1] * tensor.dim()
        shape[dim] = tensor.shape[dim]
        codes = writer * STRIDE + first + torch.arange(tensor.shape[dim]).view(shape)
        self.states[tensor] = State(codes.expand(tensor.shape), {writer: ()})
        self.outputs[StorageWeakRef(tensor.untyped_storage())] = layer
        self._remember(tensor)

    def lose(self, tensor: Tensor, operation: str, reason: str) -> None:
        """Marks a tensor as one whose channels cannot be followed."""
        writer = self._writer((operation, reason), 0)
        self.states[tensor] = State(torch.full((), writer * STRIDE).expand(tensor.shape), {writer: ()})

    def _writer(self, writer: str | tuple[str, str], size: int) -> int:
        self.writers.append(writer)
        self.sizes.append(size)
        self.consumed.append({})
        return len(self.writers) - 1

    def consume(self, codes: Tensor, reader: str = "") -> None:
        """Notes that a layer read the channels of these codes, or, without a name, that something else did."""
        codes = thin(codes)[0]
        codes = codes[codes >= 0]
        for writer in (codes >> 32).unique().tolist():
            mask = self.consumed[writer].setdefault(reader, torch.zeros(self.sizes[writer], dtype=torch.bool))
            if len(mask):
                mask[codes[codes >> 32 == writer] % STRIDE] = True

    def overwrite(self, tensors: Iterable[Tensor]) -> None:
        """Notes the layers whose outputs these tensors are, or share memory with, as overwritten."""
        for tensor in tensors:
            layer = self.outputs.get(StorageWeakRef(tensor.untyped_storage()))
            if layer is not None:
                self.overwritten.add(layer)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Notes that something that is not followed gets these tensors, as whoever called the model does."""
        for tensor in tensors:
            if tensor in self.states:
                self.consume(self.states[tensor].codes)
            self.norms.open(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = _on_one_device(func, args, kwargs)
        written = _written(func, args, kwargs)
        self.overwrite(written)
        if self.paused:
            return func(*there[0], **there[1])
        flat = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        known = [leaf for leaf in flat if leaf in self.states]
        out = func(*there[0], **there[1])
        name = func._schema.name.split("::")[-1]
        outs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
        inplace = name.endswith("_") and bool(args) and isinstance(args[0], Tensor)
        plain = name.rstrip("_") if inplace else name
        self.norms.see(plain, func, args, kwargs, flat, outs, bool(written))
        if not known or plain in rules.BLIND:
            return out
        before = [self.states[leaf] for leaf in known]
        try:
            if not any(map(carries, outs)):
                raise Lost("what it gives carries no channel")
            states = self._apply(plain, func, args, kwargs, out)
        except Lost as lost:
            self._spend(before, [])
            for tensor in filter(carries, outs):
                self.lose(tensor, plain, str(lost))
            if inplace:
                self._spread(args[0], plain)
            return out
        if written or plain not in rules.MOVES | rules.KEEPS:
            self._spend(before, [] if written or plain in ("addmm", "baddbmm") else states)
        for tensor, state in zip(outs, states, strict=False):
            if carries(tensor):
                if state.codes.shape != tensor.shape:
                    self._spend(before, [])
                    self.lose(tensor, plain, "its rule gave another shape; please report this")
                else:
                    self.states[tensor] = state
        if inplace:
            self._spread(args[0], plain)
        for tensor in outs:
            self._remember(tensor)
        return out

    def _spend(self, before: list[State], after: list[State]) -> None:
        """Notes the channels that an operation read and does not carry on, scaled at most."""
        exact = [s.codes for s in after if all(rules.kind_of(path) == "exact" for path in s.via.values())]
        kept = [thin(codes)[0].flatten() for codes in exact]
        for state in before:
            codes = thin(state.codes)[0].flatten()
            for others in kept:
                codes = codes[~torch.isin(codes, others)]
            self.consume(codes)

    def _remember(self, tensor: Tensor) -> None:
        if tensor in self.states:
            key = tensor.untyped_storage()._cdata
            self.storages.setdefault(key, []).append(WeakIdRef(tensor))

    def _spread(self, target: Tensor, operation: str) -> None:
        """After writing into a tensor, other views of its storage no longer hold what they held."""
        for reference in self.storages.get(target.untyped_storage()._cdata, []):
            view = reference()
            if isinstance(view, Tensor) and view is not target and view in self.states:
                self.consume(self.states[view].codes)
                self.lose(view, operation, "another view of the same memory was written in place")

    # ---------------------------------------------------------------- rules

    def _state(self, value: Any) -> State:
        if isinstance(value, State):
            return value
        state = self.states.get(value) if isinstance(value, Tensor) else None
        if state is None:
            size = value.shape if isinstance(value, Tensor) else ()
            state = State(torch.full((), -1).expand(size))
        return state

    def _apply(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> list[State]:
        if name in rules.MOVES:
            return move(name, func, args, kwargs, self.states)
        first = self._state(args[0] if args else None)
        if name in rules.KEEPS:
            return [first]
        if name == "as_strided" and tuple(args[1]) == tuple(first.codes.shape):
            return [first]
        if name in rules.ACTIVATIONS:
            return [State(first.codes, first.passed(rules.ACTIVATIONS[name]), first.statistic)]
        if name in rules.COMPARISONS:
            return []
        for norm in rules.NORM_OPS:
            if norm in name:
                return [State(first.codes, first.passed(norm))]
        if name in ("add", "sub", "rsub"):
            return [self._sum(*args[:2])]
        if name == "addcmul":
            return [self._sum(args[0], self._product("mul", *args[1:3]))]
        if name in ("mul", "div") and not kwargs.get("rounding_mode"):
            return [self._product(name, *args[:2])]
        if name in rules.REDUCTIONS:
            return self._reduce(name, first, out)
        if name in ("_softmax", "_log_softmax", "_safe_softmax"):
            return [State(torch.full((), -1).expand(out.shape), {}, True)]
        if name.startswith("_scaled_dot_product"):
            return [self._attention(args, out[0])]
        if name in ("mm", "bmm"):
            return [self._matmul(*args[:2])]
        if name in ("addmm", "baddbmm"):
            return [self._matmul(*args[1:3])]
        if name in rules.POOLS:
            return [self._pool(name, first, out if isinstance(out, Tensor) else out[0])]
        if name in ("masked_fill", "copy", "where", "masked_scatter", "index_put"):
            return [self._choose(name, args)]
        raise Lost(f"there is no rule for {name}")

    def _sum(self, a: Any, b: Any) -> State:
        left, right = self._state(a), self._state(b)
        if left.statistic or right.statistic:
            kept = right if left.statistic else left
            other = left if left.statistic else right
            if not (kept.codes >= 0).any():
                return State(self._broadcast(left, right)[0], {}, True)
            return State(torch.broadcast_to(kept.codes, _shape(kept, other)), kept.passed("norm"))
        x, y, size = *thin(*self._broadcast(left, right)), _shape(left, right)
        via: dict[int, tuple[str, ...]] = {}
        both = (x >= 0) & (y >= 0)
        differ = both & (x != y)
        if bool((differ & ((x ^ y) < STRIDE)).any()):
            raise Lost("it adds different channels of one layer")
        only = not bool(both.any())
        added = b if left.via else a
        vector = isinstance(added, Tensor) and added.numel() == max(added.shape, default=1)
        name = (rules.BIAS if vector else rules.OFFSET,) if only else (rules.RESIDUAL,) if bool(differ.any()) else ()
        codes = torch.maximum(x, y)
        self.consume(codes[(x == -1) != (y == -1)])
        if name == (rules.RESIDUAL,) and len(left.via) == len(right.via) == 1:
            if all(rules.kind_of(path) == "exact" for state in (left, right) for path in state.via.values()):
                self.joined.add((max(*left.via, *right.via), min(*left.via, *right.via)))
        writers = codes >> 32
        present = {w for w in {**left.via, **right.via} if bool((writers == w).any())}
        for writer, path in itertools.chain(left.via.items(), right.via.items()):
            if writer in present:
                via[writer] = rules.join(via.get(writer, ()), *path, *name)
        return State(codes.expand(size), via)

    def _product(self, name: str, a: Any, b: Any) -> State:
        left, right = self._state(a), self._state(b)
        x, y = self._broadcast(left, right)
        tracked_left, tracked_right = bool((x >= 0).any()), bool((y >= 0).any())
        if not tracked_left and not tracked_right:
            return State(x, {}, left.statistic or right.statistic)
        if tracked_left and not tracked_right:
            return State(x, left.passed("norm") if right.statistic else left.via)
        if tracked_right and not tracked_left:
            if name == "div":
                return State(y, right.passed("reciprocal"))
            return State(y, right.passed("norm") if left.statistic else right.via)
        if torch.equal(x, y):
            return State(x, {**right.passed(rules.SELF_GATE), **left.passed(rules.SELF_GATE)})
        if name == "mul":
            bent_left, bent_right = (any(rules.is_activation(p) for p in s.via.values()) for s in (left, right))
            if bent_left != bent_right:
                codes, state = (y, right) if bent_left else (x, left)
                return State(codes, state.passed(rules.GATED))
        raise Lost("it combines two branches of which neither or both pass an activation")

    def _reduce(self, name: str, state: State, out: Any) -> list[State]:
        outs = [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]
        shape, size = outs[0].shape, state.codes.shape
        if len(shape) == len(size):
            dims = [d for d in range(len(size)) if shape[d] != size[d]]
            keep = True
        else:
            dims, keep = _reduced(size, shape), False
        if dims is not None and dims and not state.statistic:
            collapsed = self._collapse(state.codes, dims)
            if collapsed is not None:
                codes = collapsed if keep else collapsed.reshape(shape)
                label = rules.POOL if name in ("mean", "sum") else name
                return [State(codes, state.passed(label)) for _ in outs]
        if not dims and keep:
            return [State(state.codes, state.passed(name)) for _ in outs]
        return [State(torch.full((), -1).expand(o.shape), {}, True) for o in outs]

    def _attention(self, args: Any, out: Tensor) -> State:
        query, value = args[0], self._state(args[2])
        if not (value.codes >= 0).any():
            return State(torch.full((), -1).expand(out.shape))
        collapsed = self._collapse(value.codes, [value.codes.dim() - 2])
        if collapsed is None:
            raise Lost("the values of different tokens come from different channels")
        if collapsed.shape[-3] != out.shape[-3]:
            collapsed = collapsed.repeat_interleave(query.shape[-3] // collapsed.shape[-3], -3)
        return State(collapsed.expand(out.shape), value.passed(rules.ATTENTION))

    def _matmul(self, a: Tensor, b: Tensor) -> State:
        left, right = self._state(a), self._state(b)
        shape = (*a.shape[:-1], b.shape[-1])
        tracked = [bool((s.codes >= 0).any()) for s in (left, right)]
        if not any(tracked):
            return State(torch.full((), -1).expand(shape), {}, left.statistic or right.statistic)
        carried = [
            self._collapse(s.codes, [dim]) if t else None
            for s, t, dim in ((left, tracked[0], left.codes.dim() - 1), (right, tracked[1], right.codes.dim() - 2))
        ]
        found = [c is not None for c in carried]
        if found == [False, False]:
            if all(tracked):
                return State(torch.full((), -1).expand(shape), {}, True)
            raise Lost("it contracts the channel axis with a tensor that is no adaptable layer's weight")
        if found == [True, True]:
            raise Lost("both factors could carry the channels")
        state, codes, other = (left, carried[0], right) if found[0] else (right, carried[1], left)
        scores = other.statistic or all(tracked)
        assert codes is not None
        return State(codes.expand(shape), state.passed(rules.ATTENTION if scores else rules.MIX))

    def _pool(self, name: str, state: State, out: Tensor) -> State:
        spatial = list(range(state.codes.dim() - rules.POOLS[name], state.codes.dim()))
        collapsed = self._collapse(state.codes, spatial)
        if collapsed is None:
            raise Lost("pixels of one channel come from different channels")
        label = rules.POOL if "max" not in name else name
        return State(collapsed.expand(out.shape), state.passed(label))

    def _choose(self, name: str, args: Any) -> State:
        if name == "masked_fill":
            state = self._state(args[0])
            if isinstance(args[2], Tensor) or args[2] != 0:
                self.consume(state.codes)
            return state
        if name == "copy":
            state = self._state(args[1])
            return State(torch.broadcast_to(state.codes, args[0].shape), state.via, state.statistic)
        if name != "where":
            raise Lost("it writes some entries of one stream into another")
        left, right = self._state(args[1]), self._state(args[2])
        x, y = self._broadcast(left, right)
        x = torch.broadcast_to(x, torch.broadcast_shapes(x.shape, args[0].shape))
        y = torch.broadcast_to(y, x.shape)
        if bool(((x >= 0) & (y >= 0) & (x != y)).any()):
            raise Lost("it chooses between two streams")
        self.consume(torch.maximum(x, y)[(x == -1) != (y == -1)])
        return State(torch.maximum(x, y), {**left.via, **right.via}, left.statistic or right.statistic)

    def _collapse(self, codes: Tensor, dims: Iterable[int]) -> Tensor | None:
        """Reduces axes along which all entries have one writer's channel, -1 aside; `None` where two differ."""
        high = codes.amax(list(dims), keepdim=True)
        self.consume(high.expand_as(codes)[codes == -1])
        return high if bool(((codes == high) | (codes < 0)).all()) else None

    def _broadcast(self, left: State, right: State) -> tuple[Tensor, Tensor]:
        shape = _shape(left, right)
        return torch.broadcast_to(left.codes, shape), torch.broadcast_to(right.codes, shape)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors that an operation writes into, by its schema."""
    if not func._schema.is_mutable:
        return []
    places = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    held = [args[i] if i < len(args) else kwargs.get(name) for i, name in places]
    return [leaf for leaf in tree_flatten(held)[0] if isinstance(leaf, Tensor)]


def _on_one_device(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Lets a model with weights on the meta device compute real positions and masks, which decide where it goes.

    What the model makes out of nothing on the meta device is made on the CPU instead, and moves to meta where
    it meets weights. Masks that select entries become their positions first, since these give a shape.
    """
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    on_meta = [leaf.is_meta for leaf in leaves]
    if kwargs.get("device") is not None and (any(on_meta) or torch.device(kwargs["device"]).type == "meta"):
        kwargs = {**kwargs, "device": torch.device("meta" if any(on_meta) else "cpu")}
    if all(on_meta) or not any(on_meta):
        return args, kwargs
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
        where = [[i] if i is None or i.dtype != torch.bool else list(i.nonzero().unbind(1)) for i in args[1]]
        args = (args[0], list(itertools.chain(*where)), *args[2:])
    return tree_map_only(Tensor, lambda leaf: leaf.to("meta"), (args, kwargs))


def _shape(left: State, right: State) -> torch.Size:
    return torch.broadcast_shapes(left.codes.shape, right.codes.shape)


def _reduced(size: Iterable[int], shape: Iterable[int]) -> list[int] | None:
    """Returns which axes a reduction removed, where sizes tell; `None` where they do not."""
    size, shape = list(size), list(shape)
    gone, position = [], 0
    for dim, length in enumerate(size):
        if position < len(shape) and shape[position] == length:
            position += 1
        else:
            gone.append(dim)
    return gone if position == len(shape) else None

"""Traces the propagation graph: runs the model once and notes which layer wrote what each layer reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten

from san_peft.errors import TraceError
from san_peft.propagation import rules
from san_peft.propagation.channels import ChannelMap
from san_peft.propagation.codes import STRIDE, ZERO
from san_peft.propagation.follow import Follow
from san_peft.propagation.graph import Barrier, Edge, Layer, PropagationGraph
from san_peft.propagation.inputs import derive_inputs
from san_peft.propagation.norms import Norms
from san_peft.propagation.untouched import untouched

_CONTAINERS = (Mapping, list, tuple, set, frozenset)


@dataclass
class _Reads:
    """What a layer read in all its calls: for every input channel (layer, channel), or why it is lost."""

    sources: list[tuple[str, int] | None] | None = None
    via: dict[str, tuple[str, ...]] = field(default_factory=dict)
    barriers: dict[tuple[str, str], None] = field(default_factory=dict)


def trace(model: nn.Module, example_inputs: Any = None) -> PropagationGraph:
    """Finds out which layer last wrote each input channel of which other layer.

    The model runs once in eval mode without gradients, on whatever device it is, `meta` included. A mode below
    autograd carries beside every tensor where its entries come from; see the guide to the propagation graph. The
    model's modes, hooks, buffers, the random state and the number of threads are as before, also when the model raises.

    Args:
        model: Any model. Adaptable layers are `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` and transformers' `Conv1D`.
        example_inputs: Keyword arguments as a dict, arguments as a tuple, or one tensor. `None` derives them for models
            of transformers and timm.

    Returns:
        The graph among all adaptable layers, with its barriers, heads and norms.

    Raises:
        TraceError: If inputs cannot be derived, or the model raises on them.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> print(trace(net, torch.zeros(3, 4)))
        1 edge, 0 barriers
          0 -> 2 [identity] (through gelu)
          heads: 2
    """
    if torch.get_default_device().type == "meta":  # positions and channels are numbers, which meta has not
        with torch.device("cpu"):
            return trace(model, example_inputs)
    inputs = derive_inputs(model) if example_inputs is None else example_inputs
    layers = {name: m for name, m in model.named_modules() if is_adaptable(m)}
    follow, reads = Follow(Norms(model, layers)), dict.fromkeys(layers)
    order: list[str] = []
    with untouched(model), ExitStack() as stack:
        for name, module in layers.items():
            before, after = _hooks(follow, name, module, reads, order)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        for number, module in enumerate(follow.norms.modules.values()):
            before, after = _norm_hooks(follow, number)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, _DropoutNd) and module.inplace:  # it writes in training only, which is not traced
                stack.callback(module.register_forward_pre_hook(lambda _, args: follow.overwrite(_held(args))).remove)
        try:
            with torch.no_grad(), follow:
                if isinstance(inputs, Mapping):
                    out = model(**inputs)
                else:
                    out = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} raised {type(error).__name__} while it was traced: {error}. Pass inputs that "
                "it accepts: san_peft.trace(model, example_inputs)."
            ) from error
        heads = _heads(follow, out, reads)
        follow.release(_held(out, inputs))
    return _graph(follow, layers, reads, order, heads)


def is_adaptable(module: nn.Module) -> bool:
    """Whether SAN can adapt a module: a dense or convolutional layer, or GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or _is_gpt2(module)


def _is_gpt2(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _record(name: str, module: nn.Module) -> Layer:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return Layer(name, kind, module.in_features, module.out_features)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return Layer(name, kind, module.in_channels, module.out_channels)
    weight = module.get_parameter("weight")
    return Layer(name, kind, weight.shape[0], weight.shape[1])


def _channel_dim(module: nn.Module) -> int:
    return -1 - len(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d) else -1


def _hooks(follow: Follow, name: str, module: nn.Module, reads: dict[str, Any], order: list[str]) -> tuple[Any, Any]:
    dim = _channel_dim(module)

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        follow.calls[name] += 1
        if given and not follow.paused:
            if reads[name] is None:
                reads[name] = _Reads()
                order.append(name)
            _read(follow, name, reads[name], given[0], dim)
            follow.norms.read(name, given[0], dim)
            follow.release(given[1:])
        follow.paused += 1

    def after(_: nn.Module, __: Any, out: Any) -> None:
        follow.paused -= 1
        if not follow.paused and isinstance(out, Tensor):
            follow.write(out, name, dim)

    return before, after


def _norm_hooks(follow: Follow, number: int) -> tuple[Any, Any]:
    def before(_: nn.Module, __: Any) -> None:
        follow.norms.enter(number, follow.paused > 0)

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        follow.norms.leave(number, module, args, kwargs, out)

    return before, after


def _held(*values: Any) -> Iterator[Tensor]:
    """Yields the tensors within some values, those in attributes of objects, as of caches, included."""
    seen: dict[int, Any] = {}
    todo = list(values)
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, type | ModuleType | nn.Module):
            seen[id(value)] = value
            inside = value.values() if isinstance(value, Mapping) else value
            todo += inside if isinstance(inside, Iterable) and isinstance(value, _CONTAINERS) else ()
            todo += getattr(value, "__dict__", {}).values()


def _read(follow: Follow, name: str, reads: _Reads, x: Tensor, dim: int) -> None:
    """Notes the source of every input channel of one call, and compares it with the calls before."""
    state = follow.states.get(x)
    size = x.shape[dim]
    sources: list[tuple[str, int] | None] = [None] * size
    if state is not None:
        rows = state.codes.movedim(dim, -1).reshape(-1, size)
        high = rows.amax(0)
        differ = ((rows != high) & (rows >= 0)).any(0)
        follow.consume(rows, name)
        follow.consume(rows[:, ((rows != high) & (rows != ZERO)).any(0)])
        for position, (code, bad) in enumerate(zip(high.tolist(), differ.tolist(), strict=True)):
            if code < 0:
                continue
            writer = follow.writers[code // STRIDE]
            if isinstance(writer, tuple):
                reads.barriers[writer] = None
            elif bad:
                reads.barriers[
                    "input", "one input channel holds different channels, or layers, at different positions"
                ] = None
            else:
                sources[position] = (writer, code % STRIDE)
        for writer, path in state.via.items():
            layer = follow.writers[writer]
            if isinstance(layer, str):
                reads.via[layer] = rules.join(reads.via.get(layer, ()), *path)
    if reads.sources is None:
        reads.sources = sources
    elif reads.sources != sources:
        reads.barriers["call", "its calls read from different layers"] = None
        reads.sources = [a if a == b else None for a, b in zip(reads.sources, sources, strict=True)]


def _heads(follow: Follow, out: Any, reads: Mapping[str, _Reads | None]) -> tuple[str, ...]:
    """Layers that write the output directly: of outputs with names, the logits, else the first.

    Two layers that nothing reads and whose sum is the output are two heads.
    """
    if isinstance(out, Mapping):
        named = [value for key, value in out.items() if "logits" in key]
        out = named or next(iter(out.values()), None)
    read = {source[0] for r in reads.values() if r is not None for source in r.sources or [] if source is not None}
    heads: dict[str, None] = {}
    for tensor in tree_flatten(out)[0]:
        state = follow.states.get(tensor) if isinstance(tensor, Tensor) else None
        if state is None:
            continue
        for writer in (state.codes[state.codes >= 0] // STRIDE).unique().tolist():
            path = state.via.get(writer, ())
            pair = next((pair for pair in follow.joined if pair[0] == writer), (writer,))
            names = [follow.writers[w] for w in pair]
            if len(pair) == 2 and not read & set(names):
                path = tuple(name for name in path if name != rules.RESIDUAL)
            if rules.kind_of(path) == "exact":
                heads |= {layer: None for layer in names if isinstance(layer, str)}
    return tuple(name for name in reads if name in heads)


def _graph(
    follow: Follow,
    layers: dict[str, nn.Module],
    reads: dict[str, _Reads | None],
    order: list[str],
    heads: tuple[str, ...],
) -> PropagationGraph:
    records = {name: replace(_record(name, layers[name]), overwritten=name in follow.overwritten) for name in order}
    edges, barriers = [], []
    for name in order:
        read = reads[name]
        assert read is not None
        assert read.sources is not None
        groups: dict[str, list[int]] = {}
        for position, source in enumerate(read.sources):
            if source is not None:
                if source[0] not in groups:
                    groups[source[0]] = [-1] * len(read.sources)
                groups[source[0]][position] = source[1]
        for anterior, index in groups.items():
            if anterior == name:
                barriers.append(Barrier("call", name, "it reads its own output in a later call"))
                continue
            channels = ChannelMap.from_index(index, records[anterior].out_channels)
            edge = Edge(anterior, name, channels, read.via.get(anterior, ()))
            edges.append(replace(edge, closed=_closed(follow, edge, read)))
        barriers += [Barrier(operation, name, reason) for operation, reason in read.barriers]
    barriers += [
        Barrier("call", name, "it was never called; what reads its weight directly goes past SAN")
        for name in layers
        if name not in records
    ]
    norms = follow.norms.norms(order)
    return PropagationGraph(tuple(edges), tuple(barriers), tuple(records.values()), heads, norms)


def _closed(follow: Follow, edge: Edge, read: _Reads) -> bool:
    """Whether nothing but its posterior reads what an exact edge carries; see `Follow.consumed`."""
    if (
        edge.kind != "exact"
        or follow.calls[edge.anterior] > 1
        or any(operation == "call" for operation, _ in read.barriers)
    ):
        return False
    consumed = follow.consumed[follow.writers.index(edge.anterior)]
    index = edge.channels.index
    carried = index[index >= 0]
    return not any(mask[carried].any() for reader, mask in consumed.items() if reader != edge.posterior)

"""Traces the propagation graph: runs the model once and notes which layer wrote what each layer reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
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

REPACKS = "support_avx512bf16_for_cpu"
"""Flag of bitsandbytes' 4-bit layer: on such a CPU it packs its weight anew, for good, when it runs in eval mode."""


_CONTAINERS = (Mapping, list, tuple, set, frozenset)


@dataclass
class _Reads:
    """What a layer read in all its calls: for every input channel (layer, channel), or why it is lost."""

    sources: list[tuple[str, int] | None] | None = None
    via: dict[str, tuple[str, ...]] = field(default_factory=dict)
    barriers: dict[tuple[str, str], None] = field(default_factory=dict)


def trace(model: nn.Module, example_inputs: Any = None, embeddings: Collection[str] = ()) -> PropagationGraph:
    """Finds out which layer last wrote each input channel of which other layer.

    The model runs once in eval mode without gradients, on whatever device it is, `meta` included. A mode below
    autograd carries beside every tensor where its entries come from; see the guide to the propagation graph. The
    model's modes, hooks, buffers, the random state and the number of threads are as before, also when the model raises.

    Args:
        model: Any model. Adaptable layers are `nn.Linear`, torch's convolutions and transposed convolutions,
            `nn.MultiheadAttention` and transformers' `Conv1D`.
        example_inputs: Keyword arguments as a dict, arguments as a tuple, or one tensor. `None` derives them for models
            of transformers and timm.
        embeddings: Names of `nn.Embedding` layers that count as layers too: they write channels and read none.

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
            return trace(model, example_inputs, embeddings)
    inputs = derive_inputs(model) if example_inputs is None else example_inputs
    layers = _layers(model, embeddings)
    follow, reads = Follow(Norms(model, layers)), dict.fromkeys(layers)
    order: list[str] = []
    with _as_it_was(model), ExitStack() as stack:
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
    """Whether SAN can adapt a module: a dense layer, a convolution, an attention of torch, or GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | _ConvNd | nn.MultiheadAttention) or _is_gpt2(module)


def _layers(model: nn.Module, embeddings: Collection[str]) -> dict[str, nn.Module]:
    """The layers by name; what an attention of torch holds is a part of it."""
    found: dict[str, nn.Module] = {}
    within = None
    for name, module in model.named_modules():
        if within is not None and name.startswith(within):
            continue
        if is_adaptable(module) or name in embeddings:
            found[name] = module
            within = f"{name}." if isinstance(module, nn.MultiheadAttention) else within
    return found


def _is_gpt2(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def _record(name: str, module: nn.Module) -> Layer:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return Layer(name, kind, module.in_features, module.out_features)
    if isinstance(module, _ConvNd):
        return Layer(name, kind, module.in_channels, module.out_channels)
    if isinstance(module, nn.Embedding):
        return Layer(name, kind, 0, module.embedding_dim)
    if isinstance(module, nn.MultiheadAttention):
        return Layer(name, kind, sum(attention_inputs(module)) + module.embed_dim, 4 * module.embed_dim)
    weight = module.get_parameter("weight")
    return Layer(name, kind, weight.shape[0], weight.shape[1])


def _channel_dim(module: nn.Module) -> int:
    return -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else -1


def attention_inputs(module: Any) -> tuple[int, int, int]:
    """How many channels the queries, the keys and the values of an attention of torch have."""
    return module.embed_dim, module.kdim or module.embed_dim, module.vdim or module.embed_dim


def _hooks(follow: Follow, name: str, module: nn.Module, reads: dict[str, Any], order: list[str]) -> tuple[Any, Any]:
    dim = _channel_dim(module)

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        follow.calls[name] += 1
        if given and not follow.paused:
            if reads[name] is None:
                reads[name] = _Reads()
                order.append(name)
            if isinstance(module, nn.Embedding):
                reads[name].sources = []
            elif isinstance(module, nn.MultiheadAttention):
                _read_attention(follow, name, module, reads[name], args, kwargs)
            else:
                _read(follow, name, reads[name], given[0], dim)
                follow.norms.read(name, given[0], dim)
                follow.release(given[1:])
        follow.paused += 1

    def after(_: nn.Module, __: Any, out: Any) -> None:
        follow.paused -= 1
        if isinstance(module, nn.MultiheadAttention) and not follow.paused:
            follow.write(out[0], name, dim, first=3 * module.embed_dim, size=4 * module.embed_dim)
        elif not follow.paused and isinstance(out, Tensor):
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
    _note(reads, _sources(follow, name, reads, x, dim))


def _read_attention(follow: Follow, name: str, module: Any, reads: _Reads, args: Any, kwargs: Any) -> None:
    """The same of an attention, whose input channels are those of queries, keys, values and the attended values.

    It is one layer of four groups. The channels of the fourth group come from its own output channels of the third.
    """
    given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    sources: list[tuple[str, int] | None] = []
    for key in ("query", "key", "value"):
        sources += _sources(follow, name, reads, given[key], -1)
        follow.norms.open(given[key])
    reads.via[name] = (rules.ATTENTION,)
    _note(reads, sources + [(name, 2 * module.embed_dim + channel) for channel in range(module.embed_dim)])


def _sources(follow: Follow, name: str, reads: _Reads, x: Tensor, dim: int) -> list[tuple[str, int] | None]:
    """Returns the source of every input channel."""
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
    return sources


def _note(reads: _Reads, sources: list[tuple[str, int] | None]) -> None:
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
            within = isinstance(layers[name], nn.MultiheadAttention)  # from its values to its output projection
            if anterior == name and not within:
                barriers.append(Barrier("call", name, "it reads its own output in a later call"))
                continue
            channels = ChannelMap.from_index(index, records[anterior].out_channels)
            edge = Edge(anterior, name, channels, read.via.get(anterior, ()))
            closed = _closed(follow, edge, read) and getattr(layers[name], "bias_v", None) is None
            edges.append(replace(edge, closed=closed))
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


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and everything back at the end: modes, buffers, random state."""
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    values = {b: b.clone() for held in buffers for b in held.values() if b is not None and not b.is_meta}
    repacking = [module for module in modules if getattr(module, REPACKS, False)]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    fastpath, threads = torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()
    with torch.random.fork_rng(sorted(devices)):
        try:
            torch.set_num_threads(1)  # many small operations, which threads that wait for each other only slow down
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.training = False
            for module in repacking:
                setattr(module, REPACKS, False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_num_threads(threads)
            for module in repacking:
                setattr(module, REPACKS, True)
            for module, state, held in zip(modules, training, buffers, strict=True):
                module.training = state
                module._buffers.clear()
                module._buffers.update(held)
            with torch.no_grad():
                for buffer, value in values.items():
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)

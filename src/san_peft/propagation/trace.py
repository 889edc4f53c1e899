"""Traces the propagation graph: runs the model once and records which layer wrote what each layer reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from inspect import BoundArguments
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten

from san_peft.errors import TraceError
from san_peft.propagation import rules
from san_peft.propagation.codes import NONE, STRIDE, carries
from san_peft.propagation.follow import Follow
from san_peft.propagation.graph import Barrier, Edge, Layer, PropagationGraph
from san_peft.propagation.inputs import derive_inputs
from san_peft.propagation.memory import DATA
from san_peft.propagation.norms import Norms
from san_peft.propagation.reads import Reads
from san_peft.propagation.untouched import untouched

NEVER_CALLED = "it was never called; what reads its weight directly goes past SAN"

_CONTAINERS = (Mapping, list, tuple, set, frozenset)


def trace(model: nn.Module, example_inputs: Any = None, embeddings: Collection[str] = ()) -> PropagationGraph:
    """Traces which layer last wrote each input channel of each other layer.

    Runs the model once in eval mode without gradients, on its device, which may be `meta`. A dispatch mode below
    autograd stores the origin of each entry of each tensor; see the guide to the propagation graph. Training modes,
    hooks, buffers, the random state and the number of threads are restored afterwards, even if the model raises.

    Args:
        model: Any model. Adaptable layers are `nn.Linear`, torch's convolutions and transposed convolutions,
            `nn.MultiheadAttention` and the `Conv1D` of transformers.
        example_inputs: Keyword arguments as a dict, arguments as a tuple, both as `inspect.BoundArguments`, or a single
            tensor. `None` derives inputs for transformers and timm models.
        embeddings: Names of `nn.Embedding` layers to trace as well. They write channels and read none.

    Returns:
        The graph of all adaptable layers, with its barriers, heads and norms.

    Raises:
        TraceError: If inputs cannot be derived, or the model raises an exception on them.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> print(trace(net, torch.zeros(3, 4)))
        1 edge, 0 barriers
          0 -> 2 [identity] (through gelu)
          heads: 2
    """
    if torch.get_default_device().type == "meta":  # positions and codes need real values
        with torch.device("cpu"):
            return trace(model, example_inputs, embeddings)
    args, kwargs = arguments_of(derive_inputs(model) if example_inputs is None else example_inputs)
    layers = _layers(model, embeddings)
    follow = Follow(model, Norms(model, layers), layers)
    follow.memory.see(tensors_within(args, kwargs))
    reads: dict[str, Reads] = {}
    left_out: dict[str, str] = {}
    with untouched(model, threads=1), ExitStack() as stack:  # threads slow down many small operations
        for name, module in layers.items():
            before, after = _hooks(follow, name, module, reads, left_out)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, always_call=True).remove)
        for number, module in enumerate(follow.norms.modules.values()):
            before, after = _norm_hooks(follow, number)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, _DropoutNd) and module.inplace:  # it overwrites only in training mode
                stack.callback(
                    module.register_forward_pre_hook(lambda _, args: follow.overwrite(tensors_within(args))).remove
                )
        try:
            with torch.compiler.set_stance("force_eager"), torch.no_grad(), follow:
                out = model(*args, **kwargs)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} raised {type(error).__name__} during tracing: {error}. Pass inputs that the "
                "model accepts: san_peft.trace(model, example_inputs)."
            ) from error
        heads = _heads(follow, out, reads, layers)
        used = follow.memory.reach(tensors_within(_used(out)))
        follow.release(tensors_within(out, args, kwargs))
    if used > DATA:  # otherwise no output is differentiable in any layer
        for name in reads:
            if not used & follow.bits[name]:
                left_out.setdefault(name, "no output that a task uses depends on it")
    for name, other in _tied(model, [name for name in reads if name not in heads]).items():
        left_out.setdefault(name, f"its weight is tied to {other}, which merging would change")
    return _graph(follow, layers, reads, heads, left_out)


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Converts a dict, a tuple, a tensor or bound arguments to positional and keyword arguments."""
    if isinstance(inputs, BoundArguments):
        return inputs.args, inputs.kwargs
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}


def is_adaptable(module: nn.Module) -> bool:
    """Returns whether SAN can adapt a module: dense layers, convolutions, `nn.MultiheadAttention`, GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | _ConvNd | nn.MultiheadAttention) or _is_gpt2(module)


def _layers(model: nn.Module, embeddings: Collection[str]) -> dict[str, nn.Module]:
    """Returns the adaptable layers by name, without the submodules of `nn.MultiheadAttention`."""
    found: dict[str, nn.Module] = {}
    within = None
    for name, module in model.named_modules():
        if within is not None and name.startswith(within):
            continue
        if is_adaptable(module) or name in embeddings:
            found[name] = module
            within = f"{name}." if isinstance(module, nn.MultiheadAttention) else within
    return found


def parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """Returns all names of each parameter by its `id`; a tied parameter has several, a shared module counts once."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            found.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return found


def _tied(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Returns the layers with a tied weight, and the name of another module that holds it."""
    names, found = parameter_names(model), {}
    for layer in layers:
        weight = model.get_submodule(layer)._parameters.get("weight")
        holders = [name.rpartition(".")[0] for name in names.get(id(weight), ())] if weight is not None else []
        others = [name for name in holders if name != layer]
        if others:
            found[layer] = others[0]
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
    """Returns the number of input channels of the queries, keys and values of an `nn.MultiheadAttention`."""
    return module.embed_dim, module.kdim or module.embed_dim, module.vdim or module.embed_dim


def _hooks(
    follow: Follow, name: str, module: nn.Module, reads: dict[str, Reads], left_out: dict[str, str]
) -> tuple[Any, Any]:
    dim = _channel_dim(module)
    running: list[tuple[int, Reads | None]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given, read = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)], None
        reach = follow.enter(name, given)
        if given and follow.paused == 1:
            if isinstance(module, nn.Embedding):
                read = Reads(0, torch.empty(0, dtype=torch.int64))
            elif isinstance(module, nn.MultiheadAttention):
                read = _read_attention(follow, name, module, args, kwargs)
            else:
                read = Reads(given[0].shape[dim])
                read.read(follow, name, given[0], dim)
                follow.norms.read(name, given[0], dim)
                follow.release(given[1:])
        running.append((reach, read))

    def after(_: nn.Module, __: Any, out: Any) -> None:
        reach, read = running.pop()
        if follow.paused == 1 and out is not None:  # otherwise it is inside another layer, or it raised
            if read is not None:
                reads[name] = reads[name].join(read) if name in reads else read
            if isinstance(module, nn.MultiheadAttention):
                follow.write(out[0], name, dim, first=3 * module.embed_dim, size=4 * module.embed_dim)
            elif isinstance(out, Tensor):
                follow.write(out, name, dim)
            else:
                left_out[name] = f"it returns a {type(out).__name__} instead of a tensor"
                for tensor in filter(carries, tensors_within(out)):
                    follow.lose(tensor, name, left_out[name])
            follow.memory.made("", [], list(tensors_within(out)), reach, writes=True)
        follow.paused -= 1

    return before, after


def _norm_hooks(follow: Follow, number: int) -> tuple[Any, Any]:
    def before(_: nn.Module, __: Any) -> None:
        follow.norms.enter(number, follow.paused > 0)

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        follow.norms.leave(number, module, args, kwargs, out)

    return before, after


def tensors_within(*values: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested values, including attributes of objects such as caches."""
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


def _read_attention(follow: Follow, name: str, module: Any, args: Any, kwargs: Any) -> Reads:
    """Returns the reads of an `nn.MultiheadAttention`, which counts as one layer with four groups of channels.

    The input channels are the queries, the keys, the values, and the input of the output projection. The last group
    reads the layer's own output channels of the third group.
    """
    given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    sizes, width = attention_inputs(module), module.embed_dim
    parts = []
    for key, size in zip(("query", "key", "value"), sizes, strict=True):
        part = Reads(size)
        part.read(follow, name, given[key], -1)
        follow.norms.open(given[key])
        parts.append(part)
    own = follow.numbers[name] * STRIDE + 2 * width + torch.arange(width)
    sources = [torch.full((part.size,), NONE) if part.sources is None else part.sources for part in parts]
    whole = Reads(sum(sizes) + width, torch.cat([*sources, own]), {name: (rules.ATTENTION,)}, within=True)
    for part in parts:
        whole.join(Reads(whole.size, None, part.via, part.barriers))
    return whole


def _heads(follow: Follow, out: Any, reads: Mapping[str, Reads], layers: Iterable[str]) -> tuple[str, ...]:
    """Returns the layers that compute the model's output: the logits, or else the first output.

    Bounded functions such as the logit soft cap of Gemma 2, and a bias outside of the layer as in BART, may follow. If
    the output is the sum of two layers that no layer reads, both are heads.
    """
    if isinstance(out, Mapping):
        named = [value for key, value in out.items() if "logits" in key]
        out = named or next(iter(out.values()), None)
    read = {anterior for r in reads.values() for anterior in r.anteriors(follow)}
    heads: dict[str, None] = {}
    for tensor in tree_flatten(out)[0]:
        state = follow.find(tensor) if isinstance(tensor, Tensor) else None
        if state is None:
            continue
        for writer in (state.codes[state.codes >= 0] // STRIDE).unique().tolist():
            path = state.via.get(writer, ())
            pair = next((pair for pair in follow.ledger.joined if pair[0] == writer), (writer,))
            names = [follow.ledger.writers[w] for w in pair]
            if len(pair) == 2 and not read & set(names):
                path = tuple(name for name in path if name != rules.RESIDUAL)
            capped = all(name in rules.LAST or rules.path_kind([name]) == "exact" for name in path)
            if rules.path_kind(path) == "exact" or (capped and not read & set(names)):
                heads |= {layer: None for layer in names if isinstance(layer, str)}
    return tuple(name for name in layers if name in heads)


def _used(out: Any) -> Any:
    """Returns the outputs that a task uses: all except a `pooler_output` next to features or logits."""
    if isinstance(out, Mapping):
        beside = "last_hidden_state" in out or any("logits" in str(key) for key in out)
        return [_used(value) for key, value in out.items() if not (beside and key == "pooler_output")]
    return [_used(value) for value in out] if isinstance(out, list | tuple) else out


def _graph(
    follow: Follow,
    layers: dict[str, nn.Module],
    reads: Mapping[str, Reads],
    heads: tuple[str, ...],
    left_out: Mapping[str, str],
) -> PropagationGraph:
    records = {
        name: replace(
            _record(name, layers[name]), overwritten=name in follow.overwritten, left_out=left_out.get(name, "")
        )
        for name in reads
    }
    sizes = {name: record.out_channels for name, record in records.items()}
    edges, barriers = [], []
    for name, read in reads.items():
        found, lost = read.edges(follow, name, sizes)
        mixed = getattr(layers[name], "bias_v", None) is not None  # an attention with an extra token
        edges += [replace(edge, closed=not mixed and _closed(follow, edge, read)) for edge in found]
        barriers += lost
    barriers += [Barrier("call", name, NEVER_CALLED) for name in layers if name not in records]
    for parameter, operation in follow.ledger.beside.items():
        owner, _, leaf = parameter.rpartition(".")
        if owner not in layers or owner in records:
            barriers.append(Barrier(operation, owner or parameter, f"its {leaf} is read by a function, past SAN"))
    norms = follow.norms.norms(reads)
    return PropagationGraph(tuple(edges), tuple(barriers), tuple(records.values()), heads, norms)


def _closed(follow: Follow, edge: Edge, read: Reads) -> bool:
    """Returns whether an edge is exact and only its posterior reads its channels; see `Ledger.consumed`."""
    if (
        edge.kind != "exact"
        or follow.calls[edge.anterior] > 1
        or any(operation == "call" for operation, _ in read.barriers)
    ):
        return False
    consumed = follow.ledger.consumed[follow.ledger.writers.index(edge.anterior)]
    index = edge.channels.index
    carried = index[index >= 0]
    return not any(mask[carried].any() for reader, mask in consumed.items() if reader != edge.posterior)

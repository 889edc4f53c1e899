"""Resolves a config against a model: which layers to adapt and which edges connect them, without changing the model."""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from san_peft.errors import GraphError, TargetError, TraceError
from san_peft.propagation.graph import Edge, Norm, PropagationGraph
from san_peft.tuner import _peft
from san_peft.tuner.attention import layer_for
from san_peft.tuner.config import SanConfig
from san_peft.tuner.decompose import is_feedforward, type_of, unfit
from san_peft.tuner.frozen import stored_weight
from san_peft.tuner.layer import LAYER_TYPES, SanLayer, cannot_adapt
from san_peft.tuner.sharded import is_sharded


def resolve(tuner: _peft.Tuner, model: nn.Module, config: SanConfig) -> PropagationGraph | None:
    """Fills in the targets and saved modules of a config, and its edges and placement if the model can be traced.

    Returns:
        The edges with their norms, or `None` if tracing has to wait for the first forward pass, because example inputs
        cannot be derived or the model does not run on them. `settle` then fills in the rest.
    """
    modules = layers_by_name(model)
    names = {name: module for name, module in modules.items() if _is_layer(module)}
    targets: Any = config.target_modules
    wide = isinstance(targets, str) and targets.lower() == "all-linear"
    graph, waits = None, False
    if config.edges is None or targets is None or wide:
        try:
            graph = _graph(model, config, tables_of(tuner, model, config))
        except TraceError as error:
            if config.gate:
                reason = "gate=True adds parameters to posterior layers, so the edges must be known now"
                raise TraceError(f"{error} {reason}.") from error
            waits = config.edges is None
    if targets is None or wide:
        targets = _chosen(model, config, graph, names, wide)
    saved: Any = config.modules_to_save
    if config.train_norms:
        saved = sorted({*(saved or []), *(n for n in norms_of(model) if not _inside(n, saved))})
    draft = dataclasses.replace(config, target_modules=targets, edges=None)
    stored = () if config.edges is None else config.resolved_edges()
    _check_edges(stored, names)
    _check_targets(tuner, model, draft, modules, graph)
    for edge in stored:
        _check_parallel(edge.posterior, names[edge.posterior])
    if config.edges is None and not waits:
        edges, placement = _selected(tuner, draft, graph, modules)
    else:
        edges, placement = stored, config.placement
    config.target_modules, config.modules_to_save = targets, saved
    return None if waits else _settled(config, edges, placement)


def tables_of(tuner: _peft.Tuner, model: nn.Module, config: SanConfig) -> list[str]:
    """Returns the names of embeddings among the targets; the default targets contain none."""
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return []
    return [n for n, m in layers_by_name(model).items() if _is_table(m) and _peft.matches(tuner, config, n)]


def settle(tuner: _peft.Tuner, model: nn.Module, config: SanConfig, graph: PropagationGraph) -> PropagationGraph:
    """Fills in edges and placement from a graph that was traced after the adapter was injected."""
    modules = layers_by_name(model)
    _check_targets(tuner, model, config, modules, graph)
    return _settled(config, *_selected(tuner, config, graph, modules))


def _settled(config: SanConfig, edges: tuple[Edge, ...], placement: dict | None) -> PropagationGraph:
    config.edges = [edge.to_json() for edge in edges]
    config.placement = placement
    seen = () if placement is None else placement["norms"].items()
    return PropagationGraph(edges, norms=tuple(Norm(fqn, tuple(readers)) for fqn, readers in seen))


def _selected(
    tuner: _peft.Tuner, config: SanConfig, graph: PropagationGraph | None, modules: dict[str, nn.Module]
) -> tuple[tuple[Edge, ...], dict | None]:
    """Returns the edges that the scheme selects, and their placement."""
    if graph is None:
        return (), None
    names = {name: module for name, module in modules.items() if _is_layer(module)}
    edges, placement = _select(tuner, config, graph, names), None
    for edge in edges:
        _check_parallel(edge.posterior, names[edge.posterior])
    if graph.layers:
        foreign = _is_foreign(graph, config, modules.values())
        placement = {
            "norms": {norm.fqn: list(norm.readers) for norm in graph.norms},
            "overwritten": [layer.fqn for layer in graph.layers if layer.overwritten or foreign],
        }
    return edges, placement


def _is_foreign(graph: PropagationGraph, config: SanConfig, modules: Iterable[nn.Module]) -> bool:
    """Returns whether a user-supplied graph has no in-place outputs although the model has in-place modules.

    It may then be the graph of another model with the same layers, such as one with other activations.
    """
    if isinstance(config.propagation, str) or any(layer.overwritten for layer in graph.layers):
        return False
    return any(getattr(module, "inplace", False) is True for module in modules)


def _chosen(
    model: nn.Module, config: SanConfig, graph: PropagationGraph | None, names: dict[str, nn.Module], wide: bool
) -> set[str] | str:
    """Returns the default targets: all traced layers except the heads that the other options select."""
    if graph is not None and graph.layers:
        left_out = {layer.fqn for layer in graph.layers if layer.left_out}
        chosen = [layer.fqn for layer in graph.layers if layer.fqn not in left_out.union(graph.heads)]
    else:
        output: Any = getattr(model, "get_output_embeddings", None)
        head = None if output is None else output()
        chosen = [name for name, module in names.items() if module is not head and not _is_table(module)]
    chosen = [n for n in chosen if not _inside(n, config.modules_to_save) and (not wide or _is_linear(names[n]))]
    kept = [n for n in chosen if _peft.in_blocks(config, n) and not _peft.is_excluded(config, n)]
    if chosen and not kept:
        raise TargetError(
            f"None of the {len(chosen)} layers matches layers_to_transform={config.layers_to_transform}, "
            f"layers_pattern={config.layers_pattern!r} and exclude_modules={_listed(config.exclude_modules)}; the "
            f"first layer is {chosen[0]}."
        )
    if config.inner is not None:
        inner = config.inner_config()
        reasons = {
            n: unfit(config.inner["peft_type"], _plain(names[n])) or _peft.refusal(inner, model, n) for n in kept
        }
        fitting = [n for n in kept if reasons[n] is None]
        if fitting and len(fitting) < len(kept):
            first = next(n for n in kept if reasons[n])
            warnings.warn(
                f"{len(kept) - len(fitting)} of {len(kept)} layers are left out because {config.inner['peft_type']} "
                f"cannot adapt them, such as {first}: {reasons[first]}.",
                stacklevel=5,
            )
            kept = fitting
    return exactly(kept, (name for name, _ in model.named_modules()))


def exactly(chosen: Iterable[str], every: Iterable[str]) -> set[str] | str:
    """Returns targets that match exactly the chosen modules.

    PEFT matches a list at the end of names. If that would also match other modules (`2` matches `3.2`), this returns a
    regular expression.
    """
    chosen = set(chosen)
    ends = tuple(f".{name}" for name in chosen)
    if any(name.endswith(ends) and name not in chosen for name in map(plain_name, every)):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return chosen


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _check_targets(
    tuner: _peft.Tuner,
    model: nn.Module,
    config: SanConfig,
    modules: dict[str, nn.Module],
    graph: PropagationGraph | None,
) -> None:
    """Raises `TargetError` if a target matches no module, or a module that SAN cannot adapt."""
    targets: Any = config.target_modules
    for target in sorted(targets) if isinstance(targets, set | list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            last = dict.fromkeys(name.rpartition(".")[2] for name, m in modules.items() if _is_layer(m))
            close = difflib.get_close_matches(target, last, n=3)
            raise TargetError(
                f"Target modules {{{target!r}}} not found in the base model: target_modules contains {target!r}, but "
                f"no module name of the {type(model).__name__} ends with it."
                f"{' Did you mean ' + ', '.join(close) + '?' if close else ''} Its layers: {', '.join(last)}."
            )
    idle = []
    attentions = [
        name
        for name, module in modules.items()
        if isinstance(_plain(module), nn.MultiheadAttention) and _peft.matches(tuner, config, name)
    ]
    traced = {layer.fqn for layer in graph.layers} if graph is not None else set()
    for name, module in modules.items():
        if isinstance(module, AuxiliaryTrainingWrapper) or not _peft.matches(tuner, config, name):
            continue
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(module, BaseTunerLayer):
            _check_host(name, module, config)
        _check_parallel(name, inner)
        if not isinstance(inner, LAYER_TYPES):
            raise TargetError(f"{name} is {cannot_adapt(inner)}")
        if config.inner is not None and (reason := unfit(config.inner["peft_type"], inner)):
            raise TargetError(f"{name} is {reason}. Leave it out of target_modules.")
        if any(name.startswith(f"{other}.") for other in attentions):
            raise TargetError(
                f"{name} is part of an nn.MultiheadAttention that is a target as well and already scales its output "
                "projection. Target only one of them."
            )
        if traced and name not in traced:
            idle.append(name)
    if idle:
        warnings.warn(
            f"{len(idle)} target layers were not called when the model was traced, so nothing is propagated from or to "
            "them. Their scales have an effect only if the model reads their weights directly: "
            f"{', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''}.",
            stacklevel=4,
        )


def _check_parallel(fqn: str, layer: Any) -> None:
    """Raises `TargetError` if a layer is sharded: its scale would be sharded too, but edges connect full layers."""
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if any(getattr(layer, name, None) is not None for name in ("_hf_tp_plan", "_hf_device_mesh")):
        raise TargetError(
            f"{fqn} is split by tensor parallelism (plan {getattr(layer, '_hf_tp_plan', None)!r}), which SAN does not "
            "support. Load the model without tp_plan, and shard it with FSDP2 after get_peft_model."
        )
    weight: Any = stored_weight(layer) if isinstance(layer, LAYER_TYPES) else None
    if is_sharded(weight):
        raise TargetError(
            f"The weight of {fqn} is already sharded across {weight.device_mesh.size()} devices. Call get_peft_model "
            "first, then fully_shard."
        )


def _check_host(fqn: str, layer: BaseTunerLayer, config: SanConfig) -> None:
    """Raises `TargetError` if a layer belongs to another tuner that does not host this adapter."""
    host = layer.host if isinstance(layer, SanLayer) else layer
    if host is None:
        return
    theirs = type_of(host)
    if config.inner is None and not isinstance(layer, SanLayer):
        raise TargetError(
            f"{fqn} is already adapted by another tuner ({theirs}). To propagate the scale of that adapter, call "
            "san_peft.propagate(model); to use SAN instead, unload it first."
        )
    if config.inner is not None and theirs != config.inner["peft_type"]:
        raise TargetError(
            f"{fqn} hosts a {theirs} adapter, but inner is a {config.inner['peft_type']} config: a layer supports one "
            "type of host. Load only one of them, or merge the first."
        )


def _graph(model: nn.Module, config: SanConfig, tables: Iterable[str]) -> PropagationGraph | None:
    """Returns the traced or given graph, before the scheme selects edges; `None` if none is needed.

    The model is traced even without propagation, to find the heads and the outputs that are modified in place.
    """
    if not isinstance(config.propagation, str):
        return PropagationGraph.from_json(config.propagation)
    try:
        return trace_plain(model, tables=tables)
    except TraceError:
        if config.propagation == "none":
            return None
        raise


def trace_plain(model: nn.Module, example_inputs: Any = None, tables: Iterable[str] = ()) -> PropagationGraph:
    """Traces a model with all adapters disabled, using the module names of the base model."""
    from san_peft.propagation.trace import trace

    embeddings = [name for name, _ in model.named_modules() if plain_name(name) in set(tables)]
    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    with _disabled(adapted):
        return _plain_graph(trace(model, example_inputs, embeddings))


def _select(
    tuner: _peft.Tuner, config: SanConfig, graph: PropagationGraph, names: dict[str, nn.Module]
) -> tuple[Edge, ...]:
    explicit = not isinstance(config.propagation, str)
    edges = graph.select("all" if explicit else config.propagation).edges
    edges = [edge for edge in edges if not _inside(edge.posterior, config.modules_to_save)]
    _check_edges(edges, names)
    carried = {n for n in names if _peft.matches(tuner, config, n)}
    if config.inner is not None and not config.own_scale:
        inner = config.inner_config()
        carried = {n for n in carried if not is_feedforward(inner, n)}
    # the tracer does not look inside an attention, so if its output projection is a target, it gets no edges itself
    edges = [edge for edge in edges if not any(name.startswith(f"{edge.posterior}.") for name in carried)]
    kept, cut = [], []
    for edge in edges:
        (kept if edge.anterior in carried else cut).append(edge)
    limited = config.exclude_modules or config.layers_to_transform is not None
    if cut and (explicit or limited):
        shown = "; ".join(f"{e.anterior} -> {e.posterior}" for e in cut[:3])
        warnings.warn(
            f"{len(cut)} of {len(edges)} edges are dropped because their anterior layer has no scale: "
            f"{shown}{' ...' if len(cut) > 3 else ''}.",
            stacklevel=5,
        )
    return tuple(kept)


@contextmanager
def _disabled(modules: list[Any]) -> Iterator[None]:
    """Disables tuner layers temporarily, and restores the state of each."""
    before = [(m, m.disable_adapters) for m in modules]
    try:
        for module, _ in before:
            _peft.set_disabled(module, True)
        yield
    finally:
        for module, state in before:
            _peft.set_disabled(module, state)


def _plain(module: nn.Module) -> nn.Module:
    """Returns the frozen layer inside a tuner layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_layer(module: nn.Module) -> bool:
    return isinstance(_plain(module), LAYER_TYPES)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(_plain(module), nn.Linear | Conv1D)


def _is_table(module: nn.Module) -> bool:
    return isinstance(_plain(module), nn.Embedding)


def _inside(fqn: str, saved: Iterable[str] | None) -> bool:
    """Returns whether a module is in `modules_to_save` or inside such a module; PEFT matches name endings."""
    parts = fqn.split(".")
    ends = tuple(saved or ())
    return any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts) + 1))


def layers_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Returns modules by their name in the base model, without the submodules of tuner layers."""
    found: dict[str, Any] = {}
    within = None
    for full, module in model.named_modules():
        name = plain_name(full)
        if within is not None and name.startswith(within):
            continue
        if isinstance(module, BaseTunerLayer):
            within = f"{name}."
        found.setdefault(name, module)
    return found


def plain_name(name: str) -> str:
    """Returns the name that a module has in the base model."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def _plain_graph(graph: PropagationGraph) -> PropagationGraph:
    edges = [
        dataclasses.replace(e, anterior=plain_name(e.anterior), posterior=plain_name(e.posterior)) for e in graph.edges
    ]
    layers = [dataclasses.replace(layer, fqn=plain_name(layer.fqn)) for layer in graph.layers]
    norms = [Norm(plain_name(norm.fqn), tuple(map(plain_name, norm.readers))) for norm in graph.norms]
    heads = tuple(map(plain_name, graph.heads))
    return PropagationGraph(tuple(edges), graph.barriers, tuple(layers), heads, tuple(norms))


def _check_edges(edges: Iterable[Edge], names: dict[str, nn.Module]) -> None:
    """Raises `GraphError` if an edge names a missing layer, or its channel counts do not fit."""
    for edge in edges:
        for fqn in (edge.anterior, edge.posterior):
            if fqn not in names:
                close = difflib.get_close_matches(fqn, names, n=3)
                raise GraphError(
                    f"edge {edge}: the model has no layer {fqn} that SAN can adapt."
                    f"{' Did you mean ' + ', '.join(close) + '?' if close else ''}"
                    " Edges are specific to an architecture: set edges=None to trace them again."
                )
        out, size = _sizes(names[edge.anterior])[0], _sizes(names[edge.posterior])[1]
        if (edge.channels.source_size, edge.channels.size) != (out, size):
            raise GraphError(
                f"edge {edge}: its channel map goes from {edge.channels.source_size} to {edge.channels.size} channels, "
                f"but {edge.anterior} has {out} output channels and {edge.posterior} has {size} input channels."
            )


def _sizes(module: nn.Module) -> tuple[int, int]:
    layer = module if isinstance(module, SanLayer) else layer_for(module)
    return layer.out_features, layer.in_features


def norms_of(model: nn.Module) -> list[str]:
    """Returns the names of normalisation layers: 'norm' in the class name, and only 1D parameters."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        params = list(module.parameters(recurse=False))
        if "norm" in type(module).__name__.lower() and params and all(p.dim() == 1 for p in params):
            found.append(plain_name(name))
    return [name for name in dict.fromkeys(found) if ".modules_to_save" not in name]

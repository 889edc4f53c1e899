"""Resolving: which layers a configuration means and which edges connect them. Nothing is changed in the model."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.conv import _ConvNd

from san_peft.errors import GraphError, TargetError, TraceError
from san_peft.propagation.graph import Edge, Norm, PropagationGraph
from san_peft.tuner import _peft
from san_peft.tuner.attention import layer_for
from san_peft.tuner.config import SanConfig
from san_peft.tuner.decompose import is_feedforward, type_of, unfit
from san_peft.tuner.frozen import stored_weight
from san_peft.tuner.layer import LAYER_TYPES, SanLayer, cannot_adapt
from san_peft.tuner.sharded import is_sharded


def resolve(tuner: _peft.Tuner, model: nn.Module, config: SanConfig) -> PropagationGraph:
    """Fills in the configuration's targets, norms, edges and placement, and returns the edges with their norms."""
    modules = layers_by_name(model)
    names = {name: module for name, module in modules.items() if _is_layer(module)}
    targets: Any = config.target_modules
    norms: Any = config.modules_to_save
    wide = isinstance(targets, str) and targets.lower() == "all-linear"
    tables = (
        []
        if targets is None or wide
        else [n for n, m in names.items() if _is_table(m) and _peft.matches(tuner, config, n)]
    )
    graph = _graph(model, config, tables) if config.edges is None or targets is None or wide else None
    if targets is None or (wide and graph):
        without = [name for name, module in names.items() if not _is_table(module)]
        chosen = [layer.fqn for layer in graph.layers] if graph and graph.layers else without
        heads = set(graph.heads) if graph else set()
        targets = {
            n for n in chosen if n not in heads and not _inside(n, norms) and not (wide and _is_convolution(names[n]))
        }
    if config.train_norms:
        norms = sorted({*(norms or []), *(n for n in norms_of(model) if not _inside(n, norms))})
    draft = dataclasses.replace(config, target_modules=targets, edges=None)
    stored = None if config.edges is None else config.resolved_edges()
    placement = config.placement
    _check_edges(stored or (), names)
    _check_targets(tuner, model, draft, modules, graph)
    if stored is None:
        stored = _select(tuner, draft, graph, names) if graph else ()
        placement = None
        if graph is not None and graph.layers:
            placement = {
                "norms": {norm.fqn: list(norm.readers) for norm in graph.norms},
                "overwritten": [layer.fqn for layer in graph.layers if layer.overwritten],
            }
    for edge in stored:
        _check_parallel(edge.posterior, names[edge.posterior])
    config.target_modules, config.modules_to_save = targets, norms
    config.edges = [edge.to_json() for edge in stored]
    config.placement = placement
    seen = () if placement is None else placement["norms"].items()
    return PropagationGraph(stored, norms=tuple(Norm(fqn, tuple(readers)) for fqn, readers in seen))


def _check_targets(
    tuner: _peft.Tuner,
    model: nn.Module,
    config: SanConfig,
    modules: dict[str, nn.Module],
    graph: PropagationGraph | None,
) -> None:
    """Raises where a target is no layer that SAN can adapt, or a listed name matches nothing at all."""
    targets: Any = config.target_modules
    for target in sorted(targets) if isinstance(targets, set | list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            last = dict.fromkeys(name.rpartition(".")[2] for name, m in modules.items() if _is_layer(m))
            close = difflib.get_close_matches(target, last, n=3)
            raise TargetError(
                f"target_modules names {target!r}, but no module of the {type(model).__name__} ends in it."
                f"{' Did you mean ' + ', '.join(close) + '?' if close else ''} Its layers: {', '.join(last)}."
            )
    idle = []
    attentions = [
        name
        for name, module in modules.items()
        if isinstance(_frozen(module), nn.MultiheadAttention) and _peft.matches(tuner, config, name)
    ]
    traced = {layer.fqn for layer in graph.layers} if graph is not None else set()
    for name, module in modules.items():
        if isinstance(module, AuxiliaryTrainingWrapper) or targets == "all-linear":
            continue
        if not _peft.matches(tuner, config, name):
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
                f"{name} is a part of an nn.MultiheadAttention that target_modules names as well. The attention has "
                "scales for its output projection too: name one of them."
            )
        if traced and name not in traced:
            idle.append(name)
    if idle:
        warnings.warn(
            f"{len(idle)} target layers were not called when the model was traced. If the model reads their weights "
            "directly, their own scales act, but nothing is propagated from them or to them; else they may do nothing: "
            f"{', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''}.",
            stacklevel=4,
        )


def _check_parallel(fqn: str, layer: Any) -> None:
    """Raises where a layer is cut into parts: its scale would be cut as well, and its edges lead to whole layers."""
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if any(getattr(layer, name, None) is not None for name in ("_hf_tp_plan", "_hf_device_mesh")):
        raise TargetError(
            f"{fqn} is split by tensor parallelism (plan {getattr(layer, '_hf_tp_plan', None)!r}), which SAN does not "
            "support. Load the model without tp_plan, and shard it with FSDP2 after get_peft_model."
        )
    weight: Any = stored_weight(layer) if isinstance(layer, LAYER_TYPES) else None
    if is_sharded(weight):
        raise TargetError(
            f"The weight of {fqn} is in shards on {weight.device_mesh.size()} devices already. Call "
            "get_peft_model first and fully_shard after it."
        )


def _check_host(fqn: str, layer: BaseTunerLayer, config: SanConfig) -> None:
    """Raises where a layer is another tuner's, unless it is of the kind that hosts this adapter."""
    host = layer.host if isinstance(layer, SanLayer) else layer
    if host is None:
        return
    theirs = type_of(host)
    if config.inner is None and not isinstance(layer, SanLayer):
        raise TargetError(
            f"{fqn} already is a layer of another tuner ({theirs}). To propagate that adapter's own scale use "
            "san_peft.propagate(model); to add SAN beside it, unload it first."
        )
    if config.inner is not None and theirs != config.inner["peft_type"]:
        raise TargetError(
            f"{fqn} hosts a {theirs} adapter, and inner asks for {config.inner['peft_type']}: two kinds of host cannot "
            "share a layer. Load one of them, or merge the first."
        )


def _graph(model: nn.Module, config: SanConfig, tables: Iterable[str]) -> PropagationGraph | None:
    """Returns the graph the configuration speaks of, before its scheme selects; `None` where none is needed."""
    if not isinstance(config.propagation, str):
        return PropagationGraph.from_json(config.propagation)
    if config.propagation == "none" and config.target_modules not in (None, "all-linear"):
        return None
    from san_peft.propagation.trace import trace

    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    try:
        with _disabled(adapted):
            embeddings = [name for name, _ in model.named_modules() if plain_name(name) in set(tables)]
            return _plain_graph(trace(model, embeddings=embeddings))
    except TraceError:
        if config.propagation == "none":
            return None
        raise


def _select(
    tuner: _peft.Tuner, config: SanConfig, graph: PropagationGraph, names: dict[str, nn.Module]
) -> tuple[Edge, ...]:
    explicit = not isinstance(config.propagation, str)
    edges = graph.select("all" if explicit else config.propagation).edges
    _check_edges(edges, names)
    carried = {n for n in names if _peft.matches(tuner, config, n)}
    if config.inner is not None and not config.own_scale:
        inner = config.inner_config()
        carried = {n for n in carried if not is_feedforward(inner, n)}
    edges = [edge for edge in edges if not _inside(edge.posterior, config.modules_to_save)]
    # the inside of an attention is not followed, so one whose output projection is a target by itself reads nothing
    edges = [edge for edge in edges if not any(name.startswith(f"{edge.posterior}.") for name in carried)]
    kept, cut = [], []
    for edge in edges:
        (kept if edge.anterior in carried else cut).append(edge)
    limited = config.exclude_modules or config.layers_to_transform is not None
    if cut and (explicit or limited):
        shown = "; ".join(f"{e.anterior} -> {e.posterior}" for e in cut[:3])
        warnings.warn(
            f"{len(cut)} of {len(edges)} edges fall away because their anterior layer carries no scale: "
            f"{shown}{' ...' if len(cut) > 3 else ''}.",
            stacklevel=4,
        )
    return tuple(kept)


@contextmanager
def _disabled(modules: list[Any]) -> Iterator[None]:
    """Runs tuner layers as their frozen layers, and puts every one's own state back."""
    before = [(m, m.disable_adapters) for m in modules]
    try:
        for module, _ in before:
            _peft.set_disabled(module, True)
        yield
    finally:
        for module, state in before:
            _peft.set_disabled(module, state)


def _frozen(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_layer(module: nn.Module) -> bool:
    return isinstance(_frozen(module), LAYER_TYPES)


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(_frozen(module), _ConvNd)


def _is_table(module: nn.Module) -> bool:
    return isinstance(_frozen(module), nn.Embedding)


def _inside(fqn: str, saved: Iterable[str] | None) -> bool:
    """Whether a module is one of `modules_to_save`, or part of one; PEFT matches these at the end of names."""
    parts = fqn.split(".")
    ends = tuple(saved or ())
    return any(".".join(parts[:count]).endswith(ends) for count in range(1, len(parts) + 1))


def layers_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the name they had before any adapter was put in; what a tuner layer keeps inside is left out."""
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
    """Returns a module's name as it was before any adapter was put in."""
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
    """Raises `GraphError` where an edge names a layer the model lacks, or its lengths do not fit."""
    for edge in edges:
        for fqn in (edge.anterior, edge.posterior):
            if fqn not in names:
                close = difflib.get_close_matches(fqn, names, n=3)
                raise GraphError(
                    f"edge {edge}: the model has no layer {fqn} that SAN can adapt."
                    f"{' Did you mean ' + ', '.join(close) + '?' if close else ''}"
                    " Edges belong to one architecture: set edges=None to resolve them anew."
                )
        out, size = _sizes(names[edge.anterior])[0], _sizes(names[edge.posterior])[1]
        if (edge.channels.source_size, edge.channels.size) != (out, size):
            raise GraphError(
                f"edge {edge}: its map leads from {edge.channels.source_size} to {edge.channels.size} channels, but "
                f"{edge.anterior} writes {out} and {edge.posterior} reads {size}."
            )


def _sizes(module: nn.Module) -> tuple[int, int]:
    layer = module if isinstance(module, SanLayer) else layer_for(module)
    return layer.out_features, layer.in_features


def norms_of(model: nn.Module) -> list[str]:
    """Returns the names of the modules that normalise: no children, a class named so, nothing but vectors to train."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        params = list(module.parameters(recurse=False))
        if "norm" in type(module).__name__.lower() and params and all(p.dim() == 1 for p in params):
            found.append(plain_name(name))
    return [name for name in dict.fromkeys(found) if ".modules_to_save" not in name]

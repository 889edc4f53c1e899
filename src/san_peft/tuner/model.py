"""The tuner: puts SAN layers into a model and wires the edges of the propagation graph to them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from san_peft.errors import AdapterError, GraphError, SanError
from san_peft.propagation.graph import Edge, PropagationGraph
from san_peft.tuner import _peft
from san_peft.tuner.config import SanConfig
from san_peft.tuner.layer import MODES, Incoming, SanLayer, index_of
from san_peft.tuner.resolve import resolve


class SanModel(_peft.Tuner):
    """A model under SAN: small trained scales on frozen layers, propagated along the traced graph.

    Args:
        model: The model to adapt.
        peft_config: Its `SanConfig`, or a dict of them by adapter name.
        adapter_name: Name of the adapter.

    Raises:
        SanError: If targets, edges or lengths do not fit the model; the model stays as it was.
    """

    prefix = _peft.PREFIX
    tuner_layer_cls = SanLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds an adapter: resolves targets and edges first, then puts the layers in, then wires them."""
        config: Any = self.peft_config[adapter_name]
        edges = resolve(self, model, config)
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
            **kwargs,
        )
        self._wire(model, adapter_name, config, edges, low_cpu_mem_usage)

    @property
    def propagation_graph(self) -> PropagationGraph:
        """The edges in use by the active adapters."""
        edges = {(e.anterior, e.posterior): e for a in self.active_adapters for e in self._edges_of(a)}
        return PropagationGraph(tuple(edges.values()))

    def _edges_of(self, adapter_name: str) -> tuple[Edge, ...]:
        config: Any = self.peft_config[adapter_name]
        return config.resolved_edges()

    # ------------------------------------------------------------------ injecting and wiring

    def prepare_config(self, config: SanConfig, model_config: dict[str, Any]) -> SanConfig:
        """Returns the configuration as it is: `_resolve` has filled in the targets."""
        return config

    def create_and_replace(
        self, config: SanConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, fqn: str
    ) -> None:
        """Gives a module a scale of its own."""
        layer = target if isinstance(target, SanLayer) else SanLayer(target)
        layer.update_layer(adapter_name, config, inference_mode=config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            _peft.replace(self, parent, target_name, layer, target)

    def _wire(self, model: nn.Module, adapter_name: str, config: SanConfig, edges: Iterable[Edge], empty: bool) -> None:
        by_posterior: dict[str, list[Edge]] = {}
        for edge in edges:
            by_posterior.setdefault(edge.posterior, []).append(edge)
        for fqn, group in by_posterior.items():
            posterior = model.get_submodule(fqn)
            if not isinstance(posterior, SanLayer):
                parent, _, name = fqn.rpartition(".")
                layer = SanLayer(posterior)
                layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
                layer.train(posterior.training)
                _peft.replace(self, model.get_submodule(parent), name, layer, posterior)
                posterior = layer
            incoming = []
            for edge in group:
                source = model.get_submodule(edge.anterior)
                if not isinstance(source, SanLayer) or adapter_name not in source.san_scale:
                    raise GraphError(f"edge {edge}: {edge.anterior} carries no scale of adapter {adapter_name!r}.")
                index = index_of(edge.channels)
                incoming.append(Incoming(edge.anterior, source.san_scale, index, config.exponent, config.detach))
            with torch.device("meta") if empty else _nothing():
                posterior.connect(adapter_name, incoming, config.gate)
            if config.gate:
                trainable = adapter_name in self.active_adapters and not config.inference_mode
                posterior.san_gate[adapter_name].requires_grad_(trainable)

    # ------------------------------------------------------------------ modes

    def set_mode(self, mode: str) -> _Mode:
        """Chooses what of the trained adapter acts, for analysis.

        Args:
            mode: `both`; `neuron`, the own scale and shift without propagation; `synapse`, the propagated input scale
                alone; `off`, the frozen layers with the trained head and norms.

        Returns:
            A handle that puts the earlier mode back when used as a context manager.

        Raises:
            SanError: For an unknown mode, or while an adapter is merged.
        """
        if mode not in MODES:
            raise SanError(f"Unknown mode {mode!r}; choose from {', '.join(MODES)}.")
        layers = [module for module in self.modules() if isinstance(module, SanLayer)]
        merged = sum(layer.merged for layer in layers)
        if merged:
            raise SanError(f"{merged} of {len(layers)} layers are merged, which fixes the mode; unmerge first.")
        before = layers[0].san_mode if layers else "both"
        for layer in layers:
            layer.san_mode = mode
        return _Mode(self, before)

    # ------------------------------------------------------------------ merging and combining

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises what a safe merge of any layer would raise, before any weight is touched."""
        for module in self.modules():
            if isinstance(module, SanLayer):
                module.check_merge(adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges as PEFT does; with `safe_merge`, all layers are checked before the first is touched."""
        if safe_merge:
            self.check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merges and returns the plain model; with `safe_merge`, all layers are checked before one is touched."""
        if safe_merge:
            self.check_merge(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Makes a new adapter out of several.

        Args:
            adapters: Names of the adapters; they must have the same targets, edges and exponent.
            weights: Weight of each.
            adapter_name: Name of the new one.
            combination_type: `linear` adds the weighted offsets from one; `product` multiplies the scales, each raised
                to its weight (positive scales only). Shifts are added with their weights either way.

        Raises:
            AdapterError: If the adapters do not exist, do not match, or cannot be combined that way.
        """
        if adapter_name in self.peft_config:
            raise AdapterError(f"There already is an adapter {adapter_name!r}.")
        if len(adapters) != len(weights) or not adapters:
            raise AdapterError(f"{len(adapters)} adapters need as many weights, got {len(weights)}.")
        if combination_type not in ("linear", "product"):
            raise AdapterError(f"Unknown combination_type {combination_type!r}; choose linear or product.")
        for name in adapters:
            if name not in self.peft_config:
                raise AdapterError(f"There is no adapter {name!r}; there are {', '.join(self.peft_config)}.")
        first = self.peft_config[adapters[0]]
        for name in adapters[1:]:
            for field in ("target_modules", "edges", "exponent", "shift", "gate"):
                if getattr(self.peft_config[name], field) != getattr(first, field):
                    raise AdapterError(f"Adapters {adapters[0]!r} and {name!r} differ in {field}.")
        layers = [m for m in self.modules() if isinstance(m, SanLayer)]
        if combination_type == "product":
            for layer in layers:
                for name in adapters:
                    scale = layer.get_scale(name)
                    if scale is not None and bool((scale <= 0).any()):
                        raise AdapterError(f"A scale of adapter {name!r} is not positive; combine with 'linear'.")
        self.peft_config[adapter_name] = copy.deepcopy(first)
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer in layers:
                for kind in layer.adapter_layer_names:
                    bank = getattr(layer, kind)
                    if adapter_name not in bank:
                        continue
                    offsets = [bank[name].weight for name in adapters]
                    if combination_type == "product" and kind != "san_shift":
                        offsets = [torch.log1p(offset.float()) for offset in offsets]
                    total = torch.stack([w * o for w, o in zip(weights, offsets, strict=True)]).sum(0)
                    product = combination_type == "product" and kind != "san_shift"
                    bank[adapter_name].weight.copy_(torch.expm1(total) if product else total)


class _Mode:
    """Handle of `SanModel.set_mode`: leaving the context puts the earlier mode back."""

    def __init__(self, tuner: SanModel, before: str) -> None:
        self._tuner, self._before = tuner, before

    def __enter__(self) -> SanModel:
        return self._tuner

    def __exit__(self, *_: object) -> None:
        self._tuner.set_mode(self._before)


@contextmanager
def _nothing() -> Iterator[None]:
    yield

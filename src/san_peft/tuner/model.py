"""The tuner: puts SAN layers into a model and wires the edges of the propagation graph to them."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from san_peft.errors import AdapterError, GraphError, SanError
from san_peft.propagation.graph import Edge, PropagationGraph
from san_peft.propagation.placement import place
from san_peft.propagation.rules import ATTENTION
from san_peft.tuner import _peft
from san_peft.tuner.config import SanConfig
from san_peft.tuner.decompose import has_adapter, kind_of, moves_weight, reference_norms
from san_peft.tuner.layer import MODES, Incoming, SanLayer, index_of
from san_peft.tuner.merge import check_layers, existing, merge_layers
from san_peft.tuner.precision import PrecisionReport, report
from san_peft.tuner.quantized import forget_quantization, keep_exact
from san_peft.tuner.resolve import layers_by_name, resolve
from san_peft.tuner.scales import Scales


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
        graph = resolve(self, model, config)
        keep_exact(model)
        if config.inner is not None:
            self._inject_host(model, adapter_name, config, low_cpu_mem_usage)
            state_dict = None  # it names the host's tensors, and would be read as targets
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
            **kwargs,
        )
        self._wire(model, adapter_name, config, graph, low_cpu_mem_usage)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model, in a pass of its scales."""
        with self.scales.passing(kwargs):
            return self.model.forward(*args, **kwargs)

    @property
    def scales(self) -> Scales:
        """The scales of all adapters of the model, one object for a forward pass."""
        own = vars(self)
        if "_scales" not in own:
            layers = (m for m in self.model.modules() if isinstance(m, SanLayer))
            there = next((s for s in (getattr(layer, "san_scales", None) for layer in layers) if s is not None), None)
            own["_scales"] = Scales(self.model) if there is None else there
        return own["_scales"]

    def set_mixed(self, adapter_names: list[str] | None) -> None:
        """Says which adapters the samples of the next batch name, or that they name none."""
        self.scales.mixed = () if adapter_names is None else tuple(sorted(set(adapter_names)))

    def train(self, mode: bool = True) -> SanModel:
        """Sets the mode, on which it depends where some scales act."""
        super().train(mode)
        self.scales.prepare()
        return self

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates adapters."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.scales.prepare()

    def enable_adapter_layers(self) -> None:
        """Switches the adapters on."""
        super().enable_adapter_layers()
        self.scales.prepare()

    def disable_adapter_layers(self) -> None:
        """Switches the adapters off."""
        super().disable_adapter_layers()
        self.scales.prepare()

    def unloaded(self) -> None:
        """Gives norms their own classes back, once the layers are out of the model."""
        self.scales.release()

    @property
    def propagation_graph(self) -> PropagationGraph:
        """The edges in use by the active adapters."""
        edges = {(e.anterior, e.posterior): e for a in self.active_adapters for e in self._edges_of(a)}
        return PropagationGraph(tuple(edges.values()))

    def _edges_of(self, adapter_name: str) -> tuple[Edge, ...]:
        config: Any = self.peft_config[adapter_name]
        return config.resolved_edges()

    def precision_report(self) -> PrecisionReport:
        """Says how many propagated scales half precision would round to one, and how many are lost when applied.

        See `san_peft.tuner.precision.report`, also for an example.

        Returns:
            The report, with one row for each edge of the active adapters that acts at present.

        Raises:
            SanError: If frozen weights are offloaded or partitioned.
        """
        return report(self.scales)

    # ------------------------------------------------------------------ hosts

    @property
    def hosts(self) -> dict[str, Any]:
        """PEFT's tuners that hold the adapters hosting SAN, by type; no part of the model themselves."""
        return vars(self).setdefault("_hosts", {})

    def _inject_host(self, model: nn.Module, adapter_name: str, config: SanConfig, empty: bool) -> None:
        """Puts the host's adapter on the targets, unless it is there; a failure leaves the layers as they were."""
        inner: Any = config.inner_config()
        kind = kind_of(inner, config.decomposition)
        targets = {n: m for n, m in layers_by_name(model).items() if _peft.matches(self, config, n)}
        if all(has_adapter(_host_of(m), adapter_name) for m in targets.values()):
            return
        if kind.forms_delta:
            warnings.warn(
                f"The scale of {kind.name} comes out of its whole delta weight, formed in every step for each of "
                f"{len(targets)} layers; LoRA, DoRA and VeRA do without.",
                stacklevel=4,
            )
        inner.target_modules = set(targets)
        inner.inference_mode = config.inference_mode
        with self.without_layers(model):
            before: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
            references = reference_norms(before) if moves_weight(inner) else {}
            try:
                self.hosts[kind.name] = _peft.inject_host(
                    self.hosts.get(kind.name), model, inner, adapter_name, self.active_adapters, low_cpu_mem_usage=empty
                )
            except BaseException:
                for name, module in before.items():
                    model.set_submodule(name, module)
                    if has_adapter(_host_of(module), adapter_name):
                        module.delete_adapter(adapter_name)
                raise
        vars(self)["_references"] = references

    @contextmanager
    def without_layers(self, model: nn.Module) -> Iterator[None]:
        """Takes SAN's layers off for as long as another tuner works on the model."""
        layers = {n: m for n, m in model.named_modules() if isinstance(m, SanLayer)}
        for name, layer in layers.items():
            model.set_submodule(name, layer.base_layer)
        try:
            yield
        finally:
            for name, layer in layers.items():
                layer.base_layer = model.get_submodule(name)
                model.set_submodule(name, layer)

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
        if adapter_name in layer.san_host:
            layer.san_host[adapter_name].reference = vars(self).get("_references", {}).get(fqn)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            _peft.replace(self, parent, target_name, layer, target)

    def _wire(
        self, model: nn.Module, adapter_name: str, config: SanConfig, graph: PropagationGraph, empty: bool
    ) -> None:
        by_posterior: dict[str, list[Edge]] = {}
        for edge in graph.edges:
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
                banks = (source.san_scale, source.san_host) if isinstance(source, SanLayer) else ()
                if not any(adapter_name in bank for bank in banks):
                    raise GraphError(f"edge {edge}: {edge.anterior} carries no scale of adapter {adapter_name!r}.")
                index = index_of(edge.channels)
                incoming.append(Incoming(edge.anterior, banks, index, config))
            with torch.device("meta") if empty else _nothing():
                posterior.connect(adapter_name, incoming, config.gate)
            if config.gate:
                trainable = adapter_name in self.active_adapters and not config.inference_mode
                posterior.san_gate[adapter_name].requires_grad_(trainable)
        layers = {name: m for name, m in layers_by_name(model).items() if isinstance(m, SanLayer)}
        for name, layer in layers.items():
            if adapter_name in layer.san_scale or adapter_name in layer.san_host:
                stays = config.placement is not None and name not in config.placement["overwritten"]
                layer.san_keep = "output" if stays else "input"
        readers = {norm.fqn: norm.readers for norm in graph.norms}
        attention = {(edge.anterior, edge.posterior) for edge in graph.edges if ATTENTION in edge.via}
        self.scales.wire(adapter_name, layers, place(graph), readers, attention)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, its host's part included."""
        super().delete_adapter(adapter_name)
        for host in self.hosts.values():
            host.peft_config.pop(adapter_name, None)
        self.scales.unwire(adapter_name)

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
        layers = self._san_layers()
        merged = sum(layer.merged for layer in layers)
        if merged:
            raise SanError(f"{merged} of {len(layers)} layers are merged, which fixes the mode; unmerge first.")
        before = layers[0].san_mode if layers else "both"
        for layer in layers:
            layer.san_mode = mode
        self.scales.prepare()
        return _Mode(self, before)

    # ------------------------------------------------------------------ merging and combining

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises what a safe merge of any layer would raise, before any weight is touched."""
        names = existing(adapter_names, self.peft_config)
        self._check_merge_allowed()
        check_layers(self._san_layers(), names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges as PEFT does, hosts included, all layers or none; `safe_merge` looks for NaN before it begins."""
        names = existing(adapter_names, self.peft_config)
        self._check_merge_allowed()
        merge_layers(self._san_layers(), names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerges all merged adapters, hosts included: the frozen weights come back bit for bit."""
        layers = self._san_layers()
        for layer in [layer for layer in layers if layer.merged] or layers[:1]:
            with onload_layer(layer):
                layer.unmerge()

    def _san_layers(self) -> list[SanLayer]:
        return [module for module in self.modules() if isinstance(module, SanLayer)]

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merges and returns the plain model; every layer is checked before one is touched, and nothing is kept."""
        names = existing(adapter_names, self.peft_config)
        self._check_merge_allowed()
        merge_layers(self._san_layers(), names, safe_merge, keeps_base=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return forget_quantization(super().merge_and_unload(progressbar, adapter_names=names))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts a module into the place of another; PEFT's would ask one of several layers for a weight of its own."""
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **options: Any,
    ) -> None:
        """Makes a new adapter out of several.

        Args:
            adapters: Names of the adapters; they must have the same targets, edges and exponent.
            weights: Weight of each.
            adapter_name: Name of the new one.
            combination_type: `linear` adds the weighted offsets from one; `product` multiplies the scales, each raised
                to its weight (positive scales only). Shifts are added with their weights either way. Hosts are combined
                by PEFT, which has other types for them, and the scale comes out of the result.
            options: Passed to PEFT where hosts are combined, such as `svd_rank`.

        Raises:
            AdapterError: If the adapters do not exist, do not match, or cannot be combined that way.
        """
        if adapter_name in self.peft_config:
            raise AdapterError(f"There already is an adapter {adapter_name!r}.")
        if len(adapters) != len(weights) or not adapters:
            raise AdapterError(f"{len(adapters)} adapters need as many weights, got {len(weights)}.")
        for name in adapters:
            if name not in self.peft_config:
                raise AdapterError(f"There is no adapter {name!r}; there are {', '.join(self.peft_config)}.")
        first: Any = self.peft_config[adapters[0]]
        for name in adapters[1:]:
            for field in (
                "target_modules",
                "edges",
                "exponent",
                "bound",
                "shift",
                "gate",
                "decomposition",
                "own_scale",
            ):
                if getattr(self.peft_config[name], field) != getattr(first, field):
                    raise AdapterError(f"Adapters {adapters[0]!r} and {name!r} differ in {field}.")
        configs: Any = self.peft_config
        hosts = {(configs[name].inner or {}).get("peft_type") for name in adapters}
        if hosts != {None}:
            return self._combine_hosts(adapters, weights, adapter_name, combination_type, hosts, options)
        if combination_type not in ("linear", "product") or options:
            raise AdapterError(
                f"Unknown combination_type {combination_type!r}, or options ({', '.join(options) or 'none'}); choose "
                "linear or product, without options."
            )
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

    def _combine_hosts(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str,
        kinds: set[str | None],
        options: dict[str, Any],
    ) -> None:
        first: Any = self.peft_config[adapters[0]]
        host: Any = self.hosts.get(str(first.inner and first.inner["peft_type"]))
        if len(kinds) > 1 or first.own_scale or not hasattr(host, "add_weighted_adapter"):
            raise AdapterError(
                "Adapters over hosts are combined by PEFT, where all have one kind of host that PEFT can combine, and "
                f"no scales of their own; these have the hosts {', '.join(map(str, kinds))}."
            )
        with self.without_layers(self.model):
            host.active_adapter = self.active_adapter
            host.add_weighted_adapter(adapters, weights, adapter_name, combination_type=combination_type, **options)
        inner = copy.deepcopy(host.peft_config[adapter_name])
        inner.target_modules = None
        self.peft_config[adapter_name] = dataclasses.replace(first, inner=inner)
        self.inject_adapter(self.model, adapter_name)


class _Mode:
    """Handle of `SanModel.set_mode`: leaving the context puts the earlier mode back."""

    def __init__(self, tuner: SanModel, before: str) -> None:
        self._tuner, self._before = tuner, before

    def __enter__(self) -> SanModel:
        return self._tuner

    def __exit__(self, *_: object) -> None:
        self._tuner.set_mode(self._before)


def _host_of(module: nn.Module) -> Any:
    host = module.host if isinstance(module, SanLayer) else module
    return host if isinstance(host, BaseTunerLayer) else None


@contextmanager
def _nothing() -> Iterator[None]:
    yield

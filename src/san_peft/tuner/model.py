"""The tuner: puts SAN layers into a model and wires the edges of the propagation graph to them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn

from san_peft.errors import AdapterError, GraphError, MergeError, SanError
from san_peft.propagation.graph import Edge, PropagationGraph
from san_peft.propagation.placement import place
from san_peft.propagation.rules import ATTENTION
from san_peft.propagation.trace import arguments_of
from san_peft.tuner import _peft
from san_peft.tuner.acting import set_fast_paths
from san_peft.tuner.attention import layer_for
from san_peft.tuner.checks import check_adapter, saved_modules
from san_peft.tuner.combine import combine
from san_peft.tuner.config import SanConfig
from san_peft.tuner.decompose import has_adapter, kind_of, moves_weight, reference_norms
from san_peft.tuner.first_pass import WAYS_OUT, trace_first_pass
from san_peft.tuner.layer import MODES, SanLayer, index_of
from san_peft.tuner.merge import check_layers, existing, merge_layers
from san_peft.tuner.precision import PrecisionReport, report
from san_peft.tuner.quantized import forget_quantization, keep_exact
from san_peft.tuner.resolve import exactly, layers_by_name, resolve, settle, tables_of
from san_peft.tuner.scales import Scales
from san_peft.tuner.statistics import freeze_statistics, release_statistics
from san_peft.tuner.vectors import Incoming


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
        check_adapter(model, adapter_name, self.peft_config)
        config: Any = copy.copy(self.peft_config[adapter_name])  # what is filled in belongs to this model alone
        graph = resolve(self, model, config)
        config.modules_to_save = saved_modules(model, adapter_name, config.modules_to_save)
        self.peft_config[adapter_name] = config
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
        self._wire(model, adapter_name, config, graph or PropagationGraph(()), low_cpu_mem_usage)
        if graph is None:
            self.scales.pending[adapter_name] = partial(self._wire_at_first_pass, adapter_name)
        _peft.share_layers(model, SanLayer)
        set_fast_paths(model, False)
        freeze_statistics(model)

    def _wire_at_first_pass(self, adapter_name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Traces the batch that the model was called with, and wires an adapter whose edges were not known."""
        layers = self._san_layers()
        if any(layer.merged or layer.disable_adapters for layer in layers):
            return  # nothing would be propagated in this pass
        with torch.inference_mode(False):  # what is made for good must be fit for training
            config: Any = self.peft_config[adapter_name]
            graph = trace_first_pass(self.model, args, kwargs, tables_of(self, self.model, config))
            if graph is not None:
                self._wire(self.model, adapter_name, config, settle(self, self.model, config, graph), False)
                del self.scales.pending[adapter_name]

    def wire_on(self, inputs: Any) -> None:
        """Traces some inputs now, where edges wait for the first forward pass; `None` leaves them waiting.

        Args:
            inputs: A dict of keyword arguments, a tuple of arguments, or a tensor.
        """
        if inputs is not None and self.scales.pending:
            self.scales.wire_pending(*arguments_of(inputs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model, in a pass of its scales."""
        self.check_mixed(args, kwargs)
        with self.scales.passing(args, kwargs):
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

    def set_mixed(
        self, adapter_names: list[str] | None, hand_names_to: Callable[[nn.Module], None] | None = None
    ) -> None:
        """Says which adapters the samples of the next batch name, or that they name none, and how layers learn it."""
        self.scales.mixed = () if adapter_names is None else tuple(sorted(set(adapter_names)))
        vars(self)["_hand_names_to"] = hand_names_to

    def train(self, mode: bool = True) -> SanModel:
        """Sets the mode, on which it depends where some scales act."""
        super().train(mode)
        self.scales.prepare()
        return self

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates adapters.

        Raises:
            AdapterError: If there is no such adapter.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            if name not in self.peft_config:
                raise AdapterError(f"Adapter {name} not found. There are {', '.join(self.peft_config)}.")
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
        _peft.share_layers(self.model, SanLayer, taken_off=True)
        set_fast_paths(self.model, True)
        release_statistics(self.model)

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
        inner.target_modules = exactly(targets, (name for name, _ in model.named_modules()))
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
        layer = target if isinstance(target, SanLayer) else layer_for(target)
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
                layer = layer_for(posterior)
                layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
                layer.train(posterior.training)
                _peft.replace(self, model.get_submodule(parent), name, layer, posterior)
                posterior = layer
                if (hand_names_to := vars(self).get("_hand_names_to")) is not None:
                    hand_names_to(layer)
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
        """Deletes an adapter, its host's part included; if it alone was active, the first of the others is then."""
        before = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        for layer in self._san_layers():  # PEFT passes over layers whose names contain its prefix
            layer.delete_adapter(adapter_name)
        for host in self.hosts.values():
            host.peft_config.pop(adapter_name, None)
        self.scales.unwire(adapter_name)
        if self.peft_config and adapter_name in before:  # layers that lack the others would go without
            self.set_adapter([name for name in before if name != adapter_name] or min(self.peft_config))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` gives what an adapter does; `san_peft.save_as_lora` takes every layer."""
        layers = self._san_layers()  # PEFT's model asks without a name
        names = [adapter_name] if adapter_name in self.peft_config else self.active_adapters
        return bool(layers) and all(layer.supports_lora_conversion(name) for layer in layers for name in names)

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
        names = self._mergeable(adapter_names)
        check_layers(self._san_layers(), names)

    def _mergeable(self, adapter_names: list[str] | None) -> list[str] | None:
        names = existing(adapter_names, self.peft_config)
        self._check_merge_allowed()
        for name in self.active_adapters if names is None else names:
            scales = [layer.get_scale(name) for layer in self._san_layers()] if name in self.scales.pending else ()
            if any(scale is not None and not bool((scale == 1).all()) for scale in scales):
                raise MergeError(
                    f"The edges of adapter {name!r} are traced in its first forward pass, which there was none of, and "
                    f"its scales are not one: merging would lose what they propagate. {WAYS_OUT}"
                )
        return names

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges as PEFT does, hosts included, all layers or none; `safe_merge` looks for NaN before it begins."""
        merge_layers(self._san_layers(), self._mergeable(adapter_names), safe_merge)

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
        names = self._mergeable(adapter_names)
        merge_layers(self._san_layers(), names, safe_merge, keeps_base=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return forget_quantization(super().merge_and_unload(progressbar, adapter_names=names))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts a module in the place of another: its vectors are on the device, and a frozen layer has its weight."""
        if new_module is not child:
            setattr(parent, child_name, new_module)

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
            combination_type: `linear` adds the weighted offsets of scales and gates from one; `product` multiplies
                them, each raised to its weight (positive ones only). Shifts, and modules and tokens that are trained
                as a whole, are added with their weights either way, as differences from the frozen ones. Hosts are
                combined by PEFT, which has other types for them, and the scale comes out of the result; magnitudes of
                DoRA and biases of LoRA are weighted sums.
            options: Passed to PEFT where hosts are combined, such as `svd_rank`.

        Raises:
            AdapterError: If the adapters do not exist, do not match, or cannot be combined that way. The model is then
                as it was.
        """
        combine(self, adapters, weights, adapter_name, combination_type, options)


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

"""The `SanModel` tuner: injects SAN layers into a model and connects them along the propagation graph."""

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
from san_peft.tuner.calibrate import Calibrating
from san_peft.tuner.checks import check_adapter, saved_modules
from san_peft.tuner.combine import combine
from san_peft.tuner.config import SanConfig
from san_peft.tuner.decompose import has_adapter, kind_of, moves_weight
from san_peft.tuner.first_pass import WAYS_OUT, trace_first_pass
from san_peft.tuner.layer import MODES, SanLayer, index_of
from san_peft.tuner.merge import check_layers, existing, merge_layers
from san_peft.tuner.precision import PrecisionReport, report
from san_peft.tuner.quantized import forget_quantization, keep_exact
from san_peft.tuner.resolve import exactly, layers_by_name, resolve, settle, tables_of
from san_peft.tuner.row_norms import reference_norms
from san_peft.tuner.scales import Scales
from san_peft.tuner.statistics import freeze_statistics, release_statistics
from san_peft.tuner.vectors import Incoming


class SanModel(_peft.Tuner, Calibrating):
    """Creates a SAN model from a pretrained model: trainable scales on frozen layers, propagated to the next layers.

    Args:
        model: The model to be adapted.
        peft_config: The `SanConfig`, or a dict from adapter names to configs.
        adapter_name: The name of the adapter.

    Raises:
        SanError: If targets, edges or channel counts do not fit the model. The model is left unchanged.
    """

    prefix = _peft.PREFIX
    tuner_layer_cls = SanLayer
    # empty, since default targets are traced instead of looked up by architecture
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
        """Adds an adapter: resolves targets and edges, injects the layers, then wires the edges."""
        check_adapter(model, adapter_name, self.peft_config)
        config: Any = copy.copy(self.peft_config[adapter_name])  # the resolved fields belong to this model only
        graph = resolve(self, model, config)
        config.modules_to_save = saved_modules(model, adapter_name, config.modules_to_save)
        self.peft_config[adapter_name] = config
        keep_exact(model)
        if config.inner is not None:
            self._inject_host(model, adapter_name, config, low_cpu_mem_usage)
            state_dict = None  # PEFT would infer targets from the names of the host's tensors
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
            **kwargs,
        )
        self._wire(model, adapter_name, config, graph or PropagationGraph(()), low_cpu_mem_usage)
        self.calibrate_later(adapter_name)
        if graph is None:
            self.scales.pending[adapter_name] = partial(self._wire_at_first_pass, adapter_name)
        _peft.share_layers(model, SanLayer)
        set_fast_paths(model, False)
        freeze_statistics(model)

    def _wire_at_first_pass(self, adapter_name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Traces the first batch, and wires an adapter whose edges could not be traced before."""
        layers = self._san_layers()
        if any(layer.merged or layer.disable_adapters for layer in layers):
            return  # nothing would be propagated in this pass; wait for the next one
        with torch.inference_mode(False):  # inference tensors could not be trained later
            config: Any = self.peft_config[adapter_name]
            graph = trace_first_pass(self.model, args, kwargs, tables_of(self, self.model, config))
            if graph is not None:
                self._wire(self.model, adapter_name, config, settle(self, self.model, config, graph), False)
                del self.scales.pending[adapter_name]

    def wire_on(self, inputs: Any) -> None:
        """Traces the given inputs now if edges are pending until the first forward pass.

        Args:
            inputs: A dict of keyword arguments, a tuple of arguments, or a tensor; `None` does nothing.
        """
        if inputs is not None and self.scales.pending:
            self.scales.prepare_with(self.scales.pending, *arguments_of(inputs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; scales are computed once for the whole forward pass."""
        self.check_mixed(args, kwargs)
        with self.scales.passing(args, kwargs):
            return self.model.forward(*args, **kwargs)

    @property
    def scales(self) -> Scales:
        """Returns the object that computes the scales of all adapters of the model."""
        own = vars(self)
        if "_scales" not in own:
            layers = (m for m in self.model.modules() if isinstance(m, SanLayer))
            there = next((s for s in (getattr(layer, "san_scales", None) for layer in layers) if s is not None), None)
            own["_scales"] = Scales(self.model) if there is None else there
        return own["_scales"]

    def set_mixed(
        self, adapter_names: list[str] | None, hand_names_to: Callable[[nn.Module], None] | None = None
    ) -> None:
        """Sets the `adapter_names` of the next batch, and the function that registers the hook for them."""
        self.scales.mixed = () if adapter_names is None else tuple(sorted(set(adapter_names)))
        vars(self)["_hand_names_to"] = hand_names_to

    def train(self, mode: bool = True) -> SanModel:
        """Sets training or eval mode, which decides where some scales are applied."""
        super().train(mode)
        self.scales.prepare()
        return self

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Sets the active adapters.

        Raises:
            AdapterError: If an adapter does not exist.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            if name not in self.peft_config:
                raise AdapterError(f"Adapter {name} not found. There are {', '.join(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self.scales.prepare()

    def enable_adapter_layers(self) -> None:
        """Enables all adapters."""
        super().enable_adapter_layers()
        self.scales.prepare()

    def disable_adapter_layers(self) -> None:
        """Disables all adapters."""
        super().disable_adapter_layers()
        self.scales.prepare()

    def unloaded(self) -> None:
        """Restores norms, fast paths and running statistics after the layers were unloaded."""
        self.scales.release()
        _peft.share_layers(self.model, SanLayer, taken_off=True)
        set_fast_paths(self.model, True)
        release_statistics(self.model)

    @property
    def propagation_graph(self) -> PropagationGraph:
        """Returns the edges of the active adapters."""
        edges = {(e.anterior, e.posterior): e for a in self.active_adapters for e in self._edges_of(a)}
        return PropagationGraph(tuple(edges.values()))

    def _edges_of(self, adapter_name: str) -> tuple[Edge, ...]:
        config: Any = self.peft_config[adapter_name]
        return config.resolved_edges()

    def precision_report(self) -> PrecisionReport:
        """Reports how many propagated scales half precision rounds to one, and how many have no effect.

        See `san_peft.tuner.precision.report` for details and an example.

        Returns:
            The report, with one row per edge that the active adapters use.

        Raises:
            SanError: If frozen weights are offloaded or partitioned.
        """
        return report(self.scales)

    # ------------------------------------------------------------------ hosts

    @property
    def hosts(self) -> dict[str, Any]:
        """Returns PEFT's tuners of the hosts, by PEFT type. They are not submodules of the model."""
        return vars(self).setdefault("_hosts", {})

    def _inject_host(self, model: nn.Module, adapter_name: str, config: SanConfig, empty: bool) -> None:
        """Injects the host into the targets if it is missing; restores the layers if that fails."""
        inner: Any = config.inner_config()
        kind = kind_of(inner, config.decomposition)
        targets = {n: m for n, m in layers_by_name(model).items() if _peft.matches(self, config, n)}
        if all(has_adapter(_host_of(m), adapter_name) for m in targets.values()):
            return
        if kind.forms_delta:
            warnings.warn(
                f"The scale of a {kind.name} host needs its full delta weight, which is computed in every step for "
                f"each of {len(targets)} layers. LoRA, DoRA and VeRA hosts avoid this cost.",
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
        """Removes the SAN layers temporarily, while another tuner works on the model."""
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
        """Returns the config unchanged, since `resolve` has already filled in the targets."""
        return config

    def create_and_replace(
        self, config: SanConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, fqn: str
    ) -> None:
        """Wraps a module in a SAN layer if needed, and adds the adapter to it."""
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
                    raise GraphError(f"edge {edge}: {edge.anterior} has no scale of adapter {adapter_name!r}.")
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
        """Deletes an adapter and its host; activates another adapter if it was the only active one."""
        before = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        for layer in self._san_layers():  # PEFT skips modules whose names contain the prefix
            layer.delete_adapter(adapter_name)
        for host in self.hosts.values():
            host.peft_config.pop(adapter_name, None)
        self.scales.unwire(adapter_name)
        if self.peft_config and adapter_name in before:
            # PEFT chooses per layer, so layers that lack the remaining adapters would have none active
            self.set_adapter([name for name in before if name != adapter_name] or min(self.peft_config))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns whether PEFT's `convert_to_lora` is exact; if not, use `san_peft.save_as_lora`."""
        layers = self._san_layers()  # PeftModel calls this without a name
        names = [adapter_name] if adapter_name in self.peft_config else self.active_adapters
        return bool(layers) and all(layer.supports_lora_conversion(name) for layer in layers for name in names)

    # ------------------------------------------------------------------ modes

    def set_mode(self, mode: str) -> _Mode:
        """Sets which components of the adapter are active, for analysis.

        Args:
            mode: `both` is the full adapter; `neuron` keeps the scale and shift of each layer without propagation;
                `synapse` keeps only the propagated input scales; `off` disables both, but keeps the trained head and
                norms.

        Returns:
            A context manager that restores the previous mode on exit.

        Raises:
            SanError: If the mode is unknown, or an adapter is merged.
        """
        if mode not in MODES:
            raise SanError(f"Unknown mode {mode!r}; choose from {', '.join(MODES)}.")
        layers = self._san_layers()
        merged = sum(layer.merged for layer in layers)
        if merged:
            raise SanError(f"{merged} of {len(layers)} layers are merged, so the mode cannot change; unmerge first.")
        before = layers[0].san_mode if layers else "both"
        for layer in layers:
            layer.san_mode = mode
        self.scales.prepare()
        return _Mode(self, before)

    # ------------------------------------------------------------------ merging and combining

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Checks that a safe merge of all layers succeeds, without changing any weight."""
        names = self._mergeable(adapter_names)
        check_layers(self._san_layers(), names)

    def _mergeable(self, adapter_names: list[str] | None) -> list[str] | None:
        names = existing(adapter_names, self.peft_config)
        self._check_merge_allowed()
        for name in self.active_adapters if names is None else names:
            scales = [layer.get_scale(name) for layer in self._san_layers()] if name in self.scales.pending else ()
            if any(scale is not None and not bool((scale == 1).all()) for scale in scales):
                raise MergeError(
                    f"The edges of adapter {name!r} are traced in its first forward pass, which has not happened yet. "
                    f"Merging now would lose the propagation of its scales. {WAYS_OUT}"
                )
        return names

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters and their hosts into the base weights, as PEFT does; if one layer fails, none is merged."""
        merge_layers(self._san_layers(), self._mergeable(adapter_names), safe_merge)

    def unmerge_adapter(self) -> None:
        """Unmerges all merged adapters and their hosts; the base weights are restored bit for bit."""
        layers = self._san_layers()
        for layer in [layer for layer in layers if layer.merged] or layers[:1]:
            with onload_layer(layer):
                layer.unmerge()

    def _san_layers(self) -> list[SanLayer]:
        return [module for module in self.modules() if isinstance(module, SanLayer)]

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merges the adapters and returns the base model; all layers are checked before a weight is changed."""
        names = self._mergeable(adapter_names)
        merge_layers(self._san_layers(), names, safe_merge, keeps_base=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return forget_quantization(super().merge_and_unload(progressbar, adapter_names=names))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replaces a child module without moving tensors, which are already on the device."""
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
        """Adds a new adapter by merging the given adapters with the given weights.

        Args:
            adapters: The names of the adapters. They must have the same targets, edges and exponents.
            weights: The weight of each adapter.
            adapter_name: The name of the new adapter.
            combination_type: How to combine scales and gates: `linear` is the weighted sum of their offsets from one,
                `product` the product of the scales raised to their weights, which must be positive. Shifts, saved
                modules and trained tokens are always weighted sums of differences from the base model. Hosts are
                combined by PEFT with its own combination types; DoRA's magnitudes and LoRA's biases are weighted sums.
            options: Further options that PEFT takes when it combines hosts, such as `svd_rank`.

        Raises:
            AdapterError: If an adapter does not exist, or the adapters cannot be combined that way. The model is left
                unchanged.
        """
        combine(self, adapters, weights, adapter_name, combination_type, options)


class _Mode:
    """Restores the previous mode of `SanModel.set_mode` on exit."""

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

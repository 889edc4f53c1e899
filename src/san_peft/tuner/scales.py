"""Computes all scales of a model once per forward pass, and passes them to layers and norms.

A pass begins when the adapted model is called and ends when that call returns. `Scales.begin` computes all scales in a
few operations, whatever the number of layers, and keeps the result, a `Pass`, until `Scales.end`. Layers and norms
request their `Vectors` from it. README.md in this folder describes a full training step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from san_peft.scaling import Factor, plain_operations
from san_peft.tuner.checkpointing import checkpointed, knows_regions, region
from san_peft.tuner.fill import NOTHING, Vectors, Watch, Whole, combined, fill, hand_out
from san_peft.tuner.frozen import stored_weight
from san_peft.tuner.layout import ScaleLayout, lay_out_scales
from san_peft.tuner.norms import bind, bound_to, norm_at


@dataclass
class Pass:
    """Holds what layers and norms apply during one call of the model.

    Attributes:
        vectors: The vectors, by adapter and layer name.
        norms: The factors of norms, by name.
        recall: The values to rebuild the pass for recomputation, if gradients were enabled.
        shared: The scaled input of each group of layers that read the same one.
    """

    vectors: dict[str, dict[str, Vectors]] = field(default_factory=dict)
    norms: dict[str, Factor] = field(default_factory=dict)
    recall: Recall | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Recall:
    """Holds the values of a pass without its graph, for recomputation under activation checkpointing.

    Attributes:
        parts: For each adapter its vectors, which of them require gradients, and how they were distributed.
        without_gradients: Whether a layer ran without gradients, as in the first pass of reentrant checkpointing.
        again: The rebuilt pass.
    """

    parts: list[Any]
    without_gradients: bool = False
    again: Pass | None = None


class Scales:
    """Manages the scales of all adapters of a model.

    Args:
        model: The model that contains the layers. A pass is one call of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, Any] = {}
        self.placements: dict[str, dict[tuple[str, str], str]] = {}
        self.readers: dict[str, dict[str, tuple[str, ...]]] = {}
        self.attention: dict[str, set[tuple[str, str]]] = {}
        self.pending: dict[str, Callable[..., None]] = {}
        self.calibrating: dict[str, Callable[..., None]] = {}
        self.mixed: tuple[str, ...] = ()
        self.wiring = 0
        self._forget_passes()
        before = model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        self._handles = [before, model.register_forward_hook(self._after, always_call=True)]

    def _forget_passes(self) -> None:
        self._running: dict[int, list[Any]] = {}
        self._latest: Pass | None = None
        self._recall: Recall | None = None
        self._regions: weakref.WeakKeyDictionary[Any, Recall | None] = weakref.WeakKeyDictionary()
        self._kept: tuple[Any, Any, Pass] | None = None
        self._planned: Any = None
        self._planned_norms: Any = None
        self._layouts: dict[str, ScaleLayout] = {}
        self._watch = Watch()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without passes, since a copy must not use values of another model."""
        own = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return {**own, "_handles": self._handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_passes()

    # ------------------------------------------------------------------ wiring

    def wire(
        self,
        adapter_name: str,
        layers: dict[str, Any],
        placements: dict[tuple[str, str], str],
        readers: dict[str, tuple[str, ...]],
        attention: set[tuple[str, str]],
    ) -> None:
        """Registers the layers of an adapter, and the placement of its edges.

        Args:
            adapter_name: The name of the adapter.
            layers: All SAN layers of the model, by name.
            placements: The placement of each edge: `"input"`, `"output"` or `"norm:NAME"`.
            readers: The layers that read each norm.
            attention: The edges that pass through an attention, whose values may be in a KV cache.
        """
        self.layers = layers
        for fqn, layer in layers.items():
            layer.san_scales, layer.san_name = self, fqn
        self.placements[adapter_name], self.readers[adapter_name] = placements, readers
        self.attention[adapter_name] = attention
        self.changed()
        self.prepare()

    def unwire(self, adapter_name: str) -> None:
        """Removes an adapter."""
        self.pending.pop(adapter_name, None)
        self.calibrating.pop(adapter_name, None)
        self.placements.pop(adapter_name, None)
        self.readers.pop(adapter_name, None)
        self.attention.pop(adapter_name, None)
        self.changed()

    def release(self) -> None:
        """Restores the classes of all norms, and removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            if bound_to(module) is not None:
                bind(module, None, "")
        self.layers = {}
        self._forget_passes()

    def changed(self) -> None:
        """Invalidates all layouts after layers, adapters or edges have changed."""
        self.wiring += 1
        self._planned = self._kept = None

    # ------------------------------------------------------------------ passes

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.begin(args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.end()

    @contextmanager
    def passing(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Runs a pass for the duration of the context."""
        self.begin(args, kwargs)
        try:
            yield
        finally:
            self.end()

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begins a pass, unless one is already running in this thread.

        Args:
            args: The arguments of the model.
            kwargs: The keyword arguments of the model. During generation with the same `past_key_values`, in eval mode
                and without gradients, scales are reused until the version of a parameter changes.
        """
        key = _thread()
        running = self._running.get(key)
        if running is not None:
            running[0] += 1
            return
        if self.pending:
            self.prepare_with(self.pending, args, kwargs)
        if self.calibrating and self.model.training and torch.is_grad_enabled():
            self.prepare_with(self.calibrating, args, kwargs)
        self._running[key] = running = [1, None]
        running[1] = self._latest = self._pass(kwargs)

    @torch.compiler.disable(reason="the first forward pass traces or calibrates an adapter; run one before compiling")
    def prepare_with(
        self, waiting: Mapping[str, Callable[..., None]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Traces or calibrates adapters with the first batch. This calls the model, which then begins no pass."""
        key = _thread()
        self._running[key] = [1, None]
        try:
            for adapt in list(waiting.values()):
                adapt(args, kwargs)
        finally:
            del self._running[key]

    def end(self) -> None:
        """Ends the pass that `begin` has started."""
        key = _thread()
        running = self._running.get(key)
        if running is None:
            return
        running[0] -= 1
        if running[0] == 0:
            del self._running[key]
            if running[1] is not None:
                running[1].shared.clear()
            if self._latest is running[1]:
                self._latest = None

    def acting(self) -> Pass | None:
        """Returns the current pass, or the pass that is being recomputed in the backward pass."""
        running = self._running.get(_thread())
        if torch.compiler.is_compiling():  # no pass: a block was compiled on its own
            return self._latest if running is None else running[1]
        if running is None and torch._C._current_graph_task_id() != -1:
            return self._recalled()
        now = None if running is None else running[1]
        recall = None if now is None else now.recall
        if torch.is_grad_enabled():
            if (frame := checkpointed()) is not None:
                self._regions[frame] = recall
        elif recall is not None:
            recall.without_gradients = True
        return now

    def of(self, layer: Any) -> Vectors:
        """Returns the vectors of a layer, from the current pass or computed for this layer alone."""
        now = self.acting()
        if now is None:
            return layer.vectors_alone(layer.active_adapters)
        active = [name for name in layer.active_adapters if name in now.vectors]
        if len(active) == 1:
            return now.vectors[active[0]].get(layer.san_name, NOTHING)
        return combined([now.vectors[name].get(layer.san_name, NOTHING) for name in active])

    def of_adapter(self, layer: Any, adapter_name: str) -> Vectors:
        """Returns the vectors of a layer for one adapter, for batches with mixed adapters."""
        now = self.acting()
        if now is None or adapter_name not in now.vectors:
            return layer.vectors_alone([adapter_name])
        return now.vectors[adapter_name].get(layer.san_name, NOTHING)

    def of_norm(self, fqn: str) -> Factor | None:
        """Returns the factor of a norm in the current pass, or `None`."""
        now = self.acting()
        return None if now is None else now.norms.get(fqn)

    def share(self, layer: Any, vectors: Vectors, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Returns the scaled input of a layer, shared between layers that read the same one.

        It is dropped when the pass ends, and not shared between regions of activation checkpointing, since each region
        must be able to recompute its input.
        """
        now = self.acting()
        if vectors.group is None or now is None or not knows_regions() or plain_operations() or x.is_inference():
            return make()
        state = (x._version, torch.is_grad_enabled(), region())
        held = now.shared.get(vectors.group)
        if held is not None and held[0] is x and held[1] == state and layer.san_name not in held[2]:
            held[2].add(layer.san_name)
            return held[3]
        value = make()
        now.shared[vectors.group] = (x, state, {layer.san_name}, value)
        return value

    def _pass(self, given: Mapping[str, Any]) -> Pass | None:
        state = self._state()
        if torch.compiler.is_compiling():
            if state != self._planned:
                return None
        else:
            self._plan(state)
        names = self._names()
        if names is None:
            return None
        compiling = torch.compiler.is_compiling()
        trained = torch.is_grad_enabled()
        cache, stamp = given.get("past_key_values"), None
        if cache is not None and not (compiling or trained or self.model.training):
            stamp = self._stamp()
            if self._kept is not None and stamp is not None and _goes_on(given):
                kept_cache, kept_stamp, kept = self._kept
                if kept_cache() is cache and kept_stamp == stamp and kept.vectors.keys() == set(names):
                    return kept
        made = Pass()
        single = len(names) == 1 and not self.mixed
        dtype = self._dtype()
        filled = []
        with torch.autocast(self._device().type, enabled=False):
            for name in names:
                layout = self._layout(name, single)
                if layout is None:
                    return None
                vectors = fill(layout, dtype)
                near = self._near_zero(layout, vectors) if single else None
                made.vectors[name], norms = hand_out(layout, vectors, dtype, near)
                made.norms.update(norms)
                filled.append((layout, vectors, dtype, near))
        if trained and filled and not compiling:
            values = [type(one)(*(None if v is None else v.detach() for v in one)) for _, one, _, _ in filled]
            needs = [type(one)(*(v is not None and v.requires_grad for v in one)) for _, one, _, _ in filled]
            rest = [(layout, dtype, near) for layout, _, dtype, near in filled]
            made.recall = self._recall = Recall(list(zip(values, needs, rest, strict=True)))
        if stamp is not None:
            try:
                self._kept = (weakref.ref(cache), stamp, made)
            except TypeError:
                self._kept = None
        return made

    def _plan(self, state: list[Any]) -> None:
        """Invalidates the layouts if the state of layers or norms has changed."""
        norms = self._norms_now()
        if state != self._planned or norms != self._planned_norms:
            self._layouts, self._planned, self._planned_norms, self._kept = {}, state, norms, None

    def prepare(self) -> None:
        """Computes the layouts eagerly, since compiled code cannot do so."""
        if not self.layers or torch.compiler.is_compiling():
            return
        names = self._names()
        self._plan(self._state())
        for name in names or ():
            self._layout(name, len(names or ()) == 1 and not self.mixed)

    def _recalled(self) -> Pass | None:
        """Returns the pass of the original forward of a recomputed region, or `None` if there was none."""
        frame = checkpointed()
        recall = self._recall if frame is None else self._regions.get(frame, self._recall)
        if recall is None or recall.without_gradients or (knows_regions() and region() is None):
            # reentrant checkpointing runs backward per block, so each layer computes its own scales
            return None
        if recall.again is None:
            recall.again = Pass()
            with torch.no_grad():  # recomputation must save the same tensors as the forward pass, and none of these
                for values, needs, (layout, dtype, near) in recall.parts:
                    recall.again.vectors[layout.name], norms = hand_out(layout, values, dtype, near, needs)
                    recall.again.norms.update(norms)
        return recall.again

    def _state(self) -> list[Any]:
        """Returns everything on which layouts depend."""
        found: list[Any] = [self.wiring, self.mixed, self.model.training]
        for layer in self.layers.values():
            active = layer._active_adapter
            found.append(
                (
                    active if isinstance(active, str) else tuple(active),
                    layer._disable_adapters,
                    tuple(layer.merged_adapters),
                    layer.san_mode,
                    tuple(getattr(layer.host, "scaling", {}).items()),
                    layer.strengths,
                    *_kind_of(stored_weight(layer.get_base_layer())),
                )
            )
        return found

    def _norms_now(self) -> list[Any]:
        """Returns the identity, dtype and device of all norms that may absorb scales."""
        found = []
        for fqn in dict.fromkeys(fqn for readers in self.readers.values() for fqn in readers):
            module = norm_at(self.model, fqn)
            patched = module is not None and "forward" in vars(module)
            found.append((fqn, id(module), patched, *_kind_of(getattr(module, "weight", None))))
        return found

    def _names(self) -> list[str] | None:
        """Returns the adapters that are active in this pass, or `None` if parameters are not available."""
        names: dict[str, None] = dict.fromkeys(name for name in self.mixed if name != "__base__")
        for layer in self.layers.values():
            if not layer._disable_adapters and not self.mixed:
                active = layer._active_adapter
                for name in (active,) if isinstance(active, str) else active:
                    if name in self.placements:
                        names[name] = None
        for layer in self.layers.values():
            weight = stored_weight(layer.get_base_layer())
            if weight.is_meta or hasattr(weight, "ds_id"):
                return None  # offloaded, or partitioned by DeepSpeed: each layer computes its own scales when it runs
        return list(names)

    def _stamp(self) -> Any:
        """Returns identities and versions of all parameters to detect changes, or `None` if there are no versions."""
        found = []
        try:
            for layer in self.layers.values():
                for bank in (*layer.san_scale.values(), *layer.san_shift.values(), *layer.san_gate.values()):
                    found.append((id(bank.weight), bank.weight._version))
                if layer.host is not None:
                    frozen = stored_weight(layer.get_base_layer())
                    found.append((id(frozen), frozen._version))
                    for name in layer.host.adapter_layer_names:
                        for parameter in getattr(layer.host, name).parameters():
                            found.append((id(parameter), parameter._version))
        except RuntimeError:  # inference tensors have no version counter
            return None
        return found

    def _near_zero(self, layout: ScaleLayout, vectors: Whole) -> dict[str, list[bool]] | None:
        """Returns which parts of the vectors have an entry near zero; `None` if no gradient may divide by a scale."""
        exact = plain_operations() or not torch.is_grad_enabled()
        return None if exact else self._watch.near_zero(layout, vectors)

    def _weight(self) -> Tensor | None:
        layer = next(iter(self.layers.values()), None)
        return None if layer is None else stored_weight(layer.get_base_layer())

    def _device(self) -> torch.device:
        return torch.device("cpu") if (weight := self._weight()) is None else weight.device

    def _dtype(self) -> torch.dtype:
        """Returns the compute dtype of the frozen layers."""
        if (weight := self._weight()) is None:
            return torch.float32
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    # ------------------------------------------------------------------ layouts

    def _layout(self, name: str, single: bool) -> ScaleLayout | None:
        """Returns the layout of an adapter for the current state of the layers."""
        layout = self._layouts.get(name)
        if layout is None:
            if torch.compiler.is_compiling():
                return None
            layout = self._layouts[name] = lay_out_scales(self, name, single)
        return layout


def _goes_on(given: Mapping[str, Any]) -> bool:
    """Returns whether the input is a single next token; a longer input may begin another sequence."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    tokens = next((given[name] for name in names if given.get(name) is not None), None)
    return isinstance(tokens, Tensor) and tokens.dim() > 1 and tokens.shape[1] == 1


def _kind_of(weight: Any) -> tuple[Any, ...]:
    return (type(weight), getattr(weight, "dtype", None), getattr(weight, "device", None))


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()

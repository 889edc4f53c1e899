"""Merges and unmerges SAN layers: one layer, or all layers of a model atomically."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge, onload_layer
from torch import Tensor, nn

from san_peft.errors import AdapterError, MergeError
from san_peft.functional import fold, rounded
from san_peft.rounding import HALF, round_to
from san_peft.tuner._peft import TunerLayer
from san_peft.tuner.decompose import has_adapter
from san_peft.tuner.frozen import check_mergeable
from san_peft.tuner.row_norms import row_norms

Tensors = tuple[Tensor, Tensor | None]
"""Weight and bias of a layer."""


class Factors(NamedTuple):
    """Holds copies of an adapter's vectors in a layer, so that further training does not change what is merged."""

    scale: Tensor | None
    input_scale: Tensor | None
    shift: Tensor | None


class Part(NamedTuple):
    """Holds what one adapter contributes to a merged layer: its vectors, and copies of its host's parameters."""

    factors: Factors
    host: tuple[Tensor, ...]


class MergingLayer(TunerLayer):
    """Implements merging and unmerging of `SanLayer`.

    The frozen tensors of a merged layer are kept as non-persistent buffers, so they follow the model to another dtype
    or device without being saved.
    """

    host: Any
    groups: int
    transposed: bool
    out_features: int
    san_host: nn.ModuleDict
    san_incoming: Any
    factors: Any
    register_buffer: Any
    san_kept_weight: Tensor | None
    san_kept_bias: Tensor | None

    def init_merging(self) -> None:
        """Initialises the state of merging."""
        self.merged_adapters: list[str] = []
        self._merged: dict[str, Part] = {}
        self.register_buffer("san_kept_weight", None, persistent=False)
        self.register_buffer("san_kept_bias", None, persistent=False)

    def has_part(self, adapter_name: str) -> bool:
        """Returns whether an adapter has vectors, a host or incoming edges in this layer."""
        if any(adapter_name in getattr(self, bank) for bank in self.adapter_layer_names):
            return True
        return bool(self.san_incoming.get(adapter_name)) or has_adapter(self.host, adapter_name)

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, *, keeps_base: bool = True
    ) -> None:
        r"""Merges adapters into the weight and bias of this layer.

        With several adapters, the result does not depend on the order in which they are merged:

        $$ W' = \operatorname{diag}\Bigl(\prod g\Bigr)\,\Bigl(W + \sum \Delta W\Bigr)
           \operatorname{diag}\Bigl(\prod s\Bigr) $$

        It is computed from the frozen weight in at least float32 and rounded once, like `fold`.

        Args:
            safe_merge: Whether to check the merged weight for NaNs before the layer is changed.
            adapter_names: The adapters to merge; `None` merges all active adapters. Adapters without a part in this
                layer are skipped.
            keeps_base: Whether to keep the frozen weight, so that the layer can be unmerged.

        Raises:
            ValueError: With `safe_merge`, if the merged weight or bias is not finite.
            MergeError: If the mode is not `both`, since modes are not merged, or if the weight is quantised or computed
                in every forward pass.
        """
        names = self._to_merge(adapter_names)
        if not names:
            return
        merged, (weight, bias) = self._outcome(names, safe_merge)
        frozen = self._frozen()
        for name in names:
            self.take_scale(name)
        if keeps_base or self.san_kept_weight is not None:
            self.san_kept_weight, self.san_kept_bias = frozen
        self._write(weight, bias)
        self._note(merged)

    def check_merge(self, adapter_names: list[str] | None = None, finite: bool = True) -> None:
        """Checks that `merge` succeeds, without changing the layer; `finite` also checks for NaNs."""
        if names := self._to_merge(adapter_names):
            self._outcome(names, finite)

    def check_dense(self) -> None:
        """Raises `MergeError` if scales merged into the frozen weight would be lost; see `check_mergeable`."""
        check_mergeable(self.get_base_layer())

    @torch.no_grad()
    def get_delta(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Returns the change of weight and bias if only this adapter is merged, in at least float32.

        Raises:
            MergeError: If adapters are merged, or the weight is quantised.
        """
        if self.merged:
            raise MergeError("The model is merged; unmerge it to compute the delta weight of an adapter.")
        self.check_dense()
        weight, bias = self._base_tensors()
        wide = torch.promote_types(weight.dtype, torch.float32)
        zeros = torch.zeros(self.out_features, dtype=wide, device=weight.device)
        start = zeros if bias is None else bias.to(wide)
        after, end = self._folded(
            (weight.to(wide), None if bias is None else start), {adapter_name: Part(self.factors(adapter_name), ())}
        )
        return after - weight.to(wide), (zeros if end is None else end) - start

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the frozen weight and bias bit for bit.

        Raises:
            MergeError: If they were not kept, as after `merge_and_unload`.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.restore({})

    # ------------------------------------------------------------------ state, to merge many layers atomically

    @property
    def merged_parts(self) -> dict[str, Part]:
        """Returns what is merged, to pass to `restore` later."""
        return dict(self._merged)

    @torch.no_grad()
    def restore(self, parts: dict[str, Part]) -> None:
        """Restores an earlier state of merging.

        Raises:
            MergeError: If the frozen weights were not kept.
        """
        if self._merged.keys() != parts.keys():
            if self.san_kept_weight is None:
                raise MergeError("The frozen weights were not kept when the adapters were merged.")
            self._write(*self._folded(self._frozen(), parts) if parts else self._frozen())
            self._note(parts)
        self.forget_scales()

    @torch.no_grad()
    def take_scale(self, adapter_name: str) -> None:
        """Stores the scale of an adapter's host, which is derived from the frozen weight that merging overwrites."""
        scale: Any = self.san_host[adapter_name] if adapter_name in self.san_host else None
        if scale is not None and scale.frozen is None:
            scale.frozen = scale().detach().clone()

    def forget_scales(self) -> None:
        """Drops the stored scales of hosts that are not merged."""
        scales: Any = self.san_host
        for name in scales:
            if name not in self._merged:
                scales[name].frozen = None

    @contextmanager
    def frozen_weight(self) -> Iterator[None]:
        """Restores the frozen weight temporarily, to derive scales from it."""
        base: Any = self.get_base_layer()
        kept, present = self.san_kept_weight, base.weight.data
        try:
            if kept is not None:
                base.weight.data = kept
            yield
        finally:
            if kept is not None:
                base.weight.data = present

    # ------------------------------------------------------------------ private

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        names = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):
            names = [name for name in dict.fromkeys(names) if self.has_part(name)]
        return check_adapters_to_merge(self, names) if names else []

    @torch.no_grad()
    def _outcome(self, names: list[str], finite: bool) -> tuple[dict[str, Part], Tensors]:
        """Returns what is merged after adding some adapters, and the resulting tensors."""
        self.check_dense()
        new = {name: Part(self.factors(name), self._host_copies(name)) for name in names}
        merged = {**self._merged, **new}
        weight, bias = self._folded(self._frozen(), merged)
        if finite and not all(torch.isfinite(t).all() for t in (weight, bias) if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        return merged, (weight, bias)

    def _base_tensors(self) -> Tensors:
        base: Any = self.get_base_layer()
        bias = getattr(base, "bias", None)
        return base.weight.data, None if bias is None else bias.data

    def _frozen(self) -> Tensors:
        """Returns weight and bias without any merged adapter."""
        if self.san_kept_weight is None:
            if self.merged:
                raise MergeError("The frozen weights were not kept when the adapters were merged.")
            return self._base_tensors()
        return self.san_kept_weight, self.san_kept_bias

    @torch.no_grad()
    def _folded(self, before: Tensors, parts: dict[str, Part]) -> Tensors:
        """Returns new tensors of weight and bias with hosts and vectors merged."""
        weight, bias = before
        if any(has_adapter(self.host, name) for name in parts):
            weight, bias = self._with_hosts(before, parts)
        every, device = [part.factors for part in parts.values()], weight.device
        scale = _product([factors.scale for factors in every], device)
        input_scale = _product([factors.input_scale for factors in every], device)
        shifts = [factors.shift.to(device) for factors in every if factors.shift is not None]
        shift = torch.stack(shifts).sum(0) if shifts else None
        weight, bias = self.fold_vectors(weight, bias, scale, input_scale, shift, before[0].dtype)
        return weight, bias if bias is None or before[1] is None else round_to(bias, before[1].dtype)

    def fold_vectors(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        input_scale: Tensor | None,
        shift: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensors:
        """Folds vectors into weight and bias; an embedding has no bias, so its shift is added to every row."""
        layout = {"groups": self.groups, "transposed": self.transposed}
        if shift is None or not isinstance(self.get_base_layer(), nn.Embedding):
            return fold(weight, bias, scale, input_scale, shift, dtype=dtype, **layout)
        wide = torch.promote_types(weight.dtype, torch.float32)
        scaled, _ = fold(weight, None, scale, None, dtype=wide, **layout)
        return rounded(scaled + shift.to(wide), dtype), None

    def _with_hosts(self, before: Tensors, parts: dict[str, Part]) -> Tensors:
        """Returns copies of weight and bias in at least float32, with the hosts merged."""
        wide = torch.promote_types(before[0].dtype, torch.float32)
        weight, bias = (None if t is None else t.to(wide, copy=True) for t in before)
        base: Any = self.get_base_layer()
        host, present = self.host, base.bias
        kept, merged, training = self._base_tensors(), host.merged_adapters, host.training
        with ExitStack() as stack:
            for name, part in parts.items():
                self._lend_dora_norm(name, before[0], stack)
                for parameter, copy in zip(self._host_parameters(name), part.host, strict=False):
                    stack.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = copy.to(parameter.device)
            try:
                host.merged_adapters = []
                base.weight.data = weight
                if bias is None:  # the host must not see a bias that a merged shift has created
                    base.bias = None
                else:
                    present.data = bias
                host.merge(adapter_names=[name for name in parts if has_adapter(host, name)])
                return self._base_tensors()
            finally:
                base.weight.data, base.bias = kept[0], present
                if present is not None:
                    present.data = kept[1]
                host.merged_adapters = merged
                host.train(training)

    def _host_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        found: list[nn.Parameter] = []
        for bank in (getattr(self.host, name) for name in getattr(self.host, "adapter_layer_names", ())):
            item = bank[adapter_name] if adapter_name in bank else None
            if isinstance(item, nn.Module):
                found.extend(item.parameters())
            elif isinstance(item, nn.Parameter):
                found.append(item)
        return found

    def _host_copies(self, adapter_name: str) -> tuple[Tensor, ...]:
        """Copies a host's parameters if it has several adapters: merging another one later starts from these."""
        parameters = self._host_parameters(adapter_name)
        names = (
            {name for bank in self.host.adapter_layer_names for name in getattr(self.host, bank)} if parameters else ()
        )
        return tuple(parameter.detach().clone() for parameter in parameters) if len(names) > 1 else ()

    def _lend_dora_norm(self, adapter_name: str, weight: Tensor, stack: ExitStack) -> None:
        """Makes DoRA divide by row norms with the same rounding as in training.

        PEFT computes the norms of a half-precision weight in half precision. Merging into a float32 copy would use
        exact norms, and so multiply every row by a rounding error.
        """
        bank: Any = getattr(self.host, "lora_magnitude_vector", ())
        if weight.dtype not in HALF or adapter_name not in bank:
            return
        base: Any = self.get_base_layer()
        magnitude, present = bank[adapter_name], base.weight.data
        base.weight.data = weight
        rounding = row_norms(base, like_dora=True) / row_norms(base)
        base.weight.data = present
        rounding = torch.where(rounding.isfinite(), rounding, torch.ones_like(rounding))
        plain = magnitude.get_weight_norm

        def rounded(*args: Any, **kwargs: Any) -> Tensor:
            norm = plain(*args, **kwargs)
            return norm * rounding.view(norm.shape)

        magnitude.get_weight_norm = rounded
        stack.callback(delattr, magnitude, "get_weight_norm")

    def _note(self, parts: dict[str, Part]) -> None:
        """Records what is merged, here and in the host."""
        if not parts:
            self.san_kept_weight = self.san_kept_bias = None
        self._merged, self.merged_adapters = dict(parts), list(parts)
        if self.host is not None:
            self.host.merged_adapters = [name for name in parts if has_adapter(self.host, name)]

    @torch.no_grad()
    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        base: Any = self.get_base_layer()
        like = base.weight.data
        base.weight.data = weight.to(like.device, like.dtype)
        if isinstance(base, nn.Embedding):
            return
        if bias is None:
            base.bias = None
        elif base.bias is not None:
            base.bias.data = bias.to(base.bias.device, base.bias.dtype)
        else:
            base.bias = nn.Parameter(bias.to(like.device), requires_grad=False)


def _product(vectors: list[Tensor | None], device: torch.device) -> Tensor | None:
    given = [vector.to(device) for vector in vectors if vector is not None]
    return torch.stack(given).prod(0) if given else None


# ---------------------------------------------------------------------- many layers


def existing(adapter_names: list[str] | None, known: Iterable[str]) -> list[str] | None:
    """Checks that adapters exist, and returns their names; `None` stands for the active adapters.

    Raises:
        TypeError: If the value is a string instead of a list of strings.
        AdapterError: If an adapter does not exist.
    """
    if adapter_names is None:
        return None
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    unknown = [name for name in dict.fromkeys(adapter_names) if name not in known]
    if unknown:
        raise AdapterError(
            f"Cannot merge {', '.join(map(repr, unknown))}: no such adapter; there are {', '.join(known)}."
        )
    return list(adapter_names)


@contextmanager
def scales_taken(layers: Sequence[MergingLayer], adapter_names: list[str] | None) -> Iterator[None]:
    """Stores the scales of all hosts before a frozen weight is changed.

    On exit, the scales of adapters that were not merged are dropped.
    """
    try:
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.frozen_weight())
            for layer in layers:
                for name in layer.active_adapters if adapter_names is None else adapter_names:
                    layer.take_scale(name)
        yield
    finally:
        for layer in layers:
            layer.forget_scales()


def check_layers(layers: Sequence[MergingLayer], adapter_names: list[str] | None, finite: bool = True) -> None:
    """Checks that merging succeeds for all layers, by computing each result and discarding it."""
    with scales_taken(layers, adapter_names), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in layers:
            with onload_layer(layer):
                layer.check_merge(adapter_names, finite)


def merge_layers(
    layers: Sequence[MergingLayer], adapter_names: list[str] | None, safe_merge: bool = False, keeps_base: bool = True
) -> None:
    """Merges all layers, or none of them if one fails.

    If kept weights alone could not restore the state, every result is computed once before a weight is changed, so that
    only running out of memory or an interruption can fail later.

    Args:
        layers: The layers.
        adapter_names: The adapters to merge; `None` merges all active adapters.
        safe_merge: Whether to check the merged weights for NaNs before a weight is changed.
        keeps_base: Whether to keep the frozen weights, so that the layers can be unmerged.
    """
    if safe_merge or not keeps_base or any(layer.merged for layer in layers):
        check_layers(layers, adapter_names, finite=safe_merge)
    before = [layer.merged_parts for layer in layers]
    with scales_taken(layers, adapter_names):
        try:
            for layer in layers:
                with onload_layer(layer):
                    layer.merge(adapter_names=adapter_names, keeps_base=keeps_base)
        except BaseException as error:
            lost = 0
            for layer, parts in zip(layers, before, strict=True):
                try:
                    layer.restore(parts)
                except Exception:
                    lost += 1
            if lost:
                error.add_note(f"{lost} of {len(layers)} layers could not be restored: load the model again.")
            raise

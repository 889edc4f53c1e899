"""Merging a layer: its own rows and columns, after those of its host, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from san_peft.errors import MergeError
from san_peft.functional import fold
from san_peft.tuner._peft import TunerLayer
from san_peft.tuner.decompose import has_adapter
from san_peft.tuner.quantized import is_quantized


class Factors(NamedTuple):
    """What one adapter multiplies and adds: a copy, so that training on changes nothing that is merged."""

    scale: Tensor | None
    input_scale: Tensor | None
    shift: Tensor | None


class MergingLayer(TunerLayer):
    """The part of `SanLayer` that merges and unmerges."""

    host: Any
    groups: int
    transposed: bool
    out_features: int
    san_host: nn.ModuleDict
    factors: Any

    def init_merging(self) -> None:
        """Starts out with nothing merged."""
        self.merged_adapters: list[str] = []
        self.keeps_base = True
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._merged: dict[str, Factors] = {}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        r"""Folds adapters into this layer's own weight and bias; the neighbours' weights are theirs to fold.

        Of several adapters, and of hosts that add to the weight, the result is
        $W' = \operatorname{diag}(\prod g)\,(W + \sum \Delta W)\operatorname{diag}(\prod s)$ in whatever order they are
        merged, computed from the frozen weight in float32 at least and cast once.

        Args:
            safe_merge: Whether to compute everything and check it for NaN before touching the weight.
            adapter_names: Which adapters; `None` is all active ones.

        Raises:
            ValueError: With `safe_merge`, if the merged weight or bias is not finite.
            MergeError: If the mode is not `both` (the merged model would not be the one that was looked at), or the
                weight is quantised.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        self.check_dense()
        merged = {**self._merged, **{name: self.factors(name) for name in names}}
        before = self._kept or self._base_tensors()
        weight, bias = self._folded(before, merged)
        if safe_merge:
            self._check_finite(names, weight, bias)
        for name in names:
            if name in self.san_host:
                self.san_host[name].frozen = self.san_host[name]().detach().clone()
        if self.keeps_base and self._kept is None:
            self._kept = before
        self._merged = merged
        self._write(weight, bias)
        if self.host is not None:
            self.host.merged_adapters = list(merged)
        self.merged_adapters = list(merged)

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Raises what `merge(safe_merge=True)` would raise, and changes nothing."""
        names = [n for n in adapter_names or self.active_adapters if n not in self.merged_adapters]
        if names:
            self.check_dense()
            merged = {**self._merged, **{name: self.factors(name) for name in names}}
            self._check_finite(names, *self._folded(self._kept or self._base_tensors(), merged))

    def check_dense(self) -> None:
        """Raises `MergeError` if the frozen weight is quantised."""
        base: Any = self.get_base_layer()
        if is_quantized(base):
            raise MergeError(
                f"A {type(base).__name__} holds a quantised weight, in which small scales would be rounded away. Call "
                "san_peft.dequantize(model) first, which puts dense layers in the place of the quantised ones."
            )

    @torch.no_grad()
    def get_delta(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Returns what merging one adapter alone changes in weight and bias, in float32 at least.

        Raises:
            MergeError: If adapters are merged, or the weight is quantised.
        """
        if self.merged:
            raise MergeError("Unmerge the model before asking for what an adapter changes.")
        self.check_dense()
        weight, bias = self._base_tensors()
        wide = torch.promote_types(weight.dtype, torch.float32)
        zeros = torch.zeros(self.out_features, dtype=wide, device=weight.device)
        start = zeros if bias is None else bias.to(wide)
        after, end = self._folded(
            (weight.to(wide), None if bias is None else start), {adapter_name: self.factors(adapter_name)}
        )
        return after - weight.to(wide), (zeros if end is None else end) - start

    def _base_tensors(self) -> tuple[Tensor, Tensor | None]:
        base: Any = self.get_base_layer()
        return base.weight.data, None if base.bias is None else base.bias.data

    @torch.no_grad()
    def _folded(self, before: tuple[Tensor, Tensor | None], merged: dict[str, Factors]) -> tuple[Tensor, Tensor | None]:
        """Returns weight and bias with the hosts' deltas added and all factors multiplied in, as new tensors."""
        weight, bias = before
        hosted = [name for name in merged if has_adapter(self.host, name)]
        if hosted:
            wide = torch.promote_types(weight.dtype, torch.float32)
            copies = weight.to(wide, copy=True), None if bias is None else bias.to(wide, copy=True)
            with self._borrowed(*copies):
                self.host.merge(adapter_names=hosted)
                weight, bias = self._base_tensors()
        scale = _product([f.scale for f in merged.values()])
        input_scale = _product([f.input_scale for f in merged.values()])
        shifts = [f.shift for f in merged.values() if f.shift is not None]
        shift = torch.stack(shifts).sum(0) if shifts else None
        weight, bias = fold(weight, bias, scale, input_scale, shift, groups=self.groups, transposed=self.transposed)
        of_bias = before[0] if before[1] is None else before[1]
        return weight.to(before[0].dtype), None if bias is None else bias.to(of_bias.dtype)

    @contextmanager
    def _borrowed(self, weight: Tensor, bias: Tensor | None) -> Iterator[Any]:
        """Lends the frozen layer other tensors, and the host the state of being unmerged, to merge into."""
        base: Any = self.get_base_layer()
        before, merged = self._base_tensors(), self.host.merged_adapters
        present: Any = base.bias
        training = self.host.training
        if bias is None:  # a bias that a merged shift has made is none of the host's
            base.bias = None
        try:
            self.host.merged_adapters = []
            base.weight.data = weight
            if bias is not None:
                present.data = bias
            yield base
        finally:
            base.weight.data, base.bias = before[0], present
            if present is not None:
                present.data = before[1]
            self.host.merged_adapters = merged
            self.host.train(training)

    def _check_finite(self, names: list[str], weight: Tensor, bias: Tensor | None) -> None:
        if not torch.isfinite(weight).all() or (bias is not None and not torch.isfinite(bias).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")

    @torch.no_grad()
    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        base: Any = self.get_base_layer()
        base.weight.data = weight
        if bias is None:
            base.bias = None
        elif base.bias is not None:
            base.bias.data = bias
        else:
            base.bias = nn.Parameter(bias, requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the frozen weight and bias back, bit for bit.

        Raises:
            MergeError: If they were not kept, as in `merge_and_unload`.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._kept is None:
            raise MergeError("The frozen weights were not kept when the adapters were merged.")
        self._write(*self._kept)
        self._kept, self._merged = None, {}
        scales: Any = self.san_host
        for name in scales:
            scales[name].frozen = None
        if self.host is not None:
            self.host.merged_adapters = []
        self.merged_adapters = []


def _product(vectors: list[Tensor | None]) -> Tensor | None:
    given = [vector for vector in vectors if vector is not None]
    return torch.stack(given).prod(0) if given else None

"""Torch's `nn.MultiheadAttention` under SAN: one layer of four groups, queries, keys, values and the output."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from san_peft.errors import SanError
from san_peft.functional import channels_of, fold
from san_peft.propagation.trace import attention_inputs
from san_peft.tuner.acting import ActingTensor
from san_peft.tuner.layer import SanLayer
from san_peft.tuner.merge import Tensors

ROWS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
"""Names of an attention's weights in the order of their channels; the input projections are packed or separate."""


class SanAttention(SanLayer):
    r"""Adapts an `nn.MultiheadAttention`, with scales on the output channels of all four projections.

    $$ q, k, v = g_{q,k,v} \odot W_{q,k,v} (s_{q,k,v} \odot x), \qquad
       y = g_o \odot W_o \bigl( s_o \odot \operatorname{softmax}(q k^\top / \sqrt{d})\, v \bigr) $$

    For embedding size $d$, the layer has $4d$ output channels: queries, keys, values, output. The edge from the values
    to the output projection, $s_o = g_v^k$, goes from the layer to itself. The weights are multiplied by the scales in
    each forward pass, as merging does, which is cheap compared to the projections.

    Args:
        base_layer: The attention.
    """

    sizes: tuple[int, ...]

    def _set_sizes(self, base: Any) -> None:
        self.sizes = (*attention_inputs(base), base.embed_dim)
        self.in_features, self.out_features, self.channel_dim = sum(self.sizes), 4 * base.embed_dim, -1

    # ------------------------------------------------------------------ attributes that other modules read

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self.get_base_layer()._qkv_same_embed_dim

    @property
    def in_proj_weight(self) -> Any:
        """Returns the adapted packed input projection, or `None` if the projections are separate."""
        return self._part("in_proj_weight")

    @property
    def in_proj_bias(self) -> Any:
        """Returns the adapted bias of the three input projections, or `None`."""
        return self._part("in_proj_bias")

    def _part(self, name: str) -> Any:
        base = self.get_base_layer()
        frozen = getattr(base, name)
        if frozen is None or not self._acts(base):
            return frozen
        if torch.compiler.is_compiling():
            return self.acting_parts()[name]
        trained = torch.is_grad_enabled() and self._is_trained()
        return ActingTensor.of(frozen, f"{self.san_name}.{name}", trained, lambda: self.acting_parts()[name])

    # ------------------------------------------------------------------ forward

    def forward(self, query: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Runs the attention with its adapted weights."""
        if query is None:
            query = kwargs.pop("query")
        base = self.get_base_layer()
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return base(query, *args, **kwargs)
        if adapter_names is not None:
            raise SanError(
                f"adapter_names cannot be used here: {self.san_name} is an attention, whose weights are the same for "
                "all samples. Run one batch per adapter."
            )
        if self.merged or not self._acts(base):
            return base(query, *args, **kwargs)
        parts = self.acting_parts()
        if torch.compiler.is_compiling():
            return torch.func.functional_call(base, parts, (query, *args), kwargs)
        return _with_tensors(base, parts)(query, *args, **kwargs)

    def acting_parts(self) -> dict[str, Tensor]:
        """Computes all adapted weights and biases, by name."""
        weights, bias = self._weights(), self._bias()
        return self._named(*self._fold([w for _, w in weights], bias, *self._acting_vectors(), weights[0][1].dtype))

    # ------------------------------------------------------------------ weights packed as one weight and one bias

    def _weights(self) -> list[tuple[str, Any]]:
        base = self.get_base_layer()
        return [(name, base.get_parameter(name)) for name in ROWS if _is_there(base, name)]

    def _bias(self) -> Tensor | None:
        base = self.get_base_layer()
        return None if base.in_proj_bias is None else torch.cat([base.in_proj_bias, base.out_proj.bias])

    @torch.no_grad()
    def _base_tensors(self) -> Tensors:
        return torch.cat([w.flatten() for _, w in self._weights()]), self._bias()

    @contextmanager
    def frozen_weight(self) -> Iterator[None]:
        """Does nothing, since no scale is derived from an attention's weight."""
        yield

    def fold_vectors(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        input_scale: Tensor | None,
        shift: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensors:
        """Folds vectors into the packed weights and biases."""
        folded, bias = self._fold(self._cut(weight), bias, scale, input_scale, shift, dtype)
        return torch.cat([part.flatten() for part in folded]), bias

    def _fold(
        self,
        weights: list[Tensor],
        bias: Tensor | None,
        scale: Tensor | None,
        input_scale: Tensor | None,
        shift: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Folds vectors into each weight, and into the concatenated biases."""
        folded, biases, row, column = [], [], 0, 0
        for weight in weights:
            groups = weight.shape[0] // self.sizes[-1]  # a packed projection holds three
            out, size = channels_of(weight, groups)
            rows, columns = slice(row, row + out), slice(column, column + size)
            g, t, b = (None if v is None else v[rows] for v in (scale, shift, bias))
            s = None if input_scale is None else input_scale[columns]
            one, b = fold(weight, b, g, s, t, groups=groups, dtype=dtype)
            folded.append(one)
            biases.append(b)
            row, column = row + out, column + size
        return folded, None if biases[0] is None else torch.cat(biases)

    def _cut(self, weight: Tensor) -> list[Tensor]:
        shapes = [w.shape for _, w in self._weights()]
        return [w.view(shape) for w, shape in zip(weight.split([s.numel() for s in shapes]), shapes, strict=True)]

    def _named(self, weights: list[Tensor], bias: Tensor | None) -> dict[str, Tensor]:
        """Returns the tensors of the attention by name."""
        found = dict(zip([name for name, _ in self._weights()], weights, strict=True))
        if bias is not None:
            size = 3 * self.sizes[-1]
            found |= {"in_proj_bias": bias[:size].clone(), "out_proj.bias": bias[size:].clone()}
        return found

    @torch.no_grad()
    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        base: Any = self.get_base_layer()
        for name, value in self._named(self._cut(weight), bias).items():
            holder: Any = base.out_proj if name.startswith("out_proj.") else base
            kind = name.rpartition(".")[2]
            there = getattr(holder, kind)
            if there is None:
                like = base.out_proj.weight
                setattr(holder, kind, nn.Parameter(value.clone().to(like.device), requires_grad=False))
            else:
                there.data = value.to(there.device, there.dtype).clone()
        if bias is None:
            base.in_proj_bias = base.out_proj.bias = None


def _is_there(base: Any, name: str) -> bool:
    holder = base.out_proj if name.startswith("out_proj.") else base
    return getattr(holder, name.rpartition(".")[2]) is not None


def _with_tensors(base: Any, parts: dict[str, Tensor]) -> Any:
    """Returns a shallow copy of an attention with other tensors, so that other threads are not affected."""
    made, inner = copy.copy(base), copy.copy(base.out_proj)
    for module in (made, inner):
        vars(module)["_parameters"] = dict(vars(module)["_parameters"])
    vars(made)["_modules"] = {**vars(made)["_modules"], "out_proj": inner}
    for name, value in parts.items():
        holder = inner if name.startswith("out_proj.") else made
        vars(holder)["_parameters"][name.rpartition(".")[2]] = value
    return made


def layer_for(module: nn.Module) -> SanLayer:
    """Wraps a module in the SAN layer for its type.

    Raises:
        TargetError: If SAN cannot adapt the module.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return SanAttention(module) if isinstance(base, nn.MultiheadAttention) else SanLayer(module)

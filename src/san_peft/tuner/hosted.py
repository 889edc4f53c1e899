"""Computes LoRA and DoRA hosts together with the frozen layer."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant, DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from san_peft.decomposition import low_rank_norm
from san_peft.products import adapted_linear
from san_peft.scaling import SALT, Factor, is_dispatched, near_zero, plain_operations
from san_peft.tuner.decompose import type_of
from san_peft.tuner.fill import Vectors
from san_peft.tuner.quantized import row_matrix
from san_peft.tuner.sharded import is_sharded, onloaded, whole, whole_product

ONE_PASS: dict[Any, tuple[Any, Any]] = {
    lora.Linear: (nn.Linear, DoraLinearVariant),
    lora.Conv1d: (nn.Conv1d, DoraConv1dVariant),
    lora.Conv2d: (nn.Conv2d, DoraConv2dVariant),
    lora.Conv3d: (nn.Conv3d, DoraConv3dVariant),
}
"""PEFT's LoRA layers whose forward pass is computed here, with the type of the base layer and of the DoRA variant."""

DORA = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
"""DoRA variants whose magnitude is applied here."""

PLAIN = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
"""Layers that return a new tensor, which may be modified in place if no hook reads it."""


def has_hooks(module: Any) -> bool:
    """Returns whether a module has forward or backward hooks, or global hooks exist."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def is_quiet(module: Any) -> bool:
    """Returns whether a module has no hooks and no patched `forward`."""
    return not has_hooks(module) and "forward" not in vars(module)


class HostedLayer:
    """Runs a LoRA or DoRA host without calling it, unless it has hooks.

    The result equals the host's up to rounding, with less memory. PEFT's LoRA allocates three tensors of the output's
    size, and its DoRA computes $B A$ and a copy of the weight. Here the update is added in place, the norms of adapted
    rows come from `Scales`, and propagated scales are applied together with the magnitude. The host is not patched.
    """

    host: Any
    base_layer: Any
    san_host: Any
    channel_dim: int
    training: bool
    get_base_layer: Any
    _finished: Any
    _view: Any

    def matrices(self, adapter_name: str) -> tuple[Any, Any]:
        """Returns the modules of a LoRA host's matrices A and B."""
        return self.host.lora_A[adapter_name], self.host.lora_B[adapter_name]

    def one_pass(self, adapter_name: str) -> bool:
        """Returns whether host and base layer can be computed together: plain LoRA or DoRA on a dense layer."""
        host = self.host
        if type(host) not in ONE_PASS or adapter_name not in host.lora_A:
            return False
        base, variant = host.base_layer, host.lora_variant.get(adapter_name)
        kind, dora = ONE_PASS[type(host)]
        return (
            type(base) is kind
            and type(base.weight) is nn.Parameter
            and base.weight.dtype.is_floating_point
            and base.weight.dtype.itemsize > 1
            and not host.lora_bias.get(adapter_name, False)
            and (variant is None or type(variant) is dora)
        )

    def one_pass_dora(self, adapter_name: str) -> bool:
        """Returns whether the host is DoRA and `Scales` can divide its magnitude by the norms of adapted rows."""
        host = self.host
        if type_of(host) != "LORA" or type(host.lora_variant.get(adapter_name)) not in DORA:
            return False
        if adapter_name not in self.san_host or is_sharded(self.get_base_layer().weight):
            return False
        return bool((self.san_host[adapter_name].norms() > 0).all())

    def _magnitude(self, adapter_name: str) -> tuple[Factor, Tensor | None]:
        """Computes the factor and the offset of a DoRA host outside of a pass."""
        host, base = self.host, self.get_base_layer()
        with onloaded(host, base.weight), torch.autocast(base.weight.device.type, enabled=False):
            magnitude = whole(host.lora_magnitude_vector[adapter_name].weight).flatten()
            bias = None if base.bias is None else base.bias.detach()
            with torch.no_grad():
                down, up = (whole(m.weight).flatten(1) for m in self.matrices(adapter_name))
                product = whole_product(row_matrix(base), down)
                norms = self.san_host[adapter_name].norms()
                norms = low_rank_norm(product, down, up, norms, host.scaling[adapter_name])
            factor = magnitude / norms
            made = Factor(factor, None, not near_zero(factor), False, SALT["magnitude"])
            return made, None if bias is None else bias * (1 - factor)

    def _runs_here(self) -> str | None:
        """Returns the active adapter if its LoRA host is computed here, or `None` if the host has to be called.

        The host is called if it has hooks or is offloaded, if several adapters are active, for LoRA variants other than
        DoRA, and if the caller has disabled casting of inputs.
        """
        host = self.host
        if type_of(host) != "LORA" or host.disable_adapters or host.merged or has_hooks(host):
            return None
        if not host.cast_input_dtype_enabled:
            return None
        names = [name for name in host.active_adapters if name in host.lora_A]
        if len(names) != 1:
            return None
        variant = type(host.lora_variant.get(names[0]))
        dora = variant in DORA and names[0] in self.san_host
        return names[0] if dora or (self.one_pass(names[0]) and self._is_quiet(names[0])) else None

    def _is_quiet(self, adapter_name: str) -> bool:
        """Returns whether the submodules of the host can be bypassed."""
        host, matrices = self.host, self.matrices(adapter_name)
        base = host.base_layer
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return False
        parts = (host, base, *matrices, host.lora_dropout[adapter_name])
        return all(map(is_quiet, parts)) and all(type(m.weight) is nn.Parameter for m in matrices)

    def _run_host(self, x: Tensor, adapter_name: str, vectors: Vectors) -> Tensor:
        """Runs the frozen layer with its LoRA or DoRA host, and applies the output vectors."""
        host = self.host
        base, dropout = host.base_layer, host.lora_dropout[adapter_name]
        read = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
        if type(host.lora_variant.get(adapter_name)) not in DORA:
            z = self._adapted(x, adapter_name, vectors, read)
            return self._finished(z, vectors.scale, vectors.shift, fresh=True)
        if base.weight.is_meta and "forward" in vars(host):
            # accelerate loads offloaded parameters when the host is called, which this skips
            with onloaded(host, base.weight):
                return self._run_host(x, adapter_name, vectors)
        factor, offset, placed = vectors.magnitude, vectors.offset, vectors.placed
        if factor is None:
            factor, offset = self._magnitude(adapter_name)
            placed = None
        z = self._adapted(x if read is None else read, adapter_name, vectors)
        z = self._finished(z, factor, offset, fresh=True)
        if read is not None:
            # as in PEFT's DoRA: base(x) is added without dropout, only its change by the magnitude has dropout
            rest = base(x) - base(read)
            z = z + (rest if placed is None else rest * placed.to(rest.dtype).view(self._view(rest)))
        return self._finished(z, vectors.scale, vectors.shift)

    def _adapted(self, x: Tensor, name: str, vectors: Vectors, read: Tensor | None = None) -> Tensor:
        """Computes the frozen layer plus LoRA, as a new tensor; `read` is LoRA's input after dropout, if any."""
        base: Any = self.host.base_layer
        down, up = self.matrices(name)
        scaling = self.host.scaling[name]
        if self.channel_dim == -1 and self.one_pass(name) and self._is_quiet(name):
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
            low, high = vectors.lora or (down.weight, up.weight)
            bias = None if base.bias is None else base.bias.to(dtype)
            x, dropped = x.to(dtype), None if read is None else read.to(dtype)
            return adapted_linear(x, base.weight.to(dtype), bias, low.to(dtype), high.to(dtype), scaling, dropped)
        hidden = down((x if read is None else read).to(down.weight.dtype))
        update = up(hidden * scaling)
        z = base(x)
        fresh = is_quiet(base) and type(base) in PLAIN and not (plain_operations() or is_dispatched())
        return z.add_(update) if fresh else (z + update).to(z.dtype)

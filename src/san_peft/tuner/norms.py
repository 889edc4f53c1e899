"""Applies propagated scales inside norms: in float32, before the output is rounded.

A norm keeps its parameters, hooks and name. Its class is replaced by a subclass whose `forward` requests the factor of
the current pass from `Scales`; without a factor it computes the original norm. How the factor is applied depends on the
norm's formula, which is detected on a probe: a *form* is a formula whose output equals the module's bit for bit. The
output of a norm without a known form is multiplied after rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from san_peft import kernels
from san_peft.products import full_types
from san_peft.scaling import Factor, plain_operations, replayed, scale_channels
from san_peft.tuner.sharded import is_sharded

PROBE_ROWS = 512
"""Number of tokens on which the output of a form must equal the module's."""
NormForm = Callable[[Any, Tensor, Factor], Tensor]
EPSILONS = ("eps", "variance_epsilon", "epsilon", "norm_eps")
"""Attribute names of epsilon."""


class _Handle:
    """Refers to the scales of a norm's model. A copy refers to the same scales until it is bound again."""

    __slots__ = ("dim", "form", "fqn", "kind", "scales")

    def __init__(self, scales: Any, fqn: str, form: str, dim: int, kind: Any) -> None:
        self.scales, self.fqn, self.form, self.dim, self.kind = scales, fqn, form, dim, kind

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return _Handle(memo.get(id(self.scales), self.scales), self.fqn, self.form, self.dim, self.kind)


class ScaledNorm:
    """Multiplies the output of a norm by the factor of the current pass, as a mixin of the norm's class."""

    san_norm: _Handle

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Computes the norm times the input scale of its readers."""
        handle = self.san_norm
        factor = handle.scales.of_norm(handle.fqn)
        if factor is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if handle.form == "after" or kwargs or len(args) != 1:
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
            return scale_channels(out, factor, None, handle.dim, keep="input")
        return FORMS[handle.form](self, args[0], factor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_base_of(type(self)),), self.__dict__


def _base_of(cls: type) -> type:
    """Returns the original class of a norm."""
    order = cls.__mro__
    return order[order.index(ScaledNorm) + 1] if ScaledNorm in order else cls


def _rebuild(base: type) -> Any:
    cls: Any = _subclass(base)
    return cls.__new__(cls)


@cache
def _subclass(base: type) -> type:
    # keeps the name, since transformers and other libraries check class names
    return type(base.__name__, (ScaledNorm, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def norm_at(model: nn.Module, fqn: str) -> Any:
    """Returns the active module with a name, inside PEFT's wrapper if there is one, or `None`."""
    module: Any = model
    for part in fqn.split("."):
        module = module._modules.get(part)
        if module is None:
            return None
    if isinstance(module, AuxiliaryTrainingWrapper):
        saved: Any = getattr(module, "modules_to_save", {})
        active = module.active_adapters
        if not module.disable_adapters and len(active) == 1 and active[0] in saved:
            return saved[active[0]]
        return module.original_module
    return module


def bound_to(module: Any) -> Any:
    """Returns the scales that a norm is bound to, or `None`."""
    handle = vars(module).get("san_norm")
    return None if handle is None else handle.scales


def bind(module: Any, scales: Any, fqn: str) -> bool:
    """Binds a norm to the scales of its model, or restores its class if `scales` is `None`.

    Returns:
        Whether the norm applies scales from now on. It does not if its `forward` was patched.
    """
    if scales is None:
        if isinstance(module, ScaledNorm):
            del module.san_norm
            base = _base_of(type(module))
            if type(module) is _subclass(base):  # else another library has replaced the class, as FSDP2 does
                module.__class__ = base
        return False
    if "forward" in vars(module):  # accelerate's hooks call the original forward; other patches may not
        return bound_to(module) is scales and hasattr(module, "_hf_hook")
    weight = module.weight
    kind = (weight.dtype, weight.device)
    handle = vars(module).get("san_norm")
    there = not (is_sharded(weight) or weight.is_meta)
    if handle is not None and (handle.kind == kind or not there):
        form, dim = handle.form, handle.dim
    elif there:
        form = find_form(module)
        dim = -1 if form != "after" else channel_axis(module)
    else:
        return False
    module.san_norm = _Handle(scales, fqn, form, dim, kind)
    if not isinstance(module, ScaledNorm):
        module.__class__ = _subclass(type(module))
    return True


# ---------------------------------------------------------------------- forms


@torch.no_grad()
def find_form(module: Any) -> str:
    """Returns the form whose output equals the norm's bit for bit on a probe, or `after` if there is none."""
    base: Any = _base_of(type(module))
    weight = module.weight
    parameters = [p for p in inspect.signature(base.forward).parameters.values() if p.default is p.empty]
    if weight.dim() != 1 or len(parameters) > 2 or not weight.is_floating_point():
        return "after"
    size = weight.numel()
    generator = torch.Generator().manual_seed(0)
    # many rows, since in half precision two formulas may differ only rarely, in the last bit;
    # rows of different magnitudes, so that the epsilon matters in some of them
    probe = torch.randn(PROBE_ROWS, size, generator=generator) * torch.logspace(-2, 2, PROBE_ROWS)[:, None] + 0.3
    probe = probe.to(weight.device, weight.dtype)
    ones = Factor(torch.ones(size, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32)))
    halves = Factor(ones.wide * 0.5)
    training = module.training
    module.training = False
    try:
        expected = base.forward(module, probe)
        for name, form in FORMS.items():
            try:
                same = torch.equal(form(module, probe, ones), expected)
                linear = torch.allclose(form(module, probe, halves).float(), expected.float() / 2, rtol=1e-2, atol=1e-6)
            except (AttributeError, TypeError, RuntimeError):
                continue
            if same and linear and _keeps_half(base, module, form, probe, ones):
                return name
    except Exception:  # a norm with other inputs is multiplied after it has run
        return "after"
    finally:
        module.training = training
    return "after"


def _keeps_half(base: Any, module: Any, form: NormForm, probe: Tensor, ones: Factor) -> bool:
    """Returns whether a form has the same output dtype as the norm for half-precision inputs."""
    half = probe.to(torch.bfloat16)
    try:
        expected = base.forward(module, half)
    except Exception:  # the norm rejects half precision
        return True
    return form(module, half, ones).dtype == expected.dtype


@torch.no_grad()
def channel_axis(module: Any) -> int:
    """Returns the channel axis of a norm: 1 if it accepts channels-first images, else -1."""
    weight = module.weight
    size, training = weight.numel(), module.training
    other = 5 if size != 5 else 6
    module.training = False
    try:
        for shape in ((2, size, 3, other), (2, size, other)):
            try:
                _base_of(type(module)).forward(module, torch.zeros(shape, dtype=weight.dtype, device=weight.device))
                return 1
            except Exception:  # the norm rejects this shape
                continue
    finally:
        module.training = training
    return -1


def _epsilon(module: Any) -> float:
    for name in EPSILONS:
        value = getattr(module, name, None)
        if value is not None:
            return float(value)
    raise AttributeError(f"{type(module).__name__} has none of the attributes {', '.join(EPSILONS)}")


def _rms_cast_first(module: Any, x: Tensor, factor: Factor) -> Tensor:
    """Computes the RMS norm of LLaMA and T5: normalises in float32, rounds, then multiplies by the weight."""
    if getattr(module, "bias", None) is not None:
        raise AttributeError("this form has no bias")
    return _rms(x, module.weight, factor, _epsilon(module), True, 0.0)


def _rms_cast_last(module: Any, x: Tensor, factor: Factor) -> Tensor:
    """Computes an RMS norm that is rounded after multiplying by the weight."""
    return _rms(x, module.weight, factor, _epsilon(module), False, 0.0)


def _rms_offset(module: Any, x: Tensor, factor: Factor) -> Tensor:
    """Computes the RMS norm of Gemma: multiplies by one plus the weight, then rounds."""
    return _rms(x, module.weight, factor, _epsilon(module), False, 1.0)


def _layer_norm(module: Any, x: Tensor, factor: Factor) -> Tensor:
    """Computes torch's layer norm."""
    weight, bias, eps = module.weight, getattr(module, "bias", None), _epsilon(module)
    scale = factor.wide
    if plain_operations() or not _trained(x, weight, bias, scale):
        return _plain_layer_norm(x, weight, bias, scale, eps)
    return _LayerNorm.apply(x, weight, bias, scale, eps)


def _plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    shift = None if bias is None else bias.to(wide) * scale
    return nn.functional.layer_norm(x.to(wide), weight.shape, weight.to(wide) * scale, shift, eps).to(x.dtype)


FORMS: dict[str, NormForm] = {
    "layer_norm": _layer_norm,
    "rms_cast_first": _rms_cast_first,
    "rms_cast_last": _rms_cast_last,
    "rms_offset": _rms_offset,
}
"""Known formulas, in the order in which they are tried."""


def _has_kernel(x: Tensor) -> bool:
    return kernels.available(x) and x.is_contiguous() and x.shape[-1] <= kernels.MAX_HIDDEN


def _trained(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _rms(x: Tensor, weight: Tensor, factor: Factor, eps: float, cast_first: bool, offset: float) -> Tensor:
    scale = factor.wide
    if plain_operations() or not _trained(x, weight, scale):
        return _rms_forward(x, weight, scale, eps, cast_first, offset)[0]
    return _RmsNorm.apply(x, weight, scale, eps, cast_first, offset)


def _rms_forward(
    x: Tensor, weight: Tensor, scale: Tensor, eps: float, cast_first: bool, offset: float
) -> tuple[Tensor, Tensor]:
    """Computes an RMS norm with the same operations as the modules, applying the scale before rounding."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normal = wide * inverse
    if cast_first:
        return weight * (normal * scale).to(x.dtype), inverse
    factor = weight.to(wide.dtype)
    return (normal * (offset + factor if offset else factor) * scale).to(x.dtype), inverse


class _RmsNorm(torch.autograd.Function):
    """Computes an RMS norm times a scale; saves only the input and one number per token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, eps: float, cast_first: bool, offset: float
    ) -> Tensor:
        if _has_kernel(x):
            y, inverse = kernels.rms_forward(x, weight, scale, eps, cast_first, offset)
        else:
            y, inverse = _rms_forward(x, weight, scale, eps, cast_first, offset)
        ctx.cast_first, ctx.offset, ctx.eps = cast_first, offset, eps
        ctx.save_for_backward(x, weight, scale, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, scale, inverse = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():  # double backward

            def plain(x: Any, weight: Any, scale: Any) -> Tensor:
                return _rms_forward(x, weight, scale, ctx.eps, ctx.cast_first, ctx.offset)[0]

            return (*replayed(plain, (x, weight, scale), grad), None, None, None)
        need_x, need_weight, need_scale = ctx.needs_input_grad[:3]
        if _has_kernel(x) and kernels.available(grad):
            grad_x, grad_scale, grad_weight = kernels.rms_backward(
                grad.contiguous(), x, weight, scale, inverse, ctx.cast_first, ctx.offset, need_weight
            )
            return grad_x, grad_weight, grad_scale, None, None, None
        normal = x.to(inverse.dtype) * inverse
        factor = weight.to(inverse.dtype)
        if ctx.offset:
            factor = factor + ctx.offset
        grad_normal = grad * factor
        product = grad_normal * normal
        size = x.shape[-1]
        grad_scale = product.view(-1, size).sum(0)
        grad_weight = None
        if need_weight:
            grad_weight = (grad * normal).mul_(scale).view(-1, size).sum(0).to(weight.dtype)
        grad_x = None
        if need_x:
            with full_types(x):
                along = torch.mv(product.view(-1, size), scale).view(*x.shape[:-1], 1)
            grad_normal.mul_(scale)
            grad_x = grad_normal.addcmul_(normal, along, value=-1 / size).mul_(inverse).to(x.dtype)
        return grad_x, grad_weight, grad_scale if need_scale else None, None, None, None


class _LayerNorm(torch.autograd.Function):
    """Computes a layer norm times a scale; saves only the input and two numbers per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if _has_kernel(x):
            y, mean, inverse = kernels.layer_forward(x, weight, bias, scale, eps)
        else:
            factor = weight.to(wide) * scale
            shift = None if bias is None else bias.to(wide) * scale
            y, mean, inverse = torch.native_layer_norm(x.to(wide), weight.shape, factor, shift, eps)
            y = y.to(x.dtype)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, scale, mean, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, scale, mean, inverse = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():

            def plain(x: Any, weight: Any, bias: Any, scale: Any) -> Tensor:
                return _plain_layer_norm(x, weight, bias, scale, ctx.eps)

            return (*replayed(plain, (x, weight, bias, scale), grad), None)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if _has_kernel(x) and kernels.available(grad):
            grad_x, grad_scale, grad_weight, grad_bias = kernels.layer_backward(
                grad.contiguous(), x, weight, bias, scale, mean, inverse, need_weight=need_weight, need_bias=need_bias
            )
            return grad_x, grad_weight, grad_bias, grad_scale, None
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = weight.to(wide) * scale
        shift = None if bias is None else bias.to(wide) * scale
        grad_x, grad_factor, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad.to(wide), x.to(wide), weight.shape, mean, inverse, factor, shift, [need_x, True, bias is not None]
        )
        grad_scale = grad_factor * weight
        if bias is not None:
            grad_scale = torch.addcmul(grad_scale, grad_shift, bias.to(grad_shift.dtype))
        return (
            None if grad_x is None else grad_x.to(x.dtype),
            (grad_factor * scale).to(weight.dtype) if need_weight else None,
            (grad_shift * scale).to(weight.dtype) if need_bias else None,
            grad_scale,
            None,
        )

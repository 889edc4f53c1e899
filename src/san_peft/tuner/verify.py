"""Checks that merging preserves the adapter's effect, within measured rounding errors."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from san_peft.tuner.frozen import stored_weight

SHARE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""Accepted change of an output of each dtype, as a fraction of the adapter's effect, in addition to rounding."""

Outputs = dict[str, Tensor]
"""Floating-point outputs of a model, by name."""

SLOPE = 0.2
"""Accepted relative deviation of the merged effect from the unmerged effect."""


@contextmanager
def reached(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Collects the names of the layers that run with non-empty outputs during the context."""
    names: set[str] = set()

    def note(name: str) -> Any:
        def hook(layer: Any, args: Any, y: Any) -> None:
            if not isinstance(y, Tensor) or y.numel():
                names.add(name)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(note(name)).remove)
        yield names


@contextmanager
def jittered(layers: Iterable[nn.Module], seed: int) -> Iterator[None]:
    """Adds random noise to the outputs of layers, about as large as the rounding differences of merging."""

    def jitter(layer: Any, args: Any, y: Any) -> Any:
        nonlocal seed
        if isinstance(y, tuple) and y:  # an attention returns its weights as well
            return (jitter(layer, args, y[0]), *y[1:])
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        seed += 1
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        # a small entry is a sum of terms as large as those of other entries, and has the same absolute error
        size = wide.square().mean(layer.channel_dim, keepdim=True).sqrt_() + wide.abs()
        generator = torch.Generator(device=y.device).manual_seed(seed)
        noise = torch.rand(wide.shape, dtype=wide.dtype, device=y.device, generator=generator).sub_(0.5)
        return (wide + noise.mul_(size).mul_(_step(stored_weight(layer.get_base_layer()), wide, y.dtype))).to(y.dtype)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(jitter).remove)
        yield


def _step(weight: Tensor, wide: Tensor, dtype: torch.dtype) -> float:
    """Returns the relative rounding error of a layer's product, from its dtypes and the length of its sums."""
    step = max(torch.finfo(each).eps for each in (dtype, weight.dtype))
    convolution = weight.dim() > 2
    short = torch.backends.cudnn.allow_tf32 if convolution else torch.get_float32_matmul_precision() != "highest"
    if short and wide.dtype == torch.float32 and (wide.is_cuda or not convolution):
        step = max(step, 2**-10)
    return step + torch.finfo(wide.dtype).eps * math.sqrt(weight[0].numel()) / 8


FEW = 64
"""Rounding errors of outputs with fewer entries are estimated from several passes."""


class Verdict(NamedTuple):
    """Summarises what merging changes in the outputs; `fault` is the reason for a failure, or `None`."""

    difference: float
    where: str
    accepted: float
    effect: float
    relative: float
    fault: str | None


def judge(
    before: Outputs,
    after: Outputs,
    frozen: Outputs,
    rounded: Sequence[tuple[Outputs, Outputs]] | None,
    tolerance: float | None,
) -> Verdict:
    """Compares the change of each output by merging with the adapter's effect and with rounding errors.

    Args:
        before: The outputs before merging.
        after: The outputs after merging.
        frozen: The outputs of the base model.
        rounded: Pairs of `before` and `frozen` from passes with `jittered` layers; `None` if a tolerance is given.
        tolerance: The maximum accepted difference; `None` derives it from the effect and from rounding errors.
    """
    changes = {name: _gap(after[name], old) for name, old in before.items()}
    effects = {name: _finite(_gap(old, frozen[name])) for name, old in before.items()}
    sizes = {name: _finite(old.double()) for name, old in before.items()}
    noises = {
        name: [
            _finite(_gap(again[name], old[name]))
            for pair in rounded or ()
            for again, old in zip(pair, (before, frozen), strict=True)
        ]
        for name in before
    }
    # an output with little noise by chance has the same rounding errors as the others
    most = _norm([noise for several in noises.values() for noise in several])
    passes = 2 * max(len(rounded or ()), 1)
    common = most / max(math.sqrt(passes) * _norm(list(sizes.values())), sys.float_info.min)
    worst, faults = ("no output", -1.0, 0.0), []
    for name, change in changes.items():
        dtype, effect = before[name].dtype, effects[name]
        least = sizes[name] * max(common, torch.finfo(dtype).eps)
        noise = max(_mean(one) for one in [*noises[name], least])
        accepted = max(SHARE[dtype] * _largest(effect), 5 * max(_largest(one) for one in [*noises[name], least]))
        accepted = accepted if tolerance is None else tolerance
        place = f"{name}{_place(change)}"
        if _largest(change) > worst[1]:
            worst = (place, _largest(change), accepted)
        if not _largest(change) <= accepted:
            faults.append(
                f"Merging changes {place} by {_largest(change):.3g}, more than the tolerance of {accepted:.3g}"
            )
        elif rounded is not None:
            again = _finite(_gap(rounded[0][0][name], rounded[0][1][name]))
            faults.extend(_faults(name, change, effect, again, noise, SHARE[dtype]))
    effect, relative = max((_largest(e) for e in effects.values()), default=0.0), 0.0
    if any(change.any() for change in changes.values()):
        whole = _norm(list(effects.values()))
        relative = _norm(list(changes.values())) / whole if whole else math.inf
    where, difference, accepted = worst
    return Verdict(max(difference, 0.0), where, accepted, effect, relative, faults[0] if faults else None)


def _faults(name: str, change: Tensor, effect: Tensor, again: Tensor, noise: float, share: float) -> Iterator[str]:
    """Yields the failures of one output on average; `again` is the effect with other rounding errors."""
    # many outputs are combinations of few features; `layerwise` checks the single layers
    independent = min(effect.numel(), 16)
    accepted = max(share * _mean(effect), (1.5 + 4 / math.sqrt(independent)) * noise)
    if _mean(change) > accepted:
        yield f"Merging changes {name} by {_mean(change):.3g} on average, more than the tolerance of {accepted:.3g}"
    shared = (effect * again).mean().item()  # an estimate of the squared effect that is not biased by rounding errors
    if shared > noise**2:
        slope = 1 + (change * again).mean().item() / shared
        spread = SLOPE + 4 * noise * _mean(again) / shared / math.sqrt(independent)
        if abs(slope - 1) > spread:
            yield (
                f"Merging keeps {slope:.2f} times the effect of the adapter on {name}, which is {_mean(effect):.3g} on "
                f"average; rounding explains {1 - spread:.2f} to {1 + spread:.2f}"
            )


def _gap(new: Tensor, old: Tensor) -> Tensor:
    """Returns the difference of two outputs; zero where both are the same infinity."""
    gap = new.double() - old.double()
    return torch.where(new == old, torch.zeros_like(gap), gap)


def _finite(values: Tensor) -> Tensor:
    """Replaces non-finite values by zero, so that they do not raise the accepted difference."""
    return values.nan_to_num(0.0, 0.0, 0.0)


def _largest(values: Tensor) -> float:
    largest = values.abs().max().item() if values.numel() else 0.0
    return largest if math.isfinite(largest) else math.inf


def _mean(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0


def _norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(part.square().sum().item() for part in parts))


def _place(change: Tensor) -> str:
    if not change.numel():
        return ""
    if not torch.isfinite(change).all():
        return " (not finite)"
    return f"[{', '.join(str(int(i)) for i in torch.unravel_index(change.abs().argmax(), change.shape))}]"

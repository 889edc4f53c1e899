"""The part of `gpu.py` about fused kernels."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_parts import Context, Rows, last_line
from torch import Tensor


def part_kernels(context: Context) -> Rows:
    """Yields times of the fused kernels and of plain operations that compute the same."""
    kernels = optional("san_peft.kernels") or optional("san_peft.tuner.kernels")
    if kernels is None:
        yield {"method": "all kernels", "what": "kernels", "error": "the library has none"}
        return
    rows, wide = (64, 32) if context.small else (3904, 4096)
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (wide,) if context.small else (wide, 14336):
            x, grad = (torch.randn(rows, channels, device=context.device).to(dtype) for _ in range(2))
            factor = 1 + 0.01 * torch.randn(channels, device=context.device)
            weight = torch.ones(channels, device=context.device, dtype=dtype)
            name = f"{rows} x {channels}, {str(dtype).removeprefix('torch.')}"
            if not kernels.available(x):
                yield {"method": "all kernels", "what": name, "error": f"not available on {context.device}"}
                continue
            yield from kernel_rows(context, kernels, x, grad, factor, weight, name)


def optional(name: str) -> Any:
    """Returns a module, or `None` where it is not there."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def kernel_rows(
    context: Context, kernels: Any, x: Tensor, grad: Tensor, factor: Tensor, weight: Tensor, name: str
) -> Rows:
    def rms() -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (weight * normed.to(x.dtype)) * factor.to(x.dtype)

    def scale_backward() -> tuple[Tensor, Tensor]:
        return grad * factor.to(grad.dtype), (grad * x).sum(0, dtype=torch.float32)

    leaf, scale = x.clone().requires_grad_(), factor.clone().requires_grad_()

    def rms_backward() -> tuple[Tensor, ...]:
        wide = leaf.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return torch.autograd.grad((weight * normed.to(x.dtype)) * scale.to(x.dtype), (leaf, scale), grad)

    def fused_rms_backward() -> Any:
        _, again = kernels.rms_forward(x, weight, factor, 1e-5, True)
        return kernels.rms_backward(grad, x, weight, factor, again, True)

    def dithered() -> Tensor:
        return importlib.import_module("san_peft.rounding").multiply(x, factor)

    size = x.numel() * x.element_size()
    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "scale": (lambda: kernels.scale_forward(x, factor), lambda: x * factor.to(x.dtype), 2 * size),
        "scale, dithered": (lambda: kernels.scale_forward(x, factor), dithered, 2 * size),
        "scale, backward": (lambda: kernels.scale_backward(grad, x, factor), scale_backward, 3 * size),
        "RMS norm with a scale": (lambda: kernels.rms_forward(x, weight, factor, 1e-5, True), rms, 2 * size),
        "RMS norm with a scale, forward and backward": (fused_rms_backward, rms_backward, 5 * size),
    }
    for case, (fused, plain, moved) in cases.items():
        row: dict[str, Any] = {"method": case, "what": name, "against": "plain"}
        try:
            ours, theirs = fused(), plain()
            ours, theirs = (out[0] if isinstance(out, tuple) else out for out in (ours, theirs))
            difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
            times = [median_seconds(f, 3 if context.small else 50) for f in (fused, plain)]
            row |= {"seconds": times[0], "ratio": times[0] / times[1], "bytes_per_second": moved / times[0]}
            row |= {"relative_difference": float(difference), "goal": 1.0, "met": times[0] <= times[1]}
        except TimeoutError:
            raise
        except Exception as error:
            row["error"] = last_line(error)
        yield row


def median_seconds(run: Callable[[], Any], count: int) -> float:
    """Returns the median seconds of a function; on a GPU those between two events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(count):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            run()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)

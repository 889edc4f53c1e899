"""The Triton kernels against plain PyTorch: in Triton's interpreter here, on a GPU in `tests/gpu`.

The interpreter is chosen while Triton is imported, so the checks run in one process of their own: this file, as a
program. It prints, as JSON, what went wrong in which check.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

if __name__ == "__main__":  # its two modules without the package, which imports more than the checks do
    sys.modules["san_peft"] = ModuleType("san_peft")
    sys.modules["san_peft"].__path__ = [str(Path(__file__).parents[1] / "src" / "san_peft")]

from san_peft import kernels, rounding

HALF = (torch.bfloat16, torch.float16)
TYPES = (*HALF, torch.float32)
ONE_STEP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
"""Relative tolerance: one step of the type. The interpreter cuts off what a GPU rounds to bfloat16."""
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 3.0e4)
SHAPES = [((2, 5, 24), 1), ((3, 20, 3, 5), 1), ((40, 200), -1), ((9, 3, 7, 7), 1), ((300, 7), 0)]
LARGE = [((700, 1024), -1), ((3, 257, 1025), -1), ((5, 96, 28, 28), 1), ((1, 7, 40001), 1), ((1, 1), 0), ((33, 5), -1)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def vector(size: int, device: str = "cpu", seed: int = 1) -> Tensor:
    return 1 + 0.1 * drawn(size, device=device, seed=seed)


def along(value: Tensor, x: Tensor, dim: int) -> Tensor:
    return value.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])


def same(one: Tensor, two: Tensor) -> bool:
    """Bit for bit, but for the bits of a NaN."""
    if one.dtype != two.dtype or one.shape != two.shape or not torch.equal(one.isnan(), two.isnan()):
        return False
    integer = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.nan_to_num(0).view(integer), two.nan_to_num(0).view(integer))


def close(one: Tensor, two: Tensor, tolerance: float) -> None:
    """Within a tolerance relative to each value and to the largest."""
    one, two = one.cpu().double(), two.cpu().double()
    bound = tolerance * (two.abs() + 0.05 * two.abs().max() + 1e-30)
    assert one.shape == two.shape
    assert bool(((one - two).abs() <= bound).all()), ((one - two).abs() / bound).max()


def examples(shapes, device):
    for shape, dim in shapes:
        for dtype in TYPES:
            x = drawn(*shape, dtype=dtype) * drawn(*shape, seed=7).exp().to(dtype)
            x.view(-1)[: min(len(SPECIAL), x.numel() // 2)] = torch.tensor(SPECIAL)[: x.numel() // 2].to(dtype)
            yield x.to(device), vector(shape[dim], device), dim


def check_a_scale_is_the_reference_bit_for_bit(device="cpu", shapes=SHAPES):
    for x, factor, dim in examples(shapes, device):
        # the reference on the CPU: there a NaN keeps its bits
        want = rounding.multiply(x.cpu(), along(factor, x, dim).cpu(), dim).to(device)
        assert same(kernels.scale_forward(x, factor, dim=dim), want), (x.shape, x.dtype)
        assert same(kernels.scale_forward(x, torch.ones_like(factor), dim=dim), x), (x.shape, x.dtype)
        want = rounding.multiply(x.cpu(), along(factor, x, dim).cpu(), dim, salt=7919).to(device)
        assert same(kernels.scale_forward(x, factor, dim=dim, salt=7919), want), (x.shape, x.dtype)
        small, zero = x.abs().clamp(max=1.0) * 1e-4, torch.zeros_like(factor)
        want = rounding.multiply(small.cpu(), along(factor, x, dim).cpu(), dim).to(device)
        assert same(kernels.scale_forward(small, factor, dim=dim), want), (x.shape, x.dtype)
        want = rounding.multiply(x.cpu(), along(zero, x, dim).cpu(), dim).to(device)
        assert same(kernels.scale_forward(x, zero, dim=dim), want), (x.shape, x.dtype)


def check_a_shift_is_added_before_rounding(device="cpu", shapes=SHAPES):
    for x, factor, dim in examples(shapes, device):
        shift = 0.1 * drawn(x.shape[dim], device=device, seed=3)
        vectors = along(factor, x, dim).cpu(), along(shift, x, dim).cpu()
        want = rounding.multiply(x.cpu(), vectors[0], dim, vectors[1]).to(device)
        assert same(kernels.scale_forward(x, factor, shift, dim), want), (x.shape, x.dtype)


def check_the_gradients_of_a_scale(device="cpu", shapes=SHAPES):
    for shape, dim in shapes:
        for dtype in TYPES:
            grad, saved = drawn(*shape, dtype=dtype, device=device), drawn(*shape, device=device, seed=5)
            factor, axes = vector(shape[dim], device), [d for d in range(len(shape)) if d != dim % len(shape)]
            for kept in {saved.dtype: saved, dtype: saved.to(dtype)}.values():
                grad_x, total, plain = kernels.scale_backward(grad, kept, factor, dim, need_shift=True)
                wide = grad.float() * along(factor, grad, dim)
                if device == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts off
                    wide = (wide.view(torch.int32) & -65536).view(torch.float32)
                assert same(grad_x, wide.to(dtype))
                magnitude = (grad.double() * kept.double()).abs().sum(axes).max()
                assert total.dtype == plain.dtype == torch.float32
                assert ((grad.double() * kept.double()).sum(axes) - total).abs().max() < 1e-6 * magnitude
                assert (grad.double().sum(axes) - plain).abs().max() < 1e-6 * grad.double().abs().sum(axes).max()
                if device == "cuda":
                    again = kernels.scale_backward(grad, kept, factor, dim, need_shift=True)
                    assert torch.equal(again[1], total)
                    assert torch.equal(again[2], plain)
            none, again, nor = kernels.scale_backward(grad, kept, factor, dim, need_x=False)
            assert none is None
            assert nor is None
            assert (again - total).abs().max() < 1e-6 * magnitude


def weights(size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return (
        vector(size, device, 1).to(dtype),
        0.3 * drawn(size, dtype=dtype, device=device, seed=2),
        vector(size, device, 3),
    )


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


NORMED = [(2, 3, 100), (400, 16), (5, 1100)]


def cases(shapes, variants, device):
    """Every shape with every type and variant; a share of them for every shape in the interpreter, which is slow."""
    every = list(itertools.product(TYPES, variants))
    for i, shape in enumerate(shapes):
        yield shape, every if device == "cuda" else every[i :: len(shapes)]


def check_an_rms_norm(device="cpu", shapes=NORMED):
    for shape, chosen in cases(shapes, ((True, 0.0), (False, 1.0), (False, 0.0)), device):
        for dtype, (cast, offset) in chosen:
            x, grad = drawn(*shape, dtype=dtype, device=device) * 3, drawn(*shape, dtype=dtype, device=device, seed=9)
            weight, _, scale = weights(shape[-1], dtype, device)
            y, rstd = kernels.rms_forward(x, weight, scale, 1e-5, cast, offset)
            h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
            close(rstd, torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5), 1e-5)
            want = weight * (h * scale).to(dtype) if cast else (h * (offset + weight.float()) * scale).to(dtype)
            assert y.dtype == dtype
            close(y, want, (1 + cast) * ONE_STEP[dtype])
            gx, gs, gw = kernels.rms_backward(grad, x, weight, scale, rstd, cast, offset, need_weight=True)
            x64, w64, s64 = leaves(x, weight, scale)
            h = x64 * torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + 1e-5)
            (h * (offset + w64) * s64).backward(grad.double())
            assert (gx.dtype, gs.dtype, gw.dtype) == (dtype, torch.float32, torch.float32)
            close(gx, x64.grad, ONE_STEP[dtype])
            close(gs, s64.grad, 1e-4)
            close(gw, w64.grad, 1e-4)
            if device == "cuda":
                again = kernels.rms_backward(grad, x, weight, scale, rstd, cast, offset, need_weight=True)
                assert all(torch.equal(a, b) for a, b in zip(again, (gx, gs, gw), strict=True))
            again = kernels.rms_backward(grad, x, weight, scale, rstd, cast, offset)
            assert again[2] is None
            close(again[1], gs, 1e-6)
            y, rstd = kernels.rms_forward(x, None, None, 1e-5)
            close(y, x.double() * rstd, ONE_STEP[dtype])
            assert kernels.rms_backward(grad, x, None, None, rstd, need_weight=True)[1:] == (None, None)


def check_a_layer_norm(device="cpu", shapes=NORMED):
    for shape, chosen in cases(shapes, ("wbs", "w-s", "--s", "wb-"), device):
        for dtype, parts in chosen:
            x = drawn(*shape, dtype=dtype, device=device) * 3 + 2
            grad = drawn(*shape, dtype=dtype, device=device, seed=9)
            given = zip("wbs", weights(shape[-1], dtype, device), strict=True)
            w, b, s = (value if part in parts else None for part, value in given)
            x64, w64, b64, s64 = (t if t is None else leaves(t)[0] for t in (x, w, b, s))
            y, mean, rstd = kernels.layer_forward(x, w, b, s, 1e-5)
            normed = layer_norm(x64, shape[-1:], w64, b64, 1e-5)
            normed = normed if s64 is None else normed * s64
            normed.backward(grad.double())
            assert y.dtype == dtype
            close(y, normed.detach(), ONE_STEP[dtype])
            close(mean, x.double().mean(-1, keepdim=True), 1e-5)
            got = kernels.layer_backward(grad, x, w, b, s, mean, rstd, need_weight=True, need_bias=True)
            assert got[0].dtype == dtype
            close(got[0], x64.grad, ONE_STEP[dtype])
            for mine, leaf in zip(got[1:], (s64, w64, b64), strict=True):
                assert (mine is None) == (leaf is None)
                if mine is not None:
                    close(mine, leaf.grad, 1e-4)
            bare = kernels.layer_backward(grad, x, w, b, s, mean, rstd)
            assert bare[2:] == (None, None)
            close(bare[0], got[0], ONE_STEP[dtype])
            assert s is None or close(bare[1], got[1], 1e-6) is None


def check_what_cannot_be_launched(device="cpu"):
    x, factor = drawn(4, 6, device=device), vector(6, device)
    assert kernels.available(x)
    assert not kernels.available(x.double())
    assert not kernels.available(x.long())
    for bad in (
        lambda: kernels.scale_forward(x.t(), factor, dim=0),
        lambda: kernels.scale_forward(x, factor[:5]),
        lambda: kernels.scale_forward(x, factor.bfloat16()),
        lambda: kernels.scale_forward(x.double(), factor),
        lambda: kernels.scale_backward(x, x[:2], factor),
        lambda: kernels.rms_forward(x, factor[:2], None, 1e-5),
        lambda: kernels.layer_forward(drawn(1, 20000, device=device), None, None, None, 1e-5),
    ):
        with pytest.raises(ValueError, match=r"is|has"):
            bad()


def check_nothing_comes_of_nothing(device="cpu"):
    x, factor = torch.empty(0, 6, device=device), vector(6, device)
    assert kernels.scale_forward(x, factor).shape == x.shape
    assert kernels.scale_backward(x, x, factor)[1].tolist() == [0.0] * 6
    y, mean, rstd = kernels.layer_forward(x, factor, factor, factor, 1e-5)
    grads = kernels.layer_backward(y, x, factor, factor, factor, mean, rstd, True, True)
    assert grads[0].shape == x.shape
    assert [g.tolist() for g in grads[1:]] == [[0.0] * 6] * 3


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def failures():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(failures, name):
    assert name in failures
    assert not failures[name], failures[name]


def test_without_a_gpu_there_are_none(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.available(torch.ones(3))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels.available(torch.ones(3))


def main() -> None:
    kernels._PROCESSORS = 1  # several tiles to a program
    found = {}
    for name, check in CHECKS.items():
        kernels._TILE = 512 if "gradients" in name else 4096
        try:
            check()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""The Triton kernels on a GPU: the checks of `tests/test_kernels.py`, with larger and odder shapes."""

from __future__ import annotations

import pytest
import torch
from tests.test_kernels import CHECKS, LARGE, NORMED, SHAPES, drawn, same, vector

from san_peft import kernels, rounding

pytestmark = pytest.mark.gpu
ROWS = [(700, 768), (37, 11008), (9, 16384), (5000, 128), (3, 1), (2, 33, 4097), (2000, 4096)]


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels need compute capability 8.0")


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    CHECKS[name]("cuda")


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("name", [name for name in CHECKS if "scale" in name or "shift" in name])
def test_large_and_odd_features(name, shape):
    assert shape not in SHAPES
    CHECKS[name]("cuda", [shape])


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("name", [name for name in CHECKS if "norm" in name])
def test_rows_of_many_lengths(name, shape):
    assert shape not in NORMED
    CHECKS[name]("cuda", [shape])


def test_the_smallest_numbers():
    """Numbers that bfloat16 has no leading bit for, which the interpreter converts in its own way."""
    x = (drawn(64, 96) * 1e-39).to(torch.bfloat16)
    assert bool((x != 0).any())
    factor = vector(96)
    assert same(kernels.scale_forward(x.cuda(), factor.cuda()).cpu(), rounding.multiply(x, factor))


def test_every_value_of_a_half_type():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).unsqueeze(1).expand(-1, 8)
        x, factor = x.contiguous(), vector(8)
        assert same(kernels.scale_forward(x.cuda(), factor.cuda()).cpu(), rounding.multiply(x, factor))


def test_more_entries_than_32_bits_count():
    rows, size = 2**19 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 6 * 2 * rows * size:
        pytest.skip("needs the memory of six such tensors")
    x = torch.empty(rows, size, dtype=torch.bfloat16, device="cuda").normal_()
    factor = vector(size, "cuda")
    y = kernels.scale_forward(x, factor)
    grad_x, total, _ = kernels.scale_backward(x, y, factor)
    rms, _ = kernels.rms_forward(x, None, factor, 1e-5)
    for part in (slice(0, 5), slice(-5, None)):
        want = rounding.multiply(x[part].cpu(), factor.cpu())
        assert same(y[part].cpu(), want)
        assert same(grad_x[part].cpu(), (x[part].cpu().float() * factor.cpu()).bfloat16())
        assert same(rms[part], kernels.rms_forward(x[part].contiguous(), None, factor, 1e-5)[0])
    parts = [
        kernels.scale_backward(a, b, factor, need_x=False)[1]
        for a, b in zip(x.split(2**17), y.split(2**17), strict=True)
    ]
    assert torch.allclose(total, torch.stack(parts).sum(0), rtol=1e-4)

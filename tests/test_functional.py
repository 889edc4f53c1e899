"""Gradients, saved memory, types and errors of the equations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from san_peft.errors import SanError
from san_peft.functional import SMALLEST, fold, propagate, scale_input, scale_output


def _naive(z, scale, shift, dim):
    view = [-1 if d == dim % z.dim() else 1 for d in range(z.dim())]
    return z * scale.view(view) + (0 if shift is None else shift.view(view))


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_equal_those_of_the_plain_product(dim, with_shift, inplace):
    torch.manual_seed(0)
    z = torch.randn(2, 5, 3, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0, 0.0, -1e-3, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    shift = torch.randn(5, dtype=torch.float64, requires_grad=True) if with_shift else None
    leaves = [leaf for leaf in (z, scale, shift) if leaf is not None]
    upstream = torch.randn_like(z)

    expected = torch.autograd.grad((_naive(z, scale, shift, dim) * upstream).sum(), leaves)
    lean = scale_output(z * 1.0, scale, shift, dim, inplace=inplace)
    actual = torch.autograd.grad((lean * upstream).sum(), leaves)

    torch.testing.assert_close(lean, _naive(z, scale, shift, dim))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("frozen", ["z", "scale", "shift"])
def test_gradients_with_one_frozen_input(frozen):
    torch.manual_seed(0)
    inputs = {"z": torch.randn(4, 3), "scale": torch.rand(3) + 0.5, "shift": torch.randn(3)}
    inputs = {name: value.double().requires_grad_(name != frozen) for name, value in inputs.items()}

    assert torch.autograd.gradcheck(lambda *x: scale_output(*x), tuple(inputs.values()))


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("frozen", [None, "x", "scale"])
def test_gradients_of_a_scaled_input(dim, frozen):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 3), "scale": torch.tensor([1.0, 0.0, -2.0])}
    inputs = {name: value.double().requires_grad_(name != frozen) for name, value in inputs.items()}
    assert torch.autograd.gradcheck(lambda *x: scale_input(*x, dim), tuple(inputs.values()))
    torch.testing.assert_close(scale_input(*inputs.values(), dim), _naive(*inputs.values(), None, dim))


def _saved_bytes(function) -> int:
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    assert kept.requires_grad
    return sum(saved.values())


def test_before_an_activation_scaling_saves_nothing_of_its_own():
    z, scale = torch.randn(256, 64), torch.ones(64, requires_grad=True)
    one = z.numel() * z.element_size()

    lean = _saved_bytes(lambda: torch.nn.functional.gelu(scale_output(z, scale)))
    naive = _saved_bytes(lambda: torch.nn.functional.gelu(z * scale))

    assert one <= lean < 1.1 * one
    assert naive >= 2 * one


@pytest.mark.parametrize("keep", ["output", "input"])
@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivatives(keep, inplace):
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    scale, shift = (torch.rand(2, dtype=torch.float64).add(0.5).requires_grad_() for _ in range(2))

    def run(z: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return scale_output(z.cos(), scale, shift, keep=keep, inplace=inplace).sin()

    assert torch.autograd.gradgradcheck(run, (z, scale, shift))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_factor_takes_the_type_of_the_activation(dtype):
    x, scale = torch.randn(4, 3, dtype=dtype), torch.rand(3)
    assert scale_input(x, scale).dtype == dtype
    assert scale_output(x, scale, scale).dtype == dtype


@pytest.mark.parametrize("with_shift", [False, True])
def test_half_precision_gradient_is_near_the_float32_one(with_shift):
    torch.manual_seed(0)
    z = torch.randn(512, 32)
    scale = (1 + 0.1 * torch.randn(32)).requires_grad_()
    shift = torch.full((32,), 30.0, requires_grad=True) if with_shift else None
    upstream = torch.randn(512, 32)
    (expected,) = torch.autograd.grad((_naive(z, scale, shift, -1) * upstream).sum(), scale)

    half = scale_output(z.bfloat16(), scale, shift)
    (actual,) = torch.autograd.grad((half * upstream.bfloat16()).sum(), scale)

    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 0.02 * expected.norm()


def test_compiled_equals_eager():
    z, scale = torch.randn(4, 3), torch.rand(3, requires_grad=True)
    compiled = torch.compile(lambda z, s: scale_output(z, s), backend="aot_eager", fullgraph=True)(z, scale)
    eager = scale_output(z, scale)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled.sum(), scale), torch.autograd.grad(eager.sum(), scale))


def test_fractional_exponents_keep_the_sign():
    assert propagate(torch.tensor([-4.0, 9.0]), exponent=0.5).tolist() == [-2.0, 3.0]
    assert propagate(torch.tensor([-4.0]), exponent=2).item() == 16.0


@pytest.mark.parametrize("exponent", [0.5, 0.1, 1.5, -0.5, -1, -2, -1.5, 0, 2, 3])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_powers_are_finite_at_zero_and_so_are_their_gradients(exponent, bound):
    scale = torch.tensor([0.0, -0.0, 1e-12, -1e-7, 9e-5, -0.5, 1.0, 2.0], requires_grad=True)
    factor = propagate(scale, exponent=exponent, bound=bound)
    factor.sum().backward()
    assert factor.isfinite().all()
    assert scale.grad.isfinite().all()
    if bound is None:
        sign = scale.sign() if exponent % 2 else torch.ones_like(scale)
        torch.testing.assert_close(factor[5:], (sign * scale.abs().pow(exponent))[5:])
        torch.testing.assert_close(scale.grad[6], torch.tensor(float(exponent)))


@pytest.mark.parametrize("exponent", [0.5, -0.5, -1, -2, -3])
def test_powers_go_to_zero_without_a_step(exponent):
    sizes = torch.tensor([SMALLEST * (1 - 1e-6), SMALLEST, SMALLEST * (1 + 1e-6)], dtype=torch.float64)
    below, there, above = propagate(sizes, exponent=exponent)
    torch.testing.assert_close(torch.stack([below, above]), torch.stack([there, there]), rtol=1e-5, atol=0)
    assert propagate(torch.zeros(1), exponent=exponent).item() == 0


def test_folding_half_precision_rounds_once():
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    scale, input_scale = 1 + 0.01 * torch.randn(64), 1 + 0.01 * torch.randn(64)
    folded, _ = fold(weight, None, scale, input_scale)
    exact = weight.float() * scale[:, None] * input_scale
    above, below = (torch.nextafter(exact.bfloat16(), torch.tensor(end).bfloat16()) for end in (torch.inf, -torch.inf))
    assert ((folded >= below) & (folded <= above)).all(), "it is one of the two neighbours"
    assert ((folded.float() - exact).mean() / exact.abs().mean()).abs() < 1e-4, "and exact on average"
    assert torch.equal(fold(weight, None, torch.ones(64), torch.ones(64))[0], weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_input(torch.ones(2, 3), torch.ones(4)), r"input scale has shape \(4,\).*has 3 channels"),
        (lambda: scale_output(torch.ones(2, 3), torch.ones(3, 1)), r"scale has shape \(3, 1\)"),
        (lambda: fold(torch.ones(2, 3), None, torch.ones(3)), r"scale has shape \(3,\).*needs \(2,\)"),
        (lambda: fold(torch.ones(4, 1, 3), None, None, torch.ones(3), groups=2), r"2 groups needs \(2,\)"),
        (lambda: fold(torch.ones(5, 1, 3), None, None, groups=2), "cannot be split into 2 groups"),
        (lambda: fold(torch.ones(2, 3), None, None, None, torch.ones(3)), r"shift has shape \(3,\).*2 output"),
    ],
)
def test_errors_name_the_thing_and_the_numbers(call, message):
    with pytest.raises(SanError, match=message):
        call()


@settings(deadline=None)
@given(st.floats(-50, 50), st.floats(0.01, 3))
def test_a_bound_is_kept_and_changes_nothing_near_one(scale, bound):
    vector = torch.tensor([scale, 1.0], dtype=torch.float64, requires_grad=True)
    factor = propagate(vector, bound=bound)
    assert abs(factor[0].item() - 1) <= bound * (1 + 1e-9)
    assert factor[1].item() == 1
    (gradient,) = torch.autograd.grad(factor.sum(), vector)
    assert gradient[1].item() == 1
    assert 0 <= gradient[0].item() <= 1 + 1e-9

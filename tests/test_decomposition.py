"""The scale inside a low-rank or a dense change: against the plain formula, its gradients, and what it may allocate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from san_peft import SanError, products
from san_peft.decomposition import dense_scale, floored, low_rank_norm, low_rank_scale, low_rank_scales
from san_peft.products import CHUNK, adapted_linear, rows_at_once, weight_product

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**16))


def parts(out: int, size: int, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(out, size), draw(rank, size), draw(out, rank)


def naive(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, decomposition: str) -> Tensor:
    adapted = weight + scaling * lora_B @ lora_A
    if decomposition == "norm":
        return adapted.norm(dim=1) / weight.norm(dim=1)
    return (adapted * weight).sum(1) / weight.square().sum(1)


def factored(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, decomposition: str) -> Tensor:
    norm = weight.norm(dim=1)
    return low_rank_scale(weight_product(weight, lora_A), lora_A, lora_B, norm, scaling, decomposition)


@pytest.mark.parametrize("decomposition", ["norm", "projection"])
@settings(deadline=None)
@given(SIZES, st.floats(-3, 3))
def test_factored_equals_the_plain_formula(decomposition, sizes, scaling):
    weight, a, b = parts(*sizes)
    norms = weight.norm(dim=1)
    alive = norms >= 0.1 * norms.median()  # the others have a test of their own
    expected = naive(weight, a, b, scaling, decomposition)[alive]
    for found in (factored(weight, a, b, scaling, decomposition), dense_scale(scaling * b @ a, weight, decomposition)):
        torch.testing.assert_close(found[alive], expected, rtol=1e-7, atol=1e-7)


@settings(deadline=None)
@given(SIZES, st.floats(-3, 3))
def test_norm_of_the_adapted_rows(sizes, scaling):
    weight, a, b = parts(*sizes)
    got = low_rank_norm(weight_product(weight, a), a, b, weight.norm(dim=1), scaling)
    torch.testing.assert_close(got, (weight + scaling * b @ a).norm(dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decomposition", ["norm", "projection"])
def test_gradients_are_those_of_finite_differences_and_of_the_plain_formula(decomposition):
    weight, a, b = parts(5, 7, 3, 0)
    a.requires_grad_()
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: factored(weight, a, b, 0.7, decomposition), (a, b))
    upstream = torch.randn(5, dtype=torch.float64)
    mine = torch.autograd.grad(factored(weight, a, b, 0.7, decomposition), (a, b), upstream)
    plain = torch.autograd.grad(naive(weight, a, b, 0.7, decomposition), (a, b), upstream)
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("decomposition", ["norm", "projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_exactly_one_with_a_gradient(decomposition, dtype):
    weight, a, _ = (t.to(dtype) for t in parts(6, 8, 2, 1))
    b = torch.zeros(6, 2, requires_grad=True)
    scale = low_rank_scale(weight_product(weight, a), a, b, weight.float().norm(dim=1), 2.0, decomposition)
    assert torch.equal(scale, torch.ones(6))
    scale.sum().backward()
    assert (b.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("decomposition", ["norm", "projection"])
@pytest.mark.parametrize("size", [0.0, 1e-170, 1e-23, 1e-6, 1e-3])
def test_a_nearly_dead_row_is_measured_against_the_floor(size, decomposition):
    weight, a, b = parts(5, 5, 2, 2)
    weight[1] *= size / weight[1].norm()
    a.requires_grad_()
    b.requires_grad_()
    scale = factored(weight, a, b, 1.0, decomposition)
    floor, change = 0.1 * weight.norm(dim=1).median(), (b @ a)[1].detach()
    if decomposition == "norm":
        gained = (weight[1] + change).square().sum() - weight[1].square().sum()
        expected = (1 + gained / floor**2).sqrt()
    else:
        expected = 1 + (change * weight[1]).sum() / floor**2
    torch.testing.assert_close(scale[1].detach(), expected)
    torch.testing.assert_close(dense_scale((b @ a).detach(), weight, decomposition)[1], expected)
    assert 0.5 < expected < change.norm() / floor + 1.1
    scale.sum().backward()
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(scale[others].detach(), naive(weight, a, b, 1.0, decomposition)[others].detach())


def test_scales_are_continuous_in_a_row_that_dies():
    weight, a, b = parts(5, 5, 2, 2)
    row = weight[1] / weight[1].norm()
    found = []
    for size in (0.1 * weight.norm(dim=1).median()) * torch.logspace(0.1, -30, 200, dtype=torch.float64):
        weight[1] = row * size
        found.append(factored(weight, a, b * 0.1, 1.0, "norm")[1])
    weight[1] = 0
    found.append(factored(weight, a, b * 0.1, 1.0, "norm")[1])
    steps = torch.stack(found).diff().abs()
    assert steps.max() < 1
    assert steps[-1] < 1e-12


def test_a_layer_of_zeros_has_scale_one():
    weight, a, b = parts(4, 5, 2, 2)
    scale = factored(weight * 0, a, b, 1.0, "norm")
    assert torch.equal(scale, torch.ones_like(scale))


def test_an_adapter_that_cancels_the_row_has_scale_zero_and_a_finite_gradient():
    weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    a, b = weight.clone().requires_grad_(), torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    scale = factored(weight, a, b, 1.0, "norm")
    assert scale.item() < 1e-6
    scale.sum().backward()
    assert torch.isfinite(a.grad).all()
    assert torch.isfinite(b.grad).all()


def test_a_reference_norm_counts_as_one():
    """As after PiSSA: the adapter holds what the weight has lost, and the scale is that of their sum."""
    whole, a, b = parts(5, 6, 2, 3)
    rest = whole - b @ a
    scale = low_rank_scale(weight_product(rest, a), a, b, rest.norm(dim=1), 1.0, reference=whole.norm(dim=1))
    torch.testing.assert_close(scale, torch.ones(5, dtype=torch.float64))
    with pytest.raises(SanError, match="decomposition='norm'"):
        low_rank_scale(weight_product(rest, a), a, b, rest.norm(dim=1), 1.0, "projection", whole.norm(dim=1))


def test_an_unknown_decomposition():
    weight, a, b = parts(2, 3, 1, 0)
    with pytest.raises(SanError, match="'angle'; choose from norm, projection, feature"):
        factored(weight, a, b, 1.0, "angle")


def test_the_feature_scale_is_a_least_squares_fit_of_outputs():
    """Inputs with orthogonal channels, so that their second moments are diagonal, in float64."""
    weight, a, b = parts(5, 6, 2, 4)
    spread = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    inputs = torch.linalg.qr(parts(40, 6, 1, 5)[0]).Q * spread
    moments = inputs.square().mean(0)
    frozen, adapted = inputs @ weight.T, inputs @ (weight + 0.7 * b @ a).T
    expected = (frozen * adapted).sum(0) / frozen.square().sum(0)
    norm = (weight.square() @ moments).sqrt()
    found = low_rank_scale(weight_product(weight, a * moments), a, b, norm, 0.7, "feature")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dense_scale(0.7 * b @ a, weight, "feature", moments), expected)
    assert not torch.allclose(factored(weight, a, b, 0.7, "projection"), expected, rtol=0.1)


def test_feature_scales_of_several_layers_together():
    torch.manual_seed(0)
    weights = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    moments = torch.rand(3, 5, dtype=torch.float64)
    down = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in weights]
    up = [torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in weights]
    norms = torch.stack([(w.square() @ m).sqrt() for w, m in zip(weights, moments, strict=True)])
    inverse = floored(norms).square().reciprocal()

    def together(*given: Tensor) -> Tensor:
        unpack = [lambda w=w: w for w in weights]
        return low_rank_scales(unpack, inverse, 0.7, "feature", None, given[:3], given[3:], moments)

    each = [
        low_rank_scale(weight_product(w, a * m), a, b, n, 0.7, "feature")
        for w, m, n, a, b in zip(weights, moments, norms, down, up, strict=True)
    ]
    torch.testing.assert_close(together(*down, *up), torch.stack(each))
    assert torch.autograd.gradcheck(together, (*down, *up))
    assert torch.autograd.gradgradcheck(together, (*down, *up))


class Allocations(TorchDispatchMode):
    """Records the sizes of all tensors that operations make; views of the inputs are none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("decomposition", ["norm", "projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_weight_is_made(decomposition, dtype):
    out, size, rank = 2048, 512, 4
    weight = torch.randn(out, size).to(dtype)
    a, b = torch.randn(rank, size, requires_grad=True), torch.randn(out, rank, requires_grad=True)
    norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    with Allocations() as seen:
        scale = low_rank_scale(weight_product(weight, a), a, b, norm, 1.0, decomposition)
        scale.sum().backward()
    assert a.grad is not None
    assert seen.largest <= max(CHUNK["cpu"], (out + size) * rank) < out * size
    plain = Allocations()
    with plain:
        naive(weight.float(), a, b, 1.0, decomposition)
    assert plain.largest == out * size, "the record does see a temporary of that size"


def test_half_precision_weights_are_multiplied_in_float32():
    weight = torch.randn(3 * CHUNK["cpu"] // 64 + 5, 64).bfloat16()
    a = torch.randn(4, 64, requires_grad=True)
    product = weight_product(weight, a)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, weight.float() @ a.t())
    (mine,) = torch.autograd.grad(product.square().sum(), a)
    (plain,) = torch.autograd.grad((weight.float() @ a.t()).square().sum(), a)
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-3)


def test_a_gpu_is_given_few_large_parts():
    """Those of a LLaMA-3-8B: what is launched for a layer counts more than what it computes, if parts are small."""
    for rows, columns in ((14336, 4096), (4096, 14336), (1024, 4096), (1, 2**25)):
        weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
        assert len(weight.split(rows_at_once(weight))) <= 4
    assert rows_at_once(torch.empty(14336, 4096)) == 64


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_dense_layer_and_its_adapter_in_one_pass(bias, dropped):
    torch.manual_seed(0)

    def draw(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)

    x, a, b = draw(2, 3, 5), draw(2, 5), draw(4, 2)
    weight, shift = draw(4, 5, grad=False), draw(4, grad=False) if bias else None

    def one(x, a, b, *rest):
        return adapted_linear(x, weight, shift, a, b, 0.7, *rest)

    def plain(x, a, b, *rest):
        read = rest[0] if rest else x
        return torch.nn.functional.linear(x, weight, shift) + 0.7 * read @ a.t() @ b.t()

    inputs = (x, a, b, draw(2, 3, 5)) if dropped else (x, a, b)
    torch.testing.assert_close(one(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(one, inputs)
    upstream = torch.randn(2, 3, 4, dtype=torch.float64)
    grads = [torch.autograd.grad(f(*inputs), inputs, upstream) for f in (one, plain)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_rows_and_an_output_that_is_overwritten():
    weight, a, b = torch.randn(4, 5), torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    assert adapted_linear(torch.randn(0, 5), weight, None, a, b).shape == (0, 4)
    adapted_linear(torch.randn(3, 5), weight, None, a, b).relu_().sum().backward()
    assert a.grad.shape == (2, 5)


@pytest.mark.parametrize("decomposition", ["norm", "projection"])
@pytest.mark.parametrize("moved", [False, True])
def test_scales_of_several_layers_together(decomposition, moved):
    """Values and gradients of the stacked node against those of each layer by itself."""
    if moved and decomposition == "projection":
        pytest.skip("a reference goes with norm")
    torch.manual_seed(0)
    weights = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    weights[1][2] = 0
    down = [torch.randn(2, 5, dtype=torch.float64, requires_grad=True) for _ in weights]
    up = [torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in weights]
    norms = [w.norm(dim=1) for w in weights]
    references = [n * 1.5 for n in norms] if moved else norms
    inverse = floored(torch.stack(references)).square().reciprocal()
    start = 1 + (torch.stack(norms).square() - torch.stack(references).square()) * inverse if moved else None
    mine = low_rank_scales([lambda w=w: w for w in weights], inverse, 0.7, decomposition, start, down, up)
    upstream = torch.randn_like(mine)
    grads = torch.autograd.grad((mine * upstream).sum(), [*down, *up])
    each = torch.stack(
        [
            low_rank_scale(weight_product(w, a), a, b, n, 0.7, decomposition, r if moved else None)
            for w, a, b, n, r in zip(weights, down, up, norms, references, strict=True)
        ]
    )
    torch.testing.assert_close(mine, each)
    expected = torch.autograd.grad((each * upstream).sum(), [*down, *up])
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_high_and_low_halves_of_the_rows(monkeypatch):
    """What a GPU does with a weight in bfloat16: exact to float32's rounding, the weight as it is."""
    seen = []

    def multiply(a, b):
        seen.append((a.dtype, b.dtype))
        return a.float() @ b.float()

    monkeypatch.setattr(products, "multiply_wide", multiply)
    monkeypatch.setattr(products, "_splits", lambda weight, other: True)
    weight, rows, columns = torch.randn(40, 30).bfloat16(), torch.randn(3, 30), torch.randn(40, 3)
    torch.testing.assert_close(products.times_rows(weight, rows), weight.float() @ rows.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        products.times_columns(weight, columns), columns.t() @ weight.float(), rtol=1e-4, atol=1e-4
    )
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}

"""Laws of folding, in float64: a folded layer is the scaled layer, for every shape, stride, padding and group count."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from san_peft.functional import channels_of, fold, propagate, scale_input, scale_output

KINDS = ("linear", "conv1d", "conv2d", "conv3d", "transposed1d", "transposed2d", "transposed3d", "gpt2")


class _Conv1D(nn.Module):
    """GPT-2's layer: a dense layer whose weight is (in, out)."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, out)), nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@st.composite
def cases(draw):
    """Draws a layer, an input for it and the seed of its vectors."""
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 2**31))
    groups = draw(st.integers(1, 3)) if kind not in ("linear", "gpt2") else 1
    size, out = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    if draw(st.booleans()) and groups > 1:
        size = out = groups  # depthwise
    bias = draw(st.booleans())
    torch.manual_seed(seed)
    spatial = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": bias,
    }
    if kind == "linear":
        layer, x = nn.Linear(size, out, bias=bias), torch.randn(2, 3, size)
    elif kind == "gpt2":
        layer, x = _Conv1D(size, out), torch.randn(2, 3, size)
    else:
        axes = int(kind[-2])
        cls = {
            "conv1d": nn.Conv1d,
            "conv2d": nn.Conv2d,
            "conv3d": nn.Conv3d,
            "transposed1d": nn.ConvTranspose1d,
            "transposed2d": nn.ConvTranspose2d,
            "transposed3d": nn.ConvTranspose3d,
        }[kind]
        layer, x = cls(size, out, **spatial), torch.randn(2, size, *(7,) * axes)
    return kind, layer.double().requires_grad_(False), x.double(), groups, seed


def _vectors(out: int, size: int, zero: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    scale, input_scale, shift = (torch.randn(n, dtype=torch.float64) for n in (out, size, out))
    if not zero:
        scale, input_scale = (v.sign() * (v.abs() + 0.1) for v in (scale, input_scale))
    return scale, input_scale, shift


@given(cases(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_a_folded_layer_is_the_scaled_layer(case, with_shift):
    kind, layer, x, groups, _ = case
    dim, transposed = (-1 if kind in ("linear", "gpt2") else 1), kind.startswith(("trans", "gpt2"))
    out, size = channels_of(layer.weight, groups, transposed)
    scale, input_scale, shift = _vectors(out, size, zero=True)
    shift = shift if with_shift else None
    expected = scale_output(layer(scale_input(x, input_scale, dim)), scale, shift, dim)

    weight, bias = fold(layer.weight, layer.bias, scale, input_scale, shift, groups=groups, transposed=transposed)
    layer.weight, layer.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)

    torch.testing.assert_close(layer(x), expected)


@given(cases())
@settings(deadline=None, max_examples=50)
def test_ones_and_zeros_are_the_identity(case):
    kind, layer, x, groups, _ = case
    transposed, dim = kind.startswith(("trans", "gpt2")), -1 if kind in ("linear", "gpt2") else 1
    out, size = channels_of(layer.weight, groups, transposed)
    ones, zeros = torch.ones(out), torch.zeros(out)

    weight, bias = fold(layer.weight, layer.bias, ones, torch.ones(size), zeros, groups=groups, transposed=transposed)

    assert torch.equal(weight, layer.weight)
    assert torch.equal(bias, layer.bias if layer.bias is not None else zeros.double())
    assert torch.equal(scale_input(x, torch.ones(size), dim), x)
    y = layer(x)
    assert torch.equal(scale_output(y, ones, zeros, dim), y)


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_propagation_is_a_gather_with_ones(seed, source, size):
    torch.manual_seed(seed)
    scale, index = torch.rand(source, dtype=torch.float64) + 0.5, torch.randint(-1, source, (size,))

    assert torch.equal(propagate(scale, index, 0.0), torch.ones_like(index, dtype=torch.float64))
    torch.testing.assert_close(propagate(scale, index) * propagate(scale, index, -1), torch.ones_like(index).double())
    assert propagate(scale, index).tolist() == [1.0 if i < 0 else scale[i].item() for i in index]

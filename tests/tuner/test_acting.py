"""Modules that read their layers' weights past the layers' forward pass: eval = train = merged."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.contract.nets import disturb
from torch import Tensor, nn
from torch.nn.functional import linear

from san_peft import SanConfig, SanError, SanLayer, trace

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LORA = {"inner": LoraConfig(r=2)}


class Encoder(nn.Module):
    """Torch's encoder with a head."""

    def __init__(self, layers: int = 2, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)
        self.stem, self.encoder = nn.Linear(6, 8), nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.stem(x), src_key_padding_mask=padding)[:, :2])


class Reader(nn.Module):
    """Multiplies with the weight of a layer that it does not call, as timm's BEiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).to(self.fc.weight.dtype)
        return self.head(torch.tanh(linear(x, self.fc.weight, self.fc.bias)))


def given() -> Tensor:
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def larger(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return net


def adapted(net: nn.Module, targets: Any, graph: Any = None, **options: Any) -> Any:
    net = larger(net.double()).eval()
    graph = trace(net, given()) if graph is None else graph
    reads = "fc" in targets or "out_proj" in targets  # the trace has not seen these called
    with pytest.warns(UserWarning, match="reads their weights directly") if reads else nullcontext():
        model = get_peft_model(net, SanConfig(target_modules=targets, propagation=graph, **options)).double()
    disturb(model)
    return model


def check_all_ways(model: Any, *args: Any) -> Tensor:
    """Eval without gradients, eval with them, training and merged give one output; returns it."""
    with model.disable_adapter(), torch.no_grad():
        frozen = model.eval()(*args)
    with torch.no_grad():
        fast = model.eval()(*args)
    slow = model(*args)
    trained = model.train()(*args)
    torch.testing.assert_close(fast, slow.detach(), **CLOSE)
    torch.testing.assert_close(fast, trained.detach(), **CLOSE)
    assert not torch.allclose(fast, frozen, rtol=1e-3)
    trained.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    other = copy.deepcopy(model).eval()
    other.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(other(*args), fast, **CLOSE)
    other.unmerge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(other(*args), fast, rtol=0, atol=0)
        torch.testing.assert_close(other.merge_and_unload()(*args), fast, **CLOSE)
    return fast


TARGETS = {
    "feedforward": ["linear1", "linear2"],
    "first": ["linear1"],
    "output": ["out_proj"],
    "attention": ["self_attn"],
    "all": ["stem", "self_attn", "linear1", "linear2"],
}


@pytest.mark.parametrize("options", [{}, {"shift": True}, LORA], ids=["own", "shift", "lora"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_encoder_of_torch(targets, options, bias):
    if "inner" in options and targets in ("attention", "all"):
        pytest.skip("a host takes no attention")
    if not bias and "shift" in options and targets in ("attention", "all"):
        pytest.skip("a shift makes a bias, and torch's encoder then reads that of its norms, which have none")
    torch.manual_seed(0)
    model = adapted(Encoder(bias=bias), TARGETS[targets], **options)
    check_all_ways(model, given())


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("targets", ["feedforward", "attention"])
def test_padding_where_one_layer_is_adapted(targets, number):
    torch.manual_seed(0)
    names = [f"encoder.layers.{number}.{name}" for name in TARGETS[targets]]
    model = adapted(Encoder(), names)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 2 + [True] * 3])
    check_all_ways(model, given(), padding)


@pytest.mark.parametrize("options", [{}, LORA], ids=["own", "lora"])
def test_a_weight_that_is_read_by_a_function(options):
    torch.manual_seed(0)
    model = adapted(Reader(), ["stem", "fc"], **options)
    check_all_ways(model, given())


def test_gradients_are_those_of_a_layer_that_is_called():
    torch.manual_seed(0)
    read = adapted(Reader(), ["stem", "fc"])
    torch.manual_seed(0)
    called = adapted(Reader(), ["stem", "fc"])
    plain = called.base_model.model
    x = given()
    read(x).square().sum().backward()
    with called.base_model.scales.passing((), {}):
        out = plain.head(torch.tanh(plain.fc(plain.stem(x))))
    out.square().sum().backward()
    for (name, one), (_, other) in zip(read.named_parameters(), called.named_parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, **CLOSE, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    net = Encoder().to(dtype).eval()
    model = get_peft_model(
        net, SanConfig(target_modules=["self_attn", "linear1"], propagation=trace(net, given().to(dtype)))
    )
    x = given().to(dtype)
    with torch.no_grad():
        start = model.base_model.model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), start)
    disturb(model)
    out = model.train()(x)
    out.float().square().sum().backward()
    assert out.dtype == dtype
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_can_be_seen_and_what_cannot_be_done():
    torch.manual_seed(0)
    model = adapted(Reader(), ["stem", "fc"])
    layer: Any = model.base_model.model.fc
    weight, frozen = layer.weight, layer.get_base_layer().weight
    assert (weight.shape, weight.dtype, weight.device, weight.dim()) == (frozen.shape, frozen.dtype, frozen.device, 2)
    assert isinstance(weight, Tensor)
    assert "fc" in repr(weight)
    assert layer.bias is None
    for write in (lambda: weight.add_(2), lambda: weight.__setitem__(0, 1.0), lambda: weight.data.zero_()):
        with pytest.raises(SanError, match="cannot be written"):
            write()
    with pytest.raises(SanError, match="memory address"):
        weight.data_ptr()
    torch.testing.assert_close(weight.detach() * 1, weight.data + 0)
    with model.disable_adapter():
        assert layer.weight is frozen
    model.merge_adapter()
    assert layer.weight is frozen


class Kernel(torch.autograd.Function):
    """A fused operation of its own, as Mamba's are: autograd does not see what it reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def test_an_operation_through_which_no_gradient_would_come_is_refused():
    torch.manual_seed(0)
    model = adapted(Reader(), ["stem", "fc"])
    layer: Any = model.base_model.model.fc
    x = given() @ torch.ones(6, 8, dtype=torch.float64)
    with pytest.raises(SanError, match="no gradient would reach the scales"):
        Kernel.apply(x, layer.weight)
    with torch.no_grad():
        torch.testing.assert_close(Kernel.apply(x, layer.weight), layer(x), **CLOSE)


def test_a_mixed_batch_is_refused():
    torch.manual_seed(0)
    model = adapted(Reader(), ["fc"]).eval()
    with pytest.raises(SanError, match="adapter_names"):
        model(given(), adapter_names=["default"] * 3)


def test_hosts_that_cannot_act_there_say_so():
    torch.manual_seed(0)
    model = adapted(Reader(), ["stem", "fc"], inner=LoraConfig(r=2, use_dora=True))
    with pytest.raises(SanError, match="LORA host"):
        model(given())
    torch.manual_seed(0)
    model = adapted(Reader(), ["stem", "fc"], inner=LoraConfig(r=2, lora_dropout=0.5)).train()
    with pytest.raises(SanError, match="dropout"):
        model(given())


def test_compiled():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = adapted(Encoder(), TARGETS["all"]).eval()
    with torch.no_grad():
        expected = model(given())
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(given()), expected, **CLOSE)


def test_layers_by_which_nothing_is_read_cost_nothing():
    torch.manual_seed(0)
    model = adapted(Encoder(), ["linear1"])
    layers = [m for m in model.modules() if isinstance(m, SanLayer)]
    for layer in layers:
        layer.acting_tensors = None  # what gives the values is not called for a dtype
        assert layer.weight.dtype == torch.float64


@pytest.mark.parametrize("inplace", [Tensor.mul_, Tensor.div_])
def test_a_weight_that_is_multiplied_by_a_number(inplace):
    """RWKV does so at the first pass in eval mode."""
    model, x = adapted(Reader(), ["fc"]), torch.randn(3, 6, dtype=torch.float64)
    layer = model.base_model.model.fc
    frozen, before = layer.get_base_layer().weight.clone(), layer.weight.clone()
    with torch.no_grad():
        assert inplace(layer.weight, 2.0) is not None
    torch.testing.assert_close(layer.get_base_layer().weight, inplace(frozen.detach(), 2.0))
    torch.testing.assert_close(layer.weight.clone(), inplace(before.detach(), 2.0))
    assert model(x).isfinite().all()
    with pytest.raises(SanError, match=r"cannot be written"):
        layer.weight.add_(1.0)
    with_shift = adapted(Reader(), ["fc"], shift=True)
    with pytest.raises(SanError, match=r"cannot be written"), torch.no_grad():
        inplace(with_shift.base_model.model.fc.weight, 2.0)

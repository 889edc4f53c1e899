"""Laws of placement, in float64: wherever scales act, in norms, at outputs or at inputs, it is one function."""

from __future__ import annotations

import itertools
import random as python_random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.contract.nets import disturb
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from san_peft import SanConfig, trace

NORMS = (nn.LayerNorm, nn.RMSNorm, LlamaRMSNorm)
SEEDS = st.integers(0, 2**31)


class Block(nn.Module):
    """One of several blocks of `width` channels, as its `kind` says."""

    def __init__(self, kind: str, width: int, draw: python_random.Random) -> None:
        super().__init__()
        self.kind, self.shift, bias = kind, draw.randrange(width), draw.random() < 0.5
        self.norm, hidden = draw.choice(NORMS)(width), 2 * draw.randint(1, 4)
        self.residual = draw.random() < 0.5
        self.a, self.b = (nn.Linear(width, hidden, bias=bias) for _ in range(2))
        self.down, self.square = nn.Linear(hidden, width), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        if self.kind == "activated":
            y = self.down(F.gelu(self.a(normal)))
        elif self.kind == "gated":
            y = self.down(F.silu(self.a(normal)) * self.b(normal))
        elif self.kind == "chain":
            y = self.down(self.a(normal))
        elif self.kind == "sum":
            y = self.down(F.relu(self.a(normal) + self.b(normal)))
        elif self.kind == "attention":
            tokens = (self.a(normal) @ self.b(normal).transpose(-1, -2)).softmax(-1)
            y = self.down(tokens @ self.a(normal))
        elif self.kind == "rolled":
            y = self.square(normal.roll(self.shift, -1))
        elif self.kind == "before":
            y = self.square(x) + normal
        else:
            y = self.square(normal)
        return x + y if self.residual else y


KINDS = ("activated", "gated", "chain", "sum", "attention", "rolled", "before", "dense")


def random_net(seed: int) -> tuple[nn.Module, Tensor]:
    """A net of blocks drawn by a seed, and an input for it."""
    torch.manual_seed(seed)
    draw = python_random.Random(seed)
    size, width = draw.randint(2, 6), 2 * draw.randint(1, 5)
    blocks = [Block(draw.choice(KINDS), width, draw) for _ in range(draw.randint(1, 4))]
    net = nn.Sequential(nn.Linear(size, width), *blocks, draw.choice(NORMS)(width), nn.Linear(width, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2)
    return net.eval(), torch.randn(3, 5, size)


def adapted(seed: int, host: str, dtype: torch.dtype, **options: object):
    net, x = random_net(seed)
    graph = trace(net, x)
    if host == "own":
        options = {"shift": True, **options}
    else:
        options = {"inner": LoraConfig(r=2, use_dora=host == "dora"), **options}
    targets = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    model = get_peft_model(net, SanConfig(target_modules=targets, propagation=graph, **options))
    return model.to(dtype), x.to(dtype)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and all trained parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    (y.sin() * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **grads}


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, host=st.sampled_from(["own", "lora", "dora"]), training=st.booleans())
def test_every_placement_is_the_same_function(seed, host, training):
    model, x = adapted(seed, host, torch.float64)
    disturb(model, seed=seed % 1000, size=0.3)
    model.train(training)
    found = results(model, x)
    scales = model.base_model.scales
    scales.placements["default"] = dict.fromkeys(scales.placements["default"], "input")
    scales.changed()
    expected = results(model, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        size = max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9 * size, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, host=st.sampled_from(["own", "lora"]), training=st.booleans())
def test_the_start_is_the_frozen_model_bit_for_bit(seed, host, training):
    net, x = random_net(seed)
    model, _ = adapted(seed, host, torch.float32)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(model.train(training)(x), expected)
    assert torch.equal(model(x).detach(), expected), "where gradients are wanted, other operations run"


def test_the_nets_have_all_places():
    places = [adapted(seed, "own", torch.float32)[0].base_model.scales.placements["default"] for seed in range(8)]
    kinds = {place.partition(":")[0] for place in itertools.chain(*(found.values() for found in places))}
    assert kinds == {"norm", "output", "input"}

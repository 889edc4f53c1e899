"""What users do with autograd: operations in place, hooks, transformations, odd shapes and types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import disturb
from tests.tuner.hosted import host_parameters, layers_of
from tests.tuner.passes import CASES, CLOSE, adapted, alone, larger, total
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from san_peft import ChannelMap, Edge, PropagationGraph, SanConfig, trace

SOME = ["own", "shift", "lora", "feature", "dora", "all"]


class Chain(nn.Module):
    """Convolutions or dense layers, with an operation after the first two that may be in place."""

    def __init__(self, after: Callable[[Tensor], Tensor], images: bool) -> None:
        super().__init__()
        self.after = after
        sizes = [(6, 8), (8, 8), (8, 6)]
        layer = (lambda i, o: nn.Conv2d(i, o, 3, padding=1)) if images else nn.Linear
        self.first, self.second, self.third = (layer(i, o) for i, o in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.after(self.second(self.after(self.first(x)))))


def add_self(x: Tensor) -> Tensor:
    x += x.detach().cos()
    return x


def divide(x: Tensor) -> Tensor:
    x /= 2
    return x


def through_a_view(x: Tensor) -> Tensor:
    view = x.flatten(0, 1)
    view.mul_(0.5).add_(1)
    return x


def part(x: Tensor) -> Tensor:
    x[:1].mul_(3)
    return x


def replaced(x: Tensor) -> Tensor:
    return torch.cat([x[:1] * 3, x[1:]])


OPERATIONS = {
    "relu": (nn.ReLU(inplace=True), nn.ReLU()),
    "silu": (nn.SiLU(inplace=True), nn.SiLU()),
    "add": (add_self, lambda x: x + x.detach().cos()),
    "divide": (divide, lambda x: x / 2),
    "view": (through_a_view, lambda x: x * 0.5 + 1),
    "part": (part, replaced),
}
NAMES = ["first", "second", "third"]


def chain(operation: Callable, images: bool, case: str, graph: Any = None) -> PeftModel:
    torch.manual_seed(0)
    net = larger(Chain(operation, images).double())
    graph = trace(net, given(images)) if graph is None else graph
    model = get_peft_model(net, SanConfig(propagation=graph, target_modules=NAMES, **CASES[case])).double()
    disturb(model)
    return model


def given(images: bool) -> Tensor:
    shape = (2, 6, 4, 4) if images else (2, 3, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(x)
    total(out).backward()
    return out.detach(), {n: p.grad for n, p in host_parameters(model).items()}


BY_HAND = PropagationGraph(
    (Edge("first", "second", ChannelMap.identity(8)), Edge("second", "third", ChannelMap.identity(8)))
)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("images", [False, True], ids=["dense", "images"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_in_place(operation, images, case, tmp_path):
    inside, outside = OPERATIONS[operation]
    model, plain = (chain(one, images, case, BY_HAND) for one in (inside, outside))
    expected = run(plain, given(images))
    torch.testing.assert_close(run(model, given(images)), expected, **CLOSE)
    with alone(model):
        torch.testing.assert_close(run(model, given(images)), expected, **CLOSE)
    traced = chain(inside, images, case)
    first = run(traced, given(images))
    with alone(traced):
        torch.testing.assert_close(run(traced, given(images)), first, **CLOSE)
    traced.save_pretrained(tmp_path)
    torch.manual_seed(0)
    net = larger(Chain(inside, images).double())
    again = PeftModel.from_pretrained(net, tmp_path, is_trainable=True, autocast_adapter_dtype=False).double()
    torch.testing.assert_close(run(again, given(images)), first, **CLOSE)
    assert again.peft_config["default"].placement == traced.peft_config["default"].placement


# ---------------------------------------------------------------------- sizes and types


@pytest.mark.parametrize("case", SOME)
def test_no_rows_and_one_axis(case):
    model = chain(nn.Tanh(), False, case)
    for shape in ((0, 6), (2, 0, 6), (6,)):
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        out = model(x)
        assert out.shape == (*shape[:-1], 6)
        out.sum().backward()
        assert x.grad.shape == shape
        assert all(p.grad is not None for p in host_parameters(model).values())
        with torch.no_grad():
            torch.testing.assert_close(model(x), out.detach())
    one = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(model(one), model(one[None])[0], **CLOSE)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("inside", [False, True])
def test_backward_in_another_state_of_autocast_than_forward(inside, case):
    model = chain(nn.Tanh(), False, case).float()
    x = given(False).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        loss = total(model(x).float())
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        loss.backward()
    found = {n: p.grad for n, p in host_parameters(model).items()}
    _, expected = run(model, x)
    for name, gradient in found.items():
        tolerance = 1e-2 if inside else 0.1
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-6, name
        assert gradient.dtype == torch.float32


# ---------------------------------------------------------------------- transformations


@pytest.mark.parametrize("case", SOME)
def test_transformations(case):
    model = chain(nn.Tanh(), False, case)
    x, parameters = given(False), {n: p.detach() for n, p in host_parameters(model).items()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).cos().sum()

    def gradient(x: Tensor) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        model(x).cos().sum().backward()
        return {n: p.grad for n, p in host_parameters(model).items()}

    expected = gradient(x)
    torch.testing.assert_close(torch.func.grad(loss)(parameters, x), expected, **CLOSE)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for row in range(len(x)):
        torch.testing.assert_close({n: g[row] for n, g in each.items()}, gradient(x[row]), **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x), model(x), **CLOSE)
    tangent = torch.ones_like(x)
    _, forward = torch.func.jvp(model, (x,), (tangent,))
    step = 1e-6
    with torch.no_grad():
        numeric = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(forward, numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
def test_a_language_model_under_transformations(case):
    model = adapted(**CASES[case])
    parameters = {n: p.detach() for n, p in host_parameters(model).items()}
    embedded = model.get_input_embeddings()(torch.arange(6)[None]).detach()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return total(torch.func.functional_call(model, parameters, kwargs={"inputs_embeds": embedded}).logits)

    total(model(inputs_embeds=embedded).logits).backward()
    expected = {n: p.grad for n, p in host_parameters(model).items()}
    torch.testing.assert_close(torch.func.grad(loss)(parameters), expected, **CLOSE)


# ---------------------------------------------------------------------- hooks


@pytest.mark.parametrize("case", ["lora", "dora", "all"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_on_the_parts_of_a_host(kind, case):
    model = chain(nn.Tanh(), False, case)
    _, expected = run(model, given(False))
    host = layers_of(model)["second"].host
    parts = {"A": host.lora_A["default"], "B": host.lora_B["default"], "base": host.base_layer, "host": host}
    seen = []
    for name, module in parts.items():
        if kind == "forward":
            module.register_forward_hook(lambda m, args, out, name=name: seen.append(name))
        else:
            module.register_full_backward_hook(lambda m, grad_in, grad_out, name=name: seen.append(name))
    _, found = run(model, given(False))
    assert set(seen) >= set(parts)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("trained", [False, True])
def test_outputs_that_a_global_hook_collects_stay_as_they_were(trained, case):
    model = chain(nn.Tanh(), False, case)
    expected = model(given(False)).detach()
    seen = []
    handle = register_module_forward_hook(lambda module, args, out: seen.append((type(module), out, out.clone())))
    try:
        with torch.set_grad_enabled(trained):
            out = model(given(False))
    finally:
        handle.remove()
    assert len(seen) > 6
    for kind, value, copy in seen:
        assert torch.equal(value, copy), kind
    torch.testing.assert_close(out.detach(), expected, **CLOSE)


@pytest.mark.parametrize("inner", [None, LoraConfig(r=2)])
def test_a_graph_of_a_model_with_other_activations(inner):
    """A graph that was traced where nothing is overwritten, put on a model whose activations do so, trains as well."""

    def net(act: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 2))

    x = torch.randn(3, 8)
    graph = trace(net(nn.ReLU()), x)
    grads = []
    for inplace in (False, True):
        model = get_peft_model(net(nn.ReLU(inplace)), SanConfig(propagation=graph, inner=inner, target_modules=["0"]))
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[0], grads[1])

"""Habits of users that LoRA allows: gradient penalties, selective checkpointing, hooks of all kinds, tracing."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from tests.contract.nets import KINDS, disturb
from tests.contract.nets import adapted as contract_model
from tests.tuner.hosted import host_parameters, layers_of
from tests.tuner.passes import CASES, CLOSE, adapted, alone, batch, total
from tests.tuner.test_autograd import chain, given, run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

SOME = ["own", "shift", "lora", "feature", "dora", "all"]


# ---------------------------------------------------------------------- gradients of gradients


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        (gradient,) = torch.autograd.grad(total(model(x).cos()), x, create_graph=True)
    return gradient.square().sum()


def check_penalty(model: nn.Module, x: Tensor) -> None:
    """The gradient of a gradient penalty is the numeric derivative along a direction."""
    parameters = list(host_parameters(model).values())
    generator = torch.Generator().manual_seed(4)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    model.zero_grad(set_to_none=True)
    penalty(model, x).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
        values.append(penalty(model, x).item())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=sign * step)
    numeric = (values[0] - values[1]) / (2 * step)
    assert abs(float(slope) - numeric) <= 1e-5 * abs(numeric) + 1e-9, (float(slope), numeric)


@pytest.mark.parametrize("images", [False, True], ids=["dense", "images"])
@pytest.mark.parametrize("case", [case for case in SOME if case != "dora"])
def test_gradient_penalties(case, images):
    model = chain(nn.Tanh(), images, case)
    check_penalty(model, given(images))
    with alone(model):
        check_penalty(model, given(images))


@pytest.mark.parametrize("case", ["own", "lora"])
def test_gradient_penalties_near_zero(case):
    model = chain(nn.Tanh(), False, case)
    if case == "own":
        for layer in layers_of(model).values():
            layer.san_scale["default"].weight.data[:2] = torch.tensor([-1.0, -0.995])
    check_penalty(model, given(False))


@pytest.mark.parametrize("images", [False, True], ids=["dense", "images"])
def test_a_gradient_penalty_of_dora_is_that_of_peft(images):
    """DoRA holds the norms of its rows constant, so a numeric derivative is another."""
    model, found = chain(nn.Tanh(), images, "dora"), []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        penalty(model, given(images)).backward()
        found.append({n: p.grad for n, p in host_parameters(model).items()})
        for layer in layers_of(model).values():  # who listens gets PEFT's own forward pass
            layer.host.register_forward_hook(lambda module, args, out: None)
    torch.testing.assert_close(found[0], found[1], **CLOSE)


@pytest.mark.parametrize("case", ["own", "lora"])
def test_second_derivatives_through_norms(case):
    """Layer norms with a scale in them; the others are in test_norms.py."""
    check_penalty(adapted("timm-vit", **CASES[case]), batch("timm-vit")["x"][:1])


# ---------------------------------------------------------------------- checkpointing


def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.convolution.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("images", [False, True], ids=["dense", "images"])
@pytest.mark.parametrize("case", SOME)
def test_selective_checkpointing(case, images):
    model = chain(nn.Tanh(), images, case)
    x = given(images)
    expected = run(model, x)

    def selective(x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    model.zero_grad(set_to_none=True)
    out = selective(x)
    total(out).backward()
    torch.testing.assert_close(out.detach(), expected[0], **CLOSE)
    torch.testing.assert_close({n: p.grad for n, p in host_parameters(model).items()}, expected[1], **CLOSE)


# ---------------------------------------------------------------------- hooks


@pytest.mark.parametrize("case", SOME)
def test_full_backward_hooks_on_every_module(case):
    model = chain(nn.Tanh(), False, case)
    expected = run(model, given(False))
    seen: set[str] = set()
    for name, module in model.named_modules():
        if not list(module.children()) and "san_" not in name and "dropout" not in name:
            module.register_full_backward_hook(lambda m, gi, go, name=name: seen.add(name) and None)
        elif type(module).__name__ == "SanLayer":
            module.register_full_backward_pre_hook(lambda m, go, name=name: seen.add(name) and None)
            module.register_full_backward_hook(lambda m, gi, go, name=name: seen.add(f"{name}!") and None)
    x = given(False).requires_grad_()
    found = run(model, x)
    torch.testing.assert_close(found, expected, **CLOSE)
    layers = [n for n, m in model.named_modules() if type(m).__name__ == "SanLayer"]
    assert len(layers) == 3
    assert {*layers, *(f"{n}!" for n in layers)} <= seen
    for name in layers:
        assert any(other.startswith(f"{name}.base_layer") for other in seen), name


@pytest.mark.parametrize("case", SOME)
def test_forward_hooks_with_keywords_and_hooks_that_change_things(case):
    model = chain(nn.Tanh(), False, case)
    expected = run(model, given(False))
    layer = layers_of(model)["second"]
    calls: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda m, a, k: calls.append("pre") or (a, k), with_kwargs=True),
        layer.register_forward_hook(lambda m, a, k, out: calls.append("post"), with_kwargs=True),
        layer.base_layer.register_forward_hook(lambda m, a, k, out: calls.append("inner"), with_kwargs=True),
        model.register_forward_pre_hook(lambda m, a, k: calls.append("model") or (a, k), with_kwargs=True),
    ]
    torch.testing.assert_close(run(model, given(False)), expected, **CLOSE)
    assert calls == ["model", "pre", "inner", "post"]
    for handle in handles:
        handle.remove()
    base = layer.get_base_layer()
    handle = base.register_forward_hook(lambda m, a, out: out * 0)
    with torch.no_grad():
        zeroed = layer(given(False) @ torch.ones(6, 8, dtype=torch.float64))
    handle.remove()
    with torch.no_grad():
        plain = layer(given(False) @ torch.ones(6, 8, dtype=torch.float64))
    assert not torch.allclose(zeroed, plain)


@pytest.mark.parametrize("case", SOME)
def test_global_hooks(case):
    model = chain(nn.Tanh(), False, case)
    expected = run(model, given(False))
    seen: list[str] = []
    handles = [
        hooks.register_module_forward_pre_hook(lambda m, a: seen.append(f"pre {type(m).__name__}")),
        hooks.register_module_forward_hook(lambda m, a, out: seen.append(f"post {type(m).__name__}")),
        hooks.register_module_full_backward_hook(lambda m, gi, go: seen.append(f"back {type(m).__name__}")),
    ]
    try:
        found = run(model, given(False).requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(found, expected, **CLOSE)
    for kind in ("pre", "post", "back"):
        assert seen.count(f"{kind} SanLayer") == 3
        assert seen.count(f"{kind} Linear") >= 3


@pytest.mark.parametrize("case", SOME)
def test_saved_tensors_that_are_packed(case):
    model = chain(nn.Tanh(), False, case)
    expected = run(model, given(False))
    count = 0

    def pack(tensor: Tensor) -> Any:
        nonlocal count
        count += 1
        return tensor.numpy().copy() if not tensor.requires_grad else tensor.detach().numpy().copy()

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        found = run(model, given(False))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert count
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(run(model, given(False)), expected, **CLOSE)


# ---------------------------------------------------------------------- tracing and shapes


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("case", SOME)
def test_traced_and_saved(case):
    model = chain(nn.Tanh(), False, case).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (given(False),), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        torch.testing.assert_close(torch.jit.load(file)(given(False)), model(given(False)), **CLOSE)


@pytest.mark.parametrize("name", ["transposed", "conv3d", "attention", "embedding", "conv3d-lora", "conv3d-dora"])
def test_transformations_of_layers_of_every_kind(name):
    kind = KINDS[name]
    model = contract_model(kind, modules_to_save=None).double()
    x = kind.input(torch.float64)
    parameters = {n: p.detach() for n, p in host_parameters(model).items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return total(torch.func.functional_call(model, parameters, (x,)))

    total(model(x)).backward()
    expected = {n: p.grad for n, p in host_parameters(model).items()}
    torch.testing.assert_close(torch.func.grad(loss)(parameters), expected, **CLOSE)
    if not kind.tokens and not name.endswith("dora"):
        check_penalty(model, x)


@pytest.mark.parametrize("name", ["transposed", "conv3d", "attention", "embedding"])
def test_a_pass_equals_layers_by_themselves(name):
    kind = KINDS[name]
    model = contract_model(kind, shift=True, modules_to_save=None).double()
    disturb(model, seed=3)
    x = kind.input(torch.float64)
    expected = run(model.train(), x)
    with alone(model):
        torch.testing.assert_close(run(model, x), expected, **CLOSE)
    torch.testing.assert_close(model.eval()(x).detach(), expected[0], **CLOSE)
    if name not in ("attention", "embedding"):
        empty = model(x[:0])
        assert empty.shape == (0, 3)

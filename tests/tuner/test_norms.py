"""Norms that multiply a scale into their output: by which formula, and that they stay what they are."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm.layers
import torch
from peft import PeftModel, get_peft_model
from tests.contract.nets import disturb
from tests.golden.models import MODELS
from tests.tuner.hosted import IDS
from tests.tuner.passes import CASES, CLOSE, adapted, alone, check_law, larger, output, step, total
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from san_peft import SanConfig, trace
from san_peft.functional import Factor
from san_peft.tuner.norms import ScaledNorm, bind, bound_to, channel_axis, find_form

SIZE = 6


class Own(nn.Module):
    """A norm of one's own, by a formula that no form has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True).clamp_min(1e-6) * self.weight


NORMS = {
    "llama": (LlamaRMSNorm, "rms_cast_first"),
    "t5": (T5LayerNorm, "rms_cast_first"),
    "gemma": (GemmaRMSNorm, "rms_offset"),
    "layer": (nn.LayerNorm, "layer_norm"),
    "layer-no-bias": (lambda n: nn.LayerNorm(n, bias=False), "layer_norm"),
    "rms": (lambda n: nn.RMSNorm(n, eps=1e-5), "rms_cast_last"),
    "rms-no-eps": (nn.RMSNorm, "rms_cast_last"),
    "timm-layer": (timm.layers.LayerNorm, "layer_norm"),
    "timm-images": (timm.layers.LayerNorm2d, "after"),
    "batch": (nn.BatchNorm2d, "after"),
    "own": (Own, "after"),
}
IMAGES = ("timm-images", "batch")


class Given:
    """Stands for the scales of a model, in a pass that gives every norm one factor."""

    def __init__(self, factor: Factor | None = None) -> None:
        self.factor = factor

    def of_norm(self, fqn: str) -> Factor | None:
        return self.factor


def norm_of(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    module = NORMS[kind][0](SIZE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if kind == "batch":
            module.running_mean.add_(0.3)
            module.running_var.mul_(1.7)
    return module.to(dtype).eval()


def given(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (4, SIZE, 3, 5) if kind in IMAGES else (4, 3, SIZE)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 + 0.5).to(dtype)


def scale_of(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-0.7, 1.9, SIZE, dtype=dtype)


def along(kind: str, scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1) if kind in IMAGES else scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_forms(kind, dtype):
    form = find_form(norm_of(kind, dtype))
    if kind.startswith("rms"):  # whether torch's own is that formula bit for bit is up to torch
        assert form in ("after", "rms_cast_first", "rms_cast_last")
    elif NORMS[kind][1] == "layer_norm" and dtype == torch.bfloat16:  # and whether its kernels round alike
        assert form in ("after", "layer_norm")
    else:
        assert form == NORMS[kind][1]
    assert channel_axis(norm_of(kind, dtype)) == (1 if kind in IMAGES else -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NORMS)
def test_a_scale_of_one_gives_the_output_bit_for_bit(kind, dtype):
    module, x = norm_of(kind, dtype), given(kind, dtype)
    with torch.no_grad():
        expected = module(x)
        scales = Given(Factor(torch.ones(SIZE)))
        assert bind(module, scales, "norm")
        assert torch.equal(module(x), expected)
        wide = torch.linspace(0.5, 2, SIZE)
        scales.factor = Factor(wide)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        found = module(x)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.float(), expected.float() * along(kind, wide), **tolerance)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["llama", "t5", "gemma", "layer", "rms", "own"])
def test_weights_in_float32_and_an_input_in_half_precision(kind, autocast):
    """Whatever reads the output casts it, so its type under autocast is of no account."""
    module, x = norm_of(kind, torch.float32), given(kind, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = module(x)
        bind(module, Given(Factor(torch.ones(SIZE))), "norm")
        found = module(x)
    assert autocast or found.dtype == expected.dtype
    torch.testing.assert_close(found.to(torch.bfloat16), expected.to(torch.bfloat16), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", NORMS)
def test_outputs_and_gradients(kind):
    results = []
    for bound in (True, False):
        module, x, scale = norm_of(kind), given(kind).requires_grad_(), scale_of().requires_grad_()
        if bound:
            bind(module, Given(Factor(scale)), "norm")
        out = module(x) if bound else module(x) * along(kind, scale)
        total(out).backward()
        grads = {n: p.grad for n, p in module.named_parameters()} | {"x": x.grad, "scale": scale.grad}
        results.append((out.detach(), grads))
        assert all(g is not None for g in grads.values())
    torch.testing.assert_close(results[0], results[1], **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gemma", "layer", "rms"])
def test_backward_inside_autocast(kind):
    results = []
    for inside in (False, True):
        module, scale = norm_of(kind, torch.float32), scale_of(torch.float32).requires_grad_()
        x = given(kind, torch.float32).requires_grad_()
        bind(module, Given(Factor(scale)), "norm")
        module.san_norm.form = NORMS[kind][1]
        loss = total(module(x))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        results.append({n: p.grad for n, p in module.named_parameters()} | {"x": x.grad, "scale": scale.grad})
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma", "layer", "layer-no-bias", "rms"])
@pytest.mark.parametrize("needed", ["x", "scale", "all"])
def test_gradcheck(kind, needed):
    module = norm_of(kind).requires_grad_(needed == "all")
    names = [n for n, _ in module.named_parameters()]

    def run(x: Tensor, scale: Tensor, *parameters: Tensor) -> Tensor:
        scales.factor = Factor(scale)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    scales = Given()
    bind(module, scales, "norm")
    module.san_norm.form = NORMS[kind][1]  # in float64, where some of these modules compute in float32
    x, scale = given(kind).requires_grad_(needed != "scale"), scale_of().requires_grad_(needed != "x")
    assert torch.autograd.gradcheck(run, (x, scale, *module.parameters()))
    assert torch.autograd.gradgradcheck(run, (x, scale, *module.parameters()))


@pytest.mark.parametrize("kind", NORMS)
def test_binding_changes_nothing_else(kind):
    module, x, scales = norm_of(kind), given(kind), Given()
    plain, keys, text = type(module), list(module.state_dict()), repr(module)
    expected = module(x)
    assert bind(module, scales, "norm")
    assert torch.equal(module(x), expected)
    assert isinstance(module, plain)
    assert type(module).__name__ == plain.__name__
    assert list(module.state_dict()) == keys
    assert repr(module) == text
    twins = [copy.deepcopy(module)]
    if kind != "layer-no-bias":
        twins.append(pickle.loads(pickle.dumps(module)))
    for twin in twins:
        assert type(twin) is type(module)
        assert torch.equal(twin(x), expected)
    kept = type(module)
    bind(module, scales, "norm")
    assert type(module) is kept, "binding twice adds no class"
    bind(module, None, "")
    assert type(module) is plain
    assert bound_to(module) is None
    assert "san_norm" not in vars(module)
    assert torch.equal(module(x), expected)


# ---------------------------------------------------------------------- in a model


def first_norm(model: PeftModel) -> Any:
    return model.base_model.model.model.layers[1].input_layernorm


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
def test_hooks_fire_and_see_the_scaled_output(case):
    model = adapted(**CASES[case])
    norm, seen = first_norm(model), []
    assert isinstance(norm, ScaledNorm)
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    norm.register_forward_hook(lambda module, args, out: seen.append(out))
    norm.register_full_backward_hook(lambda module, grads_in, grads_out: seen.append(grads_out[0]))
    total(output(model)).backward()
    assert len(seen) == 3
    reader = model.base_model.model.model.layers[1].self_attn.q_proj
    expected = norm(seen[0]) * reader.get_input_scale()
    torch.testing.assert_close(seen[1], expected, **CLOSE)
    assert not torch.allclose(seen[1], norm(seen[0]), rtol=1e-3)
    check_law(model)


@pytest.mark.parametrize("case", ["own", "lora"])
def test_a_norm_that_is_replaced(case):
    model = adapted(**CASES[case])
    before = output(model)
    layer = model.base_model.model.model.layers[1]
    layer.input_layernorm = larger(LlamaRMSNorm(16).double())
    check_law(model)
    assert not torch.allclose(output(model), before, rtol=1e-3)
    layer.input_layernorm = larger(nn.LayerNorm(16).double())
    check_law(model)
    layer.input_layernorm = nn.Identity()
    check_law(model)


@pytest.mark.parametrize("case", ["own", "lora"])
def test_a_norm_whose_forward_is_patched(case):
    """As accelerate does it, before the adapter or after it; or as a user does, who changes what the norm gives."""
    model = adapted(**CASES[case])
    expected = output(model).detach()
    norm = first_norm(model)
    inside = norm.forward
    norm.forward = lambda x: inside(x)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    check_law(model)
    norm.forward = lambda x: inside(x) * 2
    check_law(model)
    norm.forward = lambda x: nn.functional.rms_norm(x, (16,), norm.weight)
    check_law(model)


@pytest.mark.parametrize("case", ["own", "lora"])
def test_a_norm_patched_before_the_adapter(case):
    torch.manual_seed(0)
    net = larger(MODELS["llama-grouped"]().double())
    for layer in net.model.layers:
        inside = layer.input_layernorm.forward
        layer.input_layernorm.forward = lambda x, inside=inside: inside(x) * 1.5
    model = get_peft_model(net, SanConfig(**CASES[case])).double().eval()
    disturb(model)
    check_law(model)


class Shared(nn.Module):
    """One norm in two places, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(4))
        self.norm = self.again = nn.LayerNorm(6)
        self.twice = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.a(self.norm(x))
        x = self.b(self.again(x))
        x = self.c(self.twice(x))
        return self.head(self.twice(x))


@pytest.mark.parametrize("case", CASES)
def test_a_norm_in_two_places(case):
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64)
    net = larger(Shared().double())
    targets = ["stem", "a", "b", "c"]
    model = get_peft_model(net, SanConfig(propagation=trace(net, x), target_modules=targets, **CASES[case]))
    model.double()
    disturb(model)
    out = model(x)
    total(out).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with alone(model):
        expected = model(x)
        total(expected).backward()
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(grads, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, **CLOSE)


@pytest.mark.parametrize("case", ["own", "lora", "dora"])
@pytest.mark.parametrize("name", ["llama-grouped", "vit"])
def test_norms_that_are_trained(name, case, tmp_path):
    model = adapted(name, train_norms=True, **CASES[case])
    check_law(model, name)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "norm" in n and p.requires_grad}
    assert before
    total(output(model, name)).backward()
    optimizer.step()
    model.zero_grad()
    now = dict(model.named_parameters())
    assert not any(torch.equal(now[n], p) for n, p in before.items())
    check_law(model, name)
    with torch.no_grad():
        out = output(model, name)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(larger(MODELS[name]().double()), tmp_path, autocast_adapter_dtype=False)
        again = again.double().eval()
        torch.testing.assert_close(output(again, name), out, **CLOSE)
        with model.disable_adapter():
            frozen = output(model, name)
        assert not torch.allclose(frozen, out, rtol=1e-3)
        merged = model.merge_and_unload()
        torch.testing.assert_close(output(merged, name), out, **CLOSE)
    plain = MODELS[name]()
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_names_of_tensors_are_those_without_binding():
    model = adapted()
    names = {n for n in model.state_dict() if "san_" not in n}
    plain = {n.replace(".base_layer", "").removeprefix("base_model.model.") for n in names}
    assert plain == set(MODELS["llama-grouped"]().state_dict())
    assert sum(isinstance(m, ScaledNorm) for m in model.modules()) >= 3
    step(model)
    assert model(input_ids=IDS).logits.shape == (2, 6, 50)

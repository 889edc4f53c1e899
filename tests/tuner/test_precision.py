"""Half precision keeps scales near one: they move outputs as in float32, and the report tells what would be lost."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import KINDS, Kind
from torch import Tensor, nn

from san_peft import SanConfig, SanLayer, rounding, trace
from san_peft.errors import SanError
from san_peft.scaling import SALT
from san_peft.tuner import precision

STEP = 0.001
"""How far from one all scales are: half a step of bfloat16 is 0.002 to 0.004."""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
NEARLY_ONE = pytest.approx(1.0, abs=0.2)
"""Accepted slopes; samples are so large that rounding alone makes errors of about 0.03."""


# ------------------------------------------------------------------ models


def llama() -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.LlamaConfig(**heads, hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=64)
    config.initializer_range, config.use_cache = 0.125, False
    return tf.LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = tf.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    config.image_size, config.patch_size, config.initializer_range = 32, 8, 0.125
    return tf.ViTModel(config, add_pooling_layer=False)


def convnext() -> nn.Module:
    config = tf.ConvNextConfig(hidden_sizes=[32, 64], depths=[2, 2], num_stages=2, initializer_range=0.125)
    return tf.ConvNextModel(config)


def random(*shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * size


@cache
def batch(kind: str) -> dict[str, Tensor]:
    """Many inputs, no two alike: equal ones are rounded alike, and the errors would not average out."""
    if kind == "llama":
        return {"inputs_embeds": random(64, 64, 64, size=0.125)}
    return {"pixel_values": random(96, 3, 32, 32)}


MODELS = {"llama": llama, "vit": vit, "convnext": convnext}
TARGETS = {"convnext": ["patch_embeddings", "downsampling_layer.1", "pwconv1", "pwconv2"]}
"""Without convolutions for each channel, which no LoRA can host."""


def lora(**options: object) -> LoraConfig:
    return LoraConfig(r=4, **options)


HOSTS: dict[str, dict[str, object]] = {
    "own": {},
    "lora-norm": {"inner": lora()},
    "lora-projection": {"inner": lora(), "decomposition": "projection"},
    "dora": {"inner": lora(use_dora=True)},
    "dora-b": {"inner": lora(use_dora=True)},
}


def base(kind: str, rounded: torch.dtype, dtype: torch.dtype | None = None) -> nn.Module:
    """A random model whose weights are of a half-precision type, as it is or in float32."""
    torch.manual_seed(0)
    net = MODELS[kind]().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name or "layer_scale" in name or name.endswith("bias"):
                parameter.copy_(torch.rand_like(parameter) * 0.5 + (-0.25 if name.endswith("bias") else 0.75))
    return net.to(rounded).to(rounded if dtype is None else dtype)


def nearly_one(model: nn.Module, host: str, sign: str, step: float = STEP) -> PeftModel:
    """Sets every scale to one plus or minus a step; that of LoRA, such that it decomposes so."""
    generator = torch.Generator().manual_seed(5)
    layers = [m for m in model.modules() if isinstance(m, SanLayer)]
    for layer in layers or [m for m in model.modules() if hasattr(m, "lora_B")]:
        peft = layer.host if isinstance(layer, SanLayer) else layer
        if peft is None and not layer.san_scale:
            continue
        signs = torch.randint(2, (layer.out_features,), generator=generator) * 2.0 - 1
        offset = signs * step if sign == "random" else torch.full_like(signs, step)
        with torch.no_grad():
            set_scale(layer, peft, host, offset, generator)
    return model


def set_scale(layer: nn.Module, peft: nn.Module | None, host: str, offset: Tensor, generator: torch.Generator) -> None:
    if host == "own":
        layer.san_scale["default"].weight.copy_(offset)
        return
    down, up = peft.lora_A["default"].weight, peft.lora_B["default"].weight
    if host.startswith("lora"):
        weight = peft.get_base_layer().weight.to(down.dtype).flatten(1)
        product = weight @ down.flatten(1).T
        share = offset * weight.square().sum(1) / product.square().sum(1) / peft.scaling["default"]
        up.copy_((share[:, None] * product).view_as(up))
        return
    if host == "dora-b":
        up.copy_(torch.randn(up.shape, generator=generator) * 0.02)
    magnitude = peft.lora_magnitude_vector["default"].weight
    magnitude.mul_((1 + offset).view_as(magnitude))


def adapted(kind: str, host: str, rounded: torch.dtype, dtype: torch.dtype | None = None, sign: str = "random", **more):
    options = {**HOSTS[host], **more}
    if "inner" in options and kind in TARGETS:
        options["target_modules"] = TARGETS[kind]
    torch.manual_seed(3)
    return nearly_one(get_peft_model(base(kind, rounded, dtype), SanConfig(**options)), host, sign)


def output(model: nn.Module, kind: str, autocast: torch.dtype | None = None) -> Tensor:
    dtype = next(p.dtype for n, p in model.named_parameters() if n.endswith("base_layer.weight"))
    inputs = {name: value.to(dtype) for name, value in batch(kind).items()}
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(**inputs)
    return (out.logits if kind == "llama" else out.last_hidden_state).float()


def effect(model: PeftModel, kind: str, autocast: torch.dtype | None = None, without=None) -> Tensor:
    """What propagation changes in the output; or the whole adapter, where `without` is its `disable_adapter`."""
    with torch.enable_grad() if model.training else torch.no_grad():
        after = output(model, kind, autocast).detach()
        with model.base_model.set_mode("neuron") if without is None else without():
            return after - output(model, kind, autocast).detach()


def slope(found: Tensor, expected: Tensor) -> float:
    """What share of an effect was found, in the mean over all outputs."""
    return ((found * expected).sum() / expected.square().sum()).item()


def cases():
    for kind in MODELS:
        for host in HOSTS:
            for half in HALF:
                quick = half == "bf16" and (kind, host) in {("llama", "lora-norm"), ("vit", "own"), ("llama", "dora-b")}
                marks = () if quick else pytest.mark.slow
                yield pytest.param(kind, host, HALF[half], marks=marks, id=f"{kind}-{host}-{half}")


# ------------------------------------------------------------------ slopes


@pytest.mark.parametrize(("kind", "host", "rounded"), cases())
def test_a_propagated_scale_near_one_acts_as_in_float32(kind, host, rounded):
    for sign in ("random", "same"):
        half, wide = (adapted(kind, host, rounded, dtype, sign) for dtype in (None, torch.float32))
        adapters = [p for n, p in half.named_parameters() if "san_scale" in n or "lora_" in n]
        assert {p.dtype for p in adapters} == {torch.float32}
        expected = effect(wide.eval(), kind)
        found = {}
        for training in (False, True):
            found["half", training] = slope(effect(half.train(training), kind), expected)
            if rounded == torch.bfloat16:
                found["autocast", training] = slope(effect(wide.train(training), kind, rounded), expected)
        assert found == dict.fromkeys(found, NEARLY_ONE), sign


@pytest.mark.parametrize(("kind", "host"), [("llama", "own"), ("llama", "lora-projection")])
def test_without_propagation_there_is_nothing_to_see(kind, host):
    """The measure itself: the mode without propagation is the model with exponent zero."""
    model, zero = (adapted(kind, host, torch.bfloat16, exponent=k) for k in (1.0, 0.0))
    with model.base_model.set_mode("neuron"), torch.no_grad():
        torch.testing.assert_close(output(model, kind), output(zero, kind), rtol=0, atol=0)


@pytest.mark.parametrize("sign", ["random", "same"])
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("kind", ["vit", *(pytest.param(k, marks=pytest.mark.slow) for k in ("llama", "convnext"))])
def test_an_own_scale_near_one_acts_as_in_float32(kind, half, sign):
    models = [adapted(kind, "own", HALF[half], dtype, sign, propagation="none") for dtype in (None, torch.float32)]
    found, expected = (effect(model.eval(), kind, None, model.disable_adapter) for model in models)
    assert slope(found, expected) == NEARLY_ONE


@pytest.mark.parametrize("host", ["dora", "dora-b"])
def test_a_magnitude_near_one_acts_as_in_float32_and_as_in_peft(host):
    kind, effects = "vit", {}
    for name in ("ours", "ours in float32", "PEFT", "PEFT in float32"):
        dtype = torch.float32 if "32" in name else None
        after, before = (dora(kind, host, dtype, "ours" in name, step) for step in (STEP, 0.0))
        with torch.no_grad():
            effects[name] = output(after, kind) - output(before, kind)
    slopes = {name: slope(found, effects["PEFT in float32"]) for name, found in effects.items()}
    assert slopes["ours in float32"] == pytest.approx(1, abs=1e-3)
    assert slopes["ours"] == NEARLY_ONE
    assert slopes["PEFT"] == pytest.approx(slopes["ours"], abs=0.3)


def dora(kind: str, host: str, dtype: torch.dtype | None, ours: bool, step: float) -> PeftModel:
    net, targets = base(kind, torch.bfloat16, dtype), ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]
    torch.manual_seed(3)
    if ours:
        config = SanConfig(inner=lora(use_dora=True), target_modules=targets, propagation="none")
    else:
        config = lora(use_dora=True, target_modules=targets)
    return nearly_one(get_peft_model(net, config), host, "random", step).eval()


@pytest.mark.parametrize("kind", [k if k == "vit" else pytest.param(k, marks=pytest.mark.slow) for k in MODELS])
@pytest.mark.parametrize("host", ["own", "lora-norm", "lora-projection", "dora-b"])
def test_gradients_of_scales_near_one(kind, host):
    found = []
    for dtype in (None, torch.float32):
        model = adapted(kind, host, torch.bfloat16, dtype)
        y = output(model, kind)
        (y * random(*y.shape)).mean().backward()
        found.append({n: p.grad.float().flatten() for n, p in model.named_parameters() if p.grad is not None})
    half, wide = found
    assert half.keys() == wide.keys()
    cosines = {n: torch.cosine_similarity(half[n], g, 0).item() for n, g in wide.items() if g.any()}
    total = torch.cosine_similarity(torch.cat([*half.values()]), torch.cat([*wide.values()]), 0).item()
    assert total > 0.95
    assert min(cosines.values()) > 0.95, min(cosines, key=cosines.get)


# ------------------------------------------------------------------ several factors of one value


@pytest.mark.parametrize("dtype", HALF.values())
def test_a_value_is_rounded_by_another_hash_for_each_factor(dtype):
    """By the same hash, a value that the first factor has left would be left by the second as well."""
    x, step = random(2048, 128).to(dtype), 2**-3 * torch.finfo(dtype).eps
    factor, y = torch.full((128,), 1 + step), x
    for salt in SALT.values():
        before, y = y, rounding.multiply(y, factor, salt=salt)
        assert slope(y.float() - before.float(), step * x.float()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", HALF.values())
def test_an_own_scale_and_a_propagated_one_on_either_side_of_a_relu(dtype):
    """Which leaves half of the values as they are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)
    x, effects = random(2048, 32).to(dtype), []
    for kind in (dtype, torch.float32):
        config = SanConfig(target_modules=["0"], propagation=trace(net, x[:1]))
        model = nearly_one(get_peft_model(copy.deepcopy(net).to(kind), config), "own", "random")
        outs: list[Tensor] = []
        model.base_model.model[2].register_forward_hook(lambda _, __, out, outs=outs: outs.append(out.float()))
        with torch.no_grad():
            model(x.to(kind))
            with model.base_model.set_mode("neuron"):
                model(x.to(kind))
        effects.append(outs[0] - outs[1])
    assert slope(*effects) == pytest.approx(1, abs=0.1)


# ------------------------------------------------------------------ the report


def small(host: str, dtype: torch.dtype = torch.bfloat16, size: float = STEP) -> PeftModel:
    kind: Kind = KINDS["dense"]
    options = {"own": {}, "lora-norm": {"inner": lora()}, "dora": {"inner": lora(use_dora=True)}}[host]
    config = SanConfig(target_modules=list(kind.targets), propagation=kind.graph(), **options)
    return nearly_one(get_peft_model(kind.net(dtype), config), host, "same", size)


@pytest.mark.parametrize("host", ["own", "lora-norm", "dora"])
def test_the_report_counts_factors_that_would_round_to_one(host):
    model = small(host)
    report, scales = model.base_model.precision_report(), model.base_model.scales
    places = {(edge.anterior, edge.posterior): edge.place for edge in report.edges}
    assert places == {("stem", "fc1"): "norm:norm", ("fc1", "fc2"): "input"}
    assert places == scales.placements["default"]
    assert [edge.channels for edge in report.edges] == [8, 12]
    assert {edge.dtype for edge in report.edges} == {torch.bfloat16}
    assert (report.channels, report.near_one, report.lost) == (20, 20, 0)
    assert str(report).splitlines()[-1] == "20 of 20 channels of 2 edges would round to one; 0 are lost"
    assert len({len(line.rstrip()) for line in str(report).splitlines()[:-1]}) == 1
    for dtype, count in ((torch.float32, 0), (torch.float64, 0), (torch.float16, 0)):
        other = small(host, dtype).base_model.precision_report()
        assert (other.channels, other.near_one, other.lost) == (20, count, 0)


@pytest.mark.parametrize("host", ["own", "dora"])
def test_the_report_tries_what_is_lost(host):
    report = small(host, size=3e-7).base_model.precision_report()
    assert report.near_one == 20
    assert 0 < report.lost <= 20
    assert small(host, size=0.0).base_model.precision_report().near_one == 0
    assert small(host, size=0.01).base_model.precision_report().near_one == 0


def test_a_report_of_a_library_that_rounds_to_the_nearest(monkeypatch):
    """What is lost is tried out, not taken from a promise."""
    monkeypatch.setattr(precision, "scale_channels", lambda x, factor, *_: x * factor.wide.to(x.dtype))
    model = small("own").base_model
    found = {edge.place: edge.lost for edge in model.precision_report().edges}
    assert found["input"] == 12
    # a norm that multiplies before it rounds loses nothing; whether it does depends on the processor
    after = model.model.norm.san_norm.form == "after"
    assert found["norm:norm"] == 0 or after


def test_a_report_knows_the_places():
    for kind, expected in (("llama", {"norm", "output", "input"}), ("convnext", {"norm", "input"})):
        report = adapted(kind, "own", torch.bfloat16).base_model.precision_report()
        assert {edge.place.partition(":")[0] for edge in report.edges} == expected
        assert report.lost == 0
        assert 0 < report.near_one == report.channels
    model = adapted("llama", "own", torch.bfloat16)
    for training, channels in (
        (False, 64),
        (True, 32),
    ):  # at the reader, or at v, whose heads are shared
        model.train(training)
        edges = [edge for edge in model.base_model.precision_report().edges if "v_proj" in edge.anterior]
        assert {(edge.place, edge.channels) for edge in edges} == {("output" if training else "input", channels)}


def test_a_report_of_what_acts_at_present():
    model = small("own")
    san = model.base_model
    with model.disable_adapter():
        assert str(san.precision_report()) == "0 of 0 channels of 0 edges would round to one; 0 are lost"
    with san.set_mode("neuron"):
        assert not san.precision_report().edges
    with san.set_mode("synapse"):
        assert {edge.place for edge in san.precision_report().edges} == {"input"}
    model.merge_adapter()
    assert not san.precision_report().edges
    model.unmerge_adapter()
    kind = KINDS["dense"]
    model.add_adapter("second", SanConfig(target_modules=list(kind.targets), propagation=kind.graph()))
    san.set_adapter(["default", "second"])
    found = {(edge.adapter, edge.place): edge.near_one for edge in san.precision_report().edges}
    assert found == {("default", "input"): 12, ("second", "input"): 0}
    with pytest.raises(SanError, match="offloaded"):
        model.to("meta").base_model.precision_report()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vit_with_layer_norms_starts_bit_for_bit(dtype):
    """A layer norm in float32 that is rounded differs from torch's own in half precision by a last bit now and then."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    net = tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=32, patch_size=8))
    net, pixels = net.to(dtype).eval(), torch.randn(32, 3, 32, 32).to(dtype)
    with torch.no_grad():
        before = net(pixels).logits
        model = get_peft_model(net, SanConfig(modules_to_save=["classifier"])).eval()
        assert torch.equal(model(pixels).logits, before)

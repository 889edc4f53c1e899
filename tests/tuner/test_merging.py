"""Merging and unmerging: nothing is lost to rounding, to an error in between, to a cast, or in a thousand times."""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.contract.nets import KINDS, adapted, disturb, outputs
from torch import nn

from san_peft import AdapterError, MergeError, SanConfig, SanLayer, trace
from san_peft.functional import fold
from san_peft.rounding import HALF
from san_peft.tuner import merge

ROOT = Path(__file__).parents[2]


def layers_of(model) -> dict[str, SanLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SanLayer)}


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, state) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert [n for n in state if not torch.equal(now[n], state[n])] == []


# ------------------------------------------------------------------ half precision


def wide_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 192), nn.Tanh(), nn.Linear(192, 256)).eval()


def near_one(host: str) -> dict:
    inner = {"own": None, "lora": LoraConfig(r=2), "dora": LoraConfig(r=2, use_dora=True)}[host]
    return {"target_modules": ["0", "2"], "inner": inner}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("part", ["own scale", "propagated scale", "lora", "dora"])
def test_a_factor_of_a_thousandth_is_kept(part, dtype):
    """The merged model in half precision moves as far as float32 says, on average over its outputs."""
    host = part if part in ("lora", "dora") else "own"
    base = wide_net().to(dtype)
    options = near_one(host) | ({"propagation": "none"} if part == "own scale" else {})
    if part != "own scale":
        options["propagation"] = trace(base, torch.randn(2, 128).to(dtype))
    model = get_peft_model(copy.deepcopy(base), SanConfig(**options)).eval()
    with torch.no_grad():
        for name, layer in layers_of(model).items():
            if part == "own scale" or (part == "propagated scale" and name.endswith("0")):
                layer.san_scale["default"].weight.fill_(0.001)
            if host != "own":
                weight = layer.get_base_layer().weight.float()
                u, s, v = torch.linalg.svd(weight)
                layer.host.lora_A["default"].weight.copy_(v[:2])
                layer.host.lora_B["default"].weight.copy_(u[:, :2] * s[:2] * 0.001)
            if host == "dora":
                layer.host.lora_magnitude_vector["default"].weight.mul_(1.001)
    exact = copy.deepcopy(base).float()
    exact_model = get_peft_model(copy.deepcopy(exact), SanConfig(**options)).eval()
    state = {n: v.float() for n, v in model.state_dict().items()}
    if host == "dora":  # the magnitude over the norm as training saw it, which is rounded
        for name, layer in layers_of(model).items():
            norm = layer.get_base_layer().weight.norm(dim=1).float()
            key = f"{name}.base_layer.lora_magnitude_vector.default.weight"
            state[key] = state[key] / norm * layer.get_base_layer().weight.float().norm(dim=1)
    exact_model.load_state_dict(state)
    x = torch.randn(256, 128).to(dtype)
    with torch.no_grad():
        effect = exact_model(x.float()) - exact(x.float())
        change = model.merge_and_unload()(x).float() - base(x).float()
    slope = (change * effect).sum() / effect.square().sum()
    assert 0.8 < slope < 1.2, slope


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_that_does_nothing_leaves_every_bit(name, dtype):
    kind = KINDS[name]
    model = get_peft_model(kind.net(dtype), kind.config()).eval()
    plain, base = model.merge_and_unload(), kind.net(dtype)
    for key, value in base.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value), key


@pytest.mark.parametrize("dtype", HALF)
def test_folding_by_parts_is_unbiased(dtype, monkeypatch):
    monkeypatch.setattr("san_peft.functional.AT_ONCE", {"cpu": (1, 1000), "cuda": (1, 1000)})
    torch.manual_seed(0)
    for shape, groups, transposed in (((300, 40), 1, False), ((40, 300), 1, True), ((60, 4, 3, 3), 3, False)):
        weight = torch.randn(shape).to(dtype)
        if weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        out, size = (shape[1], shape[0]) if transposed else (shape[0], shape[1] * groups)
        scale, input_scale = torch.full((out,), 1.001), torch.full((size,), 1.001)
        layout = {"groups": groups, "transposed": transposed}
        folded, _ = fold(weight, None, scale, input_scale, **layout)
        assert folded.dtype == dtype
        assert folded.stride() == weight.stride()
        change, exact = folded.double() - weight.double(), weight.double() * (1.001**2 - 1)
        assert 0.8 < (change * exact).sum() / exact.square().sum() < 1.2
        whole, _ = fold(weight.float(), None, scale, input_scale, dtype=dtype, **layout)
        assert whole.dtype == dtype


# ------------------------------------------------------------------ errors in between


def fails_at(monkeypatch, number: int) -> None:
    """Lets the n-th fold from now on fail, and those after it."""
    count, real = [0], merge.fold

    def failing(*args, **kwargs):
        count[0] += 1
        if count[0] >= number:
            raise RuntimeError("no memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(merge, "fold", failing)


def prepared_errors(model, cause, monkeypatch):
    """Makes merging fail, and returns what is raised and what ends the cause."""
    tuner = model.base_model
    if cause == "mode":
        tuner.set_mode("neuron")
        return MergeError, lambda: tuner.set_mode("both")
    if cause == "nan":
        vector = list(layers_of(model).values())[-1].san_scale["default"].weight
        kept = vector.data.clone()
        vector.data[0] = float("nan")
        return ValueError, lambda: vector.data.copy_(kept)
    if cause == "second fold":
        fails_at(monkeypatch, 2)
        return RuntimeError, monkeypatch.undo
    return AdapterError, lambda: None


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("cause", ["mode", "nan", "second fold", "typo"])
@pytest.mark.parametrize("verb", ["merge_and_unload", "merge_adapter"])
@pytest.mark.filterwarnings("ignore:Already following adapters")
def test_what_raises_leaves_the_model_as_it_was(verb, cause, merged_before, monkeypatch):
    if cause == "mode" and merged_before:
        pytest.skip("a merged model has no other mode")
    kind = KINDS["dense"]
    model = adapted(kind, own_scale=True, modules_to_save=None)
    model.add_adapter("second", kind.config(modules_to_save=None, own_scale=True))
    disturb(model, "second", seed=1)
    frozen, before = state_of(model), outputs(model, kind, torch.float32)
    if merged_before:
        model.merge_adapter(["second"])
    merged, out = state_of(model), outputs(model, kind, torch.float32)
    error, mend = prepared_errors(model, cause, monkeypatch)
    names = ["default", "typo"] if cause == "typo" else ["default"]
    with pytest.raises(error):
        getattr(model, verb)(adapter_names=names, safe_merge=cause == "nan")
    mend()
    assert_same(model, merged)
    assert torch.equal(outputs(model, kind, torch.float32), out)
    assert all(layer.merged_adapters == ["second"] * merged_before for layer in layers_of(model).values())
    if merged_before:
        model.unmerge_adapter()
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, kind, torch.float32), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert_same(model, frozen)
    plain = model.merge_and_unload()
    torch.testing.assert_close(outputs(plain, kind, torch.float32), before, rtol=1e-4, atol=1e-5)


def test_an_interrupted_merge_of_hosts_is_taken_back(monkeypatch):
    kind = KINDS["dense-lora"]
    model = adapted(kind)
    frozen, before = state_of(model), outputs(model, kind, torch.float32)
    fails_at(monkeypatch, 3)
    with pytest.raises(RuntimeError, match="no memory"):
        model.merge_adapter()
    monkeypatch.undo()
    assert_same(model, frozen)
    assert not any(layer.merged or layer.host.merged for layer in layers_of(model).values() if layer.host is not None)
    disturb(model, seed=3)  # the scales follow their parameters again
    assert not torch.allclose(outputs(model, kind, torch.float32), before, rtol=1e-3)
    before = outputs(model, kind, torch.float32)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, kind, torch.float32), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_is_made_anew_is_refused(norm):
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(first=norm(nn.Linear(4, 6)), last=nn.Linear(6, 2))).eval()
    model = get_peft_model(net, SanConfig(target_modules=["first", "last"], propagation="none")).eval()
    disturb(model)
    state, before = state_of(model), model(torch.ones(1, 4))
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match=r"its weight.*remove_parametrizations"):
            verb()
    assert_same(model, state)
    assert torch.equal(model(torch.ones(1, 4)), before)


# ------------------------------------------------------------------ names


def test_unknown_names_are_refused_by_name():
    model = adapted(KINDS["dense"])
    for verb in (model.merge_adapter, model.merge_and_unload, model.base_model.check_merge):
        with pytest.raises(AdapterError, match=r"'typo'.*there are default"):
            verb(adapter_names=["default", "typo"])
        with pytest.raises(TypeError, match="list of strings"):
            verb(adapter_names="default")
    assert not any(layer.merged for layer in layers_of(model).values())
    model.merge_adapter([])
    assert not any(layer.merged for layer in layers_of(model).values())


def test_a_layer_is_merged_with_what_has_a_part_in_it():
    net = wide_net()
    model = get_peft_model(net, SanConfig(target_modules=["0"], propagation="none")).eval()
    model.add_adapter("second", SanConfig(target_modules=["2"], propagation="none"))
    disturb(model)
    disturb(model, "second", seed=1)
    x = torch.randn(3, 128)
    alone = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(["default"])
    first, second = layers_of(model).values()
    assert (first.merged_adapters, second.merged_adapters) == (["default"], [])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)
    first.merge(adapter_names=["second", "nobody"])  # as PEFT's layers do, a layer passes over what it has not
    assert first.merged_adapters == ["default"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


# ------------------------------------------------------------------ several adapters


@pytest.mark.parametrize("name", ["dense", "dense-lora", "conv2d-lora"])
def test_one_after_the_other_is_both_at_once(name):
    """What hosts give comes from the frozen weight, also where another adapter is merged already."""
    kind = KINDS[name]
    model = adapted(kind, modules_to_save=None)
    model.add_adapter("second", kind.config(modules_to_save=None))
    disturb(model, "second", seed=1)
    frozen = state_of(model)
    model.base_model.set_adapter(["default", "second"])
    both = outputs(model, kind, torch.float32)
    model.merge_adapter(["default"])
    disturb(model, "default", seed=2)  # what is merged is a copy
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(["second"])
    torch.testing.assert_close(outputs(model, kind, torch.float32), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    now = model.state_dict()
    assert all(torch.equal(now[n], v) for n, v in frozen.items() if ".default." not in n)


# ------------------------------------------------------------------ types, devices, state dicts


@pytest.mark.parametrize("name", ["dense", "dense-lora", "conv2d"])
@pytest.mark.parametrize(("start", "end"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_cast_while_merged_casts_what_comes_back(name, start, end):
    kind = KINDS[name]
    model = adapted(kind, start, modules_to_save=None)
    model.add_adapter("second", kind.config(modules_to_save=None))
    disturb(model, "second", seed=1)
    expected = copy.deepcopy(model).to(end)
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter(["default"])
    model.to(end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["second"])  # out of what was kept
    assert {t.dtype for t in model.base_model.model.state_dict().values()} == {end}
    model.unmerge_adapter()
    assert_same(model, state_of(expected))
    model.base_model.set_adapter("default")
    assert torch.equal(outputs(model, kind, end), outputs(expected, kind, end))


def test_casting_one_layer_alone_is_followed_as_well():
    kind = KINDS["dense"]
    model = adapted(kind)
    model.merge_adapter()
    layer = next(iter(layers_of(model).values()))
    kept = layer.san_kept_weight.clone()
    layer.base_layer.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, kept.bfloat16())


@pytest.mark.parametrize("name", ["dense", "dense-lora"])
def test_what_is_kept_moves_with_the_model_and_is_in_no_state_dict(name):
    model = adapted(KINDS[name], shift=name == "dense")
    names, parameters = set(model.state_dict()), {n for n, _ in model.named_parameters()}
    model.merge_adapter()
    made = set(model.state_dict()) - names
    assert made <= {n for n in made if n.endswith("fc2.base_layer.bias")}  # a shift makes one
    buffers = {n for n, _ in model.named_buffers() if "san_kept" in n}
    assert {n.rpartition(".")[0] for n in buffers} == set(layers_of(model)) - {
        n for n in layers_of(model) if "head" in n
    }
    again = copy.deepcopy(model)
    for one in (model, again):
        one.unmerge_adapter()
        assert set(one.state_dict()) == names
        assert {n for n, _ in one.named_parameters()} == parameters
        assert not [n for n, _ in one.named_buffers() if "san_kept" in n]


# ------------------------------------------------------------------ a thousand times


@pytest.mark.parametrize(
    "name", ["dense", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dense-lora", "dense-dora"))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_merges_between_training_steps_change_nothing(name, dtype):
    kind = KINDS[name]
    models = [adapted(kind, dtype, modules_to_save=None).train() for _ in range(2)]
    frozen = {n: p.clone() for n, p in models[0].named_parameters() if not p.requires_grad}
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizers = [torch.optim.SGD(parameters, lr=1e-3) for parameters in trained]
    x = kind.input(dtype)
    for cycle in range(1000):
        models[0].merge_adapter()
        models[0].unmerge_adapter()
        if cycle % 20 == 0:
            for model, optimizer in zip(models, optimizers, strict=True):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert all(torch.equal(p, frozen[n]) for n, p in models[0].named_parameters() if n in frozen)
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True)), "training is what it is without merges"


# ------------------------------------------------------------------ the benchmark


@pytest.mark.slow
def test_the_benchmark_runs_in_small_and_a_merge_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    merging = importlib.import_module("merging")
    shape = merging.Shape(
        small_llama, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), ""
    )
    options = merging.Options(shapes=("small",), rounds=2, cycles=3, out=tmp_path)
    merging.run(options, merging.METHODS, {"small": shape})
    facts = json.loads((tmp_path / "merging.json").read_text())
    rows = {(r["dtype"], method): row for r in facts["results"] for method, row in r["methods"].items()}
    assert {method for _, method in rows} == {"san", "san-lora", "lora"}
    for (dtype, method), row in rows.items():
        if method != "lora":
            assert row["identical"], (dtype, method)
            assert row["extra"] <= 1.5, (dtype, method)
    assert "merge + unmerge / lora's" in (tmp_path / "merging.md").read_text()


def small_llama() -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
        )
    )

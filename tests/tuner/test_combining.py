"""Weighted adapters: one times an adapter is that adapter, whatever it trains; or an error, and nothing was added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tests.contract.nets import KINDS, Kind
from torch import Tensor, nn

from san_peft import AdapterError, SanConfig, SanLayer

LINEAR = KINDS["dense"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Normed(nn.Module):
    """A batch norm between convolutions, whose statistics an adapter trains with it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.head = nn.Conv2d(8, 4, 2, stride=2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(torch.relu(self.norm(self.stem(x)))).mean((-2, -1)))


NORMED = Kind(Normed, (3, 4, 4), ("stem", "last"))
LORA = {"r": 2, "lora_alpha": 6}
CASES: dict[str, tuple[Kind, dict[str, Any], dict[str, Any] | None]] = {
    "own": (LINEAR, {}, None),
    "shift": (LINEAR, {"shift": True}, None),
    "gate": (LINEAR, {"gate": True}, None),
    "norms": (LINEAR, {"train_norms": True}, None),
    "batch-norm": (NORMED, {"train_norms": True}, None),
    "conv": (KINDS["conv2d"], {"shift": True}, None),
    "lora": (LINEAR, {}, LORA),
    "projection": (LINEAR, {"decomposition": "projection", "train_norms": True}, LORA),
    "rslora": (LINEAR, {}, {**LORA, "use_rslora": True}),
    "dora": (LINEAR, {}, {**LORA, "use_dora": True}),
    "dora-rslora": (LINEAR, {}, {**LORA, "use_dora": True, "use_rslora": True}),
    "bias": (LINEAR, {"target_modules": ["stem", "fc1"]}, {**LORA, "lora_bias": True}),
    "ranks": (LINEAR, {}, {**LORA, "rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc2": 5}}),
    "ranks-rslora": (LINEAR, {}, {**LORA, "rank_pattern": {"fc1": 1}, "use_rslora": True, "use_dora": True}),
    "gaussian": (LINEAR, {}, {**LORA, "init_lora_weights": "gaussian"}),
    "own-scale": (LINEAR, {"own_scale": True, "shift": True, "gate": True}, LORA),
    "conv-lora": (KINDS["conv2d-lora"], {}, LORA),
    "conv-dora": (KINDS["conv2d-lora"], {}, {**LORA, "use_dora": True}),
}


def adapted(case: str, names: tuple[str, ...] = ("one", "two")) -> PeftModel:
    """A net with adapters that have been trained, in that every tensor of theirs was moved."""
    kind, options, inner = CASES[case]

    def config() -> SanConfig:
        host = None if inner is None else LoraConfig(**inner)
        given = {"target_modules": list(kind.targets), "modules_to_save": ["head"], "inner": host, **options}
        return SanConfig(propagation=kind.graph(), **given)

    model = get_peft_model(kind.net(), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if f".{name}." in key and value.is_floating_point():
                    value.add_(torch.rand(value.shape, generator=generator) * 0.3)
    return model.eval()


def run(model: PeftModel, case: str, name: str) -> Tensor:
    model.set_adapter(name)
    with torch.no_grad():
        return model(CASES[case][0].input())


@pytest.mark.parametrize("case", CASES)
def test_one_times_an_adapter_is_the_adapter(case, tmp_path):
    model = adapted(case)
    expected, other = run(model, case, "one"), run(model, case, "two")
    assert (expected - other).abs().max() > 1e-2
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.base_model.add_weighted_adapter(["one"], [1.0], "same")
    model.base_model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "first")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags.get(name, False), name
    torch.testing.assert_close(run(model, case, "same"), expected, **CLOSE)
    torch.testing.assert_close(run(model, case, "first"), expected, **CLOSE)
    assert torch.equal(run(model, case, "one"), expected)
    model.save_pretrained(tmp_path, selected_adapters=["same"])
    again = PeftModel.from_pretrained(CASES[case][0].net(), tmp_path / "same").eval()
    torch.testing.assert_close(run(again, case, "default"), expected, **CLOSE)


@pytest.mark.parametrize("case", ["own", "shift", "norms"])
def test_a_product_of_one_is_the_adapter(case):
    model = adapted(case)
    expected = run(model, case, "one")
    model.base_model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "new", combination_type="product")
    torch.testing.assert_close(run(model, case, "new"), expected, **CLOSE)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 1.0], [2.0, -0.5]])
@pytest.mark.parametrize("host", [None, "dora"])
def test_what_is_trained_as_a_whole_is_added_around_the_frozen_module(weights, host):
    model = adapted(host or "norms")
    tuner = model.base_model
    tuner.add_weighted_adapter(["one", "two"], weights, "new", combination_type="linear" if host is None else "cat")
    head = tuner.model.head
    frozen = head.original_module.weight
    pairs = list(zip(("one", "two"), weights, strict=True))
    expected = frozen + sum(weight * (head.modules_to_save[name].weight - frozen) for name, weight in pairs)
    torch.testing.assert_close(head.modules_to_save["new"].weight, expected)
    if host is not None:
        layer = tuner.model.fc1.host
        norms = layer.get_base_layer().weight.norm(dim=1)
        magnitudes = layer.lora_magnitude_vector
        expected = norms + sum(weight * (magnitudes[name].weight - norms) for name, weight in pairs)
        torch.testing.assert_close(magnitudes["new"].weight, expected)
        delta = sum(weight * layer.get_delta_weight(name) for name, weight in pairs)
        torch.testing.assert_close(layer.get_delta_weight("new"), delta)


def test_biases_of_a_host_are_added_with_their_scaling():
    model = adapted("bias")
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, 2.0], "new", combination_type="cat")
    host = model.base_model.model.fc1.host
    expected = sum(w * host.scaling[n] * host.lora_B[n].bias for n, w in (("one", 0.5), ("two", 2.0)))
    torch.testing.assert_close(host.lora_B["new"].bias * host.scaling["new"], expected)


def test_an_adapter_without_a_saved_module_counts_as_the_frozen_one():
    graph = LINEAR.graph()
    model = get_peft_model(LINEAR.net(), SanConfig(target_modules=["fc1"], propagation=graph), adapter_name="one")
    model.add_adapter("two", SanConfig(target_modules=["fc1"], propagation=graph, modules_to_save=["head"]))
    head = model.base_model.model.head
    with torch.no_grad():
        head.modules_to_save["two"].weight.add_(1.0)
    model.base_model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "new")
    torch.testing.assert_close(head.modules_to_save["new"].weight, head.original_module.weight + 0.5)
    assert model.peft_config["new"].modules_to_save == ["head"]


def test_a_host_of_ia3():
    inner = IA3Config(feedforward_modules=[])
    options = {"target_modules": ["stem", "fc1"], "propagation": LINEAR.graph(), "modules_to_save": ["head"]}
    model = get_peft_model(LINEAR.net(), SanConfig(inner=inner, **options), adapter_name="one").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".one" in name:
                parameter.add_(torch.rand(parameter.shape))
    x = LINEAR.input()
    expected = model(x)
    model.base_model.add_weighted_adapter(["one"], [1.0], "same")
    model.set_adapter("same")
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(AdapterError, match=r"IA3 .*'linear', got 'svd'"):
        model.base_model.add_weighted_adapter(["one"], [1.0], "other", combination_type="svd")


# ---------------------------------------------------------------------- refused


def state_of(model: PeftModel) -> tuple[Any, ...]:
    names = sorted(model.state_dict())
    return names, list(model.peft_config), model.active_adapters, [p.requires_grad for p in model.parameters()]


def check_refused(model: PeftModel, text: str, *arguments: Any, **options: Any) -> None:
    before = state_of(model)
    with pytest.raises(AdapterError, match=text):
        model.base_model.add_weighted_adapter(*arguments, **options)
    assert state_of(model) == before
    assert all(not layer.has_part("new") for layer in model.modules() if isinstance(layer, SanLayer))


@pytest.mark.parametrize("part", ["scale", "gate"])
def test_a_product_of_what_is_not_positive_is_refused(part):
    model = adapted("gate")
    layer = model.base_model.model.fc2 if part == "gate" else model.base_model.model.fc1
    with torch.no_grad():
        getattr(layer, f"san_{part}")["two"].weight[1] = -1.5
    text = rf"1 of 12 entries of the {part} of adapter 'two' in fc. are not positive"
    check_refused(model, text, ["one", "two"], [1.0, 1.0], "new", combination_type="product")


def test_a_variance_that_would_be_negative_is_refused():
    check_refused(adapted("batch-norm"), r"norm\.running_var negative", ["one", "two"], [-30.0, 1.0], "new")


@pytest.mark.parametrize(("case", "field"), [("dora", "use_dora"), ("bias", "lora_bias")])
def test_combinations_that_say_nothing_about_a_part_are_refused(case, field):
    text = f"combination_type='ties'.*{field}=True"
    check_refused(adapted(case), text, ["one", "two"], [1.0, 1.0], "new", combination_type="ties", density=0.5)


def test_hosts_that_differ_are_refused_by_the_field():
    options = {"target_modules": ["fc1"], "propagation": LINEAR.graph()}
    model = get_peft_model(LINEAR.net(), SanConfig(inner=LoraConfig(r=2), **options), adapter_name="one")
    for name, inner in (
        ("dora", LoraConfig(r=2, use_dora=True)),
        ("biased", LoraConfig(r=2, lora_bias=True)),
        ("none", None),
        ("wide", LoraConfig(r=4)),
    ):
        model.add_adapter(name, SanConfig(inner=inner, **options))
    check_refused(model, "differ in inner: use_dora", ["one", "dora"], [1, 1], "new")
    check_refused(model, "differ in inner: lora_bias", ["one", "biased"], [1, 1], "new")
    check_refused(model, "differ in inner: the hosts are LORA and None", ["one", "none"], [1, 1], "new")
    check_refused(model, "must have the same r value", ["one", "wide"], [1, 1], "new")
    check_refused(model, "Invalid combination_type: odd", ["one", "one"], [1, 1], "new", combination_type="odd")
    check_refused(model, "combination_type='product'", ["one"], [1], "new", combination_type="product")
    check_refused(model, r"finite, got \[nan\]", ["one"], [float("nan")], "new")
    model.base_model.merge_adapter(["one"])
    check_refused(model, "merged; unmerge it", ["one"], [1], "new")


def test_a_host_that_has_moved_the_frozen_weight_is_refused():
    inner = LoraConfig(r=2, init_lora_weights="pissa")
    model = get_peft_model(LINEAR.net(), SanConfig(inner=inner, target_modules=["fc1"], propagation=LINEAR.graph()))
    weight = model.base_model.model.fc1.get_base_layer().weight.clone()
    check_refused(model, "init_lora_weights='pissa'", ["default"], [1], "new")
    assert torch.equal(model.base_model.model.fc1.get_base_layer().weight, weight)

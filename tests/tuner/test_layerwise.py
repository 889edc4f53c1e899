"""The proof of a merge, layer by layer: whatever is wrong with one fold is found, and the layer is named."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.contract.nets import KINDS, disturb
from tests.golden.models import MODELS
from tests.tuner.hosted import CASES, trained
from tests.tuner.spoiled import forgetting, off_by, parts_of
from torch import nn

from san_peft import MergeError, SanConfig, SanLayer, merge_and_verify
from san_peft.tuner import layerwise

ARCHITECTURES = ("llama-grouped", "gpt2", "bert", "vit", "convnext", "swin", "timm-resnet", "t5")
HOSTS = {"own": lambda: None, "lora": lambda: LoraConfig(r=2), "dora": lambda: LoraConfig(r=2, use_dora=True)}
LINEAR = ("llama-grouped", "gpt2")
"""Architectures whose layers can all host LoRA."""


def layers_of(model: nn.Module) -> dict[str, SanLayer]:
    return {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, SanLayer)}


def adapted(name: str, dtype: torch.dtype, host: str = "own", size: float = 0.1, **options):
    torch.manual_seed(0)
    model = get_peft_model(MODELS[name]().to(dtype).eval(), SanConfig(inner=HOSTS[host](), **options)).eval()
    disturb(model, size=size)
    return model


CASES_OF_FOLDS = [("own", name) for name in ARCHITECTURES] + [(h, n) for h in ("lora", "dora") for n in LINEAR]
"""With their hosts, the architectures whose folds are spoiled."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("host", "name"), CASES_OF_FOLDS)
def test_each_part_of_each_fold_is_missed(host, name, dtype):
    options = {"shift": True} if host == "own" else {}
    model = adapted(name, dtype, host, **options)
    for fqn, layer in layers_of(model).items():
        before = layerwise.record(layer, ["default"], seed=0)
        assert before is not None
        layer.merge()
        assert layerwise.fault(fqn, layer, before) is None
        layer.unmerge()
        for part in parts_of(layer):
            with forgetting(layer, part):
                layer.merge()
            fault = layerwise.fault(fqn, layer, before)
            layer.unmerge()
            assert fault is not None, (fqn, part)
            assert fqn in fault


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_wrong_row_column_or_entry_of_a_bias_is_missed(name):
    """By a thousandth, in float32; which row and column is drawn."""
    model = adapted(name, torch.float32, shift=True)
    for number, (fqn, layer) in enumerate(layers_of(model).items()):
        before = layerwise.record(layer, ["default"], seed=0)
        generator = torch.Generator().manual_seed(number)
        for place in ("row", "column", "bias"):
            count = layer.in_features // layer.groups if place == "column" else layer.out_features
            channel = int(torch.randint(count, (1,), generator=generator))
            with off_by(layer, place, channel, 1.001):
                layer.merge()
            fault = layerwise.fault(fqn, layer, before)
            layer.unmerge()
            assert fault is not None, (fqn, place, channel)
            if place != "column":
                assert f"channel {channel} of {fqn} " in fault


@pytest.mark.parametrize("size", [1e-3, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("host", "name"), CASES_OF_FOLDS)
def test_rounding_alone_is_no_fault(host, name, dtype, size):
    model = adapted(name, dtype, host, size=size)
    records = {fqn: layerwise.record(layer, ["default"], 0) for fqn, layer in layers_of(model).items()}
    model.merge_adapter()
    assert [f for fqn, layer in layers_of(model).items() if (f := layerwise.fault(fqn, layer, records[fqn]))] == []


@pytest.mark.parametrize(("kind", "host"), CASES)
def test_every_kind_of_host_is_compared(kind, host):
    report = merge_and_verify(trained(kind, host), KINDS[kind].input())
    assert (report.unchecked, report.unreached) == ((), ())


# ------------------------------------------------------------------ what the outputs hide


def test_a_black_image_hides_no_convolution():
    model = adapted("vit", torch.float32)
    first = next(layer for layer in layers_of(model).values() if isinstance(layer.get_base_layer(), nn.Conv2d))
    probe = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    before = model(**probe).logits
    with (
        off_by(first, "row", 3, 3.0),
        pytest.raises(MergeError, match=r"channel 3 of vit\.embed"),
    ):
        merge_and_verify(model, probe)
    assert torch.equal(model(**probe).logits, before)
    assert merge_and_verify(model, probe).unreached == ()


def test_a_layer_of_little_influence_is_missed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        net[1].weight.mul_(1e-9)
    model = get_peft_model(net, SanConfig(target_modules=["0", "1", "2"], propagation="none")).eval()
    disturb(model)
    layer = layers_of(model)["0"]
    with forgetting(layer, "scale"), pytest.raises(MergeError, match=r"of 0 "):
        merge_and_verify(model, torch.randn(4, 6))


class Experts(nn.Module):
    """Two experts, of which the second one sees inputs with a negative first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x[:, :1] >= 0
        x, out = self.stem(x), torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (first, ~first), strict=True):
            rows = chosen.flatten().nonzero().flatten()
            out = out.index_copy(0, rows, expert(x[rows]))
        return out


def test_an_expert_without_tokens_is_compared_and_named():
    torch.manual_seed(0)
    targets = ["stem", "experts.0", "experts.1"]
    model = get_peft_model(Experts(), SanConfig(target_modules=targets, propagation="none")).eval()
    disturb(model)
    probe, idle = torch.rand(5, 4), layers_of(model)["experts.1"]
    with forgetting(idle, "scale"), pytest.raises(MergeError, match=re.escape("of experts.1 ")):
        merge_and_verify(model, probe)
    assert merge_and_verify(model, probe).unreached == ("experts.1",)


class Sum(nn.Linear):
    """A layer that wants two tensors."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x + y)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), Sum(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x), x)


def test_a_layer_that_cannot_be_compared_by_itself_is_named():
    torch.manual_seed(0)
    model = get_peft_model(Two(), SanConfig(target_modules=["a", "b"], propagation="none")).eval()
    disturb(model)
    assert merge_and_verify(model, torch.randn(5, 4)).unchecked == ("b",)


class Standardised(nn.Linear):
    """A layer whose forward pass takes the size of each row out of its weight, so that a merged scale does nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


def test_a_layer_that_does_not_compute_what_its_weight_says_is_refused():
    torch.manual_seed(0)
    net = nn.Sequential(Standardised(4, 8), nn.Linear(8, 2))
    model = get_peft_model(net, SanConfig(target_modules=["0", "1"], propagation="none")).eval()
    disturb(model)
    with pytest.raises(MergeError, match="Standardised transforms its weight"):
        merge_and_verify(model, torch.randn(5, 4))


def test_the_error_of_the_outputs_names_the_probe(monkeypatch):
    model = adapted("llama-grouped", torch.float32)
    monkeypatch.setattr("san_peft.export._check_layers", lambda layers, records: None)
    with forgetting(layers_of(model)["model.layers.0.mlp.up_proj"], "scale"):
        with pytest.raises(MergeError, match=r"output\.logits.*probe="):
            merge_and_verify(model)

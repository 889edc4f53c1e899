"""Merging with proof, and swapping adapters in place."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model
from tests.contract.nets import KINDS, disturb
from tests.golden.models import MODELS
from tests.tuner.spoiled import forgetting, parts_of
from torch import nn

from san_peft import MergeError, SanConfig, SanLayer, merge_and_verify


def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def adapted(seed: int = 0, **options):
    torch.manual_seed(0)
    model = get_peft_model(MODELS["vit"]().eval(), SanConfig(**options)).eval()
    disturb(model, seed=seed)
    return model


def test_the_report_names_what_changed():
    model = adapted()
    before = model(image()).logits
    report = merge_and_verify(model, {"pixel_values": image()})
    assert 0 < report.max_abs_difference < 1e-5
    assert report.where.startswith("output.logits[")
    assert (report.layers, report.made_biases) == (13, ())
    torch.testing.assert_close(report.model(image()).logits, before, rtol=1e-4, atol=1e-5)


def test_the_probe_is_derived():
    assert merge_and_verify(adapted()).layers == 13


def test_merged_model_saves_and_loads_without_san(tmp_path):
    import transformers as tf

    model = adapted(train_norms=True, modules_to_save=["classifier"])
    before = model(image()).logits
    merge_and_verify(model).model.save_pretrained(tmp_path)
    plain = tf.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(image()).logits, before, rtol=1e-4, atol=1e-5)


def test_a_shift_without_a_bias_makes_one_and_says_so():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 2))
    model = get_peft_model(net, SanConfig(target_modules=["0"], shift=True, propagation="none")).eval()
    disturb(model)
    report = merge_and_verify(model, torch.randn(3, 4))
    assert report.made_biases == ("0",)
    assert report.model[0].bias is not None


def assert_untouched(model, before, weights):
    assert torch.equal(model(image()).logits, before)
    for name, layer in model.named_modules():
        if isinstance(layer, SanLayer):
            assert not layer.merged
            assert torch.equal(layer.get_base_layer().weight, weights[name]), name


@pytest.mark.parametrize("training", [False, True])
def test_past_the_tolerance_the_model_is_as_it_was(training):
    model = adapted()
    before = model(image()).logits
    weights = {n: m.get_base_layer().weight.clone() for n, m in model.named_modules() if isinstance(m, SanLayer)}
    model.train(training)
    with pytest.raises(MergeError, match=r"output\.logits\[.*\] by .* of 0"):
        merge_and_verify(model, tolerance=0.0)
    assert model.training is training
    assert_untouched(model.eval(), before, weights)


def test_nan_and_broken_probe_leave_the_model_as_it_was():
    model = adapted()
    before = model(image()).logits
    weights = {n: m.get_base_layer().weight.clone() for n, m in model.named_modules() if isinstance(m, SanLayer)}
    with pytest.raises(Exception, match="size"):
        merge_and_verify(model, {"pixel_values": torch.randn(2, 3, 8, 8)})
    assert_untouched(model, before, weights)
    layer = next(m for m in model.modules() if isinstance(m, SanLayer))
    kept = layer.san_scale["default"].weight.data.clone()
    layer.san_scale["default"].weight.data[0] = float("inf")
    with pytest.raises(MergeError, match="NaN"):
        merge_and_verify(model)
    layer.san_scale["default"].weight.data = kept
    assert_untouched(model, before, weights)


def test_nothing_to_merge():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        merge_and_verify(model)
    model.unmerge_adapter()
    with model.base_model.set_mode("neuron"), pytest.raises(MergeError, match="neuron"):
        merge_and_verify(model)


# ------------------------------------------------------------------ what is held against the adapter's own effect


def small(name: str, dtype=torch.float32, size: float = 0.2, head: float = 1.0, **options):
    """A net of the contract tests with an adapter of some size, whose outputs are of another."""
    kind = KINDS[name]
    torch.manual_seed(0)
    model = get_peft_model(kind.net(dtype), kind.config(**options)).eval()
    disturb(model, size=size)
    with torch.no_grad():
        for parameter in model.base_model.model.head.parameters():
            parameter.mul_(head)
    return model, (kind.input(dtype, batch=64),)


def all_parts(name: str, dtype=torch.float32, **options) -> list[tuple[int, str]]:
    """All that can be forgotten in a net: number of the layer, and the part."""
    model, _ = small(name, dtype, **options)
    layers = (m for m in model.modules() if isinstance(m, SanLayer))
    return [(number, part) for number, layer in enumerate(layers) for part in parts_of(layer)]


@pytest.mark.parametrize(("size", "head"), [(0.2, 1.0), (0.002, 1e-4)])
@pytest.mark.parametrize("name", KINDS)
def test_each_part_of_each_layer_is_missed(name, size, head):
    """However small the outputs and the effect are, and nothing is missed where nothing is forgotten."""
    report = merge_and_verify(*small(name, size=size, head=head))
    assert report.relative < 1e-3
    assert report.max_abs_difference <= report.tolerance < report.effect
    for number, part in all_parts(name):
        model, x = small(name, size=size, head=head)
        before = model(*x)
        layer = [m for m in model.modules() if isinstance(m, SanLayer)][number]
        with forgetting(layer, part), pytest.raises(MergeError):
            merge_and_verify(model, x)
        assert torch.equal(model(*x), before), (number, part)


@pytest.mark.parametrize("name", ["dense", "dense-lora", "dense-dora", "conv2d-lora"])
def test_in_half_precision_a_tenth_is_missed(name):
    """Where a factor is a tenth from one, which is above what rounding does to the output of these nets."""
    report = merge_and_verify(*small(name, torch.bfloat16))
    assert 0 < report.relative < 0.15
    for number, part in all_parts(name):
        model, x = small(name, torch.bfloat16)
        layer = [m for m in model.modules() if isinstance(m, SanLayer)][number]
        with forgetting(layer, part), pytest.raises(MergeError):
            merge_and_verify(model, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("name", KINDS)
def test_what_rounding_does_is_accepted(name, size, dtype):
    report = merge_and_verify(*small(name, dtype, size=size))
    assert report.max_abs_difference <= report.tolerance
    if size == 0.0:
        assert (report.effect, report.relative) == (0.0, 0.0)


def test_a_lost_effect_in_small_outputs_is_found():
    """The case that an absolute floor let pass: 3.6e-5 of an effect of 5.4e-5."""
    net = nn.Sequential(OrderedDict(first=nn.Linear(4, 6), last=nn.Linear(6, 2, bias=False)))
    with torch.no_grad():
        net.last.weight.mul_(1e-3)
    model = get_peft_model(net, SanConfig(target_modules=["first", "last"], propagation="none")).eval()
    disturb(model, size=0.2)
    layer = next(m for m in model.modules() if isinstance(m, SanLayer))
    with forgetting(layer, "scale"), pytest.raises(MergeError):
        merge_and_verify(model, torch.randn(8, 4))


def test_a_tolerance_is_the_largest_difference():
    model, x = small("dense")
    with forgetting(next(m for m in model.modules() if isinstance(m, SanLayer)), "scale"):
        report = merge_and_verify(model, x, tolerance=10.0)
    assert report.tolerance == 10.0
    assert report.relative > 0.1

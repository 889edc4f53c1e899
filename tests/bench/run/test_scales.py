"""Scales of a run: out of its adapter, and out of the file that is kept of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.bench.small import short_recipe, small_scale

from san_bench.run import evaluate
from san_bench.run.evaluate import load_model
from san_bench.run.scales import FILE, RunScales, load_scales, save_scales
from san_bench.run.train import train
from san_peft.errors import SanError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs of several methods, by name."""
    root = tmp_path_factory.mktemp("runs")
    names = {"san": "san", "lora": "hosts/lora", "san-lora": "hosts/san-lora", "linear": "linear"}
    with small_scale():
        for name, recipe in names.items():
            train(short_recipe(recipe, root / name, optimizer__epochs=1))
        yield {name: root / name for name in names}


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda run: pytest.fail("the model was loaded"))


def test_own_scales_are_one_plus_what_the_adapter_holds(runs):
    scales = load_scales(runs["san"])
    saved = load_file(runs["san"] / "adapter" / "adapter_model.safetensors")
    expected = {}
    for key, offset in saved.items():
        if key.endswith(".san_scale.weight"):
            expected[key.removeprefix("base_model.model.").removesuffix(".san_scale.weight")] = (
                1 + offset.float().numpy()
            )
    assert set(scales.vectors) == set(expected)
    for layer, vector in expected.items():
        np.testing.assert_array_equal(scales.vectors[layer], vector)
        assert scales.vectors[layer].dtype == np.float32
    assert any(vector.std() > 0 for vector in expected.values())
    config = json.loads((runs["san"] / "adapter" / "adapter_config.json").read_text())
    assert scales.propagated == {edge["anterior"] for edge in config["edges"]}
    assert (scales.exponent, scales.bound, scales.propagates) == (1.0, None, True)


def test_layers_come_in_the_order_of_the_model(runs):
    layers = list(load_scales(runs["san"]).vectors)
    blocks = [int(part) for layer in layers for part in layer.split(".") if part.isdigit()]
    assert blocks == sorted(blocks)
    assert len(set(blocks)) > 1
    assert "fc2" in layers[-1]


@pytest.mark.parametrize("name", ["lora", "san-lora"])
def test_scales_of_hosts_are_ratios_of_row_norms(runs, name):
    scales = load_scales(runs[name])
    model, domain = load_model(runs[name])
    saved = load_file(runs[name] / "adapter" / "adapter_model.safetensors")
    factor = domain.recipe.method.alpha / domain.recipe.method.rank
    frozen = {key.replace(".base_layer", ""): value for key, value in model.named_parameters()}
    pairs = {key.split(".lora_A.")[0]: key for key in saved if ".lora_A." in key}
    assert {key.removeprefix("base_model.model.").replace(".base_layer", "") for key in pairs} == set(scales.vectors)
    for stem, key in pairs.items():
        layer = stem.replace(".base_layer", "")
        weight = frozen[f"{layer}.weight"].double()
        adapted = weight + factor * (saved[key.replace("lora_A", "lora_B")].double() @ saved[key].double())
        expected = (adapted.norm(dim=1) / weight.norm(dim=1)).detach().numpy()
        np.testing.assert_allclose(scales.vectors[layer.removeprefix("base_model.model.")], expected, rtol=1e-5)
        assert not np.allclose(expected, 1.0, atol=1e-7)
    assert scales.propagates == (name == "san-lora")


def test_a_run_without_an_adapter_has_no_scales(runs):
    assert load_scales(runs["linear"]) is None
    assert not (runs["linear"] / FILE).exists()


def test_the_second_time_no_model_is_loaded(runs, no_model):
    first = load_scales(runs["san"])
    assert (runs["san"] / FILE).is_file()
    again = load_scales(runs["san"])
    assert list(again.vectors) == list(first.vectors)
    assert (again.propagated, again.exponent, again.bound) == (first.propagated, first.exponent, first.bound)


def test_an_adapter_that_was_trained_again_is_read_again(runs, tmp_path):
    run = tmp_path / "run"
    load_scales(runs["san"])
    shutil.copytree(runs["san"], run)
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("fc1.san_scale.weight"))
    save_file({**tensors, key: torch.full_like(tensors[key], 0.25)}, file)
    layer = key.removeprefix("base_model.model.").removesuffix(".san_scale.weight")
    assert load_scales(run).vectors[layer].tolist() == [1.25] * len(tensors[key])


def test_the_file_is_enough_where_the_adapter_is_gone(runs, tmp_path, no_model):
    run = tmp_path / "run"
    load_scales(runs["san"])
    shutil.copytree(runs["san"], run)
    shutil.rmtree(run / "adapter")
    assert list(load_scales(run).vectors) == list(load_scales(runs["san"]).vectors)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"no tensors at all"])
def test_a_damaged_file_says_what_to_do(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(SanError, match=r"scales\.safetensors"):
        load_scales(tmp_path)


def test_what_acts_in_the_end(tmp_path):
    vectors = {"a": np.float32([2.0, -0.5]), "b": np.float32([3.0])}
    save_scales(tmp_path, RunScales(vectors, frozenset({"a"}), 0.5, None))
    scales = load_scales(tmp_path)
    np.testing.assert_allclose(scales.acting("a"), [2 * 2**0.5, 0.5 * 0.5**0.5])
    assert scales.acting("b").tolist() == [3.0]
    bounded = RunScales(vectors, frozenset({"a"}), 1.0, 0.5)
    np.testing.assert_allclose(bounded.acting("a"), [2 * (1 + 0.5 * np.tanh(2)), -0.5 * (1 + 0.5 * np.tanh(-3))])
    assert not RunScales(vectors, frozenset({"a"}), 0.0).propagates
    assert RunScales(vectors, frozenset({"a"}), 0.0).acting("a").tolist() == [2.0, -0.5]

"""`accelerate launch` with the settings that ship, on one GPU, which prepares and cuts up a model as on many."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.bench.shards import launch
from tests.bench.texts import recipe_of, small_language

from san_bench.report.groups import losses_of
from san_bench.run import launch as launching
from san_bench.run.evaluate import evaluate
from san_bench.run.train import train

pytestmark = pytest.mark.gpu
SETTINGS = sorted(launching.SETTINGS.glob("*.yaml"))
KINDS = ("san", "san-lora", "full")
BFLOAT16 = {"weights": "bf16", "precision": "bf16"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same recipes, trained by one process without Accelerate's settings."""
    folder = tmp_path_factory.mktemp("launch")
    place = small_language(folder)
    return place, {kind: train(recipe_of(place, folder / kind, kind, **BFLOAT16)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda path: path.stem)
def test_a_launch_trains_as_one_process_does(alone, settings, kind):
    if "zero" in settings.name:
        pytest.importorskip("deepspeed")
    place, results = alone
    output = place / settings.stem / kind
    file = place / f"{settings.stem}-{kind}.yaml"
    file.write_text(recipe_of(place, output, kind, **BFLOAT16).to_yaml(), encoding="utf-8")
    launch(settings, file, "--num_processes", "1", timeout=200)
    again, result = json.loads((output / "result.json").read_text()), results[kind]
    for key in ("steps", "trainable_parameters", "total_parameters", "n_test"):
        assert again[key] == result[key], key
    assert losses_of(output) == pytest.approx(losses_of(place / kind), rel=0.02)
    one, two = (load_file(next((folder / "adapter").glob("*.safetensors"))) for folder in (place / kind, output))
    assert {key: tensor.shape for key, tensor in two.items()} == {key: tensor.shape for key, tensor in one.items()}
    assert {key: tensor.dtype for key, tensor in two.items()} == {key: tensor.dtype for key, tensor in one.items()}
    apart = max(float((two[key].float() - one[key].float()).abs().max()) for key in one)
    assert apart < 0.03  # six steps of up to 0.01, rounded in other places
    assert evaluate(output)["tasks"] == again["tasks"]


def test_a_gpu_is_what_is_trained_on(alone):
    _, results = alone
    assert all(result["device"] == torch.cuda.get_device_name() for result in results.values())
    assert all(result["peak_gpu_reserved_mib"] > 0 for result in results.values())

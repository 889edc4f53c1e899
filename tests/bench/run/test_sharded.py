"""Engines of training: DeepSpeed, launched with the settings that ship, trains what one process does; what is saved.

The slow tests need deepspeed, ninja and a C++ compiler, with which DeepSpeed builds what processes of a CPU talk by.
"""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from tests.bench.shards import launch
from tests.bench.texts import recipe_of, small_language
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from san_bench.report.groups import losses_of
from san_bench.run import sharded as shards
from san_bench.run.evaluate import evaluate
from san_bench.run.launch import SETTINGS
from san_bench.run.train import train

RECIPES = {
    "san": ("san", {"selection": "best-val", "train_split": "train"}),
    "san-lora": ("san-lora", {}),
    "full": ("full", {}),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A small model with its data, and what one process makes of it."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    place = small_language(folder)
    return place, {name: train(recipe_of(place, folder / name, kind, **more)) for name, (kind, more) in RECIPES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_as_one(alone, stage, name):
    place, results = alone
    kind, more = RECIPES[name]
    output, file = place / f"zero{stage}" / name, place / f"zero{stage}-{name}.yaml"
    file.write_text(recipe_of(place, output, kind, **more).to_yaml(), encoding="utf-8")
    words = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    settings = SETTINGS / f"zero{stage}.yaml"
    launch(settings, file, *words, timeout=500, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    again, result = json.loads((output / "result.json").read_text()), results[name]
    assert (result["processes"], again["processes"]) == (1, 2)
    for key in ("steps", "trainable_parameters", "total_parameters", "n_test", "tasks"):
        assert again[key] == result[key], key
    assert losses_of(output) == pytest.approx(losses_of(place / name), rel=1e-3)
    one, two = (load_file(next((folder / "adapter").glob("*.safetensors"))) for folder in (place / name, output))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-3, rtol=1e-2)
    assert evaluate(output)["tasks"] == result["tasks"]


class Trained:
    """Trainer with a model that DeepSpeed has rounded, and with what its optimiser keeps of it."""

    is_deepspeed_enabled, is_fsdp_enabled = True, False

    def __init__(self):
        self.model = self.model_wrapped = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).bfloat16())
        self.model[0].bias.requires_grad_(False)
        self.accelerator = types.SimpleNamespace(get_state_dict=lambda model: model.state_dict())
        self.exact: dict = {}

    def step(self):
        """The optimiser keeps float32, the model gets bfloat16."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                self.exact[parameter] = parameter.data.float() + 1 / 3
            parameter.data = self.exact.get(parameter, parameter.data).bfloat16()


@pytest.fixture
def trained(monkeypatch):
    trainer = Trained()
    utils = types.SimpleNamespace(safe_get_full_fp32_param=trainer.exact.get)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    return trainer


@pytest.mark.parametrize("cut", [False, True])
def test_what_is_trained_is_what_the_optimiser_has_in_its_former_type(trained, cut, monkeypatch):
    cleared = []
    monkeypatch.setattr(shards, "unset_hf_deepspeed_config", lambda: cleared.append(True))
    first, last = trained.model
    engine = shards.ShardedModel(trained)
    trained.step()
    if cut:
        first.weight.ds_id = 0
    state = engine.finish()
    assert (state is None) == (not cut)
    found = state if cut else dict(trained.model.named_parameters())
    assert found["0.weight"].dtype == torch.float32
    assert torch.equal(found["0.weight"], trained.exact[first.weight])
    assert found["1.weight"].dtype == torch.bfloat16
    assert torch.equal(found["1.weight"], trained.exact[last.weight].bfloat16())
    assert found["0.bias"].dtype == torch.bfloat16  # frozen: as DeepSpeed left it
    assert cleared, "the next model would be cut up as well"


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp2_does_not_round_what_it_gathers(version):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    plugin = types.SimpleNamespace(fsdp_version=version, mixed_precision_policy=policy)
    accelerator = types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin))
    engines = {"is_deepspeed_enabled": False, "is_fsdp_enabled": True}
    shards.ShardedModel(types.SimpleNamespace(model=nn.Linear(2, 2), accelerator=accelerator, **engines))
    assert plugin.mixed_precision_policy == (policy if version == 1 else MixedPrecisionPolicy())

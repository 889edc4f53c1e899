"""Training in two processes, each with its half of every batch, is the training of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tests.bench.small import short_recipe, small_scale
from tests.bench.texts import recipe_of, small_language
from torch.distributed.fsdp import StateDictType

from san_bench.image.domain import load_predictions
from san_bench.report.groups import losses_of
from san_bench.run.evaluate import evaluate
from san_bench.run.launch import SETTINGS
from san_bench.run.train import train

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
from san_bench import cli
from tests.bench.shards import in_shards
from tests.bench.small import small_scale
with small_scale():
    for recipe in sys.argv[1:]:
        with in_shards("shards" in recipe):
            cli.main(["train", recipe])
"""

HALF = {"weights": "bf16", "precision": "bf16"}
SHARDED = {
    "shards-san": ("san", {}),
    "shards-san-lora": ("san-lora", {}),
    "shards-full": ("full", {}),
    "shards-half-san-lora": ("san-lora", HALF),
    "shards-half-full": ("full", HALF),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same recipes, trained by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    best = {"selection": "best-val", "train_split": "train800"}
    settings = {"san": ("san", {"ema": 0.5, "checkpoint_steps": 3}), "full": ("full", best)}
    made: dict[str, list] = {}
    with small_scale():
        for name, (recipe, more) in settings.items():
            alone, shared = (short_recipe(recipe, folder / kind / name, **more) for kind in ("alone", "shared"))
            (folder / f"{name}.yaml").write_text(shared.to_yaml(), encoding="utf-8")
            made[name] = [alone, shared, train(alone)]
    place = small_language(folder / "language")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, (kind, more) in {"text": ("san-lora", {}), **SHARDED}.items():
        alone, shared = (recipe_of(place, folder / where / name, kind, **more) for where in ("alone", "shared"))
        (folder / f"{name}.yaml").write_text(shared.to_yaml(), encoding="utf-8")
        made[name] = [alone, shared, train(alone)]
    torch.set_num_threads(threads)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", "localhost:0", str(folder / "program.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *words, *(str(folder / f"{name}.yaml") for name in made)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    assert done.stdout.count("Next: ") == len(made), "the first process alone prints"
    return made


@pytest.mark.parametrize("name", ["san", "full"])
def test_two_processes_train_as_one(both, name):
    alone, shared, result = both[name]
    folder = Path(shared.output)
    again = json.loads((folder / "result.json").read_text())
    assert (result["processes"], again["processes"]) == (1, 2)
    assert {path.name for path in folder.iterdir()} == {path.name for path in Path(alone.output).iterdir()}
    for key in ("recipe_fingerprint", "steps", "trainable_parameters", "correct", "n_test", "n_train"):
        assert again[key] == result[key], key
    logs = [losses_of(Path(r.output)) for r in (alone, shared)]
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)
    torch.testing.assert_close(
        load_predictions(folder), load_predictions(Path(alone.output)), atol=1e-3, rtol=1e-3, check_stride=False
    )
    weights = [next((Path(r.output) / "adapter").glob("*.safetensors")) for r in (alone, shared)]
    one, two = map(load_file, weights)
    assert one.keys() == two.keys()


def test_two_processes_share_the_questions_and_answer_as_one(both):
    """A batch is cut in two parts of different lengths, of which the loss is over all tokens; questions take turns."""
    alone, shared, result = both["text"]
    again = json.loads((Path(shared.output) / "result.json").read_text())
    assert (result["processes"], again["processes"]) == (1, 2)
    for key in ("steps", "train_tokens", "tasks", "ways"):
        assert again[key] == result[key], key
    logs = [losses_of(Path(r.output)) for r in (alone, shared)]
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)
    answers = [(Path(r.output) / "answers-instructions.jsonl").read_text() for r in (alone, shared)]
    assert answers[0] == answers[1]
    assert answers[0].count("\n") == 6


@pytest.mark.parametrize("name", SHARDED)
def test_a_model_in_shards_is_saved_and_scored_whole(both, name):
    alone, shared, result = both[name]
    folder, half = Path(shared.output), "half" in name
    again = json.loads((folder / "result.json").read_text())
    assert (result["processes"], again["processes"]) == (1, 2)
    for key in ("steps", "trainable_parameters", "total_parameters", *(() if half else ("tasks",))):
        assert again[key] == result[key], key
    logs = [losses_of(Path(r.output)) for r in (alone, shared)]
    assert logs[1] == pytest.approx(logs[0], rel=0.02 if half else 1e-3)
    one, two = (load_file(next((Path(r.output) / "adapter").glob("*.safetensors"))) for r in (alone, shared))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        close = {"atol": 0.03, "rtol": 0.05} if half else {"atol": 1e-3, "rtol": 1e-2}
        torch.testing.assert_close(two[key], tensor, **close)  # the type too
    assert evaluate(folder)["tasks"] == again["tasks"]


@pytest.mark.parametrize("file", sorted(SETTINGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_settings_for_accelerate_are_read_and_save_whole_weights(file):
    settings = load_config_from_file(str(file))
    assert settings.num_processes == 8
    if settings.distributed_type == DistributedType.FSDP:
        plugin = FullyShardedDataParallelPlugin(**{
            key.removeprefix("fsdp_"): value
            for key, value in settings.fsdp_config.items()
            if key not in ("fsdp_offload_params", "fsdp_auto_wrap_policy", "fsdp_version")
        }, fsdp_version=settings.fsdp_config["fsdp_version"], auto_wrap_policy="transformer_based_wrap")  # fmt: skip
        assert plugin.fsdp_version == 2
        assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    else:
        stage = settings.deepspeed_config["zero_stage"]
        assert f"zero{stage}" in file.name
        assert settings.deepspeed_config.get("zero3_save_16bit_model", False) == (stage == 3)

"""A training that is killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.bench.small import short_recipe, small_scale

from san_bench import cli
from san_bench.image.domain import load_predictions
from san_bench.run import trainer
from san_bench.run.checkpoints import last_checkpoint
from san_bench.run.evaluate import evaluate
from san_bench.run.folder import COMPLETE
from san_bench.run.train import train
from san_peft.errors import SanError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_scale():
        yield


KILLED = """
import os, signal, sys
from san_bench import cli
from san_bench.image import tasks as vision
from san_bench.run import trainer
from tests.bench.small import small_task

vision.TASKS["digits"] = small_task

def die(self, args, state, control, **kwargs):
    if state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

trainer.Journal.on_step_end = die
for recipe in sys.argv[1:]:
    child = os.fork()  # before any training, so the children start from imports alone
    if not child:
        cli.main(["train", recipe])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (recipe, status)
"""

KILLABLE = {"san": ("san", {}), "lora": ("lora-r8", {"method__dropout": 0.1}), "full": ("full", {})}


@pytest.fixture(scope="module")
def killed(small, tmp_path_factory):
    """Folders of trainings that SIGKILL ended in step 7 of 8, amid an epoch; the last checkpoint is of 6."""
    folder = tmp_path_factory.mktemp("killed")
    recipes = {
        kind: short_recipe(name, folder / kind, checkpoint_steps=3, **more) for kind, (name, more) in KILLABLE.items()
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kind, recipe in recipes.items():
        (folder / f"{kind}.yaml").write_text(recipe.to_yaml())
    words = [sys.executable, "-c", KILLED, *(str(folder / f"{kind}.yaml") for kind in recipes)]
    root = Path(__file__).parents[3]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return recipes


def losses(folder):
    rows = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["learning_rate"], row["grad_norm"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", KILLABLE)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(kind, killed, tmp_path):
    recipe = killed[kind]
    folder = Path(recipe.output)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"checkpoint-3", "checkpoint-6"}
    assert not (folder / "result.json").exists()
    resumed = train(recipe)
    assert resumed["resumed_from_step"] == 6
    name, more = KILLABLE[kind]
    train(short_recipe(name, tmp_path / kind, checkpoint_steps=3, **more))
    assert losses(folder) == losses(tmp_path / kind)
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    left, right = load_file(folder / "adapter" / file), load_file(tmp_path / kind / "adapter" / file)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert torch.equal(load_predictions(folder), load_predictions(tmp_path / kind))
    assert resumed["train_seconds"] > 0
    assert not (folder / "checkpoints").exists()


def test_a_checkpoint_without_its_marker_is_dropped(tmp_path):
    for step, whole in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / COMPLETE).write_text("1.5\n")
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert last_checkpoint(tmp_path / "none") is None


def test_a_training_starts_anew_where_the_only_checkpoint_is_half_written(tmp_path):
    broken = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    broken.mkdir(parents=True)
    (broken / "adapter_model.safetensors").write_bytes(b"half")
    recipe = short_recipe("linear", tmp_path / "run", optimizer__epochs=1, checkpoint_steps=3)
    assert train(recipe)["resumed_from_step"] == 0
    assert [p.name for p in (tmp_path / "run" / "adapter").iterdir() if p.name.startswith("model")]


@pytest.mark.parametrize("name", ["full", "san"])
def test_a_full_disk_is_one_message_and_nothing_is_half_written(name, tmp_path, capsys):
    """Files that may not grow stand for the disk: the adapter, or the model, is the first that does not fit."""
    recipe = short_recipe(name, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", str(tmp_path / "recipe.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert last.startswith("san: ")
    assert "space" in last
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    cli.main(["train", str(tmp_path / "recipe.yaml")])
    assert not list((tmp_path / "run").glob(".*"))
    assert evaluate(tmp_path / "run")["correct"] == json.loads((tmp_path / "run/result.json").read_text())["correct"]


def memory_ends_after_step_5(self, args, state, control, **kwargs):
    """In the place of `Journal.on_step_end`."""
    if state.global_step == 5:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")


def test_where_an_epoch_is_chosen_there_are_checkpoints_amid_epochs_too(tmp_path, monkeypatch):
    """Epochs of three steps: the fourth is in the second one."""
    settings = {"selection": "best-val", "train_split": "train800"}
    recipe = short_recipe("san", tmp_path / "run", checkpoint_steps=2, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Journal, "on_step_end", memory_ends_after_step_5)
        with pytest.raises(SanError, match="step 4"):
            train(recipe)
    resumed, whole = train(recipe), train(short_recipe("san", tmp_path / "whole", **settings))
    assert (resumed["resumed_from_step"], whole["steps"]) == (4, 6)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert torch.equal(load_predictions(tmp_path / "run"), load_predictions(tmp_path / "whole"))


@pytest.mark.parametrize("steps", [3, 0])
def test_too_little_memory_is_one_message_and_the_last_checkpoint_stays(steps, tmp_path, monkeypatch):
    recipe = short_recipe("san", tmp_path / "run", checkpoint_steps=steps)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Journal, "on_step_end", memory_ends_after_step_5)
        with pytest.raises(SanError) as error:
            train(recipe)
    said = str(error.value)
    assert "CUDA out of memory. Tried to allocate 2 GiB. " in said
    assert "more" not in said.split("GiB")[1].split(".")[1]
    assert ("step 3" if steps else "checkpoint_steps") in said
    assert "optimizer.accumulation" in said
    assert not (tmp_path / "run" / "result.json").exists()
    assert train(recipe)["resumed_from_step"] == steps

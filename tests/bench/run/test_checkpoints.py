"""Checkpoints: damaged ones are named and passed over, and signals stop a training after saving one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.bench.small import short_recipe, small_scale

from san_bench import cli
from san_bench.config.errors import Stopped
from san_bench.image.domain import Images, load_predictions
from san_bench.run import trainer
from san_bench.run.checkpoints import StopRequest, complete, last_checkpoint, seconds_of
from san_bench.run.train import train
from san_peft.errors import SanError


@pytest.fixture(autouse=True, scope="module")
def small():
    with small_scale():
        yield


def saved(folder: Path, step: int, best: str | None = None) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(bytes(range(100)))
    (checkpoint / "optimizer.pt").write_bytes(b"optimizer" * 10)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_model_checkpoint": best}))
    complete(checkpoint, step / 2)
    return checkpoint


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "complete"])
def test_a_checkpoint_cut_at_any_byte_is_named_and_the_one_before_it_is_used(name, tmp_path, capsys):
    saved(tmp_path, 3)
    content = (saved(tmp_path, 6) / name).read_bytes()
    cuts = (
        range(len(content) - 1) if name == "complete" else range(len(content))
    )  # a marker without its newline is whole
    for size in cuts:
        shutil.rmtree(tmp_path / "checkpoint-6", ignore_errors=True)
        (saved(tmp_path, 6) / name).write_bytes(content[:size])
        found = last_checkpoint(tmp_path)
        assert found == tmp_path / "checkpoint-3", size
        assert str(tmp_path / "checkpoint-6") in capsys.readouterr().err
        assert not (tmp_path / "checkpoint-6").exists()
    assert seconds_of(tmp_path / "checkpoint-3") == 1.5


def test_a_changed_byte_and_a_missing_file_are_damage_too(tmp_path, capsys):
    (saved(tmp_path, 3) / "optimizer.pt").write_bytes(b"optimizeR" * 10)
    (saved(tmp_path, 6) / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) is None
    assert capsys.readouterr().err.count("optimizer.pt") == 2


def test_a_checkpoint_needs_the_best_one(tmp_path, capsys):
    """Its weights are loaded at the end of a training with `selection: best-val`."""
    saved(tmp_path, 2)
    best = saved(tmp_path, 4, "elsewhere/checkpoint-4")
    saved(tmp_path, 6, str(best))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    (best / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4" in capsys.readouterr().err


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """SIGINT as in the foreground; a shell ignores it in what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_signal_stops_at_once(capfd):
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    assert "SIGTERM" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(left: Path, right: Path) -> None:
    one, other = weights(left), weights(right)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert torch.equal(load_predictions(left), load_predictions(right))
    rows = [json.loads((folder / "result.json").read_text()) for folder in (left, right)]
    kept = [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]
    assert kept[0] == kept[1]


MEASURED = {
    *("run", "finished", "energy_joules", "resumed_from_step", "peak_gpu_reserved_mib", "commit"),
    *("train_seconds", "step_seconds", "total_seconds", "peak_rss_mib", "peak_rss_growth_mib"),
}
"""Entries of a result that are measured, or say how often a run was interrupted."""


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["term", "int"],
)
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(number, code, tmp_path, monkeypatch, capsys):
    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), number)

    recipe = short_recipe("san", tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Journal, "on_step_end", stop)
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", str(tmp_path / "recipe.yaml")])
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert f"san: {number.name}: " in said
    assert "step 3 of 8" in said
    assert not (tmp_path / "run" / ".lock").exists()
    assert last_checkpoint(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "checkpoint-3"


@pytest.mark.slow
def test_a_run_that_a_signal_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = short_recipe("san", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Journal, "on_step_end", stop)
        with pytest.raises(Stopped):
            train(recipe)
    assert train(recipe)["resumed_from_step"] == 3
    train(short_recipe("san", tmp_path / "whole"))
    assert_same(tmp_path / "run", tmp_path / "whole")


def broken(*_):
    raise SanError("The image test/9.png is broken.")


def train_without_scoring(recipe, monkeypatch) -> None:
    """Trains a run whose scoring fails."""
    with monkeypatch.context() as patch:
        patch.setattr(Images, "score", broken)
        with pytest.raises(SanError, match=r"test/9\.png"):
            train(recipe)


def test_a_run_whose_scoring_failed_is_scored_again_not_trained_again(tmp_path, monkeypatch, capsys):
    recipe = short_recipe("san", tmp_path / "run", optimizer__epochs=1)

    train_without_scoring(recipe, monkeypatch)
    assert (tmp_path / "run" / "trained.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "train", broken)
        train(recipe)
    assert not (tmp_path / "run" / "trained.json").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["san", "linear", "full", "lora-r8"])
def test_every_kind_of_method_is_scored_again_alike(name, tmp_path, monkeypatch):
    recipe = short_recipe(name, tmp_path / "run", optimizer__epochs=1)

    train_without_scoring(recipe, monkeypatch)
    again, whole = train(recipe), train(short_recipe(name, tmp_path / "whole", optimizer__epochs=1))
    for key in ("predictions_sha256", "saved_activation_mib", "total_parameters", "trainable_parameters", "final_loss"):
        assert again[key] == whole[key], key


@pytest.mark.slow
def test_damaged_weights_of_an_unscored_run_are_trained_again(tmp_path, monkeypatch, capsys):
    recipe = short_recipe("linear", tmp_path / "run", optimizer__epochs=1)

    train_without_scoring(recipe, monkeypatch)
    (file,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    assert train(recipe)["steps"] == 4
    assert "damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt"])
def test_a_run_with_a_damaged_newest_checkpoint_ends_alike(name, tmp_path, monkeypatch, capsys):
    def fail(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise SanError("stopped")

    recipe = short_recipe("san", tmp_path / "run", checkpoint_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Journal, "on_step_end", fail)
        with pytest.raises(SanError, match="stopped"):
            train(recipe)
    file = tmp_path / "run" / "checkpoints" / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert train(recipe)["resumed_from_step"] == 2
    assert name in capsys.readouterr().err
    train(short_recipe("san", tmp_path / "whole", checkpoint_steps=2))
    assert_same(tmp_path / "run", tmp_path / "whole")


ALARMS = """
import json, os, signal, sys

import peft, san_peft, san_bench.run.train  # so that the children start from imports alone
from san_bench import cli
from san_bench.image import tasks as vision
from tests.bench.small import small_task

task = small_task()
vision.TASKS["digits"] = lambda: task

def child(recipe, delay):
    number = os.fork()
    if not number:
        signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM ends a process without cleaning up, like SIGKILL
        cli.main(["train", recipe])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])

recipes, delays = sys.argv[1].split(","), json.loads(sys.argv[2])
killed = 0
for recipe, delay in zip(recipes, delays):
    killed += child(recipe, delay) == -signal.SIGALRM
    assert child(recipe, 0) == 0, recipe
print(killed)
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path):
    """Twenty random moments: while loading, in a step, in a save (there is one after each step), or in scoring."""
    points = 20
    recipes = [short_recipe("san", tmp_path / f"run{place}", checkpoint_steps=1) for place in range(points)]
    for place, recipe in enumerate(recipes):
        (tmp_path / f"{place}.yaml").write_text(recipe.to_yaml())
    train(short_recipe("san", tmp_path / "whole", checkpoint_steps=1))
    seconds = json.loads((tmp_path / "whole" / "result.json").read_text())["total_seconds"]
    draw = random.Random(0)
    delays = [draw.uniform(0.1, 1.2 * seconds) for _ in range(points)]
    files = ",".join(str(tmp_path / f"{place}.yaml") for place in range(points))
    done = subprocess.run(
        [sys.executable, "-c", ALARMS, files, json.dumps(delays)], cwd=Path(__file__).parents[3], text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) > points // 4
    for place in range(points):
        assert_same(tmp_path / f"run{place}", tmp_path / "whole")

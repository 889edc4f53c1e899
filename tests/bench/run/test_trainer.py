"""What a recipe asks of the Trainer: averages, selection, mixing, accumulation, decay."""

from __future__ import annotations

import json

import pytest
import torch
from tests.bench.small import SIZES, built, short_recipe, small_scale, small_task

from san_bench.image.domain import Images, load_predictions
from san_bench.run.evaluate import evaluate
from san_bench.run.train import train
from san_bench.run.trainer import Journal, make_trainer
from san_peft.errors import SanError


@pytest.fixture(autouse=True)
def small():
    with small_scale():
        yield


def test_accumulating_halves_is_one_batch(tmp_path):
    whole = short_recipe("san", tmp_path / "whole")
    halves = short_recipe("san", tmp_path / "halves", optimizer__accumulation=2)
    assert train(whole)["steps"] == train(halves)["steps"]
    torch.testing.assert_close(*(load_predictions(tmp_path / n) for n in ("whole", "halves")), atol=1e-4, rtol=1e-4)


def test_the_seconds_of_a_step_are_those_of_the_median(tmp_path):
    journal = Journal(tmp_path)
    assert journal.step_seconds is None
    journal.ends = [10.0, 12.0, 12.5, 99.0, 100.0]  # the third step was followed by an evaluation
    assert journal.step_seconds == 1.5


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(SanError, match=r"optimizer.accumulation: 3 parts do not divide a batch of 16"):
        short_recipe("san", tmp_path, optimizer__accumulation=3)
    recipe = short_recipe("san", tmp_path, precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(SanError, match="fp16"):
            make_trainer(built(recipe), Images(recipe, small_task()), tmp_path)


@pytest.mark.parametrize("kind", ["san", "full"])
def test_the_best_epoch_is_what_is_saved(kind, tmp_path):
    changes = {"train_split": "train800", "eval_split": "test", "optimizer__epochs": 3}
    recipe = short_recipe(kind, tmp_path / "run", selection="best-val", **changes)
    result = train(recipe)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    scores = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    assert len(scores) == 3
    assert result["selection"] == "best-val"
    assert evaluate(tmp_path / "run", "val200")["accuracy"] == max(scores)
    assert evaluate(tmp_path / "run")["predictions_sha256"] == result["predictions_sha256"]


def test_validation_images_in_the_training_split_select_nothing(tmp_path):
    with pytest.raises(SanError, match="selection: train800val200 contains the validation split"):
        short_recipe("san", tmp_path, selection="best-val")
    with pytest.raises(SanError, match=r"selection: .*last.*best-test"):
        short_recipe("san", tmp_path, selection="best-test", ema=0.9)


@pytest.mark.slow
def test_the_average_is_what_is_scored(tmp_path):
    """With a decay of nearly one the average stays at the start, with nearly none it is the last step's weights."""
    plain = short_recipe("san", tmp_path / "plain")
    train(plain)
    for name, decay in (("slow", 1 - 1e-9), ("quick", 1e-9)):
        train(short_recipe("san", tmp_path / name, ema=decay))
    untrained = built(plain).eval()
    last, slow, quick = (load_predictions(tmp_path / name) for name in ("plain", "slow", "quick"))
    from san_bench.image.domain import predict

    torch.testing.assert_close(slow, predict(untrained, small_task()["test"], plain), atol=1e-4, rtol=0)
    torch.testing.assert_close(quick, last, atol=1e-5, rtol=0)
    assert (slow - last).abs().max() > 0.01


@pytest.mark.slow
def test_an_average_resumes(tmp_path):
    """Cut off after the first checkpoint and started again, a run ends where one that was not cut off does."""
    changes = {"ema": 0.8, "checkpoint_steps": 3}
    train(short_recipe("san", tmp_path / "whole", **changes))
    recipe = short_recipe("san", tmp_path / "cut", **changes)
    task = small_task()
    trainer, journal = make_trainer(built(recipe, task), Images(recipe, task), tmp_path / "cut")
    journal.begin(None)

    def stop(args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 4
        return control

    journal.on_step_end = stop
    trainer.train()
    assert train(recipe)["resumed_from_step"] == 3
    assert torch.equal(load_predictions(tmp_path / "whole"), load_predictions(tmp_path / "cut"))


@pytest.mark.parametrize("change", [{"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}, {"smoothing": 0.1}])
def test_mixed_and_smoothed_labels_train(change, tmp_path):
    changes = {f"augmentation__{key}": value for key, value in change.items()}
    result = train(short_recipe("linear", tmp_path / "run", channels_last=True, **changes))
    plain = train(short_recipe("linear", tmp_path / "plain"))
    assert result["n_test"] == SIZES["test"]
    assert result["final_loss"] > plain["final_loss"], "the loss of a mixture cannot come as low"


def test_sgd_with_a_floor_and_vectors_without_decay(tmp_path):
    changes = {"kind": "sgd", "warmup_lr": 0.1, "min_lr": 0.2, "decay_vectors": False, "warmup": 0.25}
    recipe = short_recipe("san", tmp_path, **{f"optimizer__{key}": value for key, value in changes.items()})
    task = small_task()
    trainer, journal = make_trainer(built(recipe, task), Images(recipe, task), tmp_path)
    journal.begin(None)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    decayed, free = trainer.optimizer.param_groups
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() == 1 for p in free["params"])
    assert free["weight_decay"] == 0
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates[0] == pytest.approx(0.1 * recipe.optimizer.lr)
    assert max(rates) == pytest.approx(recipe.optimizer.lr)
    assert min(rates[3:]) >= 0.2 * recipe.optimizer.lr

"""Training that starts from a trained adapter or a graph file, and what a dry run says of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.bench.small import SIZES, built, short_recipe, small_scale, small_task
from transformers import EarlyStoppingCallback

from san_bench import cli
from san_bench.image.domain import Images
from san_bench.models.start import check_start
from san_bench.run.dry import dry_run
from san_bench.run.evaluate import evaluate
from san_bench.run.train import train
from san_bench.run.trainer import make_trainer
from san_peft import GraphError, SanError, detach_san, trace

LORA = "hosts/lora"


@pytest.fixture(scope="module", autouse=True)
def small():
    with small_scale():
        yield


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA adapter with weights as after training, in the layout of a run."""
    folder = tmp_path_factory.mktemp("lora")
    model = built(short_recipe(LORA, folder))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "adapter")
    return folder


def over(folder, **changes):
    method = {"method__kind": "san-lora", "method__host": str(folder)}
    return short_recipe(LORA, folder / "over", **{**method, **changes})


def logits(model):
    batch = Images(short_recipe("san", "x"), small_task()).probe(8)
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_san_over_a_trained_lora_and_back(lora, tmp_path):
    recipe = over(lora)
    check_start(recipe.method)
    model = built(recipe)
    base = Images(recipe, small_task()).base_model()
    plain = PeftModel.from_pretrained(base, lora / "adapter")
    assert model.base_model.propagation_graph.edges
    assert sum("lora_" in name and p.requires_grad for name, p in model.named_parameters()) > 0
    before = logits(model)
    assert (before - logits(plain)).abs().max() > 1e-3, "the scales of a trained adapter are propagated"
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(Images(recipe, small_task()).base_model(), tmp_path / "saved")
    torch.testing.assert_close(logits(again), before)
    torch.testing.assert_close(logits(detach_san(model)), logits(plain))


def test_an_adapter_that_does_not_fit_is_refused(lora, tmp_path):
    with pytest.raises(SanError, match=r"san-dora needs an adapter of kind dora, but .* is lora"):
        check_start(over(lora, method__kind="san-dora").method)
    with pytest.raises(SanError, match=r"san needs an adapter of kind san, but .* is lora"):
        check_start(short_recipe("san", tmp_path, **{"method__from": str(lora)}).method)
    with pytest.raises(SanError, match=r"nowhere holds no PEFT adapter"):
        check_start(over(tmp_path / "nowhere").method)
    with pytest.raises(SanError, match=r"method.rank is 4, but .* was trained with 8"):
        built(short_recipe(LORA, tmp_path, **{"method__from": str(lora), "method__rank": 4}))


def test_an_adapter_that_lacks_a_tensor_is_refused(lora, tmp_path):
    shutil.copytree(lora / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if "lora_A" in key)]
    save_file(tensors, file)
    with pytest.raises(SanError, match="is incomplete for embedded"):
        built(over(tmp_path))
    file.write_bytes(b"nothing")
    with pytest.raises(SanError, match="does not fit"):
        built(over(tmp_path))


def test_a_graph_comes_from_a_file(tmp_path):
    base = Images(short_recipe("san", tmp_path), small_task()).base_model()
    graph = trace(base)
    few = graph.with_edges(graph.edges[:3])
    file = tmp_path / "graph.json"
    file.write_text(few.to_json())
    model = built(short_recipe("san", tmp_path, method__graph=str(file)))
    assert model.base_model.propagation_graph.edges == few.edges
    with pytest.raises(SanError, match=r"method.graph: there is no file"):
        check_start(short_recipe("san", tmp_path, method__graph=str(tmp_path / "nowhere")).method)
    file.write_text("[]")
    with pytest.raises(GraphError):
        built(short_recipe("san", tmp_path, method__graph=str(file)))


def test_a_dry_run_measures_and_writes_nothing(tmp_path):
    recipe = short_recipe("san", tmp_path / "run", selection="best-val", train_split="train800", checkpoint_steps=1)
    needs = dry_run(recipe)
    assert not list(tmp_path.iterdir())
    assert needs["train"].startswith("48 images")
    assert needs["steps"].startswith("6 of 16 images")
    assert "10,410 of 1,267,860 (0.82%)" in needs["trained parameters"]
    parts = {key: float(text.split()[0].replace(",", "")) for key, text in needs.items() if key.startswith("memory: ")}
    assert parts.keys() == {
        "memory: weights", "memory: gradients", "memory: optimizer states", "memory: activations of 16 images",
        "memory: sum",
    }  # fmt: skip
    assert parts["memory: weights"] == pytest.approx(1_267_860 * 4 / 2**20, rel=0.05)
    assert parts["memory: optimizer states"] == pytest.approx(2 * parts["memory: gradients"], abs=0.1)
    assert parts["memory: activations of 16 images"] > 10


def test_controls_are_those_of_the_trainer(tmp_path):
    changes = {"train_split": "train800", "selection": "best-val", "eval_steps": 2, "patience": 3}
    recipe = short_recipe("linear", tmp_path, **changes, optimizer__max_steps=5, checkpoint_steps=3)
    trainer, _ = make_trainer(built(recipe), Images(recipe, small_task()), tmp_path)
    arguments = trainer.args
    assert (arguments.max_steps, arguments.eval_steps, arguments.save_steps) == (5, 2, 2)
    assert (arguments.eval_strategy, arguments.save_strategy) == ("steps", "steps")
    assert (arguments.load_best_model_at_end, arguments.metric_for_best_model) == (True, "accuracy")
    assert len(trainer.eval_dataset) == SIZES["val200"], "never the test split"
    stops = [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
    assert [one.early_stopping_patience for one in stops] == [3]
    plain = short_recipe("linear", tmp_path)
    trainer, _ = make_trainer(built(plain), Images(plain, small_task()), tmp_path)
    assert (trainer.args.eval_strategy, trainer.args.max_steps, trainer.eval_dataset) == ("no", -1, None)


@pytest.mark.slow
def test_training_is_evaluated_stopped_early_and_limited(tmp_path):
    """With a rate that changes nothing, no evaluation is better than the first."""
    changes = {"train_split": "train800", "selection": "best-val", "eval_steps": 1, "patience": 1}
    result = train(short_recipe("linear", tmp_path / "run", **changes, optimizer__lr=1e-12))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert result["steps"] == 2
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [1, 2]
    few = {"optimizer__max_steps": 3, "train_split": "train800", "eval_steps": 2}
    result = train(short_recipe("linear", tmp_path / "few", **few))
    rows = [json.loads(line) for line in (tmp_path / "few" / "log.jsonl").read_text().splitlines()]
    assert (result["steps"], result["selection"]) == (3, "last")
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["san", "ssf", "san-lora", "lora-r8"])
def test_a_finished_run_is_trained_on(kind, tmp_path, capsys):
    name = f"hosts/{kind}" if kind == "san-lora" else kind
    first = short_recipe(name, tmp_path / "first")
    result = train(first)
    (tmp_path / "first.yaml").write_text(first.to_yaml())
    words = [f"method.from={tmp_path / 'first'}", f"output={tmp_path / 'more'}", "optimizer.epochs=1"]
    cli.main(["train", str(tmp_path / "first.yaml"), *words])
    more = json.loads((tmp_path / "more" / "result.json").read_text())
    losses = [json.loads(line).get("loss") for line in (tmp_path / "more" / "log.jsonl").read_text().splitlines()]
    assert losses[0] < 2.2, "an untrained head has a loss of about ln 10"
    assert list(more["start_sha256"]) == ["adapter_model.safetensors"]
    assert more["trainable_parameters"] == result["trainable_parameters"]
    assert evaluate(tmp_path / "more")["predictions_sha256"] == more["predictions_sha256"]
    cli.main(["train", str(tmp_path / "first.yaml")])
    assert f"method.from={tmp_path / 'first'}" in capsys.readouterr().out

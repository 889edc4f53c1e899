"""Runs of language models: from a recipe to answers, an adapter that gives them again, and rows for tables."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import peft
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tests.bench.texts import METHODS, gpt2, llama, llama2, question, recipe_of, small_language, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from san_bench import cli
from san_bench.config.suite import Choice, Suite, plan
from san_bench.language.mini import tasks as world
from san_bench.models.adapt import with_method
from san_bench.report.figures.analysis import analyse
from san_bench.report.groups import losses_of
from san_bench.report.page.html import write_report
from san_bench.report.tables.table import table_command
from san_bench.run import evaluate as evaluating
from san_bench.run.domain import domain_of
from san_bench.run.evaluate import evaluate, export, export_lora, load_model
from san_bench.run.results import read_rows, trainings
from san_bench.run.scales import load_scales
from san_bench.run.train import train
from san_bench.suites.engines import Outcome
from san_bench.suites.suite import bench
from san_peft.errors import SanError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: (train(recipe_of(place, folder / kind, kind)), folder / kind) for kind in METHODS}


# What is trained


@pytest.mark.parametrize("kind", METHODS)
def test_a_result_says_what_was_trained_and_how_it_answered(runs, kind):
    result, folder = runs[kind]
    assert (result["n_train"], result["n_test"], result["steps"]) == (18, 6, 6)  # two of 20 are held out
    assert (result["loss_on"], result["template"], result["trained_on"]) == ("answer", "clean", "instructions")
    assert result["trainable_head"] == 0
    (task,) = result["tasks"].values()
    assert task["accuracy"] == result["accuracy"] == task["correct"] / 6
    rows = [json.loads(line) for line in (folder / "answers-instructions.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["false", "true"] * 3
    assert sum(row["correct"] for row in rows) == task["correct"]
    assert sum(row["predicted"] is None for row in rows) == task["unanswered"]
    chosen = [json.loads(line) for line in (folder / "likelihoods-instructions.jsonl").read_text().splitlines()]
    assert result["ways"]["likelihood"]["instructions"]["correct"] == sum(row["correct"] for row in chosen)
    tokens = domain_of(evaluating.run_recipe(folder)).tokens("train")
    assert result["train_tokens"] == 2 * sum(len(one["input_ids"]) for one in tokens.examples)


def test_methods_train_what_they_should_and_nothing_of_the_output(place, tmp_path):
    for kind in METHODS:
        domain = domain_of(recipe_of(place, tmp_path, kind))
        model = with_method(domain.base_model(), domain.recipe)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert any("lm_head" in name for name in trained) == (kind == "full")
        if kind == "san":
            assert any("input_layernorm" in name for name in trained)
            assert model.base_model.propagation_graph.edges
            assert isinstance(model, peft.PeftModelForCausalLM)
        if kind == "lora":
            layers = {name.split(".")[-4] for name in trained}
            assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_losses_fall_and_do_not_depend_on_accumulation(place, tmp_path):
    """A batch in parts has the loss over all its tokens, though parts differ in length."""
    losses = []
    for parts in (1, 3):
        train(recipe_of(place, tmp_path / str(parts), "lora", optimizer__accumulation=parts, optimizer__epochs=3))
        losses.append(losses_of(tmp_path / str(parts)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_packing_computes_the_same_loss(place, tmp_path):
    """Records that share a row must neither see each other nor count on."""
    domain = domain_of(recipe_of(place, tmp_path, "lora", text__packing=True))
    model = domain.base_model().eval()
    training = domain.training(model)
    items = [training.dataset[n] for n in range(5)]
    packed, padded = training.collate(items), training.plain(items)
    assert packed["input_ids"].shape == (1, sum(len(item["input_ids"]) for item in items))
    assert padded["input_ids"].shape[0] == 5
    with torch.no_grad():
        one, other = model(**packed), model(**padded)
    assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-4)
    rows = [row[: len(item["input_ids"])] for row, item in zip(other.logits, items, strict=True)]
    torch.testing.assert_close(one.logits[0], torch.cat(rows), atol=1e-3, rtol=1e-3)
    model.set_attn_implementation("eager")
    with pytest.raises(SanError, match="Packing needs sdpa"):
        domain.training(model)


def test_gradient_checkpointing_changes_no_loss(place, tmp_path, runs):
    train(recipe_of(place, tmp_path / "run", "san", gradient_checkpointing=True))
    rows = [losses_of(folder) for folder in (tmp_path / "run", runs["san"][1])]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_the_epoch_with_the_smallest_loss_on_held_out_records_is_kept(place, tmp_path):
    """Where the held-out answers are the opposite of the others, more training makes them less likely."""
    opposite = [replace(question(n), output="the correct answer is false", answer="false") for n in (1, 3)]
    write(tmp_path / "data" / "train.json", [question(n) for n in range(1, 37, 2)])
    write(tmp_path / "data" / "val.json", opposite)
    write(tmp_path / "data" / "test.json", [question(5)])
    changes = {"selection": "best-val", "optimizer.epochs": 8, "optimizer.lr": 0.1, "data": str(tmp_path / "data")}
    result = train(recipe_of(place, tmp_path / "run", "lora", **changes))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(losses) == 8
    assert min(losses) < losses[-1] * 0.99  # else the last would do
    model, domain = load_model(tmp_path / "run")
    batch = domain.training(model).plain([domain.tokens("val")[n] for n in range(2)])
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(min(losses), rel=1e-3)
    assert result["selection"] == "best-val"


# What is left


@pytest.mark.parametrize("kind", METHODS)
def test_a_saved_run_answers_as_it_did(runs, kind, capsys):
    result, folder = runs[kind]
    again = evaluate(folder)
    assert again["tasks"] == result["tasks"]
    assert again["ways"] == result["ways"]
    cli.main(["eval", str(folder), "--split", "val"])
    assert json.loads((folder / "eval-val.json").read_text())["n_test"] == 2
    pairs = (re.split(r" {2,}", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines())
    lines = dict(pair for pair in pairs if len(pair) == 2)
    score = json.loads((folder / "eval-val.json").read_text())["tasks"]["instructions"]["accuracy"]
    assert lines["instructions by generation"] == f"{score:.4g} of 2"
    assert "tasks" not in lines


def test_scales_of_a_run_can_be_read(runs):
    scales = load_scales(runs["san"][1])
    assert scales is not None
    assert scales.propagates
    assert any(name.endswith("v_proj") for name in scales.vectors)


def test_a_card_says_what_an_adapter_is(runs, place):
    result, folder = runs["san"]
    card = ModelCard.load(folder / "adapter" / "README.md")
    model, _ = load_model(folder)
    edges = model.base_model.propagation_graph.edges
    assert f"## Edges: {len(edges)}" in card.text
    assert f"{edges[0].anterior} -> {edges[0].posterior}" in card.text
    assert f"| Trained parameters | {result['trainable_parameters']:,} of {result['total_parameters']:,} |" in card.text
    assert f"`model`, weights with sha256 `{result['checkpoint_sha256']}`" in card.text
    assert "import san_peft" in card.text
    assert str(place) not in card.content
    scores = {score.metric_name: score.metric_value for score in card.data.eval_results}
    assert scores == {
        "accuracy by generation": result["accuracy"],
        "accuracy by likelihood": result["ways"]["likelihood"]["instructions"]["accuracy"],
    }
    assert f"| instructions | test | generation | {result['accuracy']:.4f} | 6 |" in card.text
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert "a full model" in (runs["full"][1] / "adapter" / "README.md").read_text()
    lora = (runs["lora"][1] / "adapter" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in lora
    assert "san_peft" not in lora


def test_an_export_needs_nothing_of_ours(runs, tmp_path):
    _, folder = runs["san"]
    report = export(folder, tmp_path / "plain")
    model, domain = load_model(folder)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    batch = tokenizer("Is 3 odd?", return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-3)
    assert report["max_abs_difference"] < 1e-3
    lora = export_lora(folder, tmp_path / "lora", 8)
    assert lora["lost_share_of_the_change"] < 1
    assert domain.recipe.method.kind == "san"


# Rows


def test_a_run_is_a_row_for_each_task_and_way(runs, capsys):
    result, folder = runs["lora"]
    rows = read_rows([folder])
    assert [(row["task"], row["way"]) for row in rows] == [("instructions", w) for w in ("generation", "likelihood")]
    assert rows[0]["accuracy"] == result["accuracy"]
    assert rows[1]["accuracy"] == result["ways"]["likelihood"]["instructions"]["accuracy"]
    cli.main(["table", str(folder)])
    printed = capsys.readouterr().out
    assert "by generation" in printed
    assert "by likelihood" in printed


# Bad input


def test_what_cannot_be_trained_is_said_at_once(place, tmp_path):
    with pytest.raises(SanError) as error:
        recipe_of(place, tmp_path, method={"kind": "linear"}, text__loss_on="all", eval_split="train", nonsense=1)
    text = str(error.value)
    for part in ("loss_on: 'all'", "nonsense", "eval_split: 'train'"):
        assert part in text
    with pytest.raises(SanError, match="method: linear "):
        recipe_of(place, tmp_path, method={"kind": "linear"})
    with pytest.raises(SanError, match="full trains the weights, and nf4 cannot be trained"):
        recipe_of(place, tmp_path, "full", weights="nf4")
    with pytest.raises(SanError, match="scoring: lm-eval"):
        recipe_of(place, tmp_path, scoring__ways=["lm-eval"])
    with pytest.raises(SanError, match=r"unknown task 'mini-langage'\. Did you mean 'mini-language'"):
        recipe_of(place, tmp_path, task="mini-langage")
    with pytest.raises(SanError, match="contains the validation split"):
        recipe_of(place, tmp_path, train_split="trainval", selection="best-val")


def test_a_model_that_is_not_one_is_an_error_that_names_it(place, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SanError, match="empty cannot be loaded as a language model: Unrecognized model"):
        domain_of(recipe_of(place, tmp_path, model=str(tmp_path / "empty"))).base_model()
    llama(40).save_pretrained(tmp_path / "bare")
    with pytest.raises(SanError, match="bare has no tokenizer that transformers can load"):
        domain_of(recipe_of(place, tmp_path, model=str(tmp_path / "bare"))).base_model()
    tokenizer = llama2()
    tokenizer.save_pretrained(tmp_path / "small")
    llama(len(tokenizer) - 4).save_pretrained(tmp_path / "small")
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    with pytest.raises(SanError, match="embedding: padding"):
        domain_of(recipe_of(place, tmp_path, model=str(tmp_path / "small"), text__pad=last)).base_model()


def test_a_cutoff_that_leaves_no_answer_is_an_error(place, tmp_path):
    with pytest.raises(SanError, match="18 records"):
        train(recipe_of(place, tmp_path / "run", text__cutoff=8))


def test_other_decoders_are_traced_as_well(place, tmp_path):
    tokenizer = llama2()
    tokenizer.save_pretrained(tmp_path / "gpt2")
    gpt2(len(tokenizer)).save_pretrained(tmp_path / "gpt2")
    result = train(recipe_of(place, tmp_path / "run", "san", model=str(tmp_path / "gpt2"), optimizer__epochs=1))
    assert math.isfinite(result["final_loss"])
    assert result["trainable_parameters"] > 0


# A suite whose tasks share one training


@pytest.fixture(scope="module")
def benched(place, tmp_path_factory):
    """mini-language cut down to four records a task to train with, two to hold out and three to ask."""
    folder = tmp_path_factory.mktemp("suite")
    names = [f"mini-language/{name}" for name in world.TASKS]
    protocol = yaml.safe_load(recipe_of(place, folder / "nowhere", "lora").to_yaml())
    given = ("task", "data", "model", "method", "seed", "train_split", "eval_split", "output", "protocol")
    protocol = {key: value for key, value in protocol.items() if key not in given}
    del protocol["optimizer"]["lr"]
    protocol["text"]["cutoff"] = 900  # the tokenizer knows few words
    (folder / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    suite = Suite.model_validate(
        {
            "protocol": str(folder / "protocol.yaml"),
            "groups": {"forms": names},
            "mix": "mini-language",
            "models": {"small": str(place / "model")},
            "methods": {kind: METHODS[kind] for kind in ("san", "lora")},
            "modes": ["neuron"],
            "verify": True,
            "settings": {},
            "search": {"tasks": [], "seeds": [100], "grid": {"default": [1e-3, 1e-2]}, "per": "suite"},
            "rates": {},
        }
    )
    splits = {"train": slice(0, 4), "val": slice(4, 6), "test": slice(6, 9)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "SPLITS", splits)
        world._load.cache_clear()
        rows = bench(suite, "tiny", Choice(methods=("san",)), folder / "out", Here(), search=True).rows
        again = Here()
        lora = Choice(methods=("lora",), overrides={"optimizer.lr": 0.01})
        rows += bench(suite, "tiny", lora, folder / "out", again).rows
        bench(suite, "tiny", Choice(methods=("san",)), folder / "out", again)
    world._load.cache_clear()
    assert again.ran == ["lora"]  # what is done is not repeated
    return suite, rows, folder / "out", splits


class Here:
    """An engine without processes."""

    def __init__(self):
        self.ran = []

    def run(self, function, jobs):
        for name, job in jobs.items():
            self.ran.append(job["labels"]["method"])
            yield Outcome(name, function(job), None)


@pytest.mark.slow
def test_one_training_is_scored_on_every_task_of_a_mix(benched):
    suite, rows, out, _ = benched
    own = [row for row in rows if row["method"] == "san"]
    assert [row["task"] for row in own if row["way"] == "generation"] == list(suite.tasks)
    assert [row["task"] for row in own if row["way"] == "likelihood"] == list(suite.tasks)
    assert {(row["trained_on"], row["group"], row["n_train"], row["n_test"]) for row in own} == {
        ("mini-language", "forms", 48, 3)
    }
    assert len({row["run"] for row in own}) == 1
    assert all(set(row["modes"]) == {"neuron"} for row in own)
    assert all("modes" not in row for row in rows if row["method"] == "lora")
    assert all(row["reload_max_abs_difference"] == 0.0 < row["merge_max_abs_difference"] < 1e-3 for row in rows)
    assert all(row["merge_changed_predictions"] == 0 for row in rows)
    chosen = json.loads((out / "rates.json").read_text())["small"]["san"]
    trials = [json.loads(line) for line in (out / "search" / "rows.jsonl").read_text().splitlines()]
    assert {row["split"] for row in trials} == {"val"}
    sums = {lr: sum(r["accuracy"] for r in trials if r["lr"] == lr and r["way"] == "generation") for lr in (1e-3, 1e-2)}
    assert chosen == min(sums, key=lambda lr: (-sums[lr], lr))  # by the first way alone
    with pytest.raises(SanError, match=r"mini-language .* --tasks"):
        plan(suite, Choice(tasks=("mini-language/easy",)))


def test_tables_pictures_and_the_report_count_a_training_once(benched, capsys):
    _, rows, out, _ = benched
    table_command([out], "markdown")
    printed = capsys.readouterr().out
    assert "tiny, small" in printed
    means = next(part for part in printed.split("**") if "by generation: means" in part)
    assert means
    found = analyse(out)
    bars = {record["method"]: record for record in found["accuracy"]}
    mine = [row["accuracy"] for row in rows if row["method"] == "lora" and row["way"] == "generation"]
    assert bars["lora"]["mean"] == pytest.approx(sum(mine) / 8)
    assert (bars["lora"]["n_tasks"], bars["lora"]["n_runs"]) == (8, 8)
    assert [(record["method"], record["task"], record["n_runs"]) for record in found["curves"]] == [
        ("lora", "mini-language", 1), ("san", "mini-language", 1)
    ]  # fmt: skip
    write_report(out, out / "report.html")
    page = (out / "report.html").read_text()
    assert ">2</dd>" in page or ">2<" in page
    assert len(trainings(rows)) == 2

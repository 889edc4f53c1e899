"""What language models are trained on and asked: records of one's own, and those of commonsense reasoning."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import datasets
import pytest
from tests.bench import texts
from tests.bench.texts import question, recipe_of, small_language, write

from san_bench.config.recipe import load_recipe
from san_bench.language.commonsense import find_task
from san_bench.language.domain import Texts
from san_bench.language.instructions import Instruction, load_records
from san_bench.language.tasks import hold_out, load_text_task
from san_bench.run.domain import domain_of
from san_bench.run.results import read_rows
from san_bench.run.train import train
from san_peft.errors import SanError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_language(tmp_path_factory.mktemp("language"))


def test_what_is_held_out_depends_on_the_number_of_records_alone():
    parts = hold_out([question(n) for n in range(30)])
    assert {name: len(part) for name, part in parts.items()} == {"train": 27, "val": 3, "trainval": 30}
    assert sorted(parts["train"] + parts["val"], key=str) == sorted(parts["trainval"], key=str)
    assert hold_out([question(n) for n in range(100, 130)])["val"] == tuple(
        question(n + 100) for n in range(30) if question(n) in parts["val"]
    )
    assert len(hold_out([question(n) for n in range(1300)])["val"]) == 120


def test_own_records_have_answers_that_can_be_sought_or_free_ones(tmp_path, place):
    write(tmp_path / "train.json", [question(n) for n in range(4)])
    free = [[Instruction("a", "", "b", "")], [Instruction("a", "", f"b{n}", f"b{n}") for n in range(99)]]
    for records in free:
        write(tmp_path / "test.json", records)
        (asked,) = load_text_task("instructions", tmp_path).asked("test").values()
        assert (asked.answers, asked.sought) == ((), ())
        with pytest.raises(SanError, match=r"likelihood needs .* scoring.ways=\[exact\]"):
            domain_of(recipe_of(place, tmp_path / "run", data=str(tmp_path)))
    write(
        tmp_path / "test.json", [Instruction("a", "", f"b{n}", f"b{n}") for n in range(98)]
    )  # 100 with true and false
    assert len(load_text_task("instructions", tmp_path).questions["test"]["instructions"].answers) == 100
    write(tmp_path / "test.json", [Instruction("a", "", f"it is {n}", f"answer{n}") for n in (1, 12)])
    task = load_text_task("instructions", tmp_path)
    (asked,) = task.asked("test").values()
    assert asked.read_answer("so answer12 it is") == "answer12"  # not answer1
    assert asked.read_answer("no answer") is None
    with pytest.raises(SanError, match=r"no questions .* 'other'.* val, test"):
        task.asked("other")
    with pytest.raises(SanError, match="needs a data folder"):
        load_text_task("commonsense")


def test_free_answers_are_scored_word_for_word_and_without_a_test_split(tmp_path, place):
    names = [("cat", "meow"), ("dog", "bark")] * 10
    write(
        tmp_path / "data" / "train.json", [Instruction(f"What says the {a}?", "", f"It says {b}", "") for a, b in names]
    )
    recipe = recipe_of(
        place, tmp_path / "run", "full", data=str(tmp_path / "data"), eval_split="val", scoring__ways=["exact"],
        scoring__max_new_tokens=12, optimizer__epochs=20,
    )  # fmt: skip
    result = train(recipe)
    assert (result["accuracy"], result["n_test"], result["way"]) == (1.0, 2, "exact")
    rows = [json.loads(line) for line in (tmp_path / "run" / "outputs-instructions.jsonl").read_text().splitlines()]
    assert [row["predicted"] for row in rows] == [row["answer"] for row in rows]
    assert {row["answer"] for row in rows} <= {"It says meow", "It says bark"}
    with pytest.raises(SanError, match=r"no questions .* 'test'.* val"):
        domain_of(recipe_of(place, tmp_path / "none", data=str(tmp_path / "data"), scoring__ways=["exact"]))


def test_commonsense_trains_on_the_mix_and_is_scored_on_eight(tmp_path):
    write(tmp_path / "commonsense_170k.json", [texts.record(task) for task in texts.TASKS] * 3)
    for task in texts.TASKS:
        write(tmp_path / task / "test.json", [texts.record(task)] * 2)
    task = load_text_task("commonsense", tmp_path)
    assert {name: len(part) for name, part in task.splits.items()} == {"train": 22, "val": 2, "trainval": 24}
    assert list(task.asked("test")) == [f"commonsense/{name}" for name in texts.TASKS]
    ((name, held_out),) = task.asked("val").items()
    assert (name, held_out.records) == ("commonsense/held-out", task.splits["val"])
    assert held_out.read_answer("so it is ending2, not answer1") == "ending2"
    assert {"true", "false", "solution1", "answer5", "ending4", "option2"} <= set(held_out.answers)
    assert {record.answer for record in task.splits["trainval"]} <= set(held_out.answers)
    recipe = {"data": str(tmp_path), "train_split": "train", "eval_split": "val"}
    assert Texts(load_recipe("language/llama-7b-lora", recipe)).task.fingerprint == task.fingerprint
    mirror = datasets.Dataset.from_list(
        [record.fields() for record in load_records(tmp_path / "commonsense_170k.json")]
    )
    (tmp_path / "commonsense_170k.json").unlink()
    with pytest.raises(SanError, match=r"no training mix: neither commonsense_170k.json, .* nor a folder"):
        load_text_task("commonsense", tmp_path)
    mirror.to_parquet(tmp_path / "commonsense_170k" / "data" / "train-00000-of-00001.parquet")  # as the hub has it
    assert load_text_task("commonsense", tmp_path).fingerprint == task.fingerprint
    mirror.to_parquet(tmp_path / "commonsense_170k.parquet")
    assert load_text_task("commonsense", tmp_path).fingerprint == task.fingerprint


def test_a_run_scored_by_lm_eval_has_its_numbers_of_questions(tmp_path, place, monkeypatch):
    write(tmp_path / "commonsense_170k.json", [texts.record(task) for task in texts.TASKS] * 3)
    for task in texts.TASKS:
        write(tmp_path / task / "test.json", [texts.record(task)] * 2)
    names = {name: facts.lm_eval for name, facts in map(find_task, texts.TASKS)}
    output = {
        "results": {name: {"acc,none": 0.25, "acc_stderr,none": 0.1} for name in names.values()},
        "n-samples": {name: {"original": 8, "effective": 8} for name in names.values()},
    }
    recipe = recipe_of(
        place, tmp_path / "run", "lora", task="commonsense", data=str(tmp_path), optimizer__epochs=1,
        scoring__ways=["generation", "lm-eval"],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SanError, match="lm-eval needs lm_eval, which is missing"):
        train(recipe)
    assert not (tmp_path / "run" / "log.jsonl").exists()  # before the training
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=lambda **given: output))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", SimpleNamespace(HFLM=lambda **given: None))
    result = train(recipe)
    own = result["ways"]["lm-eval"]["commonsense/boolq"]
    assert (own["n_test"], own["correct"], own["accuracy"], own["acc_stderr"]) == (8, 2, 0.25, 0.1)
    assert result["tasks"]["commonsense/boolq"]["n_test"] == 2
    rows = read_rows([tmp_path / "run"])
    assert len(rows) == 16
    assert {(row["way"], row["n_test"]) for row in rows} == {("generation", 2), ("lm-eval", 8)}


def test_a_single_commonsense_task_holds_out_its_own(tmp_path):
    write(tmp_path / "piqa" / "train.json", [texts.record("piqa")] * 10)
    write(tmp_path / "piqa" / "test.json", [texts.record("piqa")] * 2)
    task = load_text_task("commonsense/piqa", tmp_path)
    (asked,) = task.asked("val").values()
    assert list(task.asked("val")) == ["commonsense/piqa"]
    assert asked.answers == ("solution1", "solution2")
    assert len(asked.records) == 1

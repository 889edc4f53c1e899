"""One's own data in a run: sources, splits, mixing, streaming, scoring by loss, and what is checked beforehand."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter

import datasets
import pytest
import torch
from tests.bench.texts import recipe_of, small_language, write
from transformers import AutoTokenizer

from san_bench import cli
from san_bench.datacheck.check import examine
from san_bench.language.formats import Chat, Completion
from san_bench.language.own import load_own
from san_bench.language.prompts import IGNORED
from san_bench.language.recipe import OwnData
from san_bench.language.stream import StreamedExamples, open_stream
from san_bench.language.tasks import load_text_task
from san_bench.run.domain import domain_of
from san_bench.run.evaluate import evaluate, export, load_model
from san_bench.run.results import read_rows
from san_bench.run.train import train
from san_peft.errors import SanError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_language(tmp_path_factory.mktemp("language"))


def chat(number: int) -> dict:
    asked = {"role": "user", "content": f"Is {number} odd?"}
    return {"messages": [asked, {"role": "assistant", "content": "Yes." if number % 2 else "No."}]}


def pair(number: int) -> dict:
    return {"prompt": f"{number} is ", "completion": "odd" if number % 2 else "even"}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def halves(records):
    return records[1:], records[:1]


# Sources


def test_every_source_gives_the_same_records(tmp_path, monkeypatch):
    rows = [pair(n) for n in range(5)]
    rows[3]["prompt"] = 'None, "NA"\nand 1 is '  # what readers of tables make something else of
    table = datasets.Dataset.from_list(rows)
    lines(tmp_path / "a.jsonl", rows)
    write(tmp_path / "a.json", rows)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    lines(tmp_path / "folder" / "train.jsonl", rows)
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        tables = {"train": table, "test": table.select([0])}
        return {split: part.to_iterable_dataset() for split, part in tables.items()} if options else tables

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = ["a.jsonl", "a.json", "a.csv", "a.parquet", "one", "saved", "folder"]
    sources = [*(str(tmp_path / name) for name in names), "someone/texts"]
    for source in sources:
        found = load_own(OwnData(train=source), halves)
        assert [one.item for one in found["trainval"]] == [Completion(**r) for r in rows_of(rows)], source
        assert ("test" in found) == (source in (sources[5], "someone/texts"))
        stream = open_stream(OwnData(train=source, eval=source, streaming=True, max_steps=1))
        assert [one.item for one in stream.sample] == [one.item for one in found["trainval"]]
    assert ("someone/texts", {"streaming": True}) in asked


def rows_of(rows):
    return [{"prompt": row["prompt"], "output": row["completion"]} for row in rows]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,completion\na,b,c\n", r"row 1: .*1 cells more"),
        ("prompt,completion\na\n", "row 1: completion is missing"),
        ('prompt,completion\na,b\n"a', "after row 1"),
        ("", "no records"),
    ],
)
def test_bad_tables_name_the_row(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(SanError, match=rf"bad\.csv(.|\n)*{message}"):
        load_text_task("instructions", tmp_path / "bad.csv")


def test_a_deep_line_is_an_invalid_record(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000 + "\n" + '{"text": "b"}\n')
    with pytest.raises(SanError, match=r"deep\.jsonl: 1 of 3 records(.|\n)*line 2: "):
        load_text_task("instructions", tmp_path / "deep.jsonl")


@pytest.mark.parametrize("broken", ["dataset_dict.json", "train/state.json", "train/dataset_info.json"])
@pytest.mark.parametrize("content", ["", "[]"])
def test_a_damaged_dataset_is_an_error(tmp_path, broken, content):
    datasets.DatasetDict({"train": datasets.Dataset.from_list([pair(1)] * 3)}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / broken).write_text(content)
    with pytest.raises(SanError, match=r"saved.* (dataset|splits)"):
        load_text_task("instructions", tmp_path / "saved")


def test_names_that_cannot_be_are_errors(tmp_path):
    for name in ("a" * 300, f"{tmp_path}/{'b' * 300}.json", "a/b/c", "none.jsonl", ""):
        with pytest.raises(SanError):
            load_text_task("instructions", name or tmp_path)


# Splits


def test_what_is_held_out_depends_on_content_and_seed_alone(tmp_path):
    rows = [pair(n) for n in range(40)] * 2
    first = lines(tmp_path / "a.jsonl", rows)
    second = lines(tmp_path / "b.jsonl", reversed(rows))
    texts = {}
    for name, data in {
        "one": OwnData(train=first, held_out=0.2),
        "reversed": OwnData(train=second, held_out=0.2),
        "other": OwnData(train=first, held_out=0.2, seed=1),
    }.items():
        found = load_own(data, halves)
        assert (len(found["test"]), len(found["train"]), len(found["trainval"])) == (16, 63, 64)
        texts[name] = {one.item for one in found["test"]}
        assert len(texts[name]) == 8  # both copies of a record
        assert not texts[name] & {one.item for one in found["trainval"]}
    assert texts["one"] == texts["reversed"] != texts["other"]
    with pytest.raises(SanError, match=r"a\.jsonl: 0 training record"):
        load_own(OwnData(train=first, held_out=0.999), halves)


def test_the_test_split_is_never_used_to_select(tmp_path, place):
    own = lines(tmp_path / "a.jsonl", [pair(n) for n in range(30)])
    other = lines(tmp_path / "b.jsonl", [pair(n) for n in range(30, 34)])
    for data in ({"train": own, "eval": other}, {"train": own, "held_out": 0.2}):
        domain = domain_of(recipe_of(place, tmp_path / "run", data=data, selection="best-val", scoring__ways=["loss"]))
        parts = {split: set(domain.task.records(split)) for split in ("train", "val", "test")}
        assert all(parts.values())
        assert not parts["train"] & parts["val"] | parts["test"] & (parts["train"] | parts["val"])
        model = domain.base_model()
        assert domain.training(model).chosen_by is domain.tokens("val")


def test_sources_are_mixed_by_weight_until_one_ends(tmp_path):
    many = lines(tmp_path / "many.jsonl", [pair(n) for n in range(400)])
    few = lines(tmp_path / "few.jsonl", [chat(n) for n in range(100)])
    data = OwnData(train=[{"path": many, "weight": 3}, {"path": few, "weight": 1}], held_out=0.1)
    found = load_own(data, halves)
    counts = Counter(one.part for one in found["train"])
    assert sum(counts.values()) < 440
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.2)
    assert max(Counter(map(str, (one.item for one in found["train"]))).values()) == 1
    assert found["train"] == load_own(data, halves)["train"]
    assert len(load_own(OwnData(train=[many, few]), halves)["trainval"]) == 500
    lines(tmp_path / "few.jsonl", [chat(1)])
    with pytest.raises(SanError, match=r"No record of .*few\.jsonl"):
        load_own(data.model_copy(update={"held_out": None}), lambda records: (records[:-1], records[-1:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": ["a", {"path": "b", "weight": 2}]}}, r"data.train: 1 of 2 sources"),
        ({"data": {"train": "a", "eval": "b", "held_out": 0.1}}, r"data.held_out: "),
        ({"data": {"train": "a", "held_out": 1.0}}, r"data.held_out: "),
        ({"data": {"train": "a", "heldout": 0.1}}, r"data.heldout: .*'held_out'"),
        ({"data": {"train": "a", "format": "alpac"}}, r"data.format: .*'alpaca'"),
        ({"data": {"train": "a", "streaming": True, "eval": "b"}}, r"data.max_steps: "),
        ({"data": {"train": "a", "max_steps": 3}}, r"data.max_steps: "),
        ({"data": {"train": "a", "streaming": True, "max_steps": 3}}, r"data.eval: "),
        ({"data": {"train": ["a", "b"], "streaming": True, "max_steps": 3, "eval": "c"}}, r"data.train: "),
        ({"data": {"train": "a", "eval": {"path": "b", "weight": 1}}}, r"data.eval: "),
        ({"data": {"eval": "b"}}, r"data.train: is missing"),
        ({"data": 3}, r"data: 3 is neither"),
        ({"data": {"train": "a"}, "task": "commonsense"}, r"data: commonsense"),
        (
            {"data": {"train": "a", "streaming": True, "max_steps": 3, "eval": "b"}, "selection": "best-val"},
            r"data: .*selection last, optimizer.epochs 1",
        ),
    ],
)
def test_settings_that_do_not_fit_name_their_key(place, tmp_path, changes, message):
    with pytest.raises(SanError, match=message):
        recipe_of(place, tmp_path, **changes)


def test_settings_are_part_of_a_recipes_fingerprint_and_locations_are_not(place, tmp_path):
    recipes = [
        recipe_of(place, tmp_path, data=data)
        for data in ("a", {"train": "a"}, {"train": "b"}, {"train": "a", "held_out": 0.1}, {"train": "a", "eval": "c"})
    ]
    prints = [recipe.fingerprint for recipe in recipes]
    assert prints[1] == prints[2] == prints[4]
    assert len({prints[0], prints[1], prints[3]}) == 3
    assert "chat_template" not in recipes[0].to_yaml()
    assert recipe_of(place, tmp_path, text__chat_template="chatml").fingerprint != prints[0]


# Runs


def test_chats_train_and_are_scored_by_loss(place, tmp_path, capsys):
    data = {"train": lines(tmp_path / "chats.jsonl", [chat(n) for n in range(30)]), "held_out": 0.2}
    changes = {"data": data, "text.chat_template": "alpaca", "scoring.ways": ["loss", "exact"], "optimizer.lr": 0.1}
    with pytest.raises(SanError, match=r"no chat template.*text.chat_template"):
        train(recipe_of(place, tmp_path / "none", data=data, scoring__ways=["loss"]))
    assert not (tmp_path / "none" / "log.jsonl").exists()
    result = train(recipe_of(place, tmp_path / "run", "lora", **changes, optimizer__epochs=6, selection="best-val"))
    assert (result["n_train"], result["n_test"], result["way"]) == (22, 6, "loss")
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["loss"] < 1.5
    rows = [json.loads(line) for line in (tmp_path / "run" / "losses-instructions.jsonl").read_text().splitlines()]
    total = sum(row["tokens"] for row in rows)
    assert result["loss"] == pytest.approx(sum(row["loss"] * row["tokens"] for row in rows) / total)
    assert result["accuracy"] == sum(row["correct"] for row in rows) / total
    model, domain = load_model(tmp_path / "run")
    batch = domain.training(model).plain([domain.tokens("test")[n] for n in range(6)])
    with torch.no_grad():
        assert result["loss"] == pytest.approx(float(model(**batch).loss), rel=1e-4)
    said = [json.loads(line) for line in (tmp_path / "run" / "outputs-instructions.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in said} <= {"Yes.", "No."}
    assert all(re.fullmatch(r"Is \d+ odd\?", row["instruction"]) for row in said)
    assert {row["generated"] for row in said} <= {"Yes.", "No."}  # it has learnt where a turn ends
    assert evaluate(tmp_path / "run")["perplexity"] == pytest.approx(result["perplexity"])
    assert [row["way"] for row in read_rows([tmp_path / "run"])] == ["loss", "exact"]
    export(tmp_path / "run", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = tokenizer.apply_chat_template(chat(1)["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<s>### Instruction:\nIs 1 odd?\n\n### Response:\n"


def test_formats_have_loss_where_they_should(place, tmp_path):
    rows = {
        "completion": [pair(n) for n in range(4)],
        "text": [{"text": f"{n} is a number"} for n in range(4)],
        "alpaca": [{"instruction": f"Say {n}", "output": str(n)} for n in range(4)],
    }
    first = {"completion": "even</s>", "text": "<s> 0 is a number</s>", "alpaca": "0</s>"}
    for form, records in rows.items():
        data = {"train": lines(tmp_path / f"{form}.jsonl", records), "held_out": 0.1}
        domain = domain_of(
            recipe_of(place, tmp_path / "run", data=data, scoring__ways=["loss"], train_split="trainval")
        )
        (example, *_) = [
            one
            for one, record in zip(domain.tokens("trainval"), domain.task.records("trainval"), strict=True)
            if "0" in str(record)
        ] or [domain.tokens("test")[0]]
        text = domain.tokenizer.tokenizer.decode([label for label in example["labels"] if label != IGNORED])
        assert text.replace("<s>0", "<s> 0") == first[form]
    with pytest.raises(SanError, match=r"likelihood needs .* scoring.ways=\[exact\]"):
        domain_of(recipe_of(place, tmp_path / "run", data=data))
    data = {"train": str(tmp_path / "text.jsonl"), "held_out": 0.1}
    with pytest.raises(SanError, match=r"exact needs prompts.*scoring.ways=\[loss\]"):
        domain_of(recipe_of(place, tmp_path / "run", data=data, scoring__ways=["exact"]))


def test_everything_is_looked_at_before_the_model_is_loaded(place, tmp_path, monkeypatch):
    from san_bench.language.domain import Texts

    monkeypatch.setattr(Texts, "base_model", lambda self: pytest.fail("the model was loaded"))
    rows = [chat(n) for n in range(20)]
    rows[4]["messages"][1]["content"] = "No, " * 100
    template = tmp_path / "strict.jinja"
    template.write_text("{% if 'Is 3 ' in messages[0].content %}{{ raise_exception('no 3') }}{% endif %}a")
    same = {"eval": lines(tmp_path / "test.jsonl", [*rows[:2], chat(99)]), "train": lines(tmp_path / "a.jsonl", rows)}
    changes = {"data": same, "text.cutoff": 64, "scoring.ways": ["loss"], "train_split": "trainval"}
    found = domain_of(recipe_of(place, tmp_path / "run", **changes, text__chat_template="alpaca")).inspect()
    assert found.errors == ()
    text = "\n".join(found.remarks)
    assert re.search(r"trainval: 1 of 20 records are longer .* lose \d+ of .*a\.jsonl, line 5", text)
    assert re.search(r"test: 2 of 3 records are also training records: .*test\.jsonl, line 1", text)
    with pytest.raises(SanError, match=r"(.|\n)*a\.jsonl, line 4: .*no 3"):
        train(recipe_of(place, tmp_path / "run", **changes, text__chat_template=str(template)))


# Streams


def test_a_stream_is_read_in_order_and_by_position(tmp_path):
    many = lines(tmp_path / "many.jsonl", [pair(n) for n in range(60)])
    few = lines(tmp_path / "few.jsonl", [chat(n) for n in range(30)])
    parts = [{"path": many, "weight": 1}, {"path": few, "weight": 1}]
    stream = open_stream(OwnData(train=parts, eval=few, streaming=True, max_steps=9))
    assert stream.forms == ("completion", "messages")
    records = list(stream.records())
    assert records == list(stream.records()) != list(stream.records(1))
    kinds = Counter(type(record.item) for record in records)
    assert kinds[Chat] > 20
    assert kinds[Completion] > 20
    assert all(re.search(r"(many|few)\.jsonl, line \d+$", record.place) for record in records)

    def encode(record):
        return None if isinstance(record.item, Chat) else {"input_ids": [record.place]}

    examples = StreamedExamples(stream, encode, 200)
    everything = [examples[n] for n in range(len(examples))]  # goes on from the start
    first = [{"input_ids": [one.place]} for one in records if isinstance(one.item, Completion)]
    assert everything[: len(first)] == first
    assert everything[len(first) : 2 * len(first)] != first
    assert (examples[150], examples[3]) == (everything[150], everything[3])
    with pytest.raises(SanError, match="no record of the stream"):
        StreamedExamples(stream, lambda one: None, 3)[0]


def test_a_stream_trains_for_its_steps(place, tmp_path):
    own = lines(tmp_path / "a.jsonl", [pair(n) for n in range(20)])
    data = {"train": own, "eval": own, "streaming": True, "max_steps": 4}
    changes = {"data": data, "scoring.ways": ["loss"], "optimizer.epochs": 1, "optimizer.batch_size": 8}
    result = train(recipe_of(place, tmp_path / "run", "lora", **changes, optimizer__accumulation=2))
    assert (result["steps"], result["n_train"], result["n_test"], result["train_tokens"]) == (4, 32, 20, None)


@pytest.mark.slow
def test_a_stream_resumes_where_it_was(place, tmp_path, monkeypatch):
    own = lines(tmp_path / "a.jsonl", [chat(n) for n in range(20)])
    data = {"train": own, "eval": lines(tmp_path / "b.jsonl", [chat(90)]), "streaming": True, "max_steps": 5}
    changes = {"data": data, "text.chat_template": "chatml", "scoring.ways": ["loss"], "optimizer.epochs": 1}
    whole = train(recipe_of(place, tmp_path / "whole", "lora", **changes, checkpoint_steps=2))

    class Stop(Exception):
        pass

    from san_bench.run.trainer import Journal

    def stop(self, args, state, control, **rest):
        if state.global_step == 3:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "on_step_begin", stop)
        with pytest.raises(Stop):
            train(recipe_of(place, tmp_path / "parts", "lora", **changes, checkpoint_steps=2))
    parts = train(recipe_of(place, tmp_path / "parts", "lora", **changes, checkpoint_steps=2))
    assert parts["resumed_from_step"] == 2
    assert parts["final_loss"] == pytest.approx(whole["final_loss"], rel=1e-5)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_bad_record_of_a_stream_is_named(tmp_path):
    own = lines(tmp_path / "a.jsonl", [pair(n) for n in range(1100)] + [{"prompt": "a"}])
    stream = open_stream(OwnData(train=own, eval=own, streaming=True, max_steps=5))
    with pytest.raises(SanError, match=r"a\.jsonl, line 1101: completion is missing"):
        list(stream.records())
    lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": 3}])
    with pytest.raises(SanError, match=r"a\.jsonl: 1 of 1 (.|\n)*completion is 3"):
        open_stream(OwnData(train=own, eval=own, streaming=True, max_steps=5))


# The check of data


def test_the_check_reports_all_splits(place, tmp_path, capsys):
    rows = [chat(n) for n in range(12)]
    rows[3]["messages"][1]["content"] = ""
    rows[4]["messages"].insert(0, {"role": "assistant", "content": "So? " * 30})
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "train.jsonl", rows)
    lines(tmp_path / "data" / "test.jsonl", [chat(7), chat(98), chat(98)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(place, tmp_path / "run", text__chat_template="alpaca", text__cutoff=64).to_yaml())
    cli.main(["data", "check", "instructions", str(tmp_path / "data"), "--recipe", str(recipe)])
    text = capsys.readouterr().out
    for pattern in (
        r"instructions/train: 12 records in the format messages, 13 turns of the assistant, [\d,]+ tokens",
        r"instructions/train: 1 of 12 records have empty parts: .*train.jsonl, line 4 turn 1 \(assistant\)",
        r"instructions/train: 1 of 12 records have roles out of order: .*line 5 turn 0 \(assistant after start\)",
        r"instructions/train: 1 of 12 records are longer than the cutoff and lose \d+ of .*line 5",
        r"instructions/test: 1 of 3 records repeat an earlier one: .*test.jsonl, line 3",
        r"instructions/test: 1 of 3 records are also training records: .*line 1",
        r"0 errors",
    ):
        assert re.search(pattern, text), (pattern, text)
    assert "tokens" not in examine("instructions", tmp_path / "data")[0].layout
    lines(tmp_path / "data" / "train.jsonl", [*rows, {"messages": 3}, "no"])
    with pytest.raises(SystemExit):
        cli.main(["data", "check", "instructions", str(tmp_path / "data")])
    assert (
        "error: instructions/train: 2 of 14 records are invalid: train.jsonl, line 13: messages is 3"
        in capsys.readouterr().out
    )
    with pytest.raises(SanError, match=r"takes one of the task instructions"):
        examine("instructions", tmp_path / "data", recipe="language/san")
    with pytest.raises(SanError, match=r"use instructions"):
        examine("instructions/a", tmp_path / "data")
    with pytest.raises(SanError, match="Checksums"):
        examine("instructions", tmp_path / "data", checksums=recipe)

"""Records of instructions, and the eight tasks of commonsense reasoning."""

from __future__ import annotations

import hashlib
import json

import datasets
import pyarrow
import pyarrow.parquet as parquet
import pytest
from tests.bench.texts import TASKS, record, write

from san_bench.datacheck.check import check_command, examine
from san_bench.datacheck.fetch import fetch
from san_bench.datacheck.manifest import Facts, Manifest, load_manifest
from san_bench.language import commonsense
from san_bench.language.instructions import FIELDS, Instruction, Questions, fingerprint, load_records
from san_peft.errors import SanError

ROWS = [record(task) for task in TASKS]
PUBLISHED = load_manifest("commonsense").tasks


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def table(records):
    return {name: [getattr(one, name) for one in records] for name in FIELDS}


# Loading


def test_every_kind_of_source_gives_the_same_records(tmp_path):
    sources = [write(tmp_path / "list.json", ROWS)]
    for name in ("lines.jsonl", "lines.json"):
        sources.append(tmp_path / name)
        lines = [json.dumps({**one.fields(), "extra": 1}) for one in ROWS]
        sources[-1].write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    sources.append(tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.table({**table(ROWS), "extra": list(range(8))}), sources[-1])
    saved = datasets.Dataset.from_dict(table(ROWS))
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "dict"))
    for i, part in enumerate((ROWS[:5], ROWS[5:])):
        path = tmp_path / "parts" / "data" / f"train-0000{i}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(table(part)), path)
    sources += [tmp_path / name for name in ("saved", "dict", "parts")]
    assert {load_records(source) for source in sources} == {tuple(ROWS)}


def test_a_folder_of_several_splits_wants_one_of_them(tmp_path):
    write(tmp_path / "train.json", ROWS[:2])
    write(tmp_path / "validation.json", ROWS[2:])
    assert load_records(tmp_path, "val") == tuple(ROWS[2:])
    with pytest.raises(SanError, match="has several splits; choose one of them: train, val"):
        load_records(tmp_path)
    with pytest.raises(SanError, match="has no split 'test'; it has: train, val"):
        load_records(tmp_path, "test")


def test_every_bad_record_is_listed_at_once(tmp_path):
    good = record("boolq").fields()
    rows = [
        good,
        {name: good[name] for name in ("instruction", "input", "output")},
        {**good, "input": None, "output": 3},
        {**good, "instruction": " \n"},
        {**good, "answer": "True"},
        ["no", "record"],
    ]
    path = write(tmp_path / "test.json", rows)
    with pytest.raises(SanError) as caught:
        load_records(path, answers=("true", "false"))
    assert str(caught.value).splitlines() == [
        f"{path}: 5 of 6 records are invalid. Each needs the strings instruction, input, output, answer.",
        "  index 1: answer is missing",
        "  index 2: input is None, not a string; output is 3, not a string",
        "  index 3: instruction is empty",
        "  index 4: answer 'True' is not one of true, false",
        "  index 5: a list, not a record",
    ]


def test_the_list_of_bad_records_ends(tmp_path):
    path = write(tmp_path / "test.json", [{}] * 100)
    with pytest.raises(SanError, match=r"100 of 100 records(.|\n)*index 19: instruction is missing.*\n  and 80 more$"):
        load_records(path)


def test_bad_lines_are_named_by_their_number(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(f"{json.dumps(ROWS[0].fields())}\n\n{{'x'}}\n", encoding="utf-8")
    with pytest.raises(SanError, match=r"1 of 2 records(.|\n)*line 3: not JSON \("):
        load_records(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[{]", "JSON list"),
        ("a.json", b"[]", "contains no records"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.parquet", b"no table", "parquet"),
    ],
)
def test_a_file_that_is_something_else_says_so(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SanError, match=message):
        load_records(tmp_path / name)


def test_what_is_not_here_is_looked_for_on_the_hub(tmp_path, monkeypatch):
    with pytest.raises(SanError, match=r"There is no file or folder missing\.json"):
        load_records("missing.json")
    with pytest.raises(SanError, match=r"no records: no \.json"):
        load_records(tmp_path)
    with pytest.raises(SanError, match=r"`hf download someone/texts --repo-type dataset --local-dir DIR`"):
        load_records("someone/texts")  # the tests have no network
    asked = []
    hub = datasets.DatasetDict({"train": datasets.Dataset.from_dict(table(ROWS))})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or hub)
    assert load_records("someone/texts", "train") == tuple(ROWS)
    assert asked == ["someone/texts"]


def test_the_fingerprint_follows_the_records_alone(tmp_path):
    one = Instruction("é", "", "b", "c")
    expected = hashlib.sha256(b'["\\u00e9", "", "b", "c"]\n').hexdigest()
    assert fingerprint([one]) == expected
    paths = [write(tmp_path / name / "test.json", ROWS) for name in ("here", "there")]
    assert len({fingerprint(load_records(path)) for path in paths}) == 1
    assert fingerprint(ROWS) != fingerprint(ROWS[::-1])


# The eight tasks


def test_the_published_sizes():
    assert tuple(PUBLISHED) == TASKS == commonsense.TASKS
    sizes = [facts.splits["test"] for facts in PUBLISHED.values()]
    assert sizes == [3270, 1838, 1954, 10042, 1267, 2376, 1172, 500]
    assert sum(facts.splits["train"] for facts in PUBLISHED.values()) == 170_420


@pytest.mark.parametrize(
    ("name", "task"),
    [("siqa", "social_i_qa"), ("SIQA", "social_i_qa"), ("commonsense/arc_easy", "ARC-Easy"), ("BoolQ", "boolq")],
)
def test_a_task_is_known_by_several_names(name, task):
    assert commonsense.find_task(name)[0] == task


def test_an_unknown_task_is_an_error():
    with pytest.raises(SanError, match=r"no task 'piqua'. Did you mean 'piqa'\? Choose from boolq, piqa"):
        commonsense.find_task("piqua")


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "it is false, not true", "false"),
        ("boolq", "True", None),
        ("piqa", "solution12", "solution1"),
        ("piqa", "solution3 solution2", "solution2"),
        ("social_i_qa", "answer5", "answer5"),  # sought, though never right
        ("hellaswag", "ending4", "ending4"),
        ("hellaswag", "ending5", None),
        ("winogrande", "the correct answer is option2", "option2"),
        ("openbookqa", "Answer1 or answer3", "answer3"),
        ("ARC-Easy", "", None),
    ],
)
def test_the_first_answer_counts_and_so_does_its_case(task, text, answer):
    facts = commonsense.find_task(task)[1]
    assert Questions((), facts.answers, facts.sought).read_answer(text) == answer


def small(**splits):
    """A manifest of the eight tasks with the sizes of a small copy."""
    splits = splits or {"train": 2, "test": 3}
    facts = {n: Facts(**{**vars(f), "splits": splits}) for n, f in PUBLISHED.items()}
    return Manifest("commonsense", "made up", "nowhere", facts)


@pytest.fixture
def data(tmp_path):
    for task in TASKS:
        write(tmp_path / "dataset" / ("siqa" if task == "social_i_qa" else task) / "test.json", [record(task)] * 3)
    return tmp_path / "dataset"


def said(found):
    return [f"{problem.level}: {problem}" for one in found for problem in one.problems]


def test_every_task_loads_from_the_layout_of_the_community(data):
    for task in TASKS:
        facts = PUBLISHED[task]
        assert commonsense.load_test(task, data) == Questions(
            (record(task),) * 3, facts.answers, facts.sought, facts.lm_eval
        )
    write(data / "boolq" / "test.json", [record("piqa")])
    with pytest.raises(SanError, match="index 0: answer 'solution1' is not one of true, false"):
        commonsense.load_test("boolq", data)


def test_the_training_mix_may_have_the_answers_of_all_tasks(tmp_path):
    path = write(tmp_path / "commonsense_170k.json", ROWS)
    assert commonsense.load_mix(path) == tuple(ROWS)
    write(path, [Instruction("a", "", "b", "answer6")])
    with pytest.raises(SanError, match="answer 'answer6' is not one of true, false, solution1"):
        commonsense.load_mix(path)


def test_good_data_has_no_problem(data):
    write(data / "boolq" / "train.json", [record("boolq")] * 2)
    write(data / "commonsense_170k.json", ROWS * 2)
    found = examine("commonsense", data, manifest=small())
    assert said(found) == []
    assert found[0].layout == "test 3 (true 3, false 0); train 2 (true 2, false 0)"
    assert found[-1].name == "commonsense/commonsense_170k.json"
    assert len(examine("commonsense/SIQA", data, manifest=small())) == 1


def test_every_problem_of_the_data_is_found_at_once(data):
    (data / "piqa" / "test.json").unlink()
    (data / "winogrande" / "test.json").rename(data / "test.json")
    (data / "winogrande").rmdir()
    write(data / "openbookqa" / "test.json", [record("openbookqa")] * 2)
    write(data / "boolq" / "train.json", [record("boolq")])
    write(data / "hellaswag" / "test.json", [record("hellaswag"), {}, record("piqa")])
    write(data / "commonsense_170k.json", ROWS)
    problems = said(examine("commonsense", data, manifest=small()))
    assert problems[0] == "warning: commonsense/boolq: train has 1 records, not 2"
    assert problems[1].startswith(f"error: commonsense/piqa: test: {data / 'piqa'} contains no records")
    assert problems[2].startswith(f"error: commonsense/hellaswag: test: {data / 'hellaswag'}: 2 of 3 records")
    assert problems[3].startswith(f"error: commonsense/winogrande: {data} has no folder for WinoGrande")
    assert problems[4] == "error: commonsense/openbookqa: test has 2 records, not 3"
    assert problems[5] == "warning: commonsense/commonsense_170k.json: train has 8 records, not 16"
    assert len(problems) == 6


def test_the_command_says_what_it_found(data, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        check_command("commonsense/boolq", data)
    assert stop.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "commonsense/boolq: test 3 (true 3, false 0)",
        "error: commonsense/boolq: test has 3 records, not 3,270",
        "1 error, 0 warnings",
    ]
    with pytest.raises(SanError, match="none of the 8 tasks of commonsense"):
        check_command("commonsense", tmp_path)
    with pytest.raises(SanError, match=r"Checksums .* commonsense"):
        check_command("commonsense", data, write_checksums=tmp_path / "sums")


def test_nothing_is_fetched_but_the_way_is_said(data, tmp_path):
    (problem,) = fetch("commonsense/boolq", tmp_path / "other")
    assert "download BoolQ manually" in str(problem)
    assert fetch("commonsense/boolq", data, small()) == []

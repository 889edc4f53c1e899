"""Mini-language: the same texts and tasks everywhere, balanced, apart, and answered by who knows the world alone."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from generators.world_text import text
from san_bench.language.mini import facts as world_facts
from san_bench.language.mini import people as world_people
from san_bench.language.mini import tasks as world
from san_bench.language.mini.facts import ANIMALS, JOBS, KINDS, MATERIALS, OPPOSITES, SIZES, SOUNDS, THINGS
from san_bench.language.mini.people import TRAITS
from san_bench.language.mini.relations import DERIVED, FACTS
from san_bench.language.mini.tasks import SPLITS, TASKS, load, make_instruction, task_fingerprint
from san_bench.language.mini.wordings import RELATIONS
from san_bench.language.mini.words import RandomChoices, distinct, plural, sentence, third
from san_peft.errors import SanError

FINGERPRINTS: dict[str, str] = {
    "yes-no": "a35ddd1a5b4b44d55b87c5b0e406d779543518561fdbe1d0faa664ca3d32d91e",
    "solution": "f5864102ed5082e18b685cfe575710ccbf8c7d7b26ddf087ac114ada18d8a4c7",
    "social": "9e1f9dc8c897cd822d2c926a2648debde260a560aed3d30c2c070ca9c9f48c96",
    "ending": "a865ca03c1ff77b0b9faa208fdb6269bff2a5aac3add090c4b498c58579b8664",
    "blank": "0cde44e09a1b6b7b0aeb49a1921fc68c3eb42cbb2620aa0441b392ca1d952346",
    "easy": "c59fc6560953b451f333c11df2897cfc3454f4543af5bae102c9f17a9ad5c999",
    "hard": "83a38e93ee48655b34e817f47f5c711d4af6a7b0b0a421670748b11b5b567072",
    "book": "f6770ef52361624debb99618c8008f1fb2e33a43b4a9c8928021a48d566dc335",
}
TOKENS = {
    "yes-no": "true/false",
    "solution": "solution1/solution2",
    "social": "answer1/answer2/answer3",
    "ending": "ending1/ending2/ending3/ending4",
    "blank": "option1/option2",
    "easy": "answer1/answer2/answer3/answer4",
    "hard": "answer1/answer2/answer3/answer4",
    "book": "answer1/answer2/answer3/answer4",
}
ALL = {**RELATIONS, **DERIVED}


@pytest.fixture(params=TASKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def texts():
    return [text(0, index) for index in range(20000)]


def records(name):
    return [one for split in load(name).values() for one in split]


def parts(name, one):
    """The question of a record, and its options."""
    body = one.instruction.split("\n", 1)[1].rsplit("\n\n", 1)[0]
    question, *options = re.split("|".join(f"{answer}: " for answer in TASKS[name].answers), body)
    return question.strip().removeprefix("Question: "), [option.strip() for option in options]


def sentences(told):
    return {s.strip(' "').lower() for s in re.split(r"(?<=[.?!:])\s+|\n", told)}


# ---------------------------------------------------------------------------------------------- the tasks


def test_the_same_records_on_every_platform(name):
    assert task_fingerprint(name) == FINGERPRINTS[name]


def test_a_record_does_not_depend_on_the_others(name):
    assert [make_instruction(name, index) for index in (799, 3, 450)] == [
        load(name)["test"][299],
        load(name)["train"][3],
        load(name)["val"][50],
    ]


def test_splits_have_their_sizes_and_no_record_twice(name):
    assert {split: len(ones) for split, ones in load(name).items()} == {"train": 400, "val": 100, "test": 300}
    assert len({one.instruction for one in records(name)}) == 800
    assert sorted(i for part in SPLITS.values() for i in range(800)[part]) == list(range(800))


def test_labels_are_balanced_in_every_split(name):
    for split in load(name).values():
        counts = Counter(one.answer for one in split)
        assert set(counts) == set(TASKS[name].answers)
        assert max(counts.values()) - min(counts.values()) <= (1 if len(counts) == 3 else 0)


def test_a_record_has_the_published_form(name):
    for one in records(name):
        assert list(asdict(one)) == ["instruction", "input", "output", "answer"]
        assert one.input == ""
        assert one.output == f"the correct answer is {one.answer}"
        assert one.answer in TOKENS[name].split("/")
        assert one.instruction.splitlines()[-1] == f"Allowed answers: {TOKENS[name]}"
        assert json.loads(json.dumps(asdict(one))) == asdict(one)
        assert len(one.instruction.split()) < 60
        options = parts(name, one)[1]
        assert len(options) == len(set(options)) == (0 if name == "yes-no" else len(TASKS[name].answers))
        assert "{" not in one.instruction


def test_a_goal_and_its_solutions_are_paragraphs():
    paragraphs = load("solution")["train"][0].instruction.split("\n\n")
    assert [paragraph.split(":")[0] for paragraph in paragraphs[1:]] == ["solution1", "solution2", "Allowed answers"]


def test_words_alone_do_not_tell_the_answer(name):
    train, test = load(name)["train"], load(name)["test"]
    count = CountVectorizer(token_pattern=r"[\w:]+")
    model = LogisticRegression(max_iter=2000)
    model.fit(count.fit_transform([one.instruction for one in train]), [one.answer for one in train])
    read = count.transform([one.instruction for one in test])
    assert model.score(read, [one.answer for one in test]) < 1 / len(TASKS[name].answers) + 0.15


@pytest.mark.parametrize("name", [name for name in TASKS if name != "yes-no"])
def test_options_alone_do_not_tell_the_answer(name):
    answers = TASKS[name].answers
    rows = {
        split: [(parts(name, one)[1], answers.index(one.answer)) for one in ones] for split, ones in load(name).items()
    }
    count = CountVectorizer(token_pattern=r"\S+")
    model = LogisticRegression(max_iter=2000)
    flat = [(option, place == right) for options, right in rows["train"] for place, option in enumerate(options)]
    model.fit(count.fit_transform([option for option, _ in flat]), [right for _, right in flat])
    likely = [int(model.decision_function(count.transform(options)).argmax()) for options, _ in rows["test"]]
    assert (
        np.mean([one == right for one, (_, right) in zip(likely, rows["test"], strict=True)]) < 1 / len(answers) + 0.1
    )
    for extreme in (np.argmax, np.argmin):  # neither the longest nor the shortest
        chosen = [
            int(extreme([len(o) for o in options])) == right for rows_ in rows.values() for options, right in rows_
        ]
        assert abs(np.mean(chosen) - 1 / len(answers)) < 0.06


def test_who_knows_the_facts_answers_every_single_one():
    truth = {}
    for relation in ALL.values():
        for subject, value in relation.table.items():
            for claim in relation.claim:
                for other in set(relation.table.values()):
                    truth.setdefault(relation.word(claim, subject, other) + "?", set()).add(other == value)
    found = [(parts("yes-no", one)[0], one.answer) for one in records("yes-no")]
    known = [(truth[question], answer) for question, answer in found if question in truth]
    assert len(known) == 560
    assert all(is_so == {answer == "true"} for is_so, answer in known)
    assert len({question for question, _ in found}) == 800


@pytest.mark.parametrize(("name", "least"), [("easy", 800), ("hard", 350)])
def test_exactly_one_option_is_right(name, least):
    values, subjects = {}, {}
    for relation in ALL.values():
        for subject, value in relation.table.items():
            for wording in relation.quiz:
                asked = sentence(relation.word(wording, subject, value))
                values.setdefault(asked, set()).add(relation.fill(relation.value, subject))
            for wording in relation.which:
                asked = sentence(relation.word(wording, subject, value))
                subjects.setdefault(asked, set()).add(relation.fill(relation.subject, subject))
    seen = 0
    for one in records(name):
        question, options = parts(name, one)
        right = options[TASKS[name].answers.index(one.answer)]
        fitting = values.get(question, set()) | subjects.get(question, set())
        if fitting:
            seen += 1
            assert [option for option in options if option in fitting] == [right]
    assert seen >= least


def test_hard_questions_join_two_facts():
    one = next(one for one in records("hard") if "the person who is paid to dig for coal" in one.instruction)
    question, options = parts("hard", one)
    assert question == "What does the person who is paid to dig for coal pick up at work?"
    assert options[TASKS["hard"].answers.index(one.answer)] == "a pick"


def test_tasks_load_by_their_full_name_and_errors_name_the_likely_one():
    assert load("mini-language/book") == load("book")
    with pytest.raises(SanError, match=r"no task 'bok'\. Did you mean 'mini-language/book'"):
        load("mini-language/bok")


def test_no_two_tasks_share_a_sequence():
    assert len({task.seed for task in TASKS.values()}) == len(TASKS) == 8


# ---------------------------------------------------------------------------------------------- the world


@pytest.mark.parametrize("module", [world_facts, world_people, world])
def test_no_table_says_two_things_of_a_subject(module):
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            keys = [ast.unparse(key) for key in node.keys if key is not None]
            assert len(keys) == len(set(keys))


def test_facts_refer_to_what_is_there():
    assert {row[0] for row in THINGS.values()} == set(MATERIALS)
    assert {row[0] for row in ANIMALS.values()} == set(KINDS)
    assert set(SOUNDS) | set(SIZES) <= set(ANIMALS)
    assert len(set(SIZES)) == len(SIZES)
    assert not set(OPPOSITES) & set(OPPOSITES.values())
    assert not set(THINGS) & set(ANIMALS) & set(JOBS)
    assert all(RELATIONS["opposite"].table[RELATIONS["opposite"].table[word]] == word for word in OPPOSITES)
    assert RELATIONS["tomorrow"].table["Sunday"] == "Monday"


def test_a_name_by_a_value_names_one():
    for relation in RELATIONS.values():
        if relation.known:
            assert len(set(relation.table.values())) == len(relation.table)


def test_what_follows_agrees_with_the_facts_it_follows_from():
    assert DERIVED["water by material"].table["a hammer"] == "sink"
    assert DERIVED["legs by kind"].table["bee"] == "six legs"
    for name, relation in DERIVED.items():
        second, first = name.split(" by ")
        middle = RELATIONS[first].table.values()
        assert list(relation.table.values()) == [RELATIONS[second].table[one] for one in middle]


def test_distinct_draws_every_subject_with_different_values():
    relation = RELATIONS["kind"]
    drawn = [distinct(RandomChoices(3, index), relation, 4) for index in range(500)]
    assert all(len({relation.table[subject] for subject in four}) == 4 for four in drawn)
    assert {subject for four in drawn for subject in four} == set(ANIMALS)


@pytest.mark.parametrize(
    ("one", "many", "phrase", "it"),
    [
        ("knife", "knives", "catch fish", "catches fish"),
        ("fly", "flies", "fly", "flies"),
        ("box", "boxes", "play", "plays"),
        ("wool", "wool", "land softly", "lands softly"),
    ],
)
def test_grammar(one, many, phrase, it):
    assert (plural(one), third(phrase)) == (many, it)


# ---------------------------------------------------------------------------------------------- the texts


def test_the_same_texts_on_every_platform():
    digest = hashlib.sha256("\n\n".join(text(7, index) for index in range(300)).encode()).hexdigest()
    assert digest == "337ddc7344deb36b954afaff5c6fd7e9ccfc1019d558973ba1ffeed7371f4441"


def test_a_text_does_not_depend_on_the_others(texts):
    assert [text(0, index) for index in (19999, 5, 1234)] == [texts[19999], texts[5], texts[1234]]
    assert text(1, 5) != texts[5]


def test_texts_differ(texts):
    some = [one for told in texts[:4000] for one in sentences(told) if len(one.split()) > 2][:10000]
    assert len(some) == 10000
    assert len(set(some)) > 5500
    assert len(set(texts[:10000])) > 9000
    assert not [told for told in texts if "{" in told or "  " in told]


def test_texts_tell_every_fact(texts):
    told = [told.lower() for told in texts]
    for fact in FACTS:
        subject, value = fact.subject.lower(), fact.value.lower().split()[-1]
        assert any(subject in one and value in one for one in told), fact


def test_texts_tell_every_trait(texts):
    assert all(any(f"{word}." in told for told in texts) for word in TRAITS)


def test_texts_and_tasks_share_no_sentence(texts):
    told = set().union(*map(sentences, texts))
    asked = {
        one
        for name in TASKS
        for item in records(name)
        for one in sentences(parts(name, item)[0])
        if len(one.split()) > 2 and not one.endswith(":")
    }
    phrases = {came for _, came in world_facts.CAUSES.values()} | {row[2] for row in THINGS.values()}
    assert {one for one in told & asked if one.rstrip(".?") not in phrases} == set()
    assert not {one for one in told if "allowed answers" in one or "the correct answer is" in one}


@pytest.mark.slow
def test_the_script_writes_a_model_that_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script = Path(__file__).parents[4] / "scripts/pretrain_decoder.py"
    small = ["--steps", "2", "--batch-size", "2", "--tokenizer-texts", "2000", "--threads", "1"]
    subprocess.run([sys.executable, str(script), *small, "--out", str(tmp_path / "model")], check=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) < 4_000_000
    strange = "Déjà vu ✓ answer12\n\n  日本"
    tokens = tokenizer(strange)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == strange
    papers = json.loads((tmp_path / "model/PROVENANCE.json").read_text(encoding="utf-8"))
    assert papers["parameters"] == sum(p.numel() for p in model.parameters())
    assert papers["final"]["step"] == papers["settings"]["steps"] == 2

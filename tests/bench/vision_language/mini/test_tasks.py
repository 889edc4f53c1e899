"""The tasks of mini-vl: what pictures show, what is asked, and that the answers are right and not to be guessed."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from generators.mini_captions import FACTS, Fact, caption
from san_bench.language.mini.wordings import RELATIONS
from san_bench.vision_language.mini.pictures import CELLS, COLOURS, FONT, LETTER, SHAPES, Figure, Scene, draw_scene
from san_bench.vision_language.mini.tasks import (
    CATEGORIES,
    KINDS,
    SPLITS,
    TASKS,
    WORDS,
    conversation,
    image_of,
    item,
    picture,
)
from san_bench.vision_language.records import problems_of
from san_bench.vision_language.tasks import load_conversation_task
from san_bench.vision_language.vqa import formats as question_lines
from san_bench.vision_language.vqa.benchmarks import BENCHMARKS, score_benchmark

ITEMS = range(240)


def stem(asked):
    return asked.text.splitlines()[0]


def test_pictures_are_the_same_everywhere():
    digest = hashlib.sha256(b"".join(np.asarray(picture(name, 3)).tobytes() for name in TASKS)).hexdigest()
    assert digest == "7ac35fc9837eb5bcf9fbf3e1c13878b8b5b6d16af6a78edf1e6809f15a51ffd2"


def test_a_figure_has_its_colour_where_it_stands():
    for cell in range(4):
        for colour, paint in COLOURS.items():
            image = draw_scene(Scene((Figure(cell, "ball", colour),)), 1, cell).astype(float)
            x, y = 8 + 16 * (cell % 2), 8 + 16 * (cell // 2)
            inside = image[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
            nearest = min(COLOURS, key=lambda name: float(np.abs(inside - np.array(COLOURS[name])).sum()))
            assert nearest == colour, paint
            other = image[(y + 16) % 32, (x + 16) % 32]
            assert other.max() < 150


def test_shapes_differ_and_a_word_is_written_as_its_letters():
    bare = draw_scene(Scene(()), 1, 0).astype(float)
    masks = [np.abs(draw_scene(Scene((Figure(0, shape, "white"),)), 1, 0) - bare).max(-1) > 60 for shape in SHAPES]
    assert len({mask.tobytes() for mask in masks}) == len(SHAPES)
    for index in range(8):
        bare = draw_scene(Scene(()), 1, index).astype(float)
        shown = np.abs(draw_scene(Scene((), "cab"), 1, index) - bare).max(-1) > 60
        top, left = np.flatnonzero(shown.any(1))[0], np.flatnonzero(shown.any(0))[0]
        assert top % LETTER == left % LETTER == 1
        for place, letter in enumerate("cab"):
            wanted = [[dot == "1" for dot in row] for row in FONT[letter].split()]
            x = left + LETTER * place
            assert shown[top : top + 5, x : x + 5].tolist() == wanted
        assert shown.sum() == sum(FONT[letter].count("1") for letter in "cab")
    assert {letter for word in WORDS for letter in word} <= set(FONT)
    assert max(map(len, WORDS)) * LETTER <= 32
    assert len(set(WORDS)) == len(WORDS)


def test_the_scenes_answer_the_questions():
    """Each answer is worked out from the scene and the words of the question alone."""
    foods = RELATIONS["colour"].table
    for index in ITEMS:
        asked = item("open", index)
        words = stem(asked).rstrip("?").split()
        if words[0] == "How":
            assert asked.answer == str(len(asked.scene.figures))
        elif words[:2] == ["What", "colour"]:
            assert [asked.answer] == [f.colour for f in asked.scene.find(shape=words[-1])]
        elif words[0] == "Which":
            assert [asked.answer] == [f.shape for f in asked.scene.find(colour=words[-1])]
        else:
            assert [asked.answer] == [CELLS[f.cell] for f in asked.scene.find(shape=words[-1])]
        asked = item("unanswerable", index)
        found = asked.scene.find(shape=stem(asked).rstrip("?").split()[-1])
        assert asked.answer == (found[0].colour if found else "unanswerable")
        asked = item("science", index)
        (figure,) = asked.scene.find(shape=stem(asked).rstrip("?").split()[-1])
        right = [n for n, food in enumerate(asked.options) if foods[food.split()[-1]] == figure.colour]
        assert ["ABCD"[n] for n in right] == [asked.answer]
        asked = item("written", index)
        assert asked.answer == asked.scene.word
        asked = item("presence", index)
        colour, shape = stem(asked).removesuffix(" in the image?").split()[-2:]
        assert asked.answer == ("yes" if asked.scene.find(shape, colour) else "no")
        if asked.answer == "no" and asked.category == "adversarial":
            assert asked.scene.find(shape)
            assert asked.scene.find(colour=colour)
        asked = item("circular", index)
        word = stem(asked).rstrip("?").split()[-1]
        (figure,) = asked.scene.find(word) or asked.scene.find(colour=word)
        assert asked.options["ABCD".index(asked.answer)] in (figure.shape, figure.colour)
        assert sum(option in (figure.shape, figure.colour) for option in asked.options) == 1


def test_what_stands_left_and_right():
    for index in ITEMS:
        asked = item("composed", index)
        words = stem(asked).rstrip("?").split()
        if words[0] == "Is":
            one, other = asked.scene.find(words[3], words[2])[0], asked.scene.find(words[-1], words[-2])[0]
            assert asked.answer == ("yes" if one.cell % 2 < other.cell % 2 else "no")
            assert one.cell // 2 == other.cell // 2
            continue
        anchor = asked.scene.find(words[-1])[0]
        neighbour = next(f for f in asked.scene.figures if f.cell == anchor.cell ^ 1)
        assert ("left" in words) == (neighbour.cell < anchor.cell)
        assert asked.answer == (neighbour.colour if words[1] == "colour" else neighbour.shape)


def test_no_answer_can_be_guessed_by_its_place():
    letters = [Counter(item(name, n).answer for n in ITEMS) for name in ("science", "circular")]
    assert letters == [dict.fromkeys("ABCD", 60)] * 2
    assert Counter(item("presence", n).answer for n in ITEMS) == {"yes": 120, "no": 120}
    assert Counter(item("presence", n).category for n in ITEMS) == dict.fromkeys(CATEGORIES, 80)
    assert Counter(item("unanswerable", n).answer for n in ITEMS)["unanswerable"] == 120
    said = Counter(item("composed", n).answer for n in ITEMS)
    assert abs(said["yes"] - said["no"]) <= 1


def test_no_picture_of_one_split_is_in_another():
    for name in TASKS:
        seen = [hashlib.sha256(np.asarray(picture(name, n)).tobytes()).digest() for n in range(SPLITS["test"].stop)]
        assert len(set(seen)) == len(seen)


def described(scene, words):
    """The figures that a name like `red ball`, `ball` or `red thing` fits."""
    colour = next((name for name in COLOURS if name in words), None)
    shape = next((name for name in SHAPES if name in words), None)
    return scene.find(shape, colour)


def check_fact(scene, said, seen):
    """Works out from the scene and the beginning of a sentence, or a request, alone what is next; returns its kind."""
    named = {figure.cell: f"{figure.colour} {figure.shape}" for figure in scene.figures}
    words, foods = re.findall(r"\w+", said), RELATIONS["colour"].table
    marks = dict(re.findall(r"([A-D])\. (?:an? )?(\w+)", said))
    where = next((cell for cell, name in enumerate(CELLS) if name in said.lower()), None)
    side = next((word for word in ("left", "right", "above", "below") if word in said.lower().split()), None)
    if marks:
        (figure,) = described(scene, re.findall(r"\w+", re.sub(r"[A-D]\. (?:an? )?\w+", "", said)))
        right = {mark for mark, word in marks.items() if foods.get(word, word) in (figure.shape, figure.colour)}
        assert right == {seen}
        return "marked"
    if " or " in said and "like" in words:
        (figure,) = described(scene, re.findall(r"\w+", said.split("?")[1]))
        options = [food for food in re.findall(r"\w+", said.split("?")[0].lower()) if foods.get(food) == figure.colour]
        assert [seen.split()[-1]] == options
        return "like"
    if "letter" in said.lower().split():
        assert seen == scene.word[int(re.findall(r"\d", said)[0]) - 1]
        return "letter"
    if said in ("The letters are", "It is spelt", "Spell the word."):
        assert seen == " ".join(scene.word)
        return "spelt"
    if said in ("The written word is", "It says", "Below, one reads", "Read the word.", "Tell me the word."):
        assert seen == scene.word
        return "word"
    if words[0] == "From":
        other, one = (described(scene, re.findall(r"\w+", part))[0] for part in said.split(","))
        assert seen == ("left" if one.cell % 2 < other.cell % 2 else "right")
        return "side"
    if side and where is None:
        (anchor,) = described(scene, words)
        cell = anchor.cell ^ (1 if side in ("left", "right") else 2)
        assert (cell < anchor.cell) == (side in ("left", "above"))
        assert seen.split(maxsplit=1)[-1] == named.get(cell, "nothing")
        return "beside"
    if where is not None:
        assert seen.split(maxsplit=1)[-1] == named.get(where, "nothing")
        return "cell"
    if seen in CELLS:
        assert [CELLS[figure.cell] for figure in described(scene, words)] == [seen]
        return "place"
    if words[0] == "Count" or words[-1] in ("sees", "shows"):
        assert int(seen.split()[0]) == len(scene.figures)
        return "count"
    if seen in ("there", "missing"):
        assert bool(described(scene, words)) == (seen == "there")
        return seen
    (figure,) = described(scene, words)
    assert seen.split()[-1] in (figure.shape, figure.colour)
    assert not set(seen.split()) & set(words)
    return "colour" if seen == figure.colour else "shape"


def test_captions_tell_what_their_pictures_show():
    kinds: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    manners: Counter[int] = Counter()
    for index in range(600):
        scene, facts = caption(0, index)
        assert len(facts) == FACTS
        for said, seen, asked, manner in facts:
            try:
                kind = check_fact(scene, said, seen)
                assert check_fact(scene, asked, seen) == kind
            except (AssertionError, ValueError, KeyError, IndexError) as error:
                raise AssertionError(f"{scene}: {said} | {seen} | {asked}") from error
            kinds[kind] += 1
            answers[seen] += 1
            manners[len(manner.split("\n")) if manner else 0] += 1
    assert set(kinds) == {
        "marked", "like", "letter", "spelt", "word", "side", "beside", "cell", "place", "count", "there", "missing",
        "colour", "shape",
    }  # fmt: skip
    assert min(kinds.values()) > 60
    assert {*COLOURS, *CELLS, *"ABCD", "left", "right", "nothing"} <= set(answers)
    assert set(manners) == {0, 1, 2}
    assert min(manners.values()) > 400  # of 4800
    assert Fact("", "", "Count all.", "Be brief.").request == "Count all.\nBe brief."


def test_no_request_of_a_caption_is_a_question_of_a_task():
    tasks = {stem(item(name, index)) for name in TASKS for index in ITEMS}
    told = {part for index in ITEMS for fact in caption(0, index).facts for part in (fact.said, fact.request)}
    assert not (tasks | {question_lines.SHORT, question_lines.LETTER, question_lines.UNANSWERABLE}) & {
        line for part in told for line in part.splitlines()
    }


def test_records_are_those_of_the_published_format():
    for index in range(2 * KINDS):
        record = conversation(index)
        turns = [{"from": turn.role, "value": turn.text} for turn in record.turns]
        plain = {"id": record.id, "conversations": turns, **({"image": record.image} if record.image else {})}
        assert problems_of(plain) == []
        assert (record.image is None) == (index % KINDS == KINDS - 1)
        if record.image:
            assert np.array_equal(
                np.asarray(image_of(record.image)), np.asarray(picture(list(TASKS)[index % KINDS], index // KINDS))
            )
    assert len(conversation(KINDS).turns) == 4


def test_right_answers_score_one_by_the_rules_of_the_benchmarks():
    task = load_conversation_task("mini-vl", None)
    assert [asked.rule for asked in task.asked("test").values()] == list(BENCHMARKS)
    assert len(task.records("train")) == KINDS * 400
    assert len(task.records("trainval")) == KINDS * 500
    for name, asked in task.asked("test").items():
        assert len(asked.questions) == (1200 if asked.rule == "mmbench" else 300), name
        right = [question.answers[0] for question in asked.questions]
        assert score_benchmark(asked.rule, asked.questions, right).score == pytest.approx(1.0)
        wrong = score_benchmark(asked.rule, asked.questions, ["nothing"] * len(right))
        assert wrong.score == 0.0 if asked.rule != "pope" else wrong.details["random/yes_ratio"] == 1.0
    trained = {split: {record.image for record in task.records(split)} for split in ("train", "trainval")}
    shown = {
        split: {question.image for asked in task.asked(split).values() for question in asked.questions}
        for split in ("val", "test")
    }
    assert not trained["train"] & shown["val"]
    assert not trained["trainval"] & shown["test"]
    assert shown["val"] < trained["trainval"]
    assert task.fingerprint == load_conversation_task("mini-vl", None).fingerprint

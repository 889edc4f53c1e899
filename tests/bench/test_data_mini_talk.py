"""The tasks of mini-vl: what pictures show, what is asked, and that the answers are right and not to be guessed."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest

from san_bench.data.conversations import problems_of
from san_bench.data.mini_captions import caption
from san_bench.data.mini_pictures import CELLS, COLOURS, FONT, LETTER, SHAPES, Figure, Scene, draw
from san_bench.data.mini_talk import (
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
from san_bench.data.world_wordings import RELATIONS
from san_bench.run.conversation_task import load_conversation_task
from san_bench.run.vqa import BENCHMARKS, score

ITEMS = range(240)

MARKED = r"(A\. \w+(?:[ \n][B-D]\. \w+)+)[;.][ \n]([^.]+)\."
"""Options with their letters in a caption, and what is said of them."""


def stem(asked):
    return asked.text.splitlines()[0]


def test_pictures_are_the_same_everywhere():
    digest = hashlib.sha256(b"".join(np.asarray(picture(name, 3)).tobytes() for name in TASKS)).hexdigest()
    assert digest == "7ac35fc9837eb5bcf9fbf3e1c13878b8b5b6d16af6a78edf1e6809f15a51ffd2"


def test_a_figure_has_its_colour_where_it_stands():
    for cell in range(4):
        for colour, paint in COLOURS.items():
            image = draw(Scene((Figure(cell, "ball", colour),)), 1, cell).astype(float)
            x, y = 8 + 16 * (cell % 2), 8 + 16 * (cell // 2)
            inside = image[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
            nearest = min(COLOURS, key=lambda name: float(np.abs(inside - np.array(COLOURS[name])).sum()))
            assert nearest == colour, paint
            other = image[(y + 16) % 32, (x + 16) % 32]
            assert other.max() < 150


def test_shapes_differ_and_a_word_is_written_as_its_letters():
    bare = draw(Scene(()), 1, 0).astype(float)
    masks = [np.abs(draw(Scene((Figure(0, shape, "white"),)), 1, 0) - bare).max(-1) > 60 for shape in SHAPES]
    assert len({mask.tobytes() for mask in masks}) == len(SHAPES)
    for index in range(8):
        bare = draw(Scene(()), 1, index).astype(float)
        shown = np.abs(draw(Scene((), "cab"), 1, index) - bare).max(-1) > 60
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


def test_captions_tell_what_their_pictures_show():
    seen: Counter[str] = Counter()
    for index in range(1200):
        scene, text, _ = caption(0, index)
        named = {f"{figure.colour} {figure.shape}": figure for figure in scene.figures}
        for options, end in re.findall(MARKED, text):
            names = dict(re.findall(r"([A-D])\. (\w+)", options))
            right = names[re.findall(r"\b[A-D]\b", end)[0]]
            (shape, colour) = re.findall(r"(?:[Tt]he (\w+)|[Ww]hat is (\w+))", end)[0]
            assert {right} == ({one.colour for one in scene.find(shape)} if shape else {
                one.shape for one in scene.find(colour=colour)}), text  # fmt: skip
            seen[right] += 1
        text = re.sub(MARKED, "", text)
        for said in re.findall(r"[^.]+(?=\.)", text):
            words = said.strip().split()
            kind = " ".join(words[:2]) if words[0] in ("The", "One", "It") else words[0]
            pairs = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", said)
            seen[kind] += 1
            if scene.word and scene.word in words:
                seen["word"] += 1
            assert all(f"{colour} {shape}" in named for colour, shape in pairs), said
            for shape, colour, food in re.findall(r"The (\w+) is as (\w+) as (?:an? )?(\w.*)", said):
                assert scene.find(shape, colour), said
                assert RELATIONS["colour"].table[food] == colour
            for colour, shape in re.findall(r"[Ww]hat is (\w+) is an? (\w+)", said):
                assert scene.find(shape, colour), said
            if words[0] == "Letter":
                assert scene.word[int(words[1]) - 1] == words[3]
            if "The letters" in said:
                assert "".join(words[2:-2]) == words[-1] == scene.word
            if "picture shows" in said:
                assert len(pairs) == len(named)
            for colour, shape, cell in re.findall(r"(\w+) (\w+) is at the (\w+ \w+)", said):
                assert CELLS[named[f"{colour} {shape}"].cell] == cell
            for shape, colour in re.findall(r"[Tt]he (\w+) is (?!as )(\w+)", said):
                assert shape == f"{colour} {shape}" or len(scene.find(shape, colour)) == 1 or "alone" in said, said
            if ":" in said:
                place, what = said.strip().lower().split(": ")
                there = [name for name, figure in named.items() if CELLS[figure.cell] == place]
                assert [" ".join(what.split()[1:])] == there if there else what == "nothing"
            if "One sees" in said:
                assert int(words[2]) == len(named)
            if "but no" in said:
                assert not any(words[-1] in name.split() for name in named), said
            if "stands" in said:
                one, other = (named[" ".join(pair)] for pair in pairs)
                assert {
                    "left": one.cell % 2 < other.cell % 2, "right": one.cell % 2 > other.cell % 2,
                    "above": one.cell // 2 < other.cell // 2, "below": one.cell // 2 > other.cell // 2,
                }[words[4]]  # fmt: skip
    assert seen["word"] > 60
    assert (
        min(seen[kind] for kind in ("The picture", "One sees", "Top", "Something", "What", "Letter", *SHAPES, *COLOURS))
        > 20
    )


def test_captions_say_which_words_are_to_be_seen():
    names = {*COLOURS, *SHAPES, "a", "nothing", "left", "right", "above", "below", "top", "bottom", *"1234ABCD"}
    kinds: Counter[str] = Counter()
    for index in range(300):
        scene, text, seen = caption(0, index)
        assert all(start < end for start, end in seen)
        assert [*seen] == sorted(seen)
        known = {*names, scene.word, *scene.word}
        for start, end in seen:
            words = text[start:end]
            assert set(words.lower().split()) <= {one.lower() for one in known}, words
            assert not (text[start - 1 : start] + text[end]).isalpha(), (text, words)
            kinds.update(words.split())
        ends = [0, *(end for _, end in seen)]
        unseen = "_".join(text[a:b] for a, b in zip(ends, [*(start for start, _ in seen), None], strict=True))
        assert not re.search(r"[][]| at the [tb]|One sees \d|Letter \d is [a-z]|says [a-z]", unseen), unseen
    assert set(kinds) >= {*COLOURS, *SHAPES, "nothing", "left", "above", *"1234ABCD"}


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
        assert score(asked.rule, asked.questions, right).score == pytest.approx(1.0)
        wrong = score(asked.rule, asked.questions, ["nothing"] * len(right))
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

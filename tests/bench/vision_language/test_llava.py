"""A training on LLaVA-1.5's own layout: the mix, its images, and the seven benchmarks as they are published."""

from __future__ import annotations

import base64
import csv
import io
import json

import pytest
from PIL import Image
from tests.bench.copies import write_picture
from tests.bench.vision_language import test_domain as conversations
from tests.bench.vision_language.vqa.test_files import dump, lines, people

from san_bench.config.recipe import load_recipe
from san_bench.run.evaluate import evaluate
from san_bench.run.results import read_rows
from san_bench.run.train import train
from san_bench.vision_language.domain import Conversations
from san_bench.vision_language.mini import tasks as mini_talk
from san_bench.vision_language.recipe import BENCHMARKS
from san_bench.vision_language.vqa.formats import LETTER, SHORT

pytestmark = pytest.mark.usefixtures("one_thread")

place = conversations.place


def picture_bytes():
    file = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The mix with two images, and two questions of each benchmark, in the published files."""
    folder = tmp_path_factory.mktemp("data")
    records = [{**conversations.talk(n, n < 4), "id": str(n)} for n in range(7)]
    for number in range(4):
        records[number]["image"] = f"coco/train2017/{number}.jpg"
        write_picture(folder / "coco" / "train2017" / f"{number}.jpg", number)
    dump(folder / "llava_v1_5_mix665k.json", records)
    root = folder / "eval"
    pairs = [(n, word) for n, word in ((1, "cat"), (2, "dog"))]

    vqa = [{"question_id": n, "image_id": n, "question": f"What {n}?"} for n, _ in pairs]
    notes = [{"question_id": n, "image_id": n, "answers": people(*[word] * 10)} for n, word in pairs]
    dump(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": vqa})
    dump(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": notes})
    for n, _ in pairs:
        write_picture(root / f"vqav2/val2014/COCO_val2014_{n:012}.jpg", n)

    gqa = {str(n): {"imageId": f"n{n}", "question": f"Is it {n}?", "answer": word} for n, word in pairs}
    dump(root / "gqa/data/testdev_balanced_questions.json", gqa)
    asked = [{"question_id": str(n), "image": f"n{n}.jpg", "text": f"Is it {n}?\n{SHORT}"} for n, _ in pairs]
    lines(root / "gqa/llava_gqa_testdev_balanced.jsonl", *asked)
    for n, _ in pairs:
        write_picture(root / f"gqa/data/images/n{n}.jpg", n)

    rows = [
        {"image": f"VizWiz_val_{n:08}.jpg", "question": "What?", "answers": people(*[word] * 10)} for n, word in pairs
    ]
    dump(root / "vizwiz/val.json", rows)
    for row in rows:
        write_picture(root / "vizwiz/val" / row["image"], 1)

    base = {"question": "Which?", "choices": ["cat", "bus"], "answer": 1, "hint": "", "image": "image.png"}
    dump(root / "scienceqa/problems.json", {"4": base, "5": base, "6": {**base, "image": None}})
    dump(root / "scienceqa/pid_splits.json", {"test": ["4", "5", "6"]})
    talks = [{"from": "human", "value": "<image>\nWhich?\nA. cat\nB. bus"}, {"from": "gpt", "value": "B"}]
    dump(
        root / "scienceqa/llava_test_CQM-A.json",
        [{"id": key, "image": f"{key}/image.png", "conversations": talks} for key in ("4", "5")]
        + [{"id": "6", "conversations": talks}],
    )
    for key in ("4", "5"):
        write_picture(root / f"scienceqa/images/test/{key}/image.png", 1)

    words = [{"image_id": f"t{n}", "question": "Which year?", "answers": [f"199{n}"] * 10} for n, _ in pairs]
    dump(root / "textvqa/TextVQA_0.5.1_val.json", {"data": words})
    text = f"Which year?\nReference OCR token: 1999\n{SHORT}"
    asked = [{"question_id": f"t{n}", "image": f"t{n}.jpg", "text": text} for n, _ in pairs]
    lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", *asked)
    for n, _ in pairs:
        write_picture(root / f"textvqa/train_images/t{n}.jpg", n)

    asked = []
    for category in ("random", "popular", "adversarial"):
        both = [(len(asked) + n, f"Is there a {category} {n}?", ("yes", "no")[n]) for n in (0, 1)]
        asked += [
            {"question_id": n, "image": "p.jpg", "text": f"{text}\n{SHORT}", "category": category}
            for n, text, _ in both
        ]
        rows = [{"question_id": n, "image": "p.jpg", "text": text, "label": label} for n, text, label in both]
        lines(root / f"pope/coco/coco_pope_{category}.json", *rows)
    lines(root / "pope/llava_pope_test.jsonl", *asked)
    write_picture(root / "pope/val2014/p.jpg", 3)

    columns = "index question hint A B C D answer category image source l2-category comment split".split()
    rows = [
        [n, "What?", "nan", "cat", "dog", "bus", "nan", "B", "k", picture_bytes(), "s", "l", "nan", "dev"]
        for n in (7, 8)
    ]
    (root / "mmbench").mkdir()
    with (root / "mmbench/mmbench_dev_20230712.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    return folder


def recipe_of(place, data, output, **changes):
    return conversations.recipe_of(
        place,
        output,
        task="llava",
        data=str(data),
        answering__benchmarks=list(BENCHMARKS),
        optimizer__epochs=1,
        **changes,
    )


SIZES = {"vqav2": 2, "gqa": 2, "vizwiz": 2, "sqa": 2, "textvqa": 2, "pope": 6, "mmbench": 2}


def test_one_training_on_the_mix_is_scored_on_the_seven_benchmarks(place, data, tmp_path):
    result = train(recipe_of(place, data, tmp_path / "run"))
    assert (result["n_train"], result["trained_on"], result["dropped_records"]) == (7, "llava", 0)
    assert {name: one["n_test"] for name, one in result["tasks"].items()} == {
        f"llava/{name}": size for name, size in SIZES.items()
    }
    rows = read_rows([tmp_path / "run"])
    assert [row["task"] for row in rows] == [f"llava/{name}" for name in BENCHMARKS]
    asked = {name: (tmp_path / "run" / f"answers-{name}.jsonl").read_text().splitlines() for name in BENCHMARKS}
    assert len(asked["mmbench"]) == 6  # two questions of three options, in every rotation
    assert all(LETTER in json.loads(line)["question"] for name in ("sqa", "mmbench") for line in asked[name])
    assert "Reference OCR token: 1999" in json.loads(asked["textvqa"][0])["question"]
    assert evaluate(tmp_path / "run")["tasks"] == result["tasks"]


def test_right_answers_are_right_on_every_benchmark_and_others_are_not(place, data, tmp_path, monkeypatch):
    for texts, wanted in ((lambda q: q.answers[0], 1.0), (lambda q: "no idea", 0.0)):
        monkeypatch.setattr(
            Conversations, "answers", lambda self, model, asked, f=texts: [f(q) for q in asked.questions]
        )
        result = train(recipe_of(place, data, tmp_path / str(wanted)))
        found = {name: one["accuracy"] for name, one in result["tasks"].items()}
        assert found == {f"llava/{name}": wanted for name in BENCHMARKS}
        assert result["accuracy"] == wanted


@pytest.mark.slow
def test_the_small_llava_trains_on_mini_vl_and_answers(tmp_path, monkeypatch):
    """What ships, with a hundredth of its questions: the loss falls, and all seven tasks are scored, each its way."""
    monkeypatch.setattr(mini_talk, "SPLITS", {"train": range(0, 4), "val": range(4, 6), "test": range(6, 10)})
    recipe = load_recipe("vision-language/san", {"output": str(tmp_path / "run"), "optimizer.epochs": 4})
    result = train(recipe)
    assert (result["n_train"], result["n_test"], result["steps"]) == (48, 28, 16)
    assert list(result["tasks"]) == [f"mini-vl/{name}" for name in mini_talk.TASKS]
    losses = [row["loss"] for row in map(json.loads, (tmp_path / "run" / "log.jsonl").open()) if "loss" in row]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    assert evaluate(tmp_path / "run")["tasks"] == result["tasks"]
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| mini-vl/presence | test | generation |" in card

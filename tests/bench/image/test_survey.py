"""Every image is decoded once, before a model is loaded; class names travel with what a run writes."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image
from tests.bench.copies import class_folders, table
from tests.bench.small import small_scale

from san_bench.config.recipe import load_recipe
from san_bench.datacheck.check import examine
from san_bench.image import domain, survey
from san_bench.image.domain import Images
from san_bench.image.survey import decode_all
from san_bench.image.tasks import load_task
from san_bench.run.train import train
from san_peft.errors import SanError


@pytest.fixture
def photos(tmp_path):
    return class_folders(tmp_path / "photos", {"train": 10, "val": 4, "test": 6}, ["cat", "dog"])


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """What is decoded while the test runs, with an empty cache."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    seen: list[bytes] = []
    remark = survey.remark

    def counting(content):
        seen.append(content)
        return remark(content)

    monkeypatch.setattr(survey, "remark", counting)
    return seen


def look(folder):
    return [str(problem) for problem in decode_all(load_task("folder", folder))]


def test_images_are_decoded_once_and_again_when_they_change(photos, decoded):
    assert look(photos) == []
    assert len(decoded) == 20
    assert look(photos) == []
    assert len(decoded) == 20
    changed = photos / "test" / "cat" / "000.png"
    changed.write_bytes((photos / "test" / "dog" / "001.png").read_bytes())
    assert look(photos) == []
    assert decoded[20:] == [changed.read_bytes()]


def test_what_is_broken_is_said_each_time(photos, decoded):
    (photos / "test" / "cat" / "000.png").write_bytes(b"not an image")
    (photos / "val" / "dog" / "001.png").unlink()
    (photos / "val" / "dog" / "001.png").symlink_to(photos / "nowhere.png")
    for number in (1, 2):
        problems = look(photos)
        assert len(problems) == 2
        assert any("test/cat/000.png (cannot identify" in text for text in problems)
        assert any("missing" in text and "val/dog/001.png" in text for text in problems)
        assert len(decoded) == 19 + number - 1


def test_a_remark_is_remembered(photos, decoded):
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(photos / "test" / "cat" / "000.png")
    first = look(photos)
    assert len(first) == 1
    assert "4,000" in first[0]
    assert (look(photos), len(decoded)) == (first, 20)


def test_other_rules_of_decoding_look_again(photos, decoded, monkeypatch):
    look(photos)
    monkeypatch.setattr(survey, "RULES", "of tomorrow")
    look(photos)
    assert len(decoded) == 40


def test_rows_of_tables_are_decoded_once(tmp_path, decoded):
    table(20, ["cat", "dog"]).save_to_disk(str(tmp_path / "saved"))
    for _ in range(2):
        assert look(tmp_path / "saved") == []
        assert len(decoded) == 20


def test_the_data_check_saves_the_run_from_decoding(photos, decoded):
    assert examine("folder", photos)[0].problems == []
    assert look(photos) == []
    assert decoded == []  # the check reads the bytes itself, for their checksums


def test_an_interrupted_survey_keeps_what_it_has_seen(photos, decoded, monkeypatch):
    monkeypatch.setattr(survey, "CHUNK", 2)
    looks = survey._looks

    def stopped(*words):
        for number, found in enumerate(looks(*words)):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(survey, "_looks", stopped)
        with pytest.raises(KeyboardInterrupt):
            look(photos)
    before = len(decoded)
    look(photos)
    assert len(decoded) - before == 20 - 6


@pytest.mark.parametrize("cache", ["a file", "damaged"])
def test_a_cache_that_cannot_be_used_is_done_without(photos, decoded, cache, tmp_path):
    if cache == "a file":
        (tmp_path / "assets").write_text("in the way")
    else:
        look(photos)
        (file,) = (tmp_path / "assets").rglob("*.json")
        file.write_text('["damaged')
    decoded.clear()
    assert look(photos) == []
    assert len(decoded) == 20


def recipe(folder, output, **changes):
    short = {"data": str(folder), "output": str(output), "optimizer.epochs": 1, "optimizer.batch_size": 8}
    return load_recipe("images/san", {**short, **changes})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_broken_image_stops_a_run_before_a_model_is_loaded(photos, tmp_path, monkeypatch, split):
    monkeypatch.setattr(domain, "base_model", lambda *_: pytest.fail("a model was loaded"))
    file = photos / split / "dog" / "001.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(SanError, match=rf"{split}/dog/001\.png"):
        train(recipe(photos, tmp_path / "run"))


def test_warnings_about_the_data_are_printed(photos, tmp_path):
    (photos / "train" / "empty").mkdir()
    found = Images(recipe(photos, tmp_path / "run")).inspect()
    assert found.errors == ()
    assert "train 10, val 4, trainval 14, test 6; 2 classes" in found.remarks[0]
    assert "empty" in found.remarks[1]


def test_names_of_classes_travel(photos, tmp_path):
    from transformers import AutoModelForImageClassification

    from san_bench.run.evaluate import export

    (photos / "train" / "dog").rename(photos / "train" / "a|dog")
    for split in ("val", "test"):
        (photos / split / "dog").rename(photos / split / "a|dog")
    with small_scale():
        result = train(recipe(photos, tmp_path / "run", selection="last"))
        export(tmp_path / "run", tmp_path / "plain")
    assert result["class_names"] == ["a|dog", "cat"]
    rows = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert [(row["class"], row["n"]) for row in rows] == [("a|dog", 3), ("cat", 3)]
    assert sum(row["correct"] for row in rows) == result["correct"]
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "labels.json").read_text()) == {"0": "a|dog", "1": "cat"}
    card = ModelCard.load(adapter / "README.md").text
    assert f"| 0 | a\\|dog | {rows[0]['correct']} | 3 |" in card
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").config
    assert config.id2label == {0: "a|dog", 1: "cat"}
    assert config.label2id == {"a|dog": 0, "cat": 1}

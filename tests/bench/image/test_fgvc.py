"""FGVC in each layout."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from tests.bench import copies
from tests.bench.copies import FGVC, STANDARD, class_folders, parquet, picture, split_files, table

from san_bench.datacheck.manifest import load_manifest
from san_bench.image import fgvc
from san_bench.image.tasks import load_task
from san_peft.errors import SanError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sizes(task):
    return {name: len(split) for name, split in task.splits.items()}


def test_the_shipped_manifest_is_fgvc():
    tasks = load_manifest("fgvc").tasks
    assert {name: (f.classes, f.splits["trainval"], f.splits["test"]) for name, f in tasks.items()} == {
        "cub": (200, 5994, 5794),
        "nabirds": (555, 23929, 24633),
        "flowers": (102, 2040, 6149),
        "dogs": (120, 12000, 8580),
        "cars": (196, 8144, 8041),
    }
    assert all(f.splits["train"] + f.splits["val"] == f.splits["trainval"] for f in tasks.values())


@pytest.mark.parametrize(
    ("task", "below"), [("cub", "images"), ("nabirds", "images"), ("dogs", "Images"), ("flowers", "jpg"), ("cars", ".")]
)
def test_split_files_of_vpt(tmp_path, task, below):
    split_files(tmp_path / FGVC[task].folders[0], below, "jpg/{:03d}.png" if task == "flowers" else "{:03d}.png")
    if task == "flowers":  # VPT names its images from the data set's own folder
        split_files(tmp_path / FGVC[task].folders[0], ".", "jpg/{:03d}.png")
    loaded = fgvc.load(task, tmp_path, FGVC)
    assert (loaded.name, loaded.num_classes, sizes(loaded)) == (f"fgvc/{task}", 3, STANDARD)
    assert loaded["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert loaded["val"].image(1).tobytes() == picture(7).tobytes()
    assert loaded["trainval"].image(7).tobytes() == picture(7).tobytes()


@pytest.mark.parametrize("task", ["cub", "nabirds"])
def test_official_lists_of_birds(tmp_path, task):
    copies.birds(tmp_path / FGVC[task].folders[0])
    loaded = fgvc.load(task, tmp_path, FGVC)
    assert sizes(loaded) == STANDARD
    assert loaded["trainval"].labels.tolist() == [0, 1, 2] * 3
    assert loaded["test"].image(0).tobytes() == picture(9).tobytes()
    assert sorted(loaded["val"].labels.tolist()) == [0, 1, 2]
    assert not set(loaded["train"].files) & set(loaded["val"].files)
    assert set(loaded["train"].files) | set(loaded["val"].files) == set(loaded["trainval"].files)
    assert loaded["val"].files == fgvc.load(task, tmp_path, FGVC)["val"].files


@pytest.mark.parametrize(
    ("task", "make"),
    [("flowers", copies.flowers), ("dogs", copies.dogs), ("cars", copies.cars), ("cars", copies.old_cars)],
)
def test_official_lists_in_matlab_files(tmp_path, task, make):
    make(tmp_path / FGVC[task].folders[0])
    loaded = fgvc.load(task, tmp_path, FGVC)
    assert sizes(loaded) == STANDARD
    assert loaded["test"].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.abs(np.asarray(loaded["test"].image(5), int) - np.asarray(picture(14), int)).max() < 8
    if task == "flowers":
        assert [file[-6:-4] for file in loaded["val"].files] == ["07", "08", "09"]  # its own validation split


def test_cars_as_kaggle_nests_them(tmp_path):
    copies.cars(tmp_path / "Stanford-Cars", nested=True)
    loaded = fgvc.load("cars", tmp_path, FGVC)
    assert loaded["test"].files[0] == "cars_test/cars_test/00009.jpg"
    assert loaded["test"].image(0).size == (8, 8)


def test_folders_and_tables(tmp_path):
    class_folders(tmp_path / "a" / "stanford_cars", {"train": 9, "test": 6}, ["Audi", "BMW", "Cord"])
    class_folders(tmp_path / "b" / "stanford_cars", {"train": 9, "val": 6}, ["Audi", "BMW", "Cord"])
    parquet(tmp_path / "c" / "stanford_cars" / "data", {"train": table(9, 3), "test": table(6, 3, 1)})
    for copy in "abc":
        loaded = fgvc.load("cars", tmp_path / copy, FGVC)
        assert sizes(loaded) == STANDARD
        assert loaded["test"].image(0).tobytes() == picture({"a": 9, "b": 9, "c": 1000}[copy]).tobytes()
        assert sorted(loaded["val"].labels.tolist()) == [0, 1, 2]


def test_missing_lists_are_named(tmp_path):
    place = split_files(tmp_path / "a" / "CUB_200_2011", "images")
    (place / "val.json").unlink()
    with pytest.raises(SanError, match=r"the split file val.json is missing next to train.json, test.json"):
        fgvc.load("cub", tmp_path / "a", FGVC)
    place = copies.cars(tmp_path / "b" / "stanford_cars")
    (place / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(
        SanError, match=r"the official list cars_test_annos_withlabels.mat is missing next to cars_train"
    ):
        fgvc.load("cars", tmp_path / "b", FGVC)
    (tmp_path / "c" / "stanford_dogs").mkdir(parents=True)
    with pytest.raises(SanError, match=r"Stanford Dogs.* train.json"):
        fgvc.load("dogs", tmp_path / "c", FGVC)


def test_lists_that_disagree_are_named(tmp_path):
    place = copies.birds(tmp_path / "nabirds")
    text = (place / "image_class_labels.txt").read_text()
    (place / "image_class_labels.txt").write_text(text.replace("4 295\n", ""))
    with pytest.raises(SanError, match=r"do not list the same images.*: 4"):
        fgvc.load("nabirds", tmp_path, FGVC)


def test_broken_lists_are_named(tmp_path):
    place = split_files(tmp_path / "CUB_200_2011", "images")
    (place / "train.json").write_text("{", encoding="utf-8")
    with pytest.raises(SanError, match=r"train.json is not JSON"):
        fgvc.load("cub", tmp_path, FGVC)
    (place / "train.json").write_text("[]", encoding="utf-8")
    with pytest.raises(SanError, match=r"train.json .* classes"):
        fgvc.load("cub", tmp_path, FGVC)
    place = copies.dogs(tmp_path / "stanford_dogs")
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    for damaged in (b"no MATLAB" * 30, b"", bytes(200), header + b"\x0f\0\0\0\xff\0\0\0" + b"x" * 300):
        (place / "train_list.mat").write_bytes(damaged)
        with pytest.raises(SanError, match=r"train_list.mat cannot be read as a MATLAB file"):
            fgvc.load("dogs", tmp_path, FGVC)


def test_another_cut_of_training_is_no_error_but_another_test_is(tmp_path):
    place = split_files(tmp_path / "CUB_200_2011", "images")
    train, val = (json.loads((place / f"{name}.json").read_text()) for name in ("train", "val"))
    moved = next(iter(train))
    val[moved] = train.pop(moved)
    for name, part in (("train", train), ("val", val)):
        (place / f"{name}.json").write_text(json.dumps(part))
    assert sizes(fgvc.load("cub", tmp_path, FGVC)) == {**STANDARD, "train": 5, "val": 4}
    test = json.loads((place / "test.json").read_text())
    (place / "test.json").write_text(json.dumps(dict(list(test.items())[:5])))
    with pytest.raises(SanError, match="test has 5 images, not 6"):
        fgvc.load("cub", tmp_path, FGVC)


def test_load_task_compares_with_the_real_sizes(tmp_path):
    copies.flowers(tmp_path / "flowers-102")
    with pytest.raises(SanError, match="test has 6 images, not 6,149"):
        load_task("fgvc/flowers", tmp_path)
    with pytest.raises(SanError, match=r"The suite fgvc has no task 'car'. Did you mean 'cars'\?"):
        load_task("fgvc/car", tmp_path)

"""CIFAR-100, ImageNet-1k, image folders and data sets of the `datasets` library."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from tests.bench.copies import GIC, STANDARD, class_folders, encoded, numbers, parquet, picture, table, write_picture
from torchvision.datasets import CIFAR100

from san_bench.datacheck.manifest import load_manifest
from san_bench.image import folders
from san_bench.image.tasks import load_task
from san_peft.errors import SanError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sizes(task):
    return {name: len(split) for name, split in task.splits.items()}


def test_the_shipped_manifest():
    tasks = load_manifest("gic").tasks
    assert tasks["cifar100"].splits == {"train": 45_000, "val": 5_000, "trainval": 50_000, "test": 10_000}
    assert (tasks["imagenet-1k"].splits["trainval"], tasks["imagenet-1k"].splits["test"]) == (1_281_167, 50_000)


def batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-100 as torchvision stores it, with 9 and 6 images, and their checksums in place of the true ones."""
    place = root / "cifar-100-python"
    place.mkdir(parents=True)
    sums = {}
    for name, size, seed in (("train", 9, 0), ("test", 6, 1)):
        images = np.random.default_rng(seed).integers(0, 256, (size, 3072), dtype=np.uint8)
        content = {"data": images, "fine_labels": [i % 3 for i in range(size)]}
        (place / name).write_bytes(pickle.dumps(content))
    (place / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c"]}))
    for name in ("train", "test", "meta"):
        sums[name] = hashlib.md5((place / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return place


@pytest.mark.parametrize("below", [".", "cifar100"])
def test_cifar_as_torchvision_stores_it(tmp_path, monkeypatch, below):
    batches(tmp_path / below, monkeypatch)
    task = folders.load("cifar100", tmp_path, GIC)
    assert (task.name, task.num_classes, sizes(task)) == ("gic/cifar100", 3, STANDARD)
    assert task["trainval"].labels.tolist() == [0, 1, 2] * 3
    assert task["test"].image(0).size == (32, 32)
    first = np.random.default_rng(1).integers(0, 256, (6, 3072), dtype=np.uint8)[0].reshape(3, 32, 32)
    np.testing.assert_array_equal(np.asarray(task["test"].image(0)), first.transpose(1, 2, 0))


class Planted:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_is_not_cifars_is_never_opened(tmp_path, monkeypatch):
    place = batches(tmp_path, monkeypatch)
    (place / "train").write_bytes(pickle.dumps(Planted(tmp_path / "planted")))
    with pytest.raises(SanError, match="checksums"):
        folders.load("cifar100", tmp_path, GIC)
    assert not (tmp_path / "planted").exists()


def test_cifar_in_folders_and_tables(tmp_path):
    class_folders(tmp_path / "a" / "cifar100", {"train": 9, "test": 6}, ["10", "9", "2"])
    fine = {"train": table(9, 3, 0, "fine_label"), "test": table(6, 3, 1, "fine_label")}
    coarse = {name: t.add_column("coarse_label", [0] * len(t)) for name, t in fine.items()}
    coarse = {n: t.cast_column("coarse_label", datasets.ClassLabel(names=["all"])) for n, t in coarse.items()}
    parquet(tmp_path / "b" / "cifar100" / "cifar100", coarse)
    for copy in "ab":
        task = folders.load("cifar100", tmp_path / copy, GIC)
        assert (task.num_classes, sizes(task)) == (3, STANDARD)
    by_number = folders.load("cifar100", tmp_path / "a", GIC)
    assert {
        Path(f).parts[1]: int(n) for f, n in zip(by_number["test"].files, by_number["test"].labels, strict=True)
    } == {
        "2": 0,
        "9": 1,
        "10": 2,
    }


def test_imagenets_validation_images_are_the_test_and_nothing_is_chosen_on_them(tmp_path):
    place = class_folders(tmp_path / "ILSVRC2012", {"train": 9, "val": 6}, ["n01", "n02", "n03"])
    task = folders.load("imagenet-1k", tmp_path, GIC)
    assert (task.name, sizes(task)) == ("gic/imagenet-1k", STANDARD)
    assert all(file.startswith("val/") for file in task["test"].files)
    assert all(file.startswith("train/") for file in task["val"].files + task["train"].files)
    assert folders.load("imagenet-1k", place, GIC).fingerprint == task.fingerprint
    with pytest.raises(SanError, match="trainval has 9 images, not 1,281,167"):
        load_task("gic/imagenet-1k", tmp_path)


def test_images_that_are_not_in_folders_of_classes_are_named(tmp_path):
    place = class_folders(tmp_path / "imagenet-1k", {"train": 9}, ["n01", "n02", "n03"])
    write_picture(place / "val" / "ILSVRC2012_val_00000001.JPEG", 1)
    with pytest.raises(SanError, match="val has no class folders"):
        folders.load("imagenet-1k", tmp_path, GIC)


def test_an_image_folder_with_and_without_splits(tmp_path):
    full = class_folders(tmp_path / "full", {"train": 20, "valid": 4, "test": 6}, ["cat", "dog"])
    assert sizes(load_task("folder", full)) == {"train": 20, "val": 4, "trainval": 24, "test": 6}
    part = class_folders(tmp_path / "part", {"train": 20, "test": 6}, ["cat", "dog"])
    assert sizes(load_task("folder", part)) == {"train": 18, "val": 2, "trainval": 20, "test": 6}
    task = load_task("folder", class_folders(tmp_path / "none", {"": 50}, ["cat", "dog"]))
    assert (task.name, task.num_classes) == ("folder", 2)
    assert sizes(task) == {"train": 36, "val": 4, "trainval": 40, "test": 10}
    assert task["test"].labels.tolist().count(1) == 5
    assert len(set(task["train"].files + task["val"].files + task["test"].files)) == 50


def test_image_folders_that_do_not_fit_are_explained(tmp_path):
    with pytest.raises(SanError, match="There is no folder"):
        load_task("folder", tmp_path / "nowhere")
    with pytest.raises(SanError, match=r"is not an image folder"):
        load_task("folder", tmp_path)
    place = class_folders(tmp_path / "more", {"train": 6, "test": 6}, ["cat", "dog"])
    write_picture(place / "test" / "eel" / "1.png", 7)
    with pytest.raises(SanError, match=r"test has classes .*: eel"):
        load_task("folder", place)
    place = class_folders(tmp_path / "only", {"test": 6}, ["cat", "dog"])
    with pytest.raises(SanError, match="there is no training split, only test"):
        load_task("folder", place)


def test_data_sets_saved_to_disk_and_as_files(tmp_path):
    rows = {
        "train": table(20, ["cat", "dog"]),
        "validation": table(4, ["cat", "dog"], 1),
        "test": table(6, ["cat", "dog"], 2),
    }
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "saved"))
    parquet(tmp_path / "files" / "data", rows)
    table(20, ["cat", "dog"]).save_to_disk(str(tmp_path / "one"))
    for name in ("saved", "files"):
        task = load_task("datasets", tmp_path / name)
        assert (task.name, task.num_classes) == ("datasets", 2)
        assert sizes(task) == {"train": 20, "val": 4, "trainval": 24, "test": 6}
        assert task["trainval"].image(20).tobytes() == picture(1000).tobytes()
    assert sizes(load_task("datasets", tmp_path / "one")) == {"train": 15, "val": 1, "trainval": 16, "test": 4}


def test_labels_without_names_are_numbered_and_bytes_are_images(tmp_path):
    rows = {"jpg": [encoded(n) for n, _ in zip(numbers(), range(8), strict=False)], "cls": [30, 7, 30, 7] * 2}
    plain = datasets.Dataset.from_dict(rows)
    words = datasets.Dataset.from_dict({"jpg": rows["jpg"], "target": ["eel", "cat"] * 4})
    for name, data in (("plain", plain), ("words", words)):
        parquet(tmp_path / name, {"train": data, "test": data})
        task = load_task("datasets", tmp_path / name)
        assert task.num_classes == 2
        assert task["test"].labels.tolist() == [1, 0] * 4
        assert task["test"].image(3).tobytes() == picture(3).tobytes()


def test_a_split_without_labels_is_left_out(tmp_path):
    rows = table(6, ["cat", "dog"])
    unknown = rows.map(lambda row: {"label": -1})
    parquet(tmp_path / "data", {"train": table(20, ["cat", "dog"]), "validation": rows, "test": unknown})
    assert sizes(load_task("datasets", tmp_path)) == {"train": 18, "val": 2, "trainval": 20, "test": 6}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": [0, 1]}, "0 among label"),
        ({"a": [b"1", b"2"], "b": [b"1", b"2"], "label": [0, 1]}, "2 among a, b, label"),
        ({"jpg": [b"1", b"2"], "price": [0, 1]}, "among jpg, price"),
        ({"jpg": [b"1", b"2"], "label": [0, None]}, "'label' has 1 rows without a label"),
    ],
)
def test_columns_that_are_not_clear_are_explained(tmp_path, columns, said):
    parquet(tmp_path / "data", {"train": datasets.Dataset.from_dict(columns)})
    with pytest.raises(SanError, match=said):
        load_task("datasets", tmp_path)


def test_two_configurations_are_not_mixed(tmp_path):
    parquet(tmp_path / "first", {"train": table(4, 2)})
    parquet(tmp_path / "second", {"train": table(4, 2)})
    with pytest.raises(SanError, match=r"several configurations of train: .*first, .*second"):
        load_task("datasets", tmp_path)


def test_what_is_neither_a_folder_nor_on_the_hub_is_explained(tmp_path):
    with pytest.raises(SanError, match=r"There is no folder .*nowhere"):
        load_task("datasets", tmp_path / "nowhere")
    with pytest.raises(SanError, match="someone/nothing"):
        load_task("datasets", Path("someone/nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SanError, match="empty contains no readable dataset"):
        load_task("datasets", tmp_path / "empty")


def test_unknown_tasks_are_answered_with_known_ones(tmp_path):
    with pytest.raises(
        SanError, match=r"no task 'cifar10'. Did you mean 'cifar100'\? Choose from cifar100, imagenet-1k"
    ):
        load_task("gic/cifar10", tmp_path)

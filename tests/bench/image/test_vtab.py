"""VTAB-1k in each layout, and what is said where it is not as it must be."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from tests.bench.copies import SIZES, VTAB, class_folders, community, parquet, picture, table

from san_bench.datacheck.manifest import load_manifest
from san_bench.image import vtab
from san_bench.image.layouts import take
from san_bench.image.splits import TableSplit
from san_bench.image.tasks import load_task
from san_peft.errors import SanError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sizes(task):
    return {name: len(split) for name, split in task.splits.items()}


def test_the_shipped_manifest_is_vtab():
    tasks = load_manifest("vtab").tasks
    assert len(tasks) == 19
    assert sum(facts.splits["test"] for facts in tasks.values()) == 387_904
    assert [sum(f.group == g for f in tasks.values()) for g in ("natural", "specialised", "structured")] == [7, 4, 8]
    parts = {"train800": 800, "val200": 200, "train800val200": 1000}
    assert all({**facts.splits, **parts} == facts.splits for facts in tasks.values())
    classes = {name: facts.classes for name, facts in tasks.items()}
    assert (classes["clevr_dist"], classes["kitti"], classes["smallnorb_ele"]) == (6, 4, 9)
    assert (
        sum(classes.values()) == 100 + 102 + 47 + 102 + 37 + 10 + 397 + 2 + 10 + 45 + 5 + 8 + 6 + 6 + 4 + 16 + 16 + 27
    )
    names = [name for facts in tasks.values() for name in facts.folders]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("folder", ["cifar", "cifar_100", "CIFAR-100"])
def test_the_communitys_layout_under_both_names(tmp_path, folder):
    community(tmp_path, VTAB["cifar"], folder)
    task = vtab.load("cifar", tmp_path, VTAB)
    assert (task.name, task.num_classes, sizes(task)) == ("vtab/cifar", 2, SIZES)
    assert task["test"].labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert task["train800val200"].labels.tolist() == [0, 1] * 6
    near = np.asarray(task["val200"].image(1), int) - np.asarray(picture(9), int)
    assert np.abs(near).max() < 8  # a JPEG


def test_tables_and_folders_need_no_joined_split(tmp_path):
    parts = {name: SIZES[name] for name in ("train800", "val200", "test")}
    tables = {name: table(size, 2, seed) for seed, (name, size) in enumerate(parts.items())}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "a" / "cifar"))
    parquet(tmp_path / "b" / "cifar" / "data", tables)
    class_folders(tmp_path / "c" / "cifar", parts, ["cat", "dog"])
    for copy in ("a", "b", "c"):
        task = vtab.load("cifar", tmp_path / copy, VTAB)
        assert sizes(task) == SIZES
        in_order = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1] if copy == "c" else [0, 1] * 6
        assert task["train800val200"].labels.tolist() == in_order
        first = 0 if copy == "c" else 1000
        order = 8 if copy == "c" else 0
        assert task["val200"].image(0).tobytes() == picture(first + order).tobytes()
        assert task["train800val200"].image(8).tobytes() == task["val200"].image(0).tobytes()


def test_train_and_validation_of_the_right_size_are_taken_as_they_are(tmp_path):
    class_folders(tmp_path / "cifar", {"train": 8, "validation": 4, "test": 6}, ["cat", "dog"])
    assert sizes(vtab.load("cifar", tmp_path, VTAB)) == SIZES


def test_another_copy_of_the_data_set_is_not_cut_into_vtab(tmp_path):
    parquet(tmp_path / "cifar", {"train": table(50, 2), "test": table(6, 2, 1)})
    with pytest.raises(SanError) as said:
        vtab.load("cifar", tmp_path, VTAB)
    assert "train800 has 50 images, not 8" in str(said.value)
    assert "split val200 is missing" in str(said.value)
    assert "test of 6, train of 50;" in str(said.value)


def test_every_mistake_in_the_lists_is_said_at_once(tmp_path):
    place = community(tmp_path, VTAB["clevr_dist"])
    (place / "val200.txt").unlink()
    lines = (place / "test.txt").read_text().splitlines()
    (place / "test.txt").write_text("\n".join([*lines[:3], "images/test/000003.jpg 7", "nonsense", lines[5]]))
    with pytest.raises(SanError) as said:
        vtab.load("clevr_dist", tmp_path, VTAB)
    for words in (
        "the list val200.txt is missing",
        "test.txt: 1 lines are not a path, a space and a number: line 5, 'nonsense'",
        "split val200 is missing",
        "test has 5 images, not 6",
        "test: 1 labels are outside 0 to 2: 7 of images/test/000003.jpg",
    ):
        assert words in str(said.value)


def test_a_class_that_never_occurs_is_an_error(tmp_path):
    place = community(tmp_path, VTAB["clevr_dist"])
    for path in place.glob("*.txt"):
        path.write_text(path.read_text().replace(" 2\n", " 1\n"))
    with pytest.raises(SanError, match="only 2 of 3 classes occur, without: 2"):
        vtab.load("clevr_dist", tmp_path, VTAB)


def test_wrong_folders_are_answered_with_what_is_there(tmp_path):
    with pytest.raises(SanError, match=r"There is no folder .*nowhere"):
        vtab.load("cifar", tmp_path / "nowhere", VTAB)
    community(tmp_path / "vtab-1k", VTAB["cifar"])
    with pytest.raises(SanError, match=r"no folder for CIFAR-100: none of cifar, cifar_100. Did you mean .*/vtab-1k\?"):
        vtab.load("cifar", tmp_path, VTAB)
    community(tmp_path / "vtab-1k", VTAB["cifar"], "cifar_100")
    with pytest.raises(SanError, match=r"several folders for CIFAR-100: cifar, cifar_100. Keep one"):
        vtab.load("cifar", tmp_path / "vtab-1k", VTAB)
    (tmp_path / "empty" / "cifar").mkdir(parents=True)
    with pytest.raises(SanError, match=r"train800.txt"):
        vtab.load("cifar", tmp_path / "empty", VTAB)


def test_the_folder_of_a_task_may_be_named_itself(tmp_path):
    community(tmp_path, VTAB["cifar"])
    assert sizes(vtab.load("cifar", tmp_path / "cifar", VTAB)) == SIZES


def test_load_task_finds_the_suite_and_its_own_manifest(tmp_path):
    community(tmp_path, VTAB["cifar"])
    with pytest.raises(SanError, match="test has 6 images, not 10,000"):
        load_task("vtab/cifar", tmp_path)
    with pytest.raises(SanError, match=r"The suite vtab has no task 'cifr'. Did you mean 'cifar'\?"):
        load_task("vtab/cifr", tmp_path)
    with pytest.raises(SanError, match="vtab/cifar"):
        load_task("vtab/cifar")


def test_a_broken_table_is_named(tmp_path):
    place = parquet(tmp_path / "cifar", {"train800": table(8, 2)})
    (place / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SanError, match=r"The tables in .*cifar cannot be read"):
        vtab.load("cifar", tmp_path, VTAB)


def test_fingerprints_follow_labels_and_images(tmp_path):
    place = community(tmp_path, VTAB["cifar"])
    first = vtab.load("cifar", tmp_path, VTAB).fingerprint
    assert vtab.load("cifar", tmp_path, VTAB).fingerprint == first
    lines = (place / "test.txt").read_text()
    (place / "test.txt").write_text(lines.replace("000000.jpg 0", "000000.jpg 1"))
    assert vtab.load("cifar", tmp_path, VTAB).fingerprint != first


def test_fingerprints_of_tables_follow_what_they_hold_and_not_where(tmp_path):
    labels = np.arange(6) % 2
    copies = []
    for name in ("here.parquet", "there.parquet"):
        table(6, 2).to_parquet(tmp_path / name)
        copy = datasets.Dataset.from_parquet(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        copies.append(TableSplit(copy, "image", labels))
    first, moved = copies
    assert first.fingerprint == moved.fingerprint
    parts = [first, take(first, np.arange(5)), take(first, np.arange(6)[::-1])]
    assert len({part.fingerprint for part in parts}) == 3
    file = tmp_path / "one.png"
    first.image(0).save(file)
    inside = datasets.Dataset.from_dict({"image": [{"bytes": file.read_bytes(), "path": None}]})
    beside = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": str(file)}]})
    label = np.zeros(1, np.int64)
    prints = {
        TableSplit(t.cast_column("image", datasets.Image()), "image", label).fingerprint for t in (inside, beside)
    }
    assert len(prints) == 1

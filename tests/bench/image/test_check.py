"""`san data check`: every problem at once."""

from __future__ import annotations

import shutil

import datasets
import pytest
from tests.bench import copies
from tests.bench.copies import FGVC, VTAB, class_folders, community, encoded, parquet, picture, table, write_picture

from san_bench.datacheck.check import check_command, examine
from san_bench.datacheck.manifest import Manifest
from san_peft.errors import SanError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def data(tmp_path):
    for seed, facts in enumerate(VTAB.tasks.values()):
        community(tmp_path / "data", facts, seed=seed)
    return tmp_path / "data"


def check(*words, **options):
    return [problem for found in examine(*words, **options) for problem in found.problems]


def said(problems):
    return [f"{problem.level}: {problem}" for problem in problems]


def test_good_data_has_no_problem(data):
    assert check("vtab", data, manifest=VTAB) == []
    assert check("vtab", data, images=False, manifest=VTAB) == []


def test_every_problem_is_found_at_once(data):
    place = data / "cifar" / "images"
    (place / "test" / "000002.jpg").unlink()
    (place / "test" / "000003.jpg").write_bytes(b"")
    whole = (place / "val200" / "000001.jpg").read_bytes()
    (place / "val200" / "000001.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "cifar" / "train800.txt").unlink()
    shutil.rmtree(data / "clevr_dist")
    problems = said(check("vtab", data, manifest=VTAB))
    assert problems[:2] == [
        "error: vtab/cifar: the list train800.txt is missing",
        "error: vtab/cifar: split train800 is missing",
    ]
    assert problems[2].startswith("error: vtab/cifar: val200: 1 images cannot be read: images/val200/000001.jpg (")
    assert problems[3] == "error: vtab/cifar: test: 1 images are missing: images/test/000002.jpg"
    assert problems[4].startswith(
        "error: vtab/cifar: test: 1 images cannot be read: images/test/000003.jpg (cannot iden"
    )
    assert problems[5].startswith(f"error: vtab/clevr_dist: {data} has no folder for CLEVR distance")
    assert len(problems) == 6
    quick = said(check("vtab", data, images=False, manifest=VTAB))
    assert quick == [problems[0], problems[1], problems[3], problems[5]]


def test_one_task_can_be_checked_alone(data):
    shutil.rmtree(data / "clevr_dist")
    assert check("vtab/cifar", data, manifest=VTAB) == []
    assert len(check("vtab/clevr_dist", data, manifest=VTAB)) == 1


def test_images_in_two_splits_are_an_error_unless_they_are_few(data):
    images = data / "cifar" / "images"
    shutil.copy(images / "train800" / "000003.jpg", images / "test" / "000000.jpg")
    first, second = said(check("vtab", data, manifest=VTAB))
    assert first == (
        "error: vtab/cifar: train800 and test have 1 images in common, 16.7% of the smaller: "
        "images/train800/000003.jpg = images/test/000000.jpg"
    )
    assert second.startswith("error: vtab/cifar: train800val200 and test have 1 images in common")


def test_few_images_in_common_are_a_warning(tmp_path):
    place = class_folders(tmp_path, {"train": 300, "val": 110, "test": 120}, ["cat", "dog"])
    shutil.copy(place / "train" / "cat" / "000.png", place / "test" / "cat" / "000.png")
    shutil.copy(place / "train" / "cat" / "002.png", place / "train" / "cat" / "004.png")
    assert said(check("folder", tmp_path)) == [
        "warning: folder: train: 1 images occur more than once: train/cat/002.png = train/cat/004.png",
        "warning: folder: train and test have 1 images in common, 0.8% of the smaller: "
        "train/cat/000.png = test/cat/000.png",
    ]


def test_training_must_be_the_images_of_both_parts(data):
    write_picture(data / "cifar" / "images" / "train800val200" / "000005.jpg", 999)
    assert said(check("vtab", data, manifest=VTAB)) == [
        "warning: vtab/cifar: train800val200: 1 images are not those of train800 and val200, or have other labels"
    ]


def test_tables_are_looked_into(tmp_path):
    images = [b"no image", *map(encoded, (1, 2, 3))]
    broken = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=table(4, 2).features)
    parts = {"train800": table(8, 2, 1), "val200": broken, "test": table(6, 2, 2)}
    parquet(tmp_path / "cifar", parts)
    manifest = Manifest("vtab", "", "", {"cifar": VTAB["cifar"]})
    (problem,) = check("vtab", tmp_path, manifest=manifest)
    assert str(problem).startswith("vtab/cifar: val200: 1 images cannot be read: row 0 (cannot identify image file")


def test_fgvc_is_looked_into(tmp_path):
    copies.birds(tmp_path / "CUB_200_2011")
    (tmp_path / "CUB_200_2011" / "images" / "0295" / "009.png").write_bytes(b"x")
    (problem,) = check("fgvc/cub", tmp_path, manifest=FGVC)
    assert str(problem).startswith("fgvc/cub: test: 1 images cannot be read: images/0295/009.png")


def test_checksums_name_what_changed(data, tmp_path):
    sums = tmp_path / "sums.txt"
    assert check("vtab", data, manifest=VTAB, write_checksums=sums) == []
    lines = sums.read_text().splitlines()
    assert len(lines) == 2 * (4 + 30)
    assert lines[0].endswith("  cifar/images/test/000000.jpg")
    assert check("vtab", data, manifest=VTAB, checksums=sums) == []
    assert check("vtab/cifar", data, manifest=VTAB, checksums=sums) == []
    picture(5000).save(data / "cifar" / "images" / "test" / "000000.jpg")
    (data / "clevr_dist" / "images" / "test" / "000001.jpg").unlink()
    problems = said(check("vtab", data, manifest=VTAB, checksums=sums))
    assert problems[1:] == [
        "error: vtab: 1 files have changed, says sums.txt: cifar/images/test/000000.jpg",
        "error: vtab: 1 files are missing or unreadable, says sums.txt: clevr_dist/images/test/000001.jpg",
    ]
    assert len(check("vtab/cifar", data, manifest=VTAB, checksums=sums)) == 1


def test_checksums_that_cannot_be_used_are_explained(data, tmp_path):
    with pytest.raises(SanError, match="no checksum file"):
        check("vtab", data, manifest=VTAB, checksums=tmp_path / "none")
    (tmp_path / "bad").write_text("abc\n")
    with pytest.raises(SanError, match="bad, line 1: 'abc' is not a sha256"):
        check("vtab", data, manifest=VTAB, checksums=tmp_path / "bad")
    with pytest.raises(SanError, match="leave out --no-images"):
        check("vtab", data, images=False, manifest=VTAB, write_checksums=tmp_path / "sums")


def test_wrong_folders_and_names_are_one_message(tmp_path):
    with pytest.raises(SanError, match="There is no folder"):
        check("vtab", tmp_path / "nowhere")
    with pytest.raises(SanError, match=r"none of the 19 datasets of vtab. .* none of cifar, cifar_100"):
        check("vtab", tmp_path)
    with pytest.raises(SanError, match=r"'vtba'.*Did you mean 'vtab'\?"):
        check("vtba", tmp_path)
    with pytest.raises(SanError, match="The suite vtab has no task 'cifr'"):
        check("vtab/cifr", tmp_path)


def test_the_command_prints_all_and_ends_with_1(tmp_path, capsys):
    place = class_folders(tmp_path / "mine", {"train": 10, "test": 5}, ["cat", "dog"])
    check_command("folder", place)
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [  # older rich leaves one of the bar
        "folder: class folders, val cut from training; train 9, val 1, trainval 10, test 5; 2 classes",
        "No problems.",
    ]
    (place / "test" / "cat" / "000.png").write_bytes(b"x")
    with pytest.raises(SystemExit) as stop:
        check_command("folder", place)
    assert stop.value.code == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[1].startswith("error: folder: test: 1 images cannot be read: test/cat/000.png")
    assert lines[2] == "1 error, 0 warnings"


def test_the_command_says_what_became_of_checksums(tmp_path, capsys):
    place = class_folders(tmp_path / "mine", {"train": 10, "test": 5}, ["cat", "dog"])
    check_command("folder", place, write_checksums=tmp_path / "sums")
    assert f"Checksums written: {tmp_path / 'sums'}" in capsys.readouterr().out
    check_command("folder", place, checksums=tmp_path / "sums")
    assert f"All checksums in {tmp_path / 'sums'} match." in capsys.readouterr().out
    (tmp_path / "sums").write_text("".join((tmp_path / "sums").read_text().splitlines(True)[1:]))
    with pytest.raises(SystemExit):
        check_command("folder", place, checksums=tmp_path / "sums")
    printed = capsys.readouterr().out
    assert "1 files are new" in printed
    assert "match" not in printed


def test_an_empty_file_list_of_many_is_cut_short_in_print_but_complete(data):
    for path in (data / "cifar" / "images" / "train800").iterdir():
        path.unlink()
    (problem,) = check("vtab", data, manifest=VTAB, images=False)
    assert len(problem.items) == 8
    assert str(problem).endswith("images/train800/000004.jpg and 3 more")

"""One's own images: layouts, what is left out and counted, warnings that name folders, splits held out."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import datasets
import pytest
from tests.bench.copies import class_folders, picture, table, write_picture

from san_bench.config.recipe import load_recipe
from san_bench.datacheck.check import examine
from san_bench.image.domain import recipe_task
from san_bench.image.folders import read_own
from san_bench.image.recipe import Holdout
from san_bench.image.tasks import load_task
from san_peft.errors import SanError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def sizes(task):
    return {name: len(split) for name, split in task.splits.items()}


def every(task):
    return sorted(file for name in ("train", "val", "test") for file in task[name].files)


def warnings(found):
    return {" ".join(problem.text.split()): problem.items for problem in found.problems}


@pytest.fixture
def photos(tmp_path):
    return class_folders(tmp_path / "photos", {"": 40}, ["cat", "dog"])


@pytest.mark.parametrize("recipe", ["san", "lora", "linear"])
def test_shipped_recipes_take_a_folder(photos, recipe):
    chosen = load_recipe(f"images/{recipe}", {"data": str(photos)})
    assert sizes(recipe_task(chosen)) == {"train": 29, "val": 3, "trainval": 32, "test": 8}
    with pytest.raises(SanError, match="'folder' needs data"):
        recipe_task(load_recipe(f"images/{recipe}"))


def test_splits_held_out_follow_the_recipe_and_not_its_seed(photos):
    def cut(**changes):
        values = {key.replace("__", "."): value for key, value in changes.items()}
        return recipe_task(load_recipe("images/san", {"data": str(photos), **values}))

    assert sizes(cut(holdout__val=0.25, holdout__test=0.5)) == {"train": 15, "val": 5, "trainval": 20, "test": 20}
    assert cut(holdout__test=0.5)["test"].labels.tolist().count(0) == 10
    assert cut(seed=1).fingerprint == cut().fingerprint == load_task("folder", photos).fingerprint
    assert cut(holdout__seed=1).fingerprint != cut().fingerprint


def test_recipes_from_before_keep_their_fingerprints():
    assert load_recipe("demo/san").fingerprint == ("b92926f8726319d169175addebb8c04f96d74f330e2957f40b02255210fd06ec")
    recipe = load_recipe("images/san")
    changed = load_recipe("images/san", {"holdout.test": 0.5})
    assert "holdout" not in recipe.to_yaml()
    assert changed.fingerprint != recipe.fingerprint
    assert "test: 0.5" in changed.to_yaml()
    with pytest.raises(SanError, match="holdout"):
        load_recipe("demo/san", {"holdout.test": 0.5})


@pytest.mark.parametrize("names", [("training", "dev", "testing"), ("Train", "validation", "eval")])
def test_split_folders_by_all_their_names(tmp_path, names):
    class_folders(tmp_path, dict(zip(names, (10, 4, 6), strict=True)), ["cat", "dog"])
    assert sizes(load_task("folder", tmp_path)) == {"train": 10, "val": 4, "trainval": 14, "test": 6}


def test_two_folders_for_one_split_are_not_mixed(tmp_path):
    class_folders(tmp_path, {"train": 4, "val": 4, "valid": 4}, ["cat", "dog"])
    with pytest.raises(SanError, match="val and valid"):
        load_task("folder", tmp_path)


def test_hidden_and_system_files_are_left_out_and_counted(photos):
    clean = read_own("folder", photos)
    for name in (".DS_Store", "cat/._000.png", "cat/Thumbs.db", "dog/desktop.ini"):
        (photos / name).write_bytes(b"system")
    write_picture(photos / "__MACOSX" / "cat" / "000.png", 1)
    write_picture(photos / ".trash" / "000.png", 1)
    found = read_own("folder", photos)
    assert found.names == ("cat", "dog")
    assert found.layout.replace(", 6 hidden or system files left out", "") == clean.layout
    assert [s.fingerprint for s in found.splits.values()] == [s.fingerprint for s in clean.splits.values()]
    assert not found.problems


def test_links_do_not_multiply_images(photos, tmp_path):
    expected = every(load_task("folder", photos))
    (photos / "cat" / "again").symlink_to(photos / "cat")
    (photos / "dog" / "up").symlink_to(tmp_path)
    (photos / "all").symlink_to(photos)
    found = read_own("folder", photos)
    assert every(load_task("folder", photos)) == expected
    (items,) = [items for text, items in warnings(found).items() if text.startswith("3 linked folders")]
    assert set(items) == {"all", "cat/again", "dog/up"}


def test_a_linked_folder_outside_of_the_data_is_read_once(photos, tmp_path):
    other = class_folders(tmp_path / "other", {"": 3}, ["eel"])
    (other / "eel" / "loop").symlink_to(other / "eel")
    (photos / "eel").symlink_to(other / "eel")
    task = load_task("folder", photos)
    assert task.names == ("cat", "dog", "eel")
    assert len(every(task)) == 43


def test_the_output_of_a_run_is_no_class(photos):
    expected = load_task("folder", photos).fingerprint
    for name in ("out/recipe.yaml", "runs/first/result.json"):
        (photos / name).parent.mkdir(parents=True)
        (photos / name).write_text("{}")
        write_picture((photos / name).parent / "curve.png", 1)
    found = read_own("folder", photos)
    assert load_task("folder", photos).fingerprint == expected
    said = warnings(found)
    assert said["2 folders left out with the output of a run"] == ("out", "runs/first")
    assert said["1 folder without images left out of the classes"] == ("runs",)


def test_warnings_name_the_folders_of_classes_and_files(photos):
    write_picture(photos / "eel" / "1.png", 1)
    (photos / "dog" / "live.heic").write_bytes(b"photo")
    write_picture(photos / "stray.png", 2)
    said = warnings(read_own("folder", photos))
    assert said["1 class of one image only"] == ("eel",)
    assert said["1 image left out beside the class folders"] == ("stray.png",)
    (items,) = [items for text, items in said.items() if ".heic" in text]
    assert items == ("dog/live.heic",)


def test_a_class_in_one_split_alone_is_named(tmp_path):
    class_folders(tmp_path, {"train": 8, "test": 6}, ["cat", "dog"])
    for i in range(3):
        write_picture(tmp_path / "train" / "eel" / f"{i}.png", 500 + i)
    assert warnings(read_own("folder", tmp_path))["test has no image of 1 class"] == ("eel",)


def test_one_class_is_an_error_that_looks_deeper(photos, tmp_path):
    photos.rename(tmp_path / "unpacked")
    (tmp_path / "mine").mkdir()
    (tmp_path / "unpacked").rename(tmp_path / "mine" / "unpacked")
    with pytest.raises(SanError, match=r"one class, unpacked\. .*\(cat, dog\).*mine/unpacked\?"):
        load_task("folder", tmp_path / "mine")


def listed(folder: Path, name: str, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    """A list of paths and labels, and the images."""
    for number, row in enumerate(rows):
        write_picture(folder / row["file_name"].replace("\\", "/"), number)
    with (folder / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


ROWS = [{"file_name": f"images/{i:02d}.png", "label": ("01", "NA", "2;3")[i % 3]} for i in range(30)]


@pytest.mark.parametrize(("name", "delimiter"), [("labels.csv", ","), ("any.csv", ";"), ("any.tsv", "\t")])
def test_a_list_of_paths_and_labels(tmp_path, name, delimiter):
    file = listed(tmp_path, name, ROWS, delimiter)
    task = load_task("folder", file)
    assert task.names == ("01", "2;3", "NA")
    assert sizes(task) == {"train": 22, "val": 2, "trainval": 24, "test": 6}
    label = dict(zip(task["trainval"].files, task["trainval"].labels, strict=True))
    assert all(task.names[number] == ROWS[int(Path(path).stem)]["label"] for path, number in label.items())
    assert load_task("folder", tmp_path).fingerprint == load_task("datasets", tmp_path).fingerprint == task.fingerprint


def test_a_list_with_a_column_of_splits_and_paths_of_windows(tmp_path):
    rows = [
        {"file_name": rf"pics\{i}.png", "label": "ab"[i % 2], "split": "train" if i < 6 else "dev"} for i in range(8)
    ]
    task = load_task("folder", listed(tmp_path, "labels.csv", rows))
    assert task["test"].files == ("pics/6.png", "pics/7.png")
    assert task["test"].image(1).tobytes() == picture(7).tobytes()


def test_lists_of_parquet_and_json_lines_and_of_each_split(tmp_path):
    rows = [{"path": f"{i}.png", "class_name": "ab"[i % 2]} for i in range(10)]
    for number in range(10):
        write_picture(tmp_path / "a" / f"{number}.png", number)
        write_picture(tmp_path / "b" / ("train" if number < 6 else "test") / f"{number}.png", number)
    (tmp_path / "a" / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("folder", tmp_path / "a" / "list.jsonl")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a" / "list.parquet")
    assert load_task("folder", tmp_path / "a" / "list.parquet").fingerprint == task.fingerprint
    for split, part in {"train": rows[:6], "test": rows[6:]}.items():
        datasets.Dataset.from_list(part).to_csv(tmp_path / "b" / split / "metadata.csv")
    of_folders = load_task("folder", tmp_path / "b")
    assert of_folders["test"].files == tuple(f"test/{i}.png" for i in range(6, 10))


def test_paths_of_a_list_stay_in_its_folder(tmp_path):
    inside = tmp_path / "mine"
    write_picture(tmp_path / "secret.png", 1)
    file = listed(inside, "labels.csv", ROWS[:6])
    absolute = [{**row, "file_name": str(inside / row["file_name"])} for row in ROWS[:6]]
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, ["file_name", "label"])
        writer.writeheader()
        writer.writerows(absolute)
    assert every(load_task("folder", file)) == [row["file_name"] for row in ROWS[:6]]
    file.write_text(file.read_text() + "../secret.png,NA\n")
    with pytest.raises(SanError, match=r"1 of 7 .*\.\./secret\.png"):
        load_task("folder", file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,price\na.png,3\n", "name, price"),
        ("file_name,price\na.png,3\n", "label"),
        ("file_name,label\na.png,\nb.png,x\n", "1 rows without a label"),
        ("file_name,label\n", "no rows"),
        ("file_name,label,split\na.png,x,monday\n", "monday"),
    ],
)
def test_lists_that_do_not_fit_are_explained(tmp_path, text, said):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(SanError, match=said):
        load_task("folder", tmp_path / "labels.csv")


def test_names_of_any_bytes_and_a_folder_at_home(tmp_path, monkeypatch):
    class_folders(tmp_path / "mine", {"": 12}, ["cat", "dog"])
    (tmp_path / "mine" / "cat" / "000.png").rename(os.fsdecode(os.fsencode(tmp_path / "mine" / "cat") + b"/\xff.png"))
    (tmp_path / "mine" / "dog").rename(os.fsdecode(os.fsencode(tmp_path / "mine") + b"/d\xffg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    task = load_task("folder", Path("~/mine"))
    assert task.names == ("cat", "d?g")
    assert len(task.fingerprint) == 64
    assert [problem.level for problem in examine("folder", tmp_path / "mine")[0].problems] == []


@pytest.mark.parametrize("name", ["x" * 5000, "photos/cat/000.png/below"])
def test_what_the_system_refuses_is_explained(photos, name):
    with pytest.raises(SanError, match=r"cannot be read|There is no folder"):
        load_task("folder", photos.parent / name)


def test_checksums_of_a_list_are_relative_to_its_folder(tmp_path):
    file = listed(tmp_path / "mine", "labels.csv", ROWS)
    examine("folder", file, write_checksums=tmp_path / "sums")
    names = [line.split("  ")[1] for line in (tmp_path / "sums").read_text().splitlines()]
    assert names == sorted(["labels.csv", *(row["file_name"] for row in ROWS)])


def test_tables_and_saved_data_sets_are_folders_too(tmp_path):
    table(20, ["cat", "dog"]).save_to_disk(str(tmp_path / "saved"))
    task = load_task("folder", tmp_path / "saved")
    assert (task.names, sizes(task)["test"]) == (("cat", "dog"), 4)


def test_names_that_are_no_folder(tmp_path):
    for name in ("my_photos", str(tmp_path / "a" / "b")):
        with pytest.raises(SanError, match="There is no folder"):
            load_task("folder", Path(name))


def test_several_own_folders_are_tasks_of_their_own(photos):
    class_folders(photos.parent / "plants", {"": 30}, ["ash", "elm", "fir"])
    for name, classes in {"photos": 2, "plants": 3}.items():
        task = load_task(f"folder/{name}", photos.parent)
        assert (task.name, task.num_classes) == (f"folder/{name}", classes)
        assert load_task(f"folder/{name}", photos.parent / name).fingerprint == task.fingerprint
    with pytest.raises(SanError, match="no folder"):
        load_task("folder/planes", photos.parent)
    assert read_own("folder/plants", photos.parent, Holdout(test=0.5)).splits["test"].labels.size == 15

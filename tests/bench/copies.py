"""Small copies of data sets in the layouts that people have, and manifests that fit them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from scipy.io import savemat

from san_bench.datacheck.manifest import Facts, Manifest

SIZES = {"train800": 8, "val200": 4, "train800val200": 12, "test": 6}
STANDARD = {"train": 6, "val": 3, "trainval": 9, "test": 6}

VTAB = Manifest(
    "vtab",
    "made up",
    "nowhere",
    {
        "cifar": Facts("CIFAR-100", "natural", 2, SIZES, ("cifar", "cifar_100"), "none"),
        "clevr_dist": Facts("CLEVR distance", "structured", 3, SIZES, ("clevr_dist", "clevr_dist_8"), "none"),
    },
)
FGVC = Manifest(
    "fgvc",
    "made up",
    "nowhere",
    {
        "cub": Facts("CUB-200-2011", None, 3, STANDARD, ("CUB_200_2011",), "none", get="a page"),
        "nabirds": Facts("NABirds", None, 3, STANDARD, ("nabirds",), "none", get="a form"),
        "flowers": Facts(
            "Oxford Flowers102", None, 3, STANDARD, ("flowers-102",), "none", "a page", torchvision="Flowers102"
        ),
        "dogs": Facts("Stanford Dogs", None, 3, STANDARD, ("stanford_dogs",), "none"),
        "cars": Facts("Stanford Cars", None, 3, STANDARD, ("stanford_cars",), "none"),
    },
)
GIC = Manifest(
    "gic",
    "made up",
    "nowhere",
    {
        "cifar100": Facts(
            "CIFAR-100", None, 3, STANDARD, ("cifar100", "cifar-100-python"), "none", hub="someone/cifar100"
        ),
        "imagenet-1k": Facts("ImageNet-1k", None, 3, STANDARD, ("imagenet-1k", "ILSVRC2012"), "none", get="a form"),
    },
)


def picture(number: int) -> Image.Image:
    """A picture of 8x8 pixels of one colour, which JPEG keeps; another one for each number."""
    colour = np.random.default_rng(number).integers(0, 256, (1, 1, 3), dtype=np.uint8)
    return Image.fromarray(np.tile(colour, (8, 8, 1)))


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "png")
    return file.getvalue()


def write_picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)


def numbers(seed: int = 0) -> Iterator[int]:
    return count(1000 * seed)


def community(root: Path, facts: Facts, folder: str | None = None, seed: int = 0) -> Path:
    """VTAB-1k as NOAH's script writes it: images/SPLIT/000000.jpg and SPLIT.txt; labels go round the classes."""
    place, number = root / (folder or facts.folders[0]), numbers(seed)
    shown: list[tuple[int, int]] = []
    for split, size in facts.splits.items():
        rows = shown if split == "train800val200" else [(next(number), i % facts.classes) for i in range(size)]
        shown += rows if split in ("train800", "val200") else []
        lines = []
        for i, (n, label) in enumerate(rows):
            write_picture(place / f"images/{split}/{i:06d}.jpg", n)
            lines.append(f"images/{split}/{i:06d}.jpg {label}\n")
        (place / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return place


def class_folders(place: Path, sizes: dict[str, int], classes: list[str], seed: int = 0) -> Path:
    """SPLIT/CLASS/NUMBER.png; an empty split name puts the classes right into the folder."""
    number = numbers(seed)
    for split, size in sizes.items():
        for i in range(size):
            write_picture(place / split / classes[i % len(classes)] / f"{i:03d}.png", next(number))
    return place


def table(size: int, classes: list[str] | int, seed: int = 0, label: str = "label", **more: Any) -> datasets.Dataset:
    names = classes if isinstance(classes, list) else [str(i) for i in range(classes)]
    features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=names)})
    rows = {"image": [{"bytes": encoded(1000 * seed + i), "path": None} for i in range(size)]}
    return datasets.Dataset.from_dict({**rows, label: [i % len(names) for i in range(size)]}, features=features)


def parquet(place: Path, tables: dict[str, datasets.Dataset]) -> Path:
    """Files as on the Hugging Face hub: SPLIT-00000-of-00001.parquet in a folder for the configuration."""
    place.mkdir(parents=True, exist_ok=True)
    for split, rows in tables.items():
        rows.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))
    return place


def ids(size: int) -> list[int]:
    """Class ids with gaps, of three classes, as NABirds has them."""
    return [(295, 817, 1010)[i % 3] for i in range(size)]


def birds(place: Path) -> Path:
    """CUB's and NABirds' text files: 9 images of training and 6 of test, one after the other."""
    lists: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for i, label in enumerate(ids(15)):
        name = f"{label:04d}/{i:03d}.png"
        write_picture(place / "images" / name, i)
        lists["images"].append(f"{i + 1} {name}\n")
        lists["image_class_labels"].append(f"{i + 1} {label}\n")
        lists["train_test_split"].append(f"{i + 1} {int(i < 9)}\n")
    for name, lines in lists.items():
        (place / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return place


def split_files(place: Path, below: str, names: str = "{:03d}.png") -> Path:
    """VPT's train.json, val.json and test.json; `below` is where the data set keeps the images."""
    number = numbers()
    for split in ("train", "val", "test"):
        chosen = [next(number) for _ in range(STANDARD[split])]
        for n in chosen:
            write_picture(place / below / names.format(n), n)
        labels = dict(zip([names.format(n) for n in chosen], ids(len(chosen)), strict=True))
        (place / f"{split}.json").write_text(json.dumps(labels), encoding="utf-8")
    return place


def flowers(place: Path) -> Path:
    """Flowers102's imagelabels.mat and setid.mat: trnid, valid and tstid count images from 1."""
    for i in range(15):
        write_picture(place / f"jpg/image_{i + 1:05d}.jpg", i)
    savemat(place / "imagelabels.mat", {"labels": np.asarray([[i % 3 + 1 for i in range(15)]], np.uint8)})
    order = np.arange(1, 16)
    savemat(place / "setid.mat", {"trnid": [order[:6]], "valid": [order[6:9]], "tstid": [order[9:]]})
    return place


def dogs(place: Path) -> Path:
    """Stanford Dogs' train_list.mat and test_list.mat."""
    for split, numbers_ in (("train", range(9)), ("test", range(9, 15))):
        files = [f"n0{i % 3}-Breed/n0{i % 3}_{i}.jpg" for i in numbers_]
        for i, file in zip(numbers_, files, strict=True):
            write_picture(place / "Images" / file, i)
        cells = np.empty((len(files), 1), object)
        cells[:, 0] = files
        savemat(
            place / f"{split}_list.mat",
            {"file_list": cells, "labels": np.asarray([[i % 3 + 1] for i in numbers_], np.uint8)},
        )
    return place


def cars(place: Path, nested: bool = False) -> Path:
    """Stanford Cars' devkit; Kaggle's copy has each folder of images inside another of its name."""
    (place / "devkit").mkdir(parents=True)
    for split, numbers_ in (("train", range(9)), ("test", range(9, 15))):
        rows = [(f"{i:05d}.jpg", i % 3 + 1) for i in numbers_]
        for i, (file, _) in zip(numbers_, rows, strict=True):
            write_picture(place / f"cars_{split}" / (f"cars_{split}" if nested else "") / file, i)
        record = np.array(rows, dtype=[("fname", object), ("class", object)])
        name = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        savemat(place / name, {"annotations": record})
    return place


def old_cars(place: Path) -> Path:
    """Stanford Cars' older release: cars_annos.mat and car_ims/."""
    rows = [(f"car_ims/{i:06d}.jpg", i % 3 + 1, int(i >= 9)) for i in range(15)]
    for i, (file, _, _) in enumerate(rows):
        write_picture(place / file, i)
    record = np.array(rows, dtype=[("relative_im_path", object), ("class", object), ("test", object)])
    savemat(place / "cars_annos.mat", {"annotations": record})
    return place

"""Write a short recipe from four answers, for `san init`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from san_bench.config.recipe import load_recipe
from san_bench.config.strict import san_error, suggest

RATES = {"ssf": 0.01, "san-lora": 1e-3, "san-dora": 1e-3, "lora": 1e-3, "dora": 1e-3, "full": 1e-4}
"""Learning rates to start from, by method; SAN keeps that of the base."""

METHODS = ("san", *RATES)
"""Methods that have default values for all kinds of data."""


@dataclass(frozen=True)
class DataDefaults:
    """Defaults of one kind of data.

    Attributes:
        base: Shipped recipe to extend, for data that ships with the package.
        own_base: Shipped recipe to extend, for your own data.
        task: Task of your own data; the data of the base needs none.
        model: Model that ships with the package.
        own: Settings for your own data, by key.
        example: Example of a data folder or file.
    """

    base: str
    own_base: str
    task: str
    model: str
    own: dict[str, object]
    example: str


DATA_KINDS = {
    "image": DataDefaults(
        base="demo/san",
        own_base="images/san",
        task="folder",
        model="embedded",
        own={},
        example="photos, a folder with one folder of images per class",
    ),
    "language": DataDefaults(
        base="language/san",
        own_base="language/san",
        task="instructions",
        model="embedded/decoder",
        own={
            "train_split": "train",
            "scoring": {"ways": ["exact"], "max_new_tokens": 64},
        },
        example="records, a folder with train.json and test.json",
    ),
    "vision-language": DataDefaults(
        base="vision-language/san",
        own_base="vision-language/san",
        task="conversations",
        model="embedded/llava",
        own={"train_split": "train"},
        example="chats, a folder with records and images",
    ),
}
"""Defaults by kind of data."""


def draft_recipe(kind: str, data: str, model: str, method: str) -> str:
    """Returns a short recipe as YAML.

    Args:
        kind: A key of `DATA_KINDS`.
        data: Folder, file or hub name of the data; empty for data that ships with the package.
        model: Name or folder of the model; empty for the model that ships with the package.
        method: One of `METHODS`.

    Raises:
        SanError: If the kind or the method is unknown.
    """
    for what, word, known in (("kind of data", kind, DATA_KINDS), ("method", method, METHODS)):
        if word not in known:
            raise san_error(f"There is no {what} {word!r}.{suggest(word, known)}")
    chosen = DATA_KINDS[kind]
    values: dict[str, object] = {"extends": chosen.own_base if data else chosen.base}
    if data:
        values |= {"task": chosen.task, "data": data, **chosen.own}
    if model and model != chosen.model:
        values["model"] = model
    if method != "san":
        values |= {"method": {"kind": method}, "optimizer": {"lr": RATES[method]}}
    head = f"# {method} on {model or chosen.model}, trained on {data or 'data that ships with the package'}."
    return f"{' '.join(head.split())}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"


def write_draft(out: Path, text: str) -> None:
    """Writes a recipe to a new file, and validates it.

    Raises:
        SanError: If the file exists, or the recipe is invalid; the file is then removed.
    """
    if out.exists():
        raise san_error(f"{out} already exists. Choose another file with --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    try:
        load_recipe(out)
    except ValueError:
        out.unlink()
        raise

"""Manifests: expected sizes, classes, groups, folders and licenses of the datasets of a suite, with sources.

Example:
    >>> vtab = load_manifest("vtab")
    >>> len(vtab.tasks), sum(facts.splits["test"] for facts in vtab.tasks.values())
    (19, 387904)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from san_bench.config.strict import suggest
from san_peft.errors import SanError

SUITES = ("vtab", "fgvc", "gic", "commonsense")
"""Suites with a manifest."""


@dataclass(frozen=True)
class Facts:
    """Expected properties and source of a dataset.

    Attributes:
        title: Display name.
        group: Group of the suite in which its score is averaged, or `None`.
        classes: Number of classes, or of answers.
        splits: Number of images or records per split.
        folders: Accepted folder names; case and punctuation are ignored.
        licence: License, in a few words.
        get: Where to get it, if that differs from the rest of the suite.
        hub: Dataset on the Hugging Face hub that can be downloaded.
        torchvision: Class of `torchvision.datasets` that can download it.
        megabytes: Disk space for the download with torchvision.
        answers: Valid answers of a text task.
        sought: Patterns that the published protocol searches for in generated text, in this order.
        lm_eval: Task name in lm-eval.
    """

    title: str
    group: str | None
    classes: int
    splits: dict[str, int]
    folders: tuple[str, ...]
    licence: str
    get: str = ""
    hub: str | None = None
    torchvision: str | None = None
    megabytes: int = 0
    answers: tuple[str, ...] = ()
    sought: tuple[str, ...] = ()
    lm_eval: str = ""


@dataclass(frozen=True)
class Manifest:
    """The datasets of a suite.

    Attributes:
        suite: Name of the suite.
        source: Source of sizes, classes and names.
        get: How to get the data.
        tasks: The datasets by name.
    """

    suite: str
    source: str
    get: str
    tasks: dict[str, Facts]

    def __getitem__(self, task: str) -> Facts:
        if task not in self.tasks:
            raise SanError(f"The suite {self.suite} has no task {task!r}.{suggest(task, self.tasks)}")
        return self.tasks[task]


@cache
def load_manifest(suite: str) -> Manifest:
    """Loads the manifest of a suite.

    Raises:
        SanError: If the suite has no manifest.
    """
    if suite not in SUITES:
        raise SanError(f"There is no manifest of {suite!r}.{suggest(suite, SUITES)}")
    text = (resources.files("san_bench.datacheck") / "manifests" / f"{suite}.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    lists = ("folders", "answers", "sought")
    tasks = {
        name: Facts(**{**facts, **{key: tuple(facts[key]) for key in lists if key in facts}})
        for name, facts in raw.pop("tasks").items()
    }
    return Manifest(**raw, tasks=tasks)


def find_folder(data: Path, facts: Facts) -> Path:
    """Finds the folder of a dataset inside the folder of its suite; `data` may also be the dataset folder itself.

    Args:
        data: Folder of the suite.
        facts: The dataset.

    Raises:
        SanError: If there is no matching folder, or several.
    """
    if not data.is_dir():
        raise SanError(f"There is no folder {data}.")
    wanted = {plain(name) for name in facts.folders}
    found = {path.resolve(): path for path in _folders(data) if plain(path.name) in wanted}
    if len(found) > 1:
        names = ", ".join(sorted(path.name for path in found.values()))
        raise SanError(f"{data} has several folders for {facts.title}: {names}. Keep one of them there.")
    if found:
        return next(iter(found.values()))
    if plain(data.resolve().name) in wanted:
        return data
    inside = [path for path in _folders(data) if any(plain(p.name) in wanted for p in _folders(path))]
    hint = f" Did you mean {inside[0]}?" if inside else ""
    there = ", ".join(path.name for path in _folders(data)[:8]) or "no folder at all"
    raise SanError(f"{data} has no folder for {facts.title}: none of {', '.join(facts.folders)}.{hint} It has {there}.")


def plain(name: str) -> str:
    """Normalizes a name for comparison: lower-case letters and digits only."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))

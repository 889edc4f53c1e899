"""Language tasks by name: training records and evaluation questions.

Training splits are `train`, `val` (held out), and `trainval`, which joins both. Questions belong to `val` or `test`.

Example:
    >>> task = load_text_task("mini-language")
    >>> {name: len(records) for name, records in task.splits.items()}
    {'train': 3200, 'val': 800, 'trainval': 4000}
    >>> list(task.questions["test"])[:2], len(task.questions["test"]["mini-language/easy"].records)
    (['mini-language/yes-no', 'mini-language/solution'], 300)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from san_bench.config.strict import suggest, task_of_suite
from san_bench.datacheck.manifest import find_folder, load_manifest
from san_bench.language import commonsense
from san_bench.language.formats import Item
from san_bench.language.instructions import Questions, fingerprint, load_records
from san_bench.language.mini import tasks as world
from san_bench.language.own import Located, load_own, read_eval
from san_bench.language.recipe import OwnData, Source
from san_bench.language.stream import RecordStream, open_stream
from san_peft.errors import SanError

T = TypeVar("T")

HELD_OUT = 120
"""Size of the validation split if the data has none, as published; a tenth of fewer than 1,200 records."""

HELD_OUT_SEED = 2024
"""Seed of the held-out split. Another seed gives another task."""

MOST_ANSWERS = 100
"""Maximum number of different answers in your own data; with more, answers are free-form."""


@dataclass(frozen=True)
class TextTask:
    """A language task.

    Attributes:
        name: Its name.
        splits: Training records by split.
        questions: Evaluation questions by split and task.
        places: Where each record of a split is from, if known.
        stream: The training records, if they are read while training; `train` then has the first ones only.
    """

    name: str
    splits: Mapping[str, tuple[Item, ...]]
    questions: dict[str, dict[str, Questions]]
    places: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stream: RecordStream | None = None

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over the records of every split and task."""
        digest = hashlib.sha256()
        for name, records in self.splits.items():
            digest.update(f"{name} {fingerprint(records)}\n".encode())
        for split, tasks in self.questions.items():
            for name, questions in tasks.items():
                digest.update(f"{split} {name} {questions.sought} {fingerprint(questions.records)}\n".encode())
        return digest.hexdigest()

    def records(self, split: str) -> tuple[Item, ...]:
        """Returns the records of a split, those of its questions if it is not for training."""
        if split in self.splits:
            return self.splits[split]
        return tuple(record for questions in self.asked(split).values() for record in questions.records)

    def asked(self, split: str) -> dict[str, Questions]:
        """Returns the questions of a split by task.

        Raises:
            SanError: If the task has no questions for that split.
        """
        return questions_of(self.name, self.questions, split)


def questions_of(name: str, questions: Mapping[str, dict[str, T]], split: str) -> dict[str, T]:
    """Returns the questions of a split by task.

    Args:
        name: Name of the task for messages.
        questions: Questions by split.
        split: The split.

    Raises:
        SanError: If there are no questions for that split.
    """
    if not questions.get(split):
        have = ", ".join(one for one, tasks in questions.items() if tasks) or "none"
        raise SanError(f"{name} has no questions for the split {split!r}, only for {have}.")
    return questions[split]


def load_text_task(name: str, data: str | Path | OwnData | None = None) -> TextTask:
    """Loads a language task by its name.

    Args:
        name: `mini-language` for all eight tasks, or one of them, such as `mini-language/easy`. `commonsense` for the
            published training mix and all eight test sets, or one of them with its own training file.
            `instructions` for your own records, in any format of `san_bench.language.formats`: in files named `train`
            and, optionally, `val` and `test`.
        data: Data folder; for instructions also a file, the name of a dataset on the Hugging Face hub, or settings.

    Raises:
        SanError: If the task is unknown, or its data is missing or invalid.
    """
    suite, _, task = name.partition("/")
    if suite == "mini-language":
        return _mini(name, [task_of_suite(suite, name, world.TASKS)] if task else list(world.TASKS))
    if suite not in ("commonsense", "instructions"):
        raise SanError(f"There is no task {name!r}.{suggest(name, ('mini-language', 'commonsense', 'instructions'))}")
    if data is None:
        raise SanError(f"The task {name!r} needs a data folder: set `data`, or pass --data.")
    if isinstance(data, OwnData):
        return _stream(name, data) if data.streaming else _own(name, data)
    return _commonsense(name, Path(data), task) if suite == "commonsense" else _own(name, OwnData(train=(_at(data),)))


def hold_out(records: Sequence[T]) -> dict[str, tuple[T, ...]]:
    """Splits records into `train` and `val`; `trainval` has all records in order.

    Args:
        records: At least two records. The split depends only on their number.
    """
    count = min(HELD_OUT, max(1, len(records) // 10))
    key = [hashlib.sha256(f"{HELD_OUT_SEED}:{place}".encode()).digest() for place in range(len(records))]
    held = set(sorted(range(len(records)), key=key.__getitem__)[:count])
    return {
        "train": tuple(record for place, record in enumerate(records) if place not in held),
        "val": tuple(record for place, record in enumerate(records) if place in held),
        "trainval": tuple(records),
    }


def _mini(name: str, tasks: Sequence[str]) -> TextTask:
    loaded = {task: world.load(task) for task in tasks}
    splits = {split: tuple(r for task in tasks for r in loaded[task][split]) for split in ("train", "val")}
    splits["trainval"] = splits["train"] + splits["val"]
    questions = {}
    for split in ("val", "test"):
        own = {f"mini-language/{t}": (loaded[t][split], world.TASKS[t]) for t in tasks}
        questions[split] = {t: Questions(records, facts.answers, facts.answers) for t, (records, facts) in own.items()}
    return TextTask(name, splits, questions)


def _commonsense(name: str, data: Path, task: str) -> TextTask:
    manifest = load_manifest(commonsense.SUITE)
    tasks = [commonsense.find_task(name)[0]] if task else list(commonsense.TASKS)
    known = [manifest.tasks[one] for one in tasks]
    if task:
        records = load_records(find_folder(data, known[0]), "train", known[0].answers)
    else:
        records = commonsense.load_mix(commonsense.find_mix(data))
    test = {f"commonsense/{one}": commonsense.load_test(one, data) for one in tasks}
    splits = hold_out(records)
    # Records of the mix have no task name, so the held-out records are one task.
    answers = tuple(dict.fromkeys(answer for facts in known for answer in facts.answers))
    sought = tuple(dict.fromkeys(pattern for facts in known for pattern in facts.sought))
    val = {next(iter(test)) if task else "commonsense/held-out": Questions(splits["val"], answers, sought)}
    return TextTask(name, splits, {"val": val, "test": test})


def _at(path: str | Path) -> Source:
    return Source(path=str(path))


def _own(name: str, data: OwnData) -> TextTask:
    def split_off(records: Sequence[Located]) -> tuple[Sequence[Located], Sequence[Located]]:
        parts = hold_out(records)
        return parts["train"], parts["val"]

    located = load_own(data, split_off)
    splits = {split: tuple(one.item for one in records) for split, records in located.items()}
    places = {split: tuple(one.place for one in records) for split, records in located.items()}
    asked = {split: splits[split] for split in ("val", "test") if split in splits}
    splits.pop("test", None)
    return TextTask(name, splits, _questions(name, splits["trainval"], asked), places)


def _stream(name: str, data: OwnData) -> TextTask:
    stream = open_stream(data)
    test = read_eval(data.eval, data.format).check() if data.eval else []
    train, asked = tuple(one.item for one in stream.sample), {"test": tuple(one.item for one in test)}
    places = {"train": tuple(one.place for one in stream.sample), "test": tuple(one.place for one in test)}
    return TextTask(name, {"train": train}, _questions(name, train, asked), places, stream)


def _questions(name: str, train: Sequence[Item], asked: dict[str, tuple[Item, ...]]) -> dict[str, dict[str, Questions]]:
    """Returns the questions of your own data; with few different answers, the answers that can be chosen from."""
    found = {getattr(record, "answer", "") for records in (train, *asked.values()) for record in records}
    answers = () if "" in found or len(found) > MOST_ANSWERS else tuple(sorted(found, key=lambda a: (-len(a), a)))
    sought = tuple(re.escape(answer) for answer in answers)
    return {split: {name: Questions(records, answers, sought)} for split, records in asked.items()}

"""The tasks of mini-language: eight forms of commonsense question about a small world, and nothing to fetch.

The forms, the four fields and the answer tokens are those of the eight commonsense tasks that language models are
fine-tuned on together (`commonsense_170k`); the questions are about the world of `world_facts`. Item `i` of a task is a
function of the task's seed and `i` alone, the same on every platform. Splits are ranges of `i`, and no item occurs
twice. Labels take turns. `world_text` tells of the same world in other words, to pretrain a model that knows it.

Example:
    >>> splits = load("mini-language/easy")
    >>> {name: len(records) for name, records in splits.items()}
    {'train': 400, 'val': 100, 'test': 300}
    >>> splits["test"][0].answer in TASKS["easy"].answers
    True
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

from san_bench.config.strict import task_of_suite
from san_bench.language.instructions import Instruction
from san_bench.language.mini import questions as world_tasks
from san_bench.language.mini.questions import Item
from san_bench.language.mini.words import RandomChoices, sentence

SPLITS = {"train": slice(0, 400), "val": slice(400, 500), "test": slice(500, 800)}
"""Which items of a task are in which split."""


@dataclass(frozen=True)
class LanguageTask:
    """One task of mini-language.

    Attributes:
        like: The commonsense task whose form it has.
        seed: Names the sequence of items.
        lead: What the instruction begins with.
        answers: What may be answered.
        draw: Draws an item; `None` for the task whose answers are true and false.
        gap: What stands between two options.
    """

    like: str
    seed: int
    lead: str
    answers: tuple[str, ...]
    draw: Callable[[RandomChoices], Item] | None
    gap: str = " "


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{n + 1}" for n in range(count))


_CHOOSE = "Choose the answer that fits the question."

TASKS: dict[str, LanguageTask] = {
    "yes-no": LanguageTask("boolq", 201, "Say true for yes and false for no.", ("true", "false"), None),
    "solution": LanguageTask(
        "piqa", 402, "Choose the solution that leads there.", _numbered("solution", 2), world_tasks.solution, "\n\n"
    ),
    "social": LanguageTask("siqa", 303, _CHOOSE, _numbered("answer", 3), world_tasks.social),
    "ending": LanguageTask(
        "hellaswag", 204, "Choose the ending that fits the story.", _numbered("ending", 4), world_tasks.ending
    ),
    "blank": LanguageTask(
        "winogrande", 205, "Choose the option that fills the blank _.", _numbered("option", 2), world_tasks.blank
    ),
    "easy": LanguageTask("arc-easy", 206, _CHOOSE, _numbered("answer", 4), world_tasks.easy),
    "hard": LanguageTask("arc-challenge", 207, _CHOOSE, _numbered("answer", 4), world_tasks.hard),
    "book": LanguageTask(
        "openbookqa", 208, "Choose the answer that fits the open book.", _numbered("answer", 4), world_tasks.book
    ),
}  # fmt: skip
"""Every task by its name, without the `mini-language/` before it."""


def load(name: str) -> dict[str, tuple[Instruction, ...]]:
    """Loads the records of a task by their split; a process makes each task once.

    Args:
        name: A name in `TASKS`, with or without `mini-language/` before it.

    Raises:
        SanError: If there is no such task.
    """
    return dict(_load(task_of_suite("mini-language", name, TASKS)))


def make_instruction(name: str, index: int) -> Instruction:
    """Makes one item of a task.

    Args:
        name: A name in `TASKS`.
        index: Which item of the task's sequence; those of the splits are the first 800.
    """
    task = TASKS[name]
    dice, label = RandomChoices(task.seed, index), index % len(task.answers)
    if task.draw is None:
        body = f"Question: {world_tasks.yes_no(dice, task.seed, index)}?"
    else:
        item = task.draw(dice)
        options = list(item.options)
        right = options.pop(item.right)
        options.insert(label, right)
        marked = (f"{mark}: {words}" for mark, words in zip(task.answers, options, strict=True))
        body = f"{sentence(item.question)}\n\n{task.gap.join(marked)}"
    answer = task.answers[label]
    closing = f"Allowed answers: {'/'.join(task.answers)}"
    return Instruction(f"{task.lead}\n{body}\n\n{closing}", "", f"the correct answer is {answer}", answer)


def task_fingerprint(name: str) -> str:
    """Returns the sha256 over the splits of a task: their names, and every field of their records."""
    splits = {split: [asdict(one) for one in records] for split, records in load(name).items()}
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


@cache
def _load(name: str) -> dict[str, tuple[Instruction, ...]]:
    records = [make_instruction(name, index) for index in range(SPLITS["test"].stop)]
    return {split: tuple(records[part]) for split, part in SPLITS.items()}

"""Sort rows into sections of comparable results, and check that they are comparable."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from san_bench.config.strict import san_error
from san_bench.report.tables.published import tasks_of
from san_bench.run.results import Row

KINDS = ("full", "linear", "norm", "bitfit", "ia3", "ssf", "lora", "dora", "san-lora", "san-dora", "san")
"""Order of methods in tables, by kind."""

GROUPS = ("natural", "specialised", "structured")
"""Order of groups."""

BACKBONES = ("vit", "swin", "convnext")
"""Order of backbones."""

ALIKE = ("task_fingerprint", "train_split", "n_test")
"""Keys that must agree in all rows of a task."""


@dataclass(frozen=True)
class Line:
    """A row of a table: a method with its protocol and model selection."""

    method: str
    protocol: str | None
    selection: str | None

    @property
    def chosen(self) -> str:
        """Protocol and selection; selection on the test split is labelled."""
        return ", ".join(word for word in (self.protocol, selection_words(self.selection)) if word)


@dataclass(frozen=True)
class Section:
    """Comparable results: one family of tasks, one backbone, one split.

    Attributes:
        suite: Name of the suite.
        family: Prefix of its tasks' names, such as `vtab`; empty for a task without a prefix.
        backbone: Short name of the backbone.
        model: Model of the recipes.
        split: Evaluation split.
        way: Scoring method, if there are several.
        tasks: All tasks of the family, including those without results, with their groups.
        lines: Rows by line, task and seed.
    """

    suite: str
    family: str
    backbone: str
    model: str
    split: str
    way: str
    tasks: dict[str, str | None]
    lines: dict[Line, dict[str, dict[int, Row]]]

    @property
    def rows(self) -> list[Row]:
        """All rows, ordered by line and task."""
        return [row for tasks in self.lines.values() for seeds in tasks.values() for row in seeds.values()]

    @property
    def groups(self) -> dict[str, list[str]]:
        """Tasks by group; empty if any task has no group."""
        if None in self.tasks.values():
            return {}
        found: dict[str, list[str]] = {}
        for task, group in self.tasks.items():
            found.setdefault(str(group), []).append(task)
        return found

    @property
    def title(self) -> str:
        """Title of the section's tables."""
        family = f"{self.family} of {self.suite}" if self.family not in {"", self.suite} else self.suite
        model = "" if self.model == self.backbone else f" ({self.model})"
        return f"{family}, {self.backbone}{model}, {self.split}{f' by {self.way}' if self.way else ''}"


def selection_words(selection: str | None) -> str:
    """Returns the label of a selection: `best-test` is legacy, since it selects on the reported split."""
    return "best-test (legacy)" if selection == "best-test" else selection or ""


def sections(rows: Sequence[Row]) -> list[Section]:
    """Sorts rows into sections.

    Args:
        rows: Result rows, such as those of `read_rows`.

    Raises:
        SanError: If rows are not comparable: different data of a task, different checkpoints of the same name, or
            duplicate seeds of a method. All problems are listed.
    """
    parts: dict[tuple[str, str, str, str, str, str], list[Row]] = {}
    tasks: dict[tuple[str, str], dict[str, str | None]] = {}
    for row in rows:
        family = row["task"].rpartition("/")[0]
        suite = row.get("suite") or family or row["task"]
        key = (suite, family, row["backbone"], row.get("model") or row["backbone"], row["split"], row.get("way") or "")
        parts.setdefault(key, []).append(row)
        tasks.setdefault((suite, family), {})[row["task"]] = row.get("group")
    problems: list[str] = []
    made = []
    for key in sorted(parts, key=lambda key: (key[:2], _rank(BACKBONES, key[2]), key[2:])):
        problems += _problems(parts[key])
        made.append(Section(*key, _ordered(key[1], tasks[key[0], key[1]]), _lines(parts[key], problems)))
    if problems:
        advice = "Run `san table` on each folder, or remove the runs that do not belong."
        raise san_error("\n".join(["Some results are not comparable.", *problems, advice]))
    return made


def _ordered(family: str, found: dict[str, str | None]) -> dict[str, str | None]:
    known = {f"{family}/{task}": group for task, group in tasks_of(family).items()}
    if set(found) <= set(known):
        return known
    return dict(sorted(found.items(), key=lambda item: (_rank(GROUPS, item[1]), item[1] or "", item[0])))


def _rank(order: Sequence[str], word: str | None) -> int:
    return order.index(word) if word in order else len(order)


def _problems(rows: Sequence[Row]) -> list[str]:
    """Lists the reasons why these rows are not comparable."""
    said = []
    where = f"{rows[0]['backbone']}, {rows[0]['split']}"
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        for name in ALIKE:
            said += _differ(f"{task} ({where})", name, of_task)
    known = [row for row in rows if row.get("checkpoint_sha256")]
    return said + _differ(f"{rows[0].get('model') or rows[0]['backbone']} ({where})", "checkpoint_sha256", known)


def _differ(what: str, name: str, rows: Sequence[Row]) -> list[str]:
    counts = Counter(row.get(name) for row in rows)
    if len(counts) < 2:
        return []
    first = {row.get(name): row for row in reversed(rows)}
    parts = [f"{_short(value)} in {count} ({_run(first[value])})" for value, count in counts.items()]
    return [f"- {what}: {name} is {' but '.join(parts)}."]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _run(row: Row) -> str:
    return f"first {row['method']}, seed {row['seed']}"


def _lines(rows: Sequence[Row], problems: list[str]) -> dict[Line, dict[str, dict[int, Row]]]:
    lines: dict[Line, dict[str, dict[int, Row]]] = {}
    for row in sorted(rows, key=_place):
        line = Line(row["method"], row.get("protocol"), row.get("selection"))
        seeds = lines.setdefault(line, {}).setdefault(row["task"], {})
        if row["seed"] in seeds:
            both = (seeds[row["seed"]]["recipe_fingerprint"], row["recipe_fingerprint"])
            problems.append(
                f"- {row['method']} on {row['task']} ({row['backbone']}) has seed {row['seed']} from two recipes: "
                f"{both[0][:12]} and {both[1][:12]}."
            )
        seeds[row["seed"]] = row
    return lines


def _place(row: Row) -> tuple[Any, ...]:
    """Returns the sort key of a row, so that tables do not depend on the order in which runs finished."""
    natural = [(int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", row["method"])]
    how = (row.get("protocol") or "", row.get("selection") or "")
    return (_rank(KINDS, row.get("kind")), natural, how, row["task"], row["seed"])

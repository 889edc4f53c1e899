"""Suites: tasks, models, methods and a protocol in one strict YAML file, expanded into recipes.

Example:
    >>> suite = load_suite("mini-vision")
    >>> few = {"models": ("vit",), "tasks": ("mini-vision/count",), "seeds": 2}
    >>> part = Choice(("san", "linear"), **few, overrides={"optimizer.lr": 0.01})
    >>> chosen = plan(suite, part)
    >>> [(run.method, run.backbone, run.recipe.seed) for run in chosen]
    [('san', 'vit', 0), ('linear', 'vit', 0), ('san', 'vit', 1), ('linear', 'vit', 1)]
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from san_bench.config.errors import shown
from san_bench.config.methods import Method
from san_bench.config.recipe import VALIDATION, Recipe, find
from san_bench.config.strict import Strict, check, parse_overrides, put, read_model, read_yaml, san_error, suggest
from san_bench.kinds import recipe_class

Rates = dict[str, dict[str, float | dict[str, float]]]
"""Learning rates by backbone and method: one for all tasks, or one per task."""


MOST_NAME = 100
"""Maximum length of the name of a task, model or method, in characters."""


def is_folder_name(name: str) -> bool:
    r"""Returns whether a name of a task, model or method can be the name of a folder: none that leaves its parent.

    Example:
        >>> [is_folder_name(name) for name in ("san-lora r=8", "..", "a/b", "", "a\nb")]
        [True, False, False, False, False]
    """
    return len(name) <= MOST_NAME and re.fullmatch(r"[\w+=(),@-][\w+=(),@ .-]*", name) is not None


class Search(Strict):
    """Learning rate search on validation data, with the same budget for every method.

    Attributes:
        tasks: Tasks of the trials; empty for all. If a selection contains none of them, trials use all its tasks.
        seeds: Seeds of the trials, separate from those of the suite.
        grid: Learning rates by method; `default` for all others.
        per: One rate per `task`, or one for the whole `suite`.
    """

    tasks: Annotated[tuple[str, ...], Field(strict=False)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1, strict=False)]
    grid: dict[str, Annotated[tuple[float, ...], Field(min_length=1, strict=False)]]
    per: Literal["task", "suite"]

    @model_validator(mode="after")
    def _is_complete(self) -> Search:
        if "default" not in self.grid:
            raise ValueError("grid|needs a default for methods without an entry")
        if self.tasks and self.per == "task":
            raise ValueError("tasks|must be empty with one rate per task (per: task)")
        return self


class Suite(Strict):
    """A benchmark suite: everything a results table compares.

    Attributes:
        protocol: Shipped protocol or file: the recipe settings that all runs share.
        groups: Tasks by group.
        mix: Training mix that covers all tasks in one run, such as `mini-language`; `null` for one run per task.
        models: Models by backbone name.
        methods: Methods by their name in tables.
        modes: Ablation modes in which SAN adapters are scored besides `both`.
        verify: Whether every saved adapter is loaded, merged and scored again after its run; see
            `san_bench.suites.verify`.
        settings: Overrides of the protocol by task and dotted key.
        search: Learning rate search.
        rates: Selected learning rates.
    """

    protocol: str
    groups: dict[str, Annotated[tuple[str, ...], Field(min_length=1, strict=False)]]
    mix: str | None
    models: dict[str, str]
    methods: dict[str, Method]
    modes: Annotated[tuple[Literal["neuron", "synapse", "off"], ...], Field(strict=False)]
    verify: bool = False
    settings: dict[str, dict[str, Any]]
    search: Search
    rates: Rates

    @model_validator(mode="after")
    def _names_are_folders(self) -> Suite:
        for place, names in (("methods", self.methods), ("models", self.models), ("groups", (*self.tasks, self.mix))):
            for name in names:
                if name is not None and not all(map(is_folder_name, name.split("/") if place == "groups" else [name])):
                    raise ValueError(
                        f"{place}|{shown(name)} cannot name a folder; use up to {MOST_NAME} letters, digits, spaces "
                        "and .-_+=, not starting with a dot"
                    )
        return self

    @model_validator(mode="after")
    def _knows_its_tasks(self) -> Suite:
        for place, named in (("settings", self.settings), ("search", self.search.tasks)):
            strange = [task for task in named if task not in self.tasks]
            if strange:
                raise ValueError(f"{place}|{', '.join(strange)} is not a task of the suite")
        if self.mix and (self.settings or self.search.tasks or self.search.per == "task"):
            raise ValueError("mix|one run covers all tasks, so a single task cannot have settings, trials or rates")
        return self

    @property
    def tasks(self) -> dict[str, str]:
        """The group of each task."""
        return {task: group for group, tasks in self.groups.items() for task in tasks}


@dataclass(frozen=True)
class Choice:
    """Selection from a suite; an empty field selects everything.

    Attributes:
        methods: Names of methods.
        models: Names of backbones.
        tasks: Names of tasks.
        seeds: Number of seeds, counted from 0.
        data: Data folder.
        protocol: Replaces the protocol of the suite.
        overrides: Recipe values by dotted key, or `key=value` strings.
    """

    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    seeds: int = 1
    data: Path | None = None
    protocol: str | None = None
    overrides: Mapping[str, Any] | Sequence[str] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One run of a suite: its recipe, with no output folder yet, and its names in tables.

    Attributes:
        task: Training task, or the mix of the suite.
        groups: Group of each task that can be scored.
        backbone: Backbone name of the model.
        method: Name of the method.
        recipe: Its recipe.
    """

    task: str
    groups: dict[str, str]
    backbone: str
    method: str
    recipe: Recipe


def load_suite(name: str | Path) -> Suite:
    """Loads and validates a suite by its path or shipped name.

    Raises:
        SanError: If it does not exist or is invalid; the message lists every problem and its location.
    """
    return read_model(Suite, find(name, "suites"))


def plan(suite: Suite, choice: Choice, rates: Rates | None = None) -> list[PlannedRun]:
    """Returns the selected runs of a suite, ordered by seed.

    Args:
        suite: The suite.
        choice: Selection of runs.
        rates: Learning rates that replace those of the suite.

    Raises:
        SanError: If a name is unknown, a learning rate is missing, or a recipe is invalid.
    """
    rates = {
        backbone: {**suite.rates.get(backbone, {}), **(rates or {}).get(backbone, {})} for backbone in suite.models
    }
    overrides, protocol = parse_overrides(choice.overrides), _protocol(suite, choice)
    runs, missing = [], []
    for task, backbone, method in _cells(suite, choice):
        found = rates[backbone].get(method)
        rate = overrides.get("optimizer.lr", found.get(task) if isinstance(found, dict) else found)
        if rate is None:
            missing.append(f"{method} on {backbone}")
            continue
        for seed in range(choice.seeds):
            splits = {key: split for key, split in _splits(task)[0].items() if key not in protocol.data}
            values = {**splits, **suite.settings.get(task, {}), "seed": seed, "optimizer.lr": rate}
            runs.append(_run(suite, protocol, (task, backbone, method), {**values, **overrides}))
    if missing:
        raise san_error(
            f"No learning rate is known for {', '.join(dict.fromkeys(missing))}. Search for them first, with --search, "
            "or give one with --set optimizer.lr=..."
        )
    return sorted(runs, key=lambda run: run.recipe.seed)  # a suite that is stopped early has complete first seeds


def plan_search(suite: Suite, choice: Choice) -> list[PlannedRun]:
    """Returns the trials of the learning rate search; see `Search`."""
    search, overrides, protocol = suite.search, parse_overrides(choice.overrides), _protocol(suite, choice)
    cells, runs = _cells(suite, choice), []
    for cell in [cell for cell in cells if cell[0] in search.tasks] or cells:
        shared = {**suite.settings.get(cell[0], {}), **overrides, **_splits(cell[0])[1]}  # never the test split
        for rate in search.grid.get(cell[2], search.grid["default"]):
            for seed in search.seeds:
                runs.append(_run(suite, protocol, cell, {**shared, "seed": seed, "optimizer.lr": float(rate)}))
    return runs


def best_rates(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> Rates:
    """Selects learning rates by mean accuracy of the trials; ties go to the smaller rate.

    Args:
        suite: The suite.
        rows: Results of the trials of `plan_search`. A failed trial is absent and so counts as accuracy 0.
    """
    scores: dict[tuple[str, str, str], dict[float, float]] = {}
    for row in (row for row in rows if row.get("way") == rows[0].get("way")):  # of several scorings, the first counts
        for place in ("", row["task"]):
            by_rate = scores.setdefault((row["backbone"], row["method"], place), {})
            by_rate[row["lr"]] = by_rate.get(row["lr"], 0.0) + row["accuracy"]
    best = {key: min(by_rate, key=lambda lr: (-round(by_rate[lr], 9), lr)) for key, by_rate in scores.items()}
    rates: Rates = {}
    for backbone, method, task in best:
        if suite.search.per == "suite" and not task:
            rates.setdefault(backbone, {})[method] = best[backbone, method, ""]
        elif suite.search.per == "task" and task:
            by_task = rates.setdefault(backbone, {}).setdefault(method, {})
            assert isinstance(by_task, dict)
            by_task[task] = best[backbone, method, task]
    return rates


def _cells(suite: Suite, choice: Choice) -> list[tuple[str, str, str]]:
    kinds: dict[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
        "task": (choice.tasks, suite.tasks),
        "model": (choice.models, suite.models),
        "method": (choice.methods, suite.methods),
    }
    wrong = [
        f"The suite has no {kind} {name!r}.{suggest(name, known)}"
        for kind, (chosen, known) in kinds.items()
        for name in chosen
        if name not in known
    ]
    if choice.seeds < 1:
        wrong.append(f"The number of seeds must be 1 or more, but it is {choice.seeds}.")
    if suite.mix and choice.tasks:
        wrong.append(
            f"One run on {suite.mix} covers all tasks of the suite, so tasks cannot be selected. Leave --tasks out."
        )
    if wrong:
        raise san_error("\n".join(wrong))
    tasks, models, methods = (chosen or tuple(known) for chosen, known in kinds.values())
    tasks = (suite.mix,) if suite.mix else tasks
    return [(task, model, method) for model in models for task in tasks for method in methods]


def _splits(task: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the training and evaluation splits of runs, and those of trials."""
    fit, val = ("train800", "val200") if task.startswith(("digits", "mini-vision/", "vtab/")) else ("train", "val")
    joined = next(name for name, parts in VALIDATION.items() if parts == f"{fit}+{val}")
    return {"train_split": joined, "eval_split": "test"}, {"train_split": fit, "eval_split": val}


OF_SUITE = ("extends", "task", "model", "method", "data", "protocol", "output")
"""Keys of a recipe that a protocol cannot have."""


@dataclass(frozen=True)
class _Protocol:
    """Recipe settings that all runs share, and problems of the file."""

    name: str
    data: dict[str, Any]
    problems: list[tuple[tuple[str, ...], str]]


def _protocol(suite: Suite, choice: Choice) -> _Protocol:
    name = choice.protocol or suite.protocol
    data, _, problems = read_yaml(find(name, "protocols"))
    problems += [((key,), "a suite sets this; remove it from the protocol.") for key in OF_SUITE if key in data]
    data |= {"data": str(choice.data) if choice.data else None, "protocol": Path(name).stem, "output": "nowhere"}
    return _Protocol(name, data, problems)


def _run(suite: Suite, protocol: _Protocol, cell: tuple[str, str, str], values: Mapping[str, Any]) -> PlannedRun:
    task, backbone, method = cell
    data = copy.deepcopy(protocol.data)
    data |= {"task": task, "model": suite.models[backbone], "method": suite.methods[method].model_dump(mode="json")}
    for key, value in values.items():
        put(data, key, value)
    recipe = check(
        recipe_class(data), data, lambda loc: f"{protocol.name}, {method} on {task}: {'.'.join(loc)}", protocol.problems
    )
    return PlannedRun(task, suite.tasks, backbone, method, recipe)

"""Group the finished runs of a suite by backbone and method, with their rows, losses and scales."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from san_bench.config.errors import loading
from san_bench.config.strict import counted
from san_bench.report.tables.sections import Section, sections
from san_bench.run.results import Row, read_rows
from san_bench.run.scales import RunScales, load_scales

HOSTS = {"san": "own", "ssf": "own", "lora": "lora", "san-lora": "lora", "dora": "dora", "san-dora": "dora"}
"""Where the scale of a kind of method comes from: its own vectors, LoRA or DoRA."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        rows: One row for each task that it was evaluated on, all with the same scoring method.
        losses: Training loss of every step; empty without a log.
        scales: Its trained scales, or `None`.
    """

    rows: tuple[Row, ...]
    losses: tuple[float, ...]
    scales: RunScales | None

    @property
    def row(self) -> Row:
        """The first row."""
        return self.rows[0]

    @property
    def task(self) -> str:
        """The training task."""
        return self.row.get("trained_on") or self.row["task"]

    @property
    def key(self) -> tuple[str, int]:
        """Training task and seed."""
        return self.task, self.row["seed"]


@dataclass(frozen=True)
class Group:
    """The runs of one method on one backbone, one for each task and seed."""

    backbone: str
    method: str
    runs: tuple[FinishedRun, ...]

    @property
    def scaled(self) -> tuple[FinishedRun, ...]:
        """The runs that have scales."""
        return tuple(run for run in self.runs if run.scales is not None)

    @property
    def layers(self) -> list[str]:
        """Layers that have a scale in all runs with scales, in the order of the model."""
        found = [run.scales.vectors for run in self.runs if run.scales is not None]
        return [layer for layer in found[0] if all(layer in vectors for vectors in found)] if found else []

    @property
    def propagates(self) -> bool:
        """Whether scales propagate in any run."""
        return any(run.scales is not None and run.scales.propagates for run in self.runs)

    def matrix(self, layers: Sequence[str]) -> Float[np.ndarray, "runs channels"]:
        """Returns the concatenated scales of some layers, a row for each run with scales."""
        rows = [[run.scales.vectors[layer] for layer in layers] for run in self.runs if run.scales is not None]
        return np.array([np.concatenate(row) for row in rows], dtype=np.float64)


def read_groups(folder: Path) -> list[Group]:
    """Reads the runs of a suite by backbone and method, in the order of its tables.

    Args:
        folder: Folder of the suite, or of a single run.

    Raises:
        SanError: If rows or scales cannot be read, or rows cannot be compared.
    """
    from san_peft.errors import SanError

    suite = (folder / "rows.jsonl").is_file()
    problems: list[str] = []
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    every = read_rows([folder])
    ways = {row["run"]: row.get("way") for row in reversed(every)}  # the first scoring method of each run
    for name, rows in _named(sections([row for row in every if row.get("way") == ways[row["run"]]])):
        of_run: dict[str, list[Row]] = {}
        for row in rows:
            of_run.setdefault(row["run"], []).append(row)
        for place, own in of_run.items():
            run = folder / place if suite else folder
            try:
                found = FinishedRun(tuple(own), losses_of(run), load_scales(run))
            except SanError as error:
                problems.append(f"{place}: {error}")
            else:
                groups.setdefault(name, []).append(found)
    if problems:
        raise SanError("\n".join([f"Cannot read the scales of {counted(len(problems), 'run')}:", *problems]))
    return [Group(backbone, method, tuple(runs)) for (backbone, method), runs in groups.items()]


def _named(parts: Sequence[Section]) -> Iterator[tuple[tuple[str, str], list[Row]]]:
    """Yields rows with their backbone and method, with longer names where short ones would be ambiguous."""
    splits = {part.split for part in parts}
    for part in parts:
        models = {other.model for other in parts if other.backbone == part.backbone}
        methods = Counter(line.method for line in part.lines)
        for line, tasks in part.lines.items():
            method = line.method if methods[line.method] == 1 else f"{line.method} ({line.chosen})"
            name = method if len(splits) == 1 else f"{method}, {part.split}"
            rows = [row for seeds in tasks.values() for row in seeds.values()]
            yield (part.backbone if len(models) == 1 else part.model, name), rows


def losses_of(run: Path) -> tuple[float, ...]:
    """Returns the training loss of every step of a run; empty without a log."""
    log = run / "log.jsonl"
    if not log.is_file():
        return ()
    with loading(f"{log}", "Remove it to do without the loss."):
        rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
        return tuple(float(row["loss"]) for row in rows if "loss" in row)


def layer_kinds(layers: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Returns the kind of each layer (the shortest unique suffix of its name) and its depth among layers of that kind.

    Example:
        >>> layer_kinds(["patch", "blocks.0.mlp.fc1", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.proj"])
        {'patch': ('patch', 0), 'blocks.0.mlp.fc1': ('fc1', 0), 'blocks.0.attn.proj': ('attn.proj', 0), \
'blocks.1.mlp.fc1': ('fc1', 1), 'blocks.1.mlp.proj': ('mlp.proj', 0)}
    """
    stems = {layer: tuple(part for part in layer.split(".") if not part.isdigit()) for layer in layers}
    kinds = set(stems.values())
    seen: Counter[tuple[str, ...]] = Counter()
    found = {}
    for layer, stem in stems.items():
        tails = (stem[-length:] for length in range(1, len(stem) + 1))
        tail = next((tail for tail in tails if sum(kind[-len(tail) :] == tail for kind in kinds) == 1), stem)
        found[layer] = (".".join(tail), seen[stem])
        seen[stem] += 1
    return found


def pairs(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Pairs, for each backbone and source of scales, a method with propagation with one without.

    With propagation, the first method in the order of the tables is chosen; without, the one with the closest number of
    trained parameters outside the head. Both are restricted to common tasks and seeds.

    Returns:
        Source of the scales and methods, the one with propagation first; a single method if there is no pair.
    """
    found = []
    for backbone in dict.fromkeys(group.backbone for group in groups):
        for host in dict.fromkeys(HOSTS.values()):
            here = [g for g in groups if g.backbone == backbone and g.scaled and _host(g) == host]
            chosen = [group for group in here if group.propagates][:1]
            others = [group for group in here if not group.propagates]
            if chosen:
                others = [o for o in others if {r.key for r in o.scaled} & {r.key for r in chosen[0].scaled}]
                others.sort(key=lambda other: abs(_size(other) - _size(chosen[0])))
            chosen += others[:1]
            if chosen:
                common = set.intersection(*({run.key for run in group.scaled} for group in chosen))
                found.append((host, [_only(group, common) for group in chosen]))
    return found


def _host(group: Group) -> str | None:
    return HOSTS.get(group.runs[0].row["kind"])


def _size(group: Group) -> int:
    return group.runs[0].row["trainable_parameters"] - group.runs[0].row["trainable_head"]


def _only(group: Group, keys: set[tuple[str, int]]) -> Group:
    return Group(group.backbone, group.method, tuple(run for run in group.scaled if run.key in keys))

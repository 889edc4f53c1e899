"""Published numbers to stand beside one's own, each with its source and with what is known about it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Published:
    """A row of a published table.

    Attributes:
        backbone: As papers name it; `*` where the row stands beside every backbone.
        method: The method, with the paper that ran it where there are several.
        source: Where the numbers were read.
        confirmed: Whether they were read there. Otherwise they are recalled or derived, and may be wrong.
        accuracy: Top-1 in %, by task; without the tasks that the source does not have.
        groups: Mean over each group's tasks; computed from the tasks where those are there.
        mean_of_tasks: Mean over all tasks of the suite, where those are there.
        mean_of_groups: Mean over the means of groups.
        parameters: Trained parameters without the head, in millions.
        weights: Tag of the checkpoint.
        selection: What the checkpoint or the settings were chosen on; `None` where the source does not say.
        derived: Whether the numbers follow from others by arithmetic.
        note: What a reader should know.
    """

    backbone: str
    method: str
    source: str
    confirmed: bool
    accuracy: Mapping[str, float]
    groups: Mapping[str, float]
    mean_of_tasks: float | None
    mean_of_groups: float | None
    parameters: float | None = None
    weights: str | None = None
    selection: str | None = None
    derived: bool = False
    note: str = ""


def published(suite: str, backbone: str | None) -> list[Published]:
    """Returns what was published for a suite on a backbone; nothing where that is unknown.

    Args:
        suite: `vtab`, `fgvc`, `gic`, `commonsense` or `llava`.
        backbone: Such as `ViT-B/16` or `LLaMA-3-8B`; see `backbone_of`.

    Example:
        >>> [row.method for row in published("vtab", "ConvNeXt-B")]
        ['Full (VPT paper)', 'Linear (VPT paper)', 'VPT']
        >>> round(published("vtab", "ViT-B/16")[0].mean_of_tasks, 2)
        65.57
    """
    shipped = _data()
    known = shipped["suites"].get(suite)
    if known is None:
        return []
    wanted = set() if backbone is None else {backbone, "*"}
    return [_row(row, known["groups"], shipped["sources"]) for row in known["rows"] if row["backbone"] in wanted]


def tasks_of(suite: str) -> dict[str, str | None]:
    """Returns all tasks of a suite with their groups, in the order of the papers; nothing for an unknown suite."""
    groups = _data()["suites"].get(suite, {"groups": {}})["groups"]
    return {task: group or None for group, tasks in groups.items() for task in tasks}


def decimals_of(suite: str) -> int:
    """Returns how many decimals a suite's papers print, 1 for an unknown suite."""
    return _data()["suites"].get(suite, {"decimals": 1})["decimals"]


def claims(suite: str) -> list[str]:
    """Returns what SAN's authors claim for a suite, in sentences."""
    shipped = _data()
    return [
        f"{'Derived from ' if claim['derived'] else ''}{shipped['sources']['san']}: {claim['about']}: {claim['claim']}."
        for claim in shipped["claims"]
        if suite in claim["suites"]
    ]


def backbone_of(model: str | None) -> str | None:
    """Returns what papers call a checkpoint, or `None` where they used another.

    Checkpoints that were tuned on ImageNet-1k after their pretraining are others.

    Args:
        model: A recipe's model: a tag, or a folder of that name.

    Example:
        >>> backbone_of("timm/vit_base_patch16_224.augreg_in21k"), backbone_of("google/vit-base-patch16-224-in21k")
        ('ViT-B/16', 'ViT-B/16')
        >>> backbone_of("huggyllama/llama-7b@4782ad2")
        'LLaMA-7B'
        >>> backbone_of("timm/vit_base_patch16_224.augreg_in21k_ft_in1k") is backbone_of("embedded") is None
        True
    """
    name = (model or "").partition("@")[0].rstrip("/").rpartition("/")[2]
    return next((known for known, form in _data()["backbones"].items() if re.fullmatch(form, name)), None)


@cache
def _data() -> dict[str, Any]:
    return json.loads((resources.files("san_bench.report.tables") / "published.json").read_text(encoding="utf-8"))


def _row(row: dict[str, Any], groups: Mapping[str, Sequence[str]], sources: Mapping[str, str]) -> Published:
    tasks = [task for group in groups.values() for task in group]
    values = row.get("accuracy", [None] * len(tasks))
    accuracy = {task: value for task, value in zip(tasks, values, strict=True) if value is not None}
    means = {
        name: statistics.fmean(accuracy[t] for t in group) for name, group in groups.items() if {*group} <= {*accuracy}
    }
    means = dict(zip(groups, row["groups"], strict=True)) if "groups" in row else means
    told = {key: row[key] for key in row.keys() - {"accuracy", "groups", "mean_of_groups", "source"}}
    complete = len(means) == len(groups)
    return Published(
        **told,
        source=sources[row["source"]],
        accuracy=accuracy,
        groups=means,
        mean_of_tasks=statistics.fmean(accuracy.values()) if len(accuracy) == len(tasks) else None,
        mean_of_groups=row.get("mean_of_groups", statistics.fmean(means.values()) if complete else None),
    )

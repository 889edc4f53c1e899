"""Look up published results to compare with, each with its source and status."""

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
        backbone: Name of the backbone in papers; `*` if the row applies to every backbone.
        method: The method, with the paper that ran it if several did.
        source: Source of the numbers.
        confirmed: Whether they were read in the source. Otherwise they are recalled or derived, and may be wrong.
        accuracy: Top-1 accuracy in % by task, for the tasks in the source.
        groups: Mean over each group's tasks; computed from the tasks if those are known.
        mean_of_tasks: Mean over all tasks of the suite, if those are known.
        mean_of_groups: Mean over the group means.
        parameters: Trained parameters without the head, in millions.
        weights: Tag of the checkpoint.
        selection: Split used for model selection; `None` if the source does not say.
        derived: Whether the numbers were computed from other published numbers.
        note: Additional remark.
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
    """Returns the published rows of a suite and backbone; empty if there are none.

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
    """Returns all tasks of a suite with their groups, in the order of the papers; empty for an unknown suite."""
    groups = _data()["suites"].get(suite, {"groups": {}})["groups"]
    return {task: group or None for group, tasks in groups.items() for task in tasks}


def decimals_of(suite: str) -> int:
    """Returns the number of decimals in a suite's papers, 1 for an unknown suite."""
    return _data()["suites"].get(suite, {"decimals": 1})["decimals"]


def claims(suite: str) -> list[str]:
    """Returns the claims of SAN's authors on a suite."""
    shipped = _data()
    return [
        f"{'Derived from ' if claim['derived'] else ''}{shipped['sources']['san']}: {claim['about']}: {claim['claim']}."
        for claim in shipped["claims"]
        if suite in claim["suites"]
    ]


def backbone_of(model: str | None) -> str | None:
    """Returns the papers' name of a checkpoint, or `None` if they used another one.

    Checkpoints that were fine-tuned on ImageNet-1k after pretraining are different ones.

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

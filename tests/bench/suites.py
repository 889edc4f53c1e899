"""Folders of suites as runs leave them, with numbers that tests choose."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from san_bench.run.scales import RunScales, save_scales

ORIGIN = {
    "suite": "made-up",
    "group": None,
    "model": "embedded",
    "protocol": None,
    "selection": "last",
    "split": "test",
    "n_test": 100,
    "train_split": "train800val200",
    "n_train": 1000,
    "trainable_head": 50,
    "train_seconds": 1.0,
    "task_fingerprint": "data",
    "finished": "2026-01-01T00:00:00+00:00",
    "python": "3.11",
    "versions": {"torch": "2"},
    "commit": "abc",
    "cpu": "cpu",
    "threads": 1,
    "device": "cpu",
}


def row(task: str, method: str, seed: int, accuracy: float = 0.5, backbone: str = "vit", **more: Any) -> dict[str, Any]:
    """A row as a suite's run writes it."""
    return {
        **ORIGIN,
        "task": task,
        "backbone": backbone,
        "method": method,
        "kind": method if method in {"ssf", "lora", "dora", "san-lora", "san-dora", "linear", "full"} else "san",
        "seed": seed,
        "accuracy": accuracy,
        "correct": round(100 * accuracy),
        "trainable_parameters": 150,
        "recipe_fingerprint": f"{task} {backbone} {method} {seed}",
        "run": f"runs/{task.replace('/', '-')}/{backbone}/{method}/{seed:016x}",
        **more,
    }


def write_suite(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    losses: Callable[[Mapping[str, Any]], Sequence[float]] | None = None,
    scales: Callable[[Mapping[str, Any]], RunScales | None] | None = None,
) -> Path:
    """Writes rows, and for each run what the two functions give for its row."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for one in rows:
        run = folder / one["run"]
        if losses is not None:
            run.mkdir(parents=True, exist_ok=True)
            log = [{"loss": loss, "step": step} for step, loss in enumerate(losses(one), 1)]
            (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*log, {"train_runtime": 1.0}]))
        if scales is not None and (found := scales(one)) is not None:
            save_scales(run, found)
    return folder


LAYERS = {
    "vit.patch": 8,
    **{f"vit.layer.{i}.{kind}": 24 if kind == "fc1" else 8 for i in range(3) for kind in ("v", "proj", "fc1", "fc2")},
}
"""Layers of a small transformer with their channels."""


def pattern(task: str, seed: int, strength: float = 0.1, noise: float = 0.05, **options: Any) -> RunScales:
    """Scales with a pattern that belongs to the task, and noise that belongs to the seed."""
    vectors = {}
    for place, (layer, size) in enumerate(LAYERS.items()):
        of_task = np.random.default_rng([place, *task.encode()]).normal(0, strength, size)
        of_seed = np.random.default_rng([place, seed, *task.encode(), 7]).normal(0, noise, size)
        vectors[layer] = (1 + of_task + of_seed).astype(np.float32)
    return RunScales(vectors, **options)

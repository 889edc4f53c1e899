"""Rows of results as suites write them, made up."""

from __future__ import annotations

from typing import Any


def made_up(task: str, method: str, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    """A row that scores 1,000 images; the recipe's fingerprint follows from backbone, task, method and seed."""
    row = {
        "suite": task.rpartition("/")[0],
        "task": task,
        "group": None,
        "backbone": "vit",
        "model": "embedded",
        "method": method,
        "kind": method.partition("-r")[0],
        "seed": seed,
        "lr": 0.01,
        "protocol": None,
        "selection": "last",
        "split": "test",
        "accuracy": accuracy,
        "correct": round(1000 * accuracy),
        "n_test": 1000,
        "train_split": "train800val200",
        "n_train": 1000,
        "trainable_parameters": 12_000,
        "trainable_head": 2_000,
        "total_parameters": 500_000,
        "train_seconds": 10.0 + seed,
        "steps": 100,
        "final_loss": 0.1,
        "saved_activation_mib": 5.0,
        "peak_rss_mib": 900.0,
        "energy_joules": None,
        "task_fingerprint": f"data of {task}",
        "checkpoint_sha256": "c" * 64,
        "finished": "2026-01-02T03:04:05+00:00",
        "python": "3.12.1",
        "versions": {"torch": "2.9.0"},
        "commit": "a" * 40,
        "cpu": "Some CPU",
        "threads": 2,
        "device": "cpu",
        **changes,
    }
    return {"recipe_fingerprint": f"{row['backbone']} {task} {method} {seed} recipe", **row}

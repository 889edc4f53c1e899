"""Chooses the learning rates of the demo's recipes on validation, with the same effort for every method.

    python scripts/search_learning_rates.py            # the trials that are missing, then the choice
    python scripts/search_learning_rates.py san ssf    # the same for some methods only
    python scripts/search_learning_rates.py --restart  # forget all trials first

Every method gets the same grid, seeds and epochs; trained on `train800`, scored on `val200`, the test split is not
looked at. The best mean accuracy wins, the smaller rate where means are equal. Trials go to
`learning_rates.jsonl` beside this script, choices into the recipes. About half an hour on two cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.progress import track

from san_bench.config.recipe import load_recipe, shipped
from san_bench.run.provenance import write_rows

TRIALS = Path(__file__).with_name("learning_rates.jsonl")
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SEEDS = (100, 101)
KEEP = ("lr", "seed", "accuracy", "correct", "n_test", "final_loss", "train_seconds", "recipe_fingerprint", "versions")
KEEP += ("task_fingerprint", "commit", "cpu", "finished")


def overrides(lr: float, seed: int) -> dict[str, object]:
    return {"optimizer.lr": lr, "seed": seed, "train_split": "train800", "eval_split": "val200"}


def trial(name: str, lr: float, seed: int) -> dict[str, object]:
    import torch

    from san_bench.run.provenance import provenance
    from san_bench.run.train import train
    from san_peft.errors import SanError

    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        recipe = load_recipe(f"demo/{name}", {**overrides(lr, seed), "output": f"{folder}/run"})
        try:
            result = train(recipe)
        except SanError as error:  # a loss that is not finite is a trial too, and the worst one
            if "not finite" not in str(error):
                raise
            result = {"lr": lr, "seed": seed, "accuracy": 0.0, "recipe_fingerprint": recipe.fingerprint, **provenance()}
            result["error"] = str(error).replace(folder, "")
    return {"recipe": name, **{key: result[key] for key in (*KEEP, "error") if key in result}}


def choose(trials: list[dict]) -> dict[str, float]:
    """Best mean accuracy of every recipe whose grid is complete; ties go to the smaller rate."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in trials:
        found[row["recipe"]][row["lr"]].append(row["accuracy"])
    complete = {n: r for n, r in found.items() if all(len(r[lr]) == len(SEEDS) for lr in GRID)}
    return {n: min(r, key=lambda lr: (-round(sum(r[lr]) / len(r[lr]), 9), lr)) for n, r in complete.items()}


def current(rows: list[dict]) -> list[dict]:
    """The trials that were made with today's recipes, the learning rate and the seed aside."""
    prints = {
        (name.removeprefix("demo/"), lr, seed): load_recipe(name, overrides(lr, seed)).fingerprint
        for name in shipped()
        if name.startswith("demo/")
        for lr in GRID
        for seed in SEEDS
    }
    return [row for row in rows if prints.get((row["recipe"], row["lr"], row["seed"])) == row["recipe_fingerprint"]]


def main() -> None:
    words = sys.argv[1:]
    names = [n.removeprefix("demo/") for n in shipped() if n.startswith("demo/")]
    wanted = [w for w in words if not w.startswith("-")] or names
    old = [] if "--restart" in words or not TRIALS.exists() else TRIALS.read_text(encoding="utf-8").splitlines()
    rows = current([json.loads(line) for line in old])
    done = {(row["recipe"], row["lr"], row["seed"]) for row in rows}
    todo = [(n, lr, s) for n in wanted for lr in GRID for s in SEEDS if (n, lr, s) not in done]
    workers = min(os.cpu_count() or 1, 2)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(trial, *what) for what in todo]
        for future in track(as_completed(futures), total=len(futures), description="trials"):
            rows.append(future.result())
            rows.sort(key=lambda row: (row["recipe"], row["lr"], row["seed"]))
            write_rows(TRIALS, rows)
    for name, lr in choose(rows).items():
        path = shipped()[f"demo/{name}"]
        text = re.sub(r"(?m)^(  lr: ).*$", rf"\g<1>{lr!r}", path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
        print(f"{name}: {lr:g}")


if __name__ == "__main__":
    main()

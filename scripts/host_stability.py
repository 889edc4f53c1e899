"""Measures how far the learning rate of SAN over LoRA and DoRA can go, and what keeps the propagated scale in bounds.

    python scripts/host_stability.py            # the trials that are missing, then the table
    python scripts/host_stability.py --restart  # forget all trials first

Every variant is trained on `train800` of the digits and scored on `val200`, with the same rates, seeds and epochs; the
test split is not looked at. Trials go to `host_stability.jsonl` beside this script, the table to
`runs/host-stability.md`. About a quarter of an hour on two cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import track

from san_bench.config.recipe import load_recipe
from san_bench.run.provenance import write_atomically, write_rows

TRIALS = Path(__file__).with_name("host_stability.jsonl")
TABLE = Path("runs/host-stability.md")
SEEDS = (200, 201)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA alone": ("lora", {}),
    "SAN, norm": ("san-lora", {}),
    "SAN, projection": ("san-lora", {"method.decomposition": "projection"}),
    "SAN, norm, detached": ("san-lora", {"method.detach": True}),
    "SAN, norm, bound 0.5": ("san-lora", {"method.bound": 0.5}),
    "SAN, norm, bound 0.25": ("san-lora", {"method.bound": 0.25}),
    "SAN, projection, bound 0.5": ("san-lora", {"method.decomposition": "projection", "method.bound": 0.5}),
    "DoRA alone": ("dora", {}),
    "SAN over DoRA": ("san-dora", {}),
    "SAN over DoRA, bound 0.5": ("san-dora", {"method.bound": 0.5}),
}
SETTINGS: dict[str, tuple[dict[str, Any], tuple[float, ...], tuple[str, ...]]] = {
    "warm-up and clipping": ({}, (3e-3, 1e-2, 1.4e-2, 2e-2), tuple(VARIANTS)),
    "neither": (
        {"optimizer.warmup": 0.0, "optimizer.max_grad_norm": 1e6, "optimizer.schedule": "constant"},
        (2e-3, 4e-3, 8e-3),
        ("LoRA alone", "SAN, norm", "SAN, projection", "SAN, norm, detached", "SAN, norm, bound 0.5"),
    ),
}
"""How the optimiser is driven: with what changes to the recipe, at which rates, for which variants."""


def recipe_of(setting: str, variant: str, lr: float, seed: int, folder: str = "") -> Any:
    name, options = VARIANTS[variant]
    fixed = {"optimizer.lr": lr, "optimizer.epochs": 3, "seed": seed, "train_split": "train800", "eval_split": "val200"}
    return load_recipe(f"hosts/{name}", {**options, **SETTINGS[setting][0], **fixed, "output": f"{folder}/run"})


def trial(setting: str, variant: str, lr: float, seed: int) -> dict[str, Any]:
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
        recipe = recipe_of(setting, variant, lr, seed, folder)
        try:
            result = train(recipe)
        except SanError as error:  # a loss that is not finite is a trial too, and the worst one
            if "not finite" not in str(error):
                raise
            result = {"accuracy": 0.0, "n_test": 200, "recipe_fingerprint": recipe.fingerprint, **provenance()}
            result["error"] = str(error).replace(folder, "")
        adapter = Path(folder, "run", "adapter")
        spread = scales(adapter, recipe) if variant.startswith("SAN") and adapter.is_dir() else {}
    kept = ("accuracy", "n_test", "final_loss", "recipe_fingerprint", "versions", "commit", "cpu", "finished", "error")
    return {
        "setting": setting,
        "variant": variant,
        "lr": lr,
        "seed": seed,
        **{key: result[key] for key in kept if key in result},
        **spread,
    }


def scales(adapter: Path, recipe: Any) -> dict[str, float]:
    """How large the scales of the trained adapter have become, before any bound."""
    import torch
    from peft import PeftModel

    from san_bench.run.domain import domain_of
    from san_peft import SanLayer

    model = PeftModel.from_pretrained(domain_of(recipe).base_model(), adapter).eval()
    with torch.no_grad():
        found = [m.get_scale() for m in model.modules() if isinstance(m, SanLayer)]
    every = torch.cat([scale for scale in found if scale is not None])
    return {"scale_median": every.median().item(), "scale_max": every.max().item(), "scale_min": every.min().item()}


def table(setting: str, rows: list[dict[str, Any]]) -> str:
    _, rates, variants = SETTINGS[setting]
    lines = [
        f"| {setting} | " + " | ".join(f"lr {lr:g}" for lr in rates) + " | median scale | largest |",
        "|---|" + "---:|" * (len(rates) + 2),
    ]
    for variant in variants:
        cells, medians, largest = [], [], []
        for lr in rates:
            found = [row for row in rows if (row["setting"], row["variant"], row["lr"]) == (setting, variant, lr)]
            values = [row["accuracy"] * 100 for row in found]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
            medians += (
                [f"{statistics.mean(r['scale_median'] for r in found):.2f}"] if "scale_median" in found[0] else []
            )
            largest += [f"{max(r['scale_max'] for r in found):.1f}"] if "scale_max" in found[0] else []
        lines.append(f"| {variant} | {' | '.join(cells)} | {', '.join(medians)} | {', '.join(largest)} |")
    return "\n".join(lines)


def report(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    text = f"Accuracy in % on {first['n_test']} validation images: mean of n = {len(SEEDS)} seeds (least to largest)."
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    origin = f"Measured by `python scripts/host_stability.py`; commits {commits}; {first['cpu']}."
    tables = "\n\n".join(table(setting, rows) for setting in SETTINGS)
    return f"{text} Scales are those after training, before any bound, by learning rate.\n\n{tables}\n\n{origin}\n"


def key(row: dict[str, Any]) -> tuple[str, str, float, int]:
    return row["setting"], row["variant"], row["lr"], row["seed"]


def main() -> None:
    old = [] if "--restart" in sys.argv or not TRIALS.exists() else TRIALS.read_text(encoding="utf-8").splitlines()
    every = [
        (w, v, lr, s) for w, (_, rates, variants) in SETTINGS.items() for v in variants for lr in rates for s in SEEDS
    ]
    prints = {what: recipe_of(*what).fingerprint for what in every}
    rows = [json.loads(line) for line in old]
    rows = [r for r in rows if prints.get(key(r)) == r["recipe_fingerprint"]]
    done = {key(r) for r in rows}
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 2), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(trial, *what) for what in every if what not in done]
        for future in track(as_completed(futures), total=len(futures), description="trials"):
            rows.append(future.result())
            rows.sort(key=lambda row: every.index(key(row)))
            write_rows(TRIALS, rows)
    write_atomically(TABLE, report(rows))
    print(report(rows))


if __name__ == "__main__":
    main()

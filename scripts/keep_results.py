"""Keeps what a suite found in this repository: `python scripts/keep_results.py runs/mini-vision`.

Rows and trials go to `results/SUITE/`. The learning rates that the trials chose go into the suite that ships; rows of
other rates are left out. Rows of code that no commit holds are refused. What `san plot` found on the variance and the
similarity of scales is kept too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from san_bench.config.recipe import find
from san_bench.config.suite import Rates, load_suite
from san_bench.run.provenance import write_atomically, write_rows

ROOT = Path(__file__).parents[1]


def read(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of a file, by the folder of their run; none where there is no file."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else []):
        runs.setdefault(row["run"], []).append(row)
    return runs


def keep(source: Path, target: Path, rates: Rates | None = None) -> int:
    """Adds the rows of one file to another, those of the given rates alone; returns how many are there then."""
    runs = read(target)
    for run, rows in read(source).items():
        if not rows[0]["commit"] or rows[0]["commit"].endswith("+changes"):
            raise SystemExit(f"{source}: {run} comes from code that no commit holds. Commit first, and run it again.")
        runs[run] = rows
    kept = [
        row
        for run in sorted(runs)
        for row in runs[run]
        if rates is None or rates[row["backbone"]].get(row["method"]) == row["lr"]
    ]
    if kept:
        write_rows(target, kept)
    return len(kept)


def ship(rates: Rates, suite: str) -> Rates:
    """Writes learning rates into the file of a suite, whose last key they are; returns all that it has then."""
    file = find(suite, "suites")
    known = load_suite(suite).rates
    merged = {backbone: {**known.get(backbone, {}), **rates.get(backbone, {})} for backbone in {**known, **rates}}
    head, _, _ = file.read_text(encoding="utf-8").rpartition("rates:")
    body = yaml.safe_dump({"rates": merged}, sort_keys=False, default_flow_style=None, width=100)
    write_atomically(file, head + body)
    return load_suite(suite).rates


def main() -> None:
    """Keeps the rows and trials of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `san bench` wrote")
    args = parser.parse_args()
    name = args.folder.name
    place = ROOT / "results" / name
    chosen = args.folder / "rates.json"  # only where a search was made
    rates = ship(json.loads(chosen.read_text(encoding="utf-8")) if chosen.exists() else {}, name)
    counts = {
        "rows.jsonl": keep(args.folder / "rows.jsonl", place / "rows.jsonl", rates),
        "search/rows.jsonl": keep(args.folder / "search" / "rows.jsonl", place / "search" / "rows.jsonl"),
    }
    analysis = args.folder / "plots" / "analysis.json"
    if analysis.exists():
        found = json.loads(analysis.read_text(encoding="utf-8"))
        write_atomically(place / "variance.json", json.dumps(found["variance"], indent=1) + "\n")
        similarity = [{key: value for key, value in one.items() if key != "layers"} for one in found["similarity"]]
        write_atomically(place / "similarity.json", json.dumps(similarity, indent=1) + "\n")
    print(f"{place.relative_to(ROOT)}: {', '.join(f'{count} in {part}' for part, count in counts.items())}")


if __name__ == "__main__":
    main()

"""Measures how often the interval of paired differences covers the truth, as a table in Markdown.

    python scripts/interval_coverage.py

Differences are normal: one draw for each task, of the first standard deviation, and one for each seed within it, of the
second. A single task has the second alone.
"""

from __future__ import annotations

import numpy as np

from san_bench.report.tables.estimate import bootstrap_interval

SIZES = ((1, 5), (1, 10), (3, 3), (3, 5), (4, 5), (8, 1), (8, 5), (19, 1), (19, 3))
SPREADS = ((1.0, 1.0), (1.0, 0.3), (0.3, 1.0))
TRIALS = 400


def coverage(tasks: int, seeds: int, between: float, within: float) -> float:
    draw = np.random.default_rng((tasks, seeds, int(10 * between), int(10 * within)))
    hits = 0
    for _ in range(TRIALS):
        own = draw.normal(0, between, (tasks, 1)) if tasks > 1 else 0.0
        low, high = bootstrap_interval((own + draw.normal(0, within, (tasks, seeds))).tolist()) or (0.0, 0.0)
        hits += low <= 0 <= high
    return hits / TRIALS


def main() -> None:
    print(f"| tasks | seeds | {' | '.join(f'between {b:g}, within {w:g}' for b, w in SPREADS)} |")
    print("|" + "---:|" * (2 + len(SPREADS)))
    for tasks, seeds in SIZES:
        shares = (f"{coverage(tasks, seeds, *spread):.0%}" for spread in SPREADS)
        print(f"| {tasks} | {seeds} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()

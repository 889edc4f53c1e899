"""Estimate means with spread and n, and confidence intervals of proportions and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""Number of bootstrap resamples."""

LEAST_PAIRS = 5
"""Minimum number of pairs for an interval. Pairs of two tasks also get none: resampling has too few outcomes."""


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Returns the 95% Wilson interval of a proportion.

    Args:
        correct: Number of correct predictions.
        n: Number of predictions.

    Example:
        >>> low, high = wilson(90, 100)
        >>> f"{low:.3f} {high:.3f}"
        '0.826 0.945'
    """
    from scipy.stats import binomtest

    low, high = binomtest(correct, n).proportion_ci(method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A mean with its spread and n.

    Attributes:
        mean: Mean of the values.
        sd: Sample standard deviation (with n - 1); `None` for a single value.
        n: Number of values.
    """

    mean: float
    sd: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Returns mean, sample standard deviation and n of at least one value.

    Example:
        >>> estimate([1.0, 3.0])
        Estimate(mean=2.0, sd=1.4142135623730951, n=2)
        >>> estimate([5.0]).sd is None
        True
    """
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean_difference(differences: Sequence[Sequence[float]]) -> float:
    """Returns the mean over tasks of each task's mean over seeds, so that all tasks have equal weight."""
    return statistics.fmean(statistics.fmean(task) for task in differences)


def bootstrap_interval(differences: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float] | None:
    r"""Returns the 95% interval of `mean_difference`, from a two-level bootstrap.

    Tasks are resampled with replacement, then seeds within each task. So the interval covers the variation over seeds
    and over tasks of the same kind; with a single task it covers seeds alone.

    Percentile intervals of few tasks are too narrow, so the percentiles are expanded as Hesterberg (2015, "What
    teachers should know about the bootstrap") proposes: for k tasks, or for k seeds of a single task, to

    $$ \Phi\bigl(\mp \sqrt{k / (k - 1)} \; t_{k - 1,\, 0.975}\bigr) $$

    Args:
        differences: Paired differences of each seed, for each task.
        seed: Random seed of the bootstrap.

    Returns:
        Lower and upper end; `None` for fewer than `LEAST_PAIRS` pairs, or two tasks.

    Example:
        >>> low, high = bootstrap_interval([[0.01, 0.02, 0.03], [0.02, 0.04, 0.03], [0.05, 0.03, 0.04]])
        >>> 0.01 < low < 0.03 < high < 0.05
        True
        >>> bootstrap_interval([[0.01, 0.02], [0.03]]) is None
        True
    """
    sizes = np.array([len(task) for task in differences])
    if sizes.sum() < LEAST_PAIRS or len(sizes) == 2:
        return None
    from scipy.special import ndtr, stdtrit

    values = np.zeros((len(sizes), sizes.max()))
    for row, task in zip(values, differences, strict=True):
        row[: len(task)] = task
    draw = np.random.default_rng(seed)
    tasks = draw.integers(len(sizes), size=(RESAMPLES, len(sizes)))
    drawn = sizes[tasks][..., None]
    seeds = (draw.random((*tasks.shape, values.shape[1])) * drawn).astype(int)
    counted = np.arange(values.shape[1]) < drawn
    means = ((values[tasks[..., None], seeds] * counted).sum(-1) / drawn[..., 0]).mean(-1)
    units = len(sizes) if len(sizes) > 1 else int(sizes[0])
    tail = ndtr(-np.sqrt(units / (units - 1)) * stdtrit(units - 1, 0.975))
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)

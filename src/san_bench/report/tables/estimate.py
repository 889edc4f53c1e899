"""What a handful of runs says: mean with spread and n, intervals of shares and of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""How often pairs are drawn again for an interval."""

LEAST_PAIRS = 5
"""Fewer pairs than these, and pairs of two tasks, get no interval: resampling them knows too few outcomes."""


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    r"""Returns the Wilson interval of a share, 95% for the default `z`.

    $$ \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p) / n + z^2 / 4n^2}}{1 + z^2/n} $$

    Args:
        correct: How many were right.
        n: Of how many.
        z: Quantile of the normal distribution.

    Example:
        >>> low, high = wilson(90, 100)
        >>> f"{low:.3f} {high:.3f}"
        '0.826 0.945'
    """
    share = correct / n
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class Estimate:
    """A mean that never goes without its n.

    Attributes:
        mean: Of the values.
        sd: Sample standard deviation, with n - 1 below; `None` for a single value, which has no spread.
        n: How many values.
    """

    mean: float
    sd: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Returns mean, sample standard deviation and n of one value or more.

    Example:
        >>> estimate([1.0, 3.0])
        Estimate(mean=2.0, sd=1.4142135623730951, n=2)
        >>> estimate([5.0]).sd is None
        True
    """
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean_difference(differences: Sequence[Sequence[float]]) -> float:
    """Returns the mean over tasks of each task's mean over seeds, so that all tasks weigh the same."""
    return statistics.fmean(statistics.fmean(task) for task in differences)


def bootstrap_interval(differences: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float] | None:
    r"""Returns the 95% interval of `mean_difference`, from a bootstrap of two levels.

    Tasks are drawn with replacement, then seeds within every task that was drawn. So the interval covers what other
    seeds would change, and what other tasks of the same kind would; with a single task it covers seeds alone.

    Percentiles of few tasks are too narrow, so they are taken further out, as Hesterberg (2015, "What teachers should
    know about the bootstrap") proposes: for k tasks, or for k seeds of a single task, at

    $$ \Phi\bigl(\mp \sqrt{k / (k - 1)} \; t_{k - 1,\, 0.975}\bigr) $$

    Args:
        differences: Paired differences, a sequence of seeds for each task.
        seed: Of the draws; the same input gives the same interval.

    Returns:
        Its lower and upper end; `None` for fewer than `LEAST_PAIRS` pairs, and for two tasks.

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
    from scipy.special import ndtr, stdtrit  # comes with scikit-learn, which the suites need

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

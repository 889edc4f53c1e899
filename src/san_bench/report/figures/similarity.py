"""Measure the similarity of scale vectors within and between tasks, and embed them with PCA.

Scale vectors are centred at their initial value one, so that the change by training is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

Matrix = Float[np.ndarray, "runs runs"]

PERMUTATIONS = 9999
"""Number of permutations; the smallest p-value is 1 / 10,000."""


@dataclass(frozen=True)
class Comparison:
    """Similarity of pairs of runs on the same task, and on different tasks.

    Attributes:
        intra: Mean over pairs on the same task; `None` without pairs, or if a vector is zero after centring.
        inter: Mean over pairs on different tasks; likewise.
        n_intra: Number of pairs on the same task.
        n_inter: Number of pairs on different tasks.
        p: p-value of the permutation test, or `None` if either mean is missing.
    """

    intra: float | None
    inter: float | None
    n_intra: int
    n_inter: int
    p: float | None = None


def cosines(scales: Float[np.ndarray, "runs channels"]) -> Matrix:
    r"""Returns the cosine similarity matrix of scale vectors, centred at one.

    $$ \cos(a - 1,\; b - 1) $$

    The cosines of a vector of ones are NaN.

    Example:
        >>> cosines(np.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]])).tolist()
        [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    return _cosines(scales - 1)


def correlations(scales: Float[np.ndarray, "runs channels"]) -> Matrix:
    """Returns the Pearson correlation matrix of scale vectors: the cosine after centring each at its own mean.

    Example:
        >>> correlations(np.array([[1.0, 2.0], [1.0, 1.5], [3.0, 2.0]])).round(6).tolist()
        [[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]
    """
    return _cosines(scales - scales.mean(axis=1, keepdims=True))


def _cosines(vectors: Float[np.ndarray, "runs channels"]) -> Matrix:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = np.where(lengths > 0, vectors / lengths, np.nan)
    return unit @ unit.T


def compare(similarity: Matrix, tasks: Sequence[str], seeds: Sequence[int], test: bool = False) -> Comparison:
    """Compares the similarity of runs within tasks and between tasks.

    Only pairs with different seeds count: runs with the same seed share their random initialisation, which could make
    them similar, and within a task there are no such pairs.

    The permutation test shuffles the tasks among the runs of each seed, and counts how often the difference of the
    means is at least as large. The p-value is (1 + count) / (1 + permutations).

    Args:
        similarity: Similarity matrix of the runs.
        tasks: Task of each run.
        seeds: Seed of each run; unique within a task.
        test: Whether to test that runs on the same task are more similar.

    Example:
        >>> matrix = cosines(np.array([[2.0, 1.0], [3.0, 1.0], [1.0, 2.0], [1.0, 4.0]]))
        >>> compare(matrix, ["a", "a", "b", "b"], [0, 1, 0, 1])
        Comparison(intra=1.0, inter=0.0, n_intra=2, n_inter=2, p=None)
    """
    label, seed = np.unique(tasks, return_inverse=True)[1], np.asarray(seeds)
    first, second = np.triu_indices(len(seed), 1)
    keep = seed[first] != seed[second]
    first, second = first[keep], second[keep]
    values = similarity[first, second]
    same = label[first] == label[second]
    intra, inter = _mean(values[same]), _mean(values[~same])
    p = None
    if test and intra is not None and inter is not None:
        p = (1 + _as_large(values, first, second, label, seed)) / (1 + PERMUTATIONS)
    return Comparison(intra, inter, int(same.sum()), int((~same).sum()), p)


def _as_large(values: Any, first: Any, second: Any, label: Any, seed: Any) -> int:
    """Counts permutations with at least as large a sum over pairs on the same task (whose number is constant)."""
    draw = np.random.default_rng(0)
    sum_found = values[label[first] == label[second]].sum()
    count = 0
    for size in (len(part) for part in np.array_split(np.arange(PERMUTATIONS), 20)):
        moved = np.tile(label, (size, 1))
        for one in np.unique(seed):
            moved[:, seed == one] = draw.permuted(moved[:, seed == one], axis=1)
        sums = (moved[:, first] == moved[:, second]) @ values
        count += int((sums >= sum_found - 1e-9).sum())
    return count


def _mean(values: Float[np.ndarray, " pairs"]) -> float | None:
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def embed(scales: Float[np.ndarray, "runs channels"]) -> tuple[Float[np.ndarray, "runs 2"], tuple[float, float]]:
    """Projects runs onto the first two principal components of their scale vectors.

    The sign of each component is chosen such that the run with the largest absolute coordinate is positive.

    Args:
        scales: Concatenated scale vectors of each run.

    Returns:
        Two coordinates for each run, and the explained variance ratio of each component.

    Example:
        >>> places, shares = embed(np.array([[1.0, 7.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]))
        >>> places[:, 0].round(6).tolist(), [round(share, 6) for share in shares]
        ([4.0, -2.0, -2.0], [1.0, 0.0])
    """
    moved = scales - scales.mean(axis=0)
    left, singular, _ = np.linalg.svd(moved, full_matrices=False)
    places = np.zeros((len(scales), 2))
    found = min(2, len(singular))
    places[:, :found] = left[:, :found] * singular[:found]
    signs = np.sign(places[np.abs(places).argmax(axis=0), [0, 1]])
    places *= np.where(signs == 0, 1, signs)
    total = float((singular**2).sum())
    shares = [float(value**2 / total) if total else 0.0 for value in singular[:2]]
    return places, (shares[0], shares[1] if found > 1 else 0.0)

"""How alike scale vectors are: within a task, between tasks, and on a map.

A scale vector is centred at one, where every scale starts: what is compared is what training changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

Matrix = Float[np.ndarray, "runs runs"]

PERMUTATIONS = 9999
"""How often tasks change places for a p-value, whose smallest value is then 1 / 10,000."""


@dataclass(frozen=True)
class Comparison:
    """Similarity of pairs of runs that share the task, against that of pairs that do not.

    Attributes:
        intra: Mean over pairs of runs of one task; `None` without such a pair, or where a vector has no direction.
        inter: The same, over pairs of runs of two tasks.
        n_intra: Number of pairs of runs of one task.
        n_inter: Number of pairs of runs of two tasks.
        p: Share of permutations with as large a difference of intra and inter, or `None` where one is missing.
    """

    intra: float | None
    inter: float | None
    n_intra: int
    n_inter: int
    p: float | None = None


def cosines(scales: Float[np.ndarray, "runs channels"]) -> Matrix:
    r"""Returns the cosine of every two scale vectors, centred at one.

    $$ \cos(a - 1,\; b - 1) $$

    A vector without any change has no direction: its cosines are not a number.

    Example:
        >>> cosines(np.array([[2.0, 1.0], [1.0, 3.0], [0.0, 1.0]])).tolist()
        [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    return _cosines(scales - 1)


def correlations(scales: Float[np.ndarray, "runs channels"]) -> Matrix:
    """Returns Pearson's correlation of every two scale vectors: the cosine after centring each at its own mean.

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
    """Compares pairs within tasks with pairs between tasks.

    Only pairs of two seeds count, between tasks as well: runs of one seed start from the same random numbers, so pairs
    of one seed could be alike for that reason, and within a task there are none.

    The test permutes the tasks among the runs of each seed, as they could be if the task did not matter, and asks how
    often the difference of the means is as large as it is. Its p-value is (1 + as large) / (1 + permutations).

    Args:
        similarity: Of every two runs.
        tasks: Task of each run.
        seeds: Seed of each run; a task has no seed twice.
        test: Whether to test that runs of one task are more alike.

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
    """Counts permutations with as large a sum over pairs of one task; their number is the same in every permutation."""
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
    """Places runs on a plane by the two largest principal components of their scale vectors.

    The sign of a component is free; here the run that lies furthest out is on its positive side.

    Args:
        scales: All scale vectors of a run, one after the other.

    Returns:
        Two coordinates for each run, and the share of the variance that each of the two explains.

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

"""Similarity of scale vectors by hand, the permutation test by enumeration, and the map."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from san_bench.report.figures.similarity import compare, correlations, cosines, embed


def test_cosines_are_of_what_training_changed():
    scales = np.array([[1.3, 1.4], [1.4, 1.3], [0.7, 0.6]])
    matrix = cosines(scales)
    assert matrix[0, 1] == pytest.approx((0.3 * 0.4 + 0.4 * 0.3) / 0.25)
    assert matrix[0, 2] == pytest.approx(-1.0)
    np.testing.assert_allclose(correlations(scales)[0, 1], -1.0)  # around their own means they are opposite


def test_correlations_are_pearsons():
    scales = np.random.default_rng(0).normal(1, 0.1, (4, 30))
    np.testing.assert_allclose(correlations(scales), np.corrcoef(scales))


def test_a_vector_that_did_not_move_has_no_similarity():
    matrix = cosines(np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [1.0, 2.0]]))
    assert np.isnan(matrix[0]).all()
    found = compare(matrix, ["a", "a", "b", "b"], [0, 1, 0, 1], test=True)
    assert (found.intra, found.inter, found.p) == (None, None, None)
    assert (found.n_intra, found.n_inter) == (2, 2)


def test_only_pairs_of_two_seeds_count():
    similarity = np.array(
        [
            [1.0, 0.9, 0.5, 0.1],
            [0.9, 1.0, 0.2, 0.5],
            [0.5, 0.2, 1.0, 0.7],
            [0.1, 0.5, 0.7, 1.0],
        ]
    )
    found = compare(similarity, ["a", "a", "b", "b"], [0, 1, 0, 1])
    assert found.intra == pytest.approx((0.9 + 0.7) / 2)
    assert found.inter == pytest.approx((0.1 + 0.2) / 2)  # not 0.5, which is of one seed
    assert (found.n_intra, found.n_inter, found.p) == (2, 2, None)
    alone = compare(similarity, ["a", "b", "c", "d"], [0, 1, 2, 3], test=True)
    assert (alone.intra, alone.n_intra, alone.n_inter, alone.p) == (None, 0, 6, None)


def runs_of(pattern: float, tasks: int, seeds: int):
    """Scale vectors with a pattern of a strength for each task, and noise."""
    draw = np.random.default_rng(1)
    of_task = draw.normal(0, pattern, (tasks, 20))
    names = [(task, seed) for task in range(tasks) for seed in range(seeds)]
    scales = np.array([1 + of_task[task] + draw.normal(0, 0.1, 20) for task, _ in names])
    return cosines(scales), [f"task {task}" for task, _ in names], [seed for _, seed in names]


def test_p_is_the_share_of_permutations():
    similarity, tasks, seeds = runs_of(0.03, tasks=3, seeds=2)
    found = compare(similarity, tasks, seeds, test=True)
    first, second = np.flatnonzero(np.array(seeds) == 0), np.flatnonzero(np.array(seeds) == 1)
    block = similarity[np.ix_(first, second)]
    differences = [
        np.mean([block[i, order[i]] for i in range(3)])
        - np.mean([block[i, j] for i in range(3) for j in range(3) if j != order[i]])
        for order in itertools.permutations(range(3))
    ]
    assert found.intra - found.inter == pytest.approx(differences[0])
    exact = np.mean([one >= differences[0] - 1e-9 for one in differences])
    assert found.p == pytest.approx(exact, abs=0.015)
    assert compare(similarity, tasks, seeds, test=True) == found


def test_p_is_small_with_a_pattern_and_large_without():
    with_pattern, without = runs_of(0.3, 5, 3), runs_of(0.0, 5, 3)
    assert compare(*with_pattern, test=True).p == pytest.approx(1 / 10_000)
    assert 0.05 < compare(*without, test=True).p < 0.95


def test_runs_need_not_be_complete():
    similarity, tasks, seeds = runs_of(0.3, 4, 3)
    keep = [0, 1, 2, 3, 4, 6, 7, 9, 11]
    found = compare(similarity[np.ix_(keep, keep)], [tasks[i] for i in keep], [seeds[i] for i in keep], test=True)
    assert found.n_intra == 3 + 1 + 1 + 1
    assert found.intra > found.inter
    assert found.p < 0.01


def test_the_map_keeps_distances_and_orders_components():
    scales = np.array([[1.0, 1.0, 2.0], [5.0, 1.0, 2.0], [1.0, 3.0, 2.0], [5.0, 3.0, 2.0], [9.0, 2.0, 2.0]])
    places, shares = embed(scales)
    apart = np.linalg.norm(scales[:, None] - scales[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(places[:, None] - places[None], axis=-1), apart, atol=1e-12)
    assert shares[0] > shares[1] > 0
    assert sum(shares) == pytest.approx(1.0)
    furthest = np.abs(places).argmax(axis=0)
    assert (places[furthest, [0, 1]] > 0).all()


def test_a_map_of_equal_runs_is_a_point():
    places, shares = embed(np.ones((3, 4)))
    assert places.tolist() == [[0.0, 0.0]] * 3
    assert shares == (0.0, 0.0)

"""Balanced assignment: sizes, the optimum, ties, and the published auction with what it does to a remainder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from xlmega.errors import ConfigError
from xlmega.experts.balancing import auction, balanced_assignment, sizes


def least_cost(costs: np.ndarray) -> float:
    """The optimum over all assignments whose sizes are n // k or one more, by scipy: each cluster has n // k places,
    and one more that k - n % k dummy points block."""
    n, k = costs.shape
    small, more = divmod(n, k)
    places = np.concatenate([np.repeat(np.arange(k), small), np.arange(k) if more else []]).astype(int)
    table = costs[:, places]
    if more:
        blocks = np.full((k - more, len(places)), 1e6)
        blocks[:, small * k :] = 0.0
        table = np.vstack([table, blocks])
    rows, columns = linear_sum_assignment(table)
    return float(table[rows, columns].sum())


def test_sixty_six_documents_in_four_clusters() -> None:
    costs = np.random.default_rng(0).random((66, 4))
    assert sorted(np.bincount(balanced_assignment(costs)[0])) == [16, 16, 17, 17]
    assert np.bincount(auction(costs)).tolist() == [18, 16, 16, 16]  # as published: the rest goes to cluster 0
    assert sizes(66, 4).tolist() == [17, 17, 16, 16]


def test_two_hundred_random_sizes_are_balanced_and_cost_the_least() -> None:
    generator = np.random.default_rng(1)
    for case in range(200):
        k = int(generator.integers(1, 20))
        n = int(generator.integers(k, 300))
        costs = generator.random((n, k))
        if case % 3 == 1:
            costs = generator.integers(0, 3, (n, k)).astype(float)  # many ties
        if case % 7 == 2:
            costs = np.repeat(costs[:1], n, axis=0)  # every document the same
        labels, _ = balanced_assignment(costs)
        assert np.ptp(np.bincount(labels, minlength=k)) <= 1
        assert costs[np.arange(n), labels].sum() <= least_cost(costs) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize(("n", "k"), [(2000, 8), (1999, 64)])
def test_clusters_of_unlike_popularity(n: int, k: int) -> None:
    generator = np.random.default_rng(2)
    centres = generator.standard_normal((k, 10))
    popularity = np.arange(1, k + 1) / np.arange(1, k + 1).sum()
    rows = generator.standard_normal((n, 10)) + 2 * centres[generator.choice(k, n, p=popularity)]
    costs = ((rows[:, None] - centres) ** 2).sum(axis=2)
    labels, prices = balanced_assignment(costs)
    assert np.ptp(np.bincount(labels)) <= 1
    assert costs[np.arange(n), labels].sum() <= least_cost(costs) * (1 + 1e-6)
    again, _ = balanced_assignment(costs, prices)
    np.testing.assert_array_equal(labels, again)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 99))
def test_given_sizes_are_met(k: int, n: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    wanted = generator.multinomial(n + k, np.ones(k) / k)
    labels, _ = balanced_assignment(generator.random((n + k, k)), capacities=wanted)
    assert np.bincount(labels, minlength=k).tolist() == wanted.tolist()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="3 documents cannot fill 4 clusters"):
        balanced_assignment(np.zeros((3, 4)))
    with pytest.raises(ConfigError, match="not a finite number"):
        balanced_assignment(np.array([[0.0, np.nan], [1.0, 1.0]]))

"""Costs [points, clusters] in, an assignment out whose cluster sizes differ by at most one, at the least total cost.

How: with a price for each cluster, every point takes the cluster where cost + price is least. Prices are raised and
lowered one cluster at a time to where exactly its share of points prefers it (the dual of the transport problem, in as
many variables as there are clusters). The few points that are then still too many somewhere move along the cheapest
chains of exchanges between clusters, which keeps the assignment optimal for the sizes it has; last, the clusters that
get one point more are chosen in the same way. The result is the optimum for costs that differ from the given ones by
less than a part in 10^9 (so that equal points are told apart); time is linear in points, memory a few times the costs.

`auction` is the published procedure (METHODS §2.4, from its description), for comparison and for those who want its
clusters: where the points do not divide evenly all that are left over go to cluster 0.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.errors import ConfigError

Costs = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]
MAX_SWEEPS = 60
TOLERANCE = 0.0005
"""Part of the points that may be in the wrong number somewhere when prices are good enough."""
_SWEEP_POINTS = 50_000
"""Prices are first found on this many points, then on all."""
_AUCTION_KEPT_ROUNDS, _AUCTION_FREE_ROUNDS, _AUCTION_STEPS = 100, 1000, 50


def sizes(num_points: int, num_clusters: int) -> npt.NDArray[np.int64]:
    """Balanced sizes, the larger ones first."""
    check_sizes(num_points, num_clusters)
    small, more = divmod(num_points, num_clusters)
    return np.array([small + (k < more) for k in range(num_clusters)], np.int64)


def check_sizes(num_points: int, num_clusters: int) -> None:
    """Refuse what cannot be divided."""
    if num_clusters < 1:
        raise ConfigError(f"there must be at least 1 cluster, but {num_clusters} were asked for.")
    if num_points < num_clusters:
        raise ConfigError(
            f"{num_points} documents cannot fill {num_clusters} clusters. Ask for at most {num_points}, or give more."
        )


def balanced_assignment(
    costs: Costs, prices: npt.NDArray[np.float64] | None = None, capacities: npt.NDArray[np.int64] | None = None
) -> tuple[Labels, npt.NDArray[np.float64]]:
    """(labels [points], prices [clusters]) of least total cost with sizes that differ by at most one.

    `capacities` fixes the sizes instead; `prices` from a similar problem save time and change nothing else but ties.
    """
    num_points, num_clusters = costs.shape
    free = capacities is None
    if free:
        capacities = sizes(num_points, num_clusters)
    assert capacities is not None and capacities.sum() == num_points, (capacities, num_points)
    if num_clusters == 1:
        return np.zeros(num_points, np.int64), np.zeros(1)
    apart = _told_apart(costs)
    found = prices_for(apart, capacities / num_points, prices)
    labels = np.argmin(apart + found, axis=1)
    _repair(apart, labels, capacities, free)
    return labels, found


def prices_for(
    costs: Costs,
    shares: npt.NDArray[np.float64],
    prices: npt.NDArray[np.float64] | None = None,
    tolerance: float = TOLERANCE,
) -> npt.NDArray[np.float64]:
    """Prices [clusters], of mean 0, with which the points divide by `shares` but for a part `tolerance` of them."""
    found = np.zeros(costs.shape[1]) if prices is None else prices.copy()
    if len(costs) > 2 * _SWEEP_POINTS:
        found = _swept(costs[:: len(costs) // _SWEEP_POINTS], shares, found, tolerance)
    return _swept(costs, shares, found, tolerance)


def _swept(
    costs: Costs, shares: npt.NDArray[np.float64], prices: npt.NDArray[np.float64], tolerance: float
) -> npt.NDArray[np.float64]:
    num_points, num_clusters = costs.shape
    capacities = np.floor(shares * num_points + 0.5).astype(np.int64)
    columns = np.ascontiguousarray((costs + prices).T.astype(np.float64))  # [clusters, points]
    prices = prices.copy()
    best = np.inf
    for sweep in range(MAX_SWEEPS):
        counts = np.bincount(np.argmin(columns, axis=0), minlength=num_clusters)
        excess = int(np.maximum(counts - capacities, 0).sum())
        if excess <= tolerance * num_points or (sweep > 8 and excess >= best):
            break
        best = min(best, excess)
        for j in np.argsort(-np.abs(counts - capacities), kind="stable"):
            gap = columns[np.arange(num_clusters) != j].min(axis=0) - columns[j]
            change = _threshold(gap, int(capacities[j]))
            columns[j] += change
            prices[j] += change
    prices -= prices.mean()
    return prices


def _threshold(gap: npt.NDArray[np.float64], number: int) -> float:
    """The price change after which `number` points have a positive gap left: between two neighbours."""
    if number <= 0:
        return float(gap.max()) + 1e-12
    if number >= len(gap):
        return float(gap.min()) - 1e-12
    place = len(gap) - number
    parted = np.partition(gap, (place - 1, place))
    return float(parted[place - 1] + parted[place]) / 2


def _told_apart(costs: Costs) -> npt.NDArray[np.float64]:
    """Costs in float64 with a minute, fixed difference between points, so that no two are equal."""
    result = costs.astype(np.float64)
    if not np.isfinite(result).all():
        raise ConfigError("a distance is not a finite number. Look for nan or infinity in the vectors.")
    scale = float(result.max() - result.min()) or 1.0
    result += np.random.default_rng(0).random(result.shape) * (1e-10 * scale)
    return result


# -------------------------------------------------------------------- the last few points


def _repair(costs: npt.NDArray[np.float64], labels: Labels, capacities: npt.NDArray[np.int64], free: bool) -> None:
    """Move points along cheapest chains until the sizes are the capacities; `free` then trades the extra places."""
    exchanges = _Exchanges(costs, labels, len(capacities))
    counts = exchanges.counts
    while (counts > capacities).any():
        chain, _ = exchanges.cheapest(np.flatnonzero(counts > capacities), np.flatnonzero(counts < capacities))
        exchanges.apply(chain)
    small = int(capacities.min())
    while free and capacities.max() > small:
        chain, cost = exchanges.cheapest(np.flatnonzero(counts > small), np.flatnonzero(counts == small))
        if cost >= -1e-12:
            break
        exchanges.apply(chain)


class _Exchanges:
    """For every pair of clusters the point that moves at the least cost, kept up to date as points move."""

    def __init__(self, costs: npt.NDArray[np.float64], labels: Labels, num_clusters: int) -> None:
        self._costs, self._labels = costs, labels
        self.counts = np.bincount(labels, minlength=num_clusters)
        self._cost = np.full((num_clusters, num_clusters), np.inf)
        self._point = np.zeros((num_clusters, num_clusters), np.int64)
        self._members = [np.flatnonzero(labels == k) for k in range(num_clusters)]
        # Rows of members' regrets beside them, so that an update reads one block.
        self._regrets = [costs[rows] - costs[rows, k][:, None] for k, rows in enumerate(self._members)]
        for k in range(num_clusters):
            self._update(k)

    def _update(self, k: int) -> None:
        if not len(self._members[k]):
            self._cost[k] = np.inf
            return
        first = np.argmin(self._regrets[k], axis=0)
        self._cost[k] = self._regrets[k][first, np.arange(len(self.counts))]
        self._point[k] = self._members[k][first]
        self._cost[k, k] = np.inf

    def cheapest(self, sources: Labels, targets: Labels) -> tuple[list[int], float]:
        """(clusters along it, cost) of the cheapest chain from one of `sources` to one of `targets`."""
        far = np.full(len(self.counts), np.inf)
        far[sources] = 0.0
        before = np.full(len(self.counts), -1)
        for _ in range(len(self.counts)):  # Bellman-Ford: the graph has no negative cycle, costs may be negative
            ways = far[:, None] + self._cost
            nearest = np.argmin(ways, axis=0)
            shorter = ways[nearest, np.arange(len(far))]
            better = shorter < far - 1e-13
            if not better.any():
                break
            far[better], before[better] = shorter[better], nearest[better]
        end = int(targets[np.argmin(far[targets])])
        chain = [end]
        while before[chain[-1]] >= 0 and len(chain) <= len(far):
            chain.append(int(before[chain[-1]]))
        return chain[::-1], float(far[end])

    def apply(self, chain: list[int]) -> None:
        """Move the cheapest point of each link on to the next cluster."""
        moves = [(int(self._point[a, b]), a, b) for a, b in pairwise(chain)]
        for point, a, b in moves:
            place = int(np.searchsorted(self._members[a], point))
            self._members[a] = np.delete(self._members[a], place)
            self._regrets[a] = np.delete(self._regrets[a], place, axis=0)
            place = int(np.searchsorted(self._members[b], point))
            self._members[b] = np.insert(self._members[b], place, point)
            row = self._costs[point] - self._costs[point, b]
            self._regrets[b] = np.insert(self._regrets[b], place, row, axis=0)
            self._labels[point] = b
            self.counts[a] -= 1
            self.counts[b] += 1
        for k in chain:
            self._update(k)


# -------------------------------------------------------------------- as published


def auction(costs: Costs) -> Labels:
    """Labels [points] by the published auction on -cost; surplus points of an uneven division all go to cluster 0."""
    values = -costs.astype(np.float64).T  # [clusters, points]: what each cluster would give for a point
    num_clusters, num_points = values.shape
    check_sizes(num_points, num_clusters)
    if num_clusters == 1:
        return np.zeros(num_points, np.int64)
    step = max(float(values.max() - values.min()) / _AUCTION_STEPS, 1e-4)
    share = num_points // num_clusters
    prices = np.zeros(num_points)
    wishes = values.copy()
    won: tuple[Labels, Labels] | None = None
    unsold = np.empty(0, np.int64)
    for turn in range(100 * _AUCTION_FREE_ROUNDS):
        bids = np.zeros_like(values)
        ranked = np.argpartition(-wishes, share, axis=1)
        runner_up = wishes[np.arange(num_clusters), ranked[:, share]]
        chosen = ranked[:, :share]
        rows = np.arange(num_clusters)[:, None]
        bids[rows, chosen] = wishes[rows, chosen] - runner_up[:, None] + step
        if won is not None and turn < _AUCTION_KEPT_ROUNDS:
            bids[won] = step
        if turn > _AUCTION_FREE_ROUNDS:
            bids[0, unsold] = step
        winner: Labels = np.argmax(bids, axis=0)
        offered = bids[winner, np.arange(num_points)]
        unsold = np.flatnonzero(offered <= 0)
        if not len(unsold):
            return winner
        sold = np.flatnonzero(offered > 0)
        prices[sold] += offered[sold]
        wishes = values - prices
        won = (winner[sold], sold)
        wishes[won] = values[won]
    raise ConfigError("the published auction did not end. Use balanced assignment, which always does.")

"""Unit vectors in, k centres out, such that each centre's cluster holds as many documents as another's.

Balanced k-means: centres seeded apart (k-means++), then by turns a balanced assignment (`balancing`) and means. It
first settles on a sample of rows, then passes over all of them, a block at a time: memory is one block whatever the
number of documents, and the rows may be a memory-mapped file. Each block of a pass is balanced by prices, each block
has the same weight, so the last centres are means over all documents. The result also holds the prices: with them the
nearest-centre rule is balanced for documents of the same kind, one at a time.

`method="published"` is the procedure of METHODS §2.4: blocks of 50,000 (one smaller block where there are fewer, which
the published code cannot do), 20 iterations each that go on from the block before, the auction, stop at a squared sum
of shifts under 1e-3, random rows as first centres. Seeded here; the published code is not. Its third metric, soft-dtw,
compares series in time: the components of an SVD are none, and the mean of its clusters is not their vectors' mean, so
there is nothing here that it could mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xlmega.experts.balancing import auction, balanced_assignment, check_sizes, prices_for
from xlmega.experts.features import normalised

Centres = npt.NDArray[np.float32]
BLOCK_ROWS = 50_000
PRICE_ROWS = 50_000
_SAMPLE_ROWS, _EXACT_ROWS = 10_000, 2_000
_PATIENCE = 6
"""Iterations without a smaller shift after which centres have settled."""
_COARSE = 0.005
"""Balance between iterations, as a part of the rows; the last prices are finer."""
_PUBLISHED_BLOCK, _PUBLISHED_ITERATIONS, _PUBLISHED_TOLERANCE = 50_000, 20, 1e-3


@dataclass(frozen=True)
class KMeansSettings:
    """How centres are found."""

    num_clusters: int
    metric: Literal["euclidean", "cosine"] = "euclidean"
    method: Literal["balanced", "published", "unbalanced"] = "balanced"
    seed: int = 0
    max_iterations: int = 100
    """On the sample; the passes over everything are at most `max_passes`."""
    max_passes: int = 3
    tolerance: float = 1e-4
    """Squared shift of all centres, in units of the mean variance of a component, at which to stop."""

    def problems(self) -> Iterator[str]:
        for name in ("num_clusters", "max_iterations", "max_passes"):
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, but is {getattr(self, name)}."
        if self.seed < 0:
            yield f"seed must not be negative, but is {self.seed}."
        if self.tolerance < 0.0:
            yield f"tolerance must not be negative, but is {self.tolerance}."


@dataclass(frozen=True)
class KMeans:
    """Centres and what came with them."""

    centres: Centres
    """[clusters, components]"""
    prices: npt.NDArray[np.float64]
    """[clusters]: added to squared distances, they balance the nearest-centre rule; 0 where nothing was balanced."""
    iterations: int


def squared_distances(vectors: npt.NDArray[Any], centres: npt.NDArray[Any], metric: str) -> npt.NDArray[np.float32]:
    """[rows, clusters]: squared Euclidean distances, or 1 - cosine."""
    if metric == "cosine":
        return (1.0 - normalised(vectors) @ normalised(centres).T).astype(np.float32)
    square = np.einsum("nd,nd->n", vectors, vectors)[:, None] + np.einsum("kd,kd->k", centres, centres)
    distances = square - 2.0 * (vectors @ centres.T)
    result: npt.NDArray[np.float32] = np.maximum(distances, 0.0).astype(np.float32, copy=False)
    return result


def train_kmeans(
    vectors: npt.NDArray[np.float32], settings: KMeansSettings, say: Callable[[str], None] = lambda line: None
) -> KMeans:
    """Balanced k-means over rows [documents, components]; a ConfigError where there are fewer rows than clusters."""
    check_sizes(len(vectors), settings.num_clusters)
    if settings.method == "published":
        return _published(vectors, settings, say)
    generator = np.random.default_rng((settings.seed, len(vectors), settings.num_clusters))
    sample = vectors
    if len(vectors) > _SAMPLE_ROWS:
        sample = np.asarray(vectors[np.sort(generator.choice(len(vectors), _SAMPLE_ROWS, replace=False))])
    centres = _apart(sample, settings.num_clusters, generator)
    enough = settings.tolerance * float(sample.var(axis=0).mean())
    prices = np.zeros(settings.num_clusters)
    iterations, least, since = 0, np.inf, 0
    while iterations < settings.max_iterations and since < _PATIENCE:
        iterations += 1
        labels, prices = _labels(sample, centres, prices, settings)
        centres, shift = _means(sample, labels, centres, generator)
        if shift <= enough:
            break
        # Balance that is only nearly even keeps a few rows going to and fro.
        least, since = (shift, 0) if shift < 0.9 * least else (least, since + 1)
    say(f"centres settled on {len(sample):,} rows in {iterations} iterations")
    if len(sample) < len(vectors):
        for number in range(1, settings.max_passes + 1):
            centres, prices, shift = _pass(vectors, centres, prices, settings)
            iterations += 1
            say(f"pass {number} over {len(vectors):,} rows: squared shift {shift:.2e}")
            if shift <= enough:
                break
    if settings.method == "balanced":
        # Prices for the centres as they came out, on rows from all over the file.
        rows = np.asarray(vectors[:: max(1, len(vectors) // PRICE_ROWS)])
        costs = relative_costs(rows, centres, settings.metric)
        prices = prices_for(costs.T, np.full(len(centres), 1.0 / len(centres)), prices)
    return KMeans(centres, prices, iterations)


def relative_costs(rows: npt.NDArray[Any], centres: Centres, metric: str) -> npt.NDArray[np.float32]:
    """[clusters, rows]: `squared_distances` less what is the same for all clusters, which no assignment depends on."""
    if metric == "cosine":
        return -(normalised(centres) @ normalised(rows).T)
    costs: npt.NDArray[np.float32] = centres @ rows.T
    costs *= -2.0
    costs += np.einsum("kd,kd->k", centres, centres)[:, None]
    return costs


def _labels(
    rows: npt.NDArray[np.float32], centres: Centres, prices: npt.NDArray[np.float64], settings: KMeansSettings
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The rows' clusters, evenly where that is asked: exactly for few rows, else by prices, and the prices."""
    costs = relative_costs(rows, centres, settings.metric)
    if settings.method == "balanced":
        if len(rows) <= _EXACT_ROWS:
            return balanced_assignment(costs.T, prices)
        step = max(1, len(rows) // _SAMPLE_ROWS)
        prices = prices_for(costs.T[::step], np.full(len(centres), 1.0 / len(centres)), prices, _COARSE)
        costs += prices.astype(np.float32)[:, None]
    return np.argmin(costs, axis=0), prices


def _apart(rows: npt.NDArray[np.float32], number: int, generator: np.random.Generator) -> Centres:
    """k-means++: each next centre is a row drawn in proportion to its squared distance from those there are."""
    chosen = [int(generator.integers(len(rows)))]
    nearest = squared_distances(rows, rows[chosen], "euclidean")[:, 0].astype(np.float64)
    while len(chosen) < number:
        total = nearest.sum()
        if total > 0:
            row = int(np.searchsorted(np.cumsum(nearest), generator.random() * total))
        else:  # only copies of the centres are left
            row = int(generator.integers(len(rows)))
        chosen.append(min(row, len(rows) - 1))
        nearest = np.minimum(nearest, squared_distances(rows, rows[chosen[-1:]], "euclidean")[:, 0])
    return rows[chosen].copy()


def _means(
    rows: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], centres: Centres, generator: np.random.Generator
) -> tuple[Centres, float]:
    """(means of the clusters, squared shift); an empty cluster takes a random row."""
    sums, counts = _sums(rows, labels, len(centres))
    moved = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    for k in np.flatnonzero(counts == 0):
        moved[k] = rows[generator.integers(len(rows))]
    return moved, float(((moved - centres) ** 2).sum())


def _sums(rows: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], number: int) -> tuple[Any, Any]:
    """(sums [clusters, components], counts [clusters]) in float64."""
    from scipy import sparse  # a product with the matrix of memberships adds each row once, whatever the order

    ones = np.ones(len(rows), np.float32)
    members = sparse.csr_matrix((ones, labels, np.arange(len(rows) + 1)), shape=(len(rows), number))
    return np.asarray(members.T @ rows, np.float64), np.bincount(labels, minlength=number)


def _pass(
    vectors: npt.NDArray[np.float32], centres: Centres, prices: npt.NDArray[np.float64], settings: KMeansSettings
) -> tuple[Centres, npt.NDArray[np.float64], float]:
    """One iteration over every row, balanced within each block."""
    number = len(centres)
    sums, counts = np.zeros(centres.shape), np.zeros(number, np.int64)
    for first in range(0, len(vectors), BLOCK_ROWS):
        rows = np.asarray(vectors[first : first + BLOCK_ROWS])
        labels, prices = _labels(rows, centres, prices, settings)
        block_sums, block_counts = _sums(rows, labels, number)
        sums += block_sums
        counts += block_counts
    moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres).astype(np.float32)
    return moved, prices, float(((moved - centres) ** 2).sum())


def _published(vectors: npt.NDArray[np.float32], settings: KMeansSettings, say: Callable[[str], None]) -> KMeans:
    generator = np.random.default_rng((settings.seed, len(vectors), settings.num_clusters))
    blocks = np.array_split(vectors, max(1, len(vectors) // _PUBLISHED_BLOCK))
    centres = blocks[0][generator.choice(len(blocks[0]), settings.num_clusters, replace=False)].copy()
    iterations = 0
    for block in blocks:
        for _ in range(_PUBLISHED_ITERATIONS):
            before = centres
            labels = auction(squared_distances(block, centres, settings.metric))
            centres, _ = _means(block, labels, centres, generator)
            iterations += 1
            if np.sqrt(((centres - before) ** 2).sum(axis=1)).sum() ** 2 < _PUBLISHED_TOLERANCE:
                break
        say(f"{iterations} iterations by auction")
    return KMeans(centres, np.zeros(len(centres)), iterations)

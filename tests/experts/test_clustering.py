"""Balanced k-means: finds what is there, sizes and prices, seeds, blocks, the published method, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from xlmega.errors import ConfigError
from xlmega.experts import clustering
from xlmega.experts.balancing import balanced_assignment
from xlmega.experts.clustering import KMeansSettings, squared_distances, train_kmeans
from xlmega.experts.features import normalised


def clouds(n: int, popularity: tuple[float, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((len(popularity), 16))
    label = generator.choice(len(popularity), n, p=popularity)
    return normalised(centres[label] + 0.15 * generator.standard_normal((n, 16))), label


@pytest.mark.parametrize("method", ["balanced", "unbalanced", "published"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equal_clouds_are_found(method: str, metric: str) -> None:
    rows, label = clouds(400, (0.25,) * 4)
    # Random rows as first centres, as published, may fall into one cloud; this seed's do not.
    found = train_kmeans(rows, KMeansSettings(4, metric, method, seed=3))  # type: ignore[arg-type]
    nearest = np.argmin(squared_distances(rows, found.centres, metric), axis=1)
    assert len({(a, b) for a, b in zip(label, nearest)}) == 4 or method == "balanced"
    agree = np.array([[((label == a) & (nearest == b)).sum() for b in range(4)] for a in range(4)])
    assert agree.max(axis=1).sum() >= 360


def test_unequal_clouds_are_divided_evenly_by_prices() -> None:
    rows, _ = clouds(3000, (0.7, 0.1, 0.1, 0.1))
    found = train_kmeans(rows, KMeansSettings(4))
    costs = squared_distances(rows, found.centres, "euclidean")
    counts = np.bincount(np.argmin(costs + found.prices, axis=1), minlength=4)
    assert np.abs(counts - 750).max() <= 15
    assert np.ptp(np.bincount(balanced_assignment(costs, found.prices)[0])) == 0


def test_blocks_give_nearly_the_centres_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = clouds(6000, (0.4, 0.3, 0.3))
    whole = train_kmeans(rows, KMeansSettings(3))
    monkeypatch.setattr(clustering, "BLOCK_ROWS", 1500)
    monkeypatch.setattr(clustering, "_SAMPLE_ROWS", 1000)
    lines: list[str] = []
    blocks = train_kmeans(rows, KMeansSettings(3), lines.append)
    distances = squared_distances(blocks.centres, whole.centres, "euclidean")
    assert distances.min(axis=1).max() < 0.02
    assert any("pass 1 over 6,000 rows" in line for line in lines)
    again = train_kmeans(rows, KMeansSettings(3))
    np.testing.assert_array_equal(blocks.centres, again.centres)  # by seed


def test_the_published_method_takes_fewer_than_fifty_thousand() -> None:
    rows, _ = clouds(66, (0.25,) * 4)
    found = train_kmeans(rows, KMeansSettings(4, method="published", seed=1))
    assert found.centres.shape == (4, 16) and not found.prices.any()


def test_as_many_clusters_as_rows_and_copies() -> None:
    rows = np.eye(5, dtype=np.float32)
    found = train_kmeans(rows, KMeansSettings(5))
    assert squared_distances(rows, found.centres, "euclidean").min(axis=1).max() == 0.0
    train_kmeans(np.ones((10, 3), np.float32), KMeansSettings(3))
    with pytest.raises(ConfigError, match="5 documents cannot fill 6 clusters"):
        train_kmeans(rows, KMeansSettings(6))

"""Costs of documents, in files, in; clusters of equal size over all files out, in memory that does not grow with them.

In: for each file of a split an .npz with `costs` [documents, clusters] and `labels` [documents]. Prices come from a
sample; the documents nearest to a border, at most so many candidates, are then divided at the least cost there is.
Splits of no more documents than candidates are divided at the least cost as a whole. Sizes differ by at most one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xlmega.experts.balancing import balanced_assignment, prices_for, sizes
from xlmega.experts.features import read_arrays


def balanced_labels(stores: Sequence[Path], num_clusters: int, candidates: int) -> Iterator[npt.NDArray[np.int64]]:
    """The labels of each file's documents; sizes over all files differ by at most one."""
    lengths = [len(read_arrays(store, ("labels",))["labels"]) for store in stores]
    total = sum(lengths)
    if total <= candidates:
        everything = np.concatenate([_costs(store) for store in stores])
        labels, _ = balanced_assignment(everything)
        yield from np.split(labels, np.cumsum(lengths)[:-1])
        return
    stride = -(-total // candidates)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sample = np.concatenate(
        [_costs(store)[-int(start) % stride :: stride] for store, start in zip(stores, starts, strict=False)]
    )
    capacities = sizes(total, num_clusters)
    prices = prices_for(sample, capacities / total)
    del sample
    while True:
        places, left = _candidates(stores, starts, prices, capacities, candidates)
        if (left >= 0).all():
            break
        candidates *= 2  # the sample was no guide to the rest: more documents must be able to move
    rows = np.concatenate(
        [
            _costs(store)[places[(places >= a) & (places < b)] - a]
            for store, a, b in zip(stores, starts, starts[1:], strict=False)
        ]
    )
    moved, _ = balanced_assignment(rows, prices, capacities=left)
    for store, a, b in zip(stores, starts, starts[1:], strict=False):
        labels = np.argmin(_costs(store) + prices, axis=1)
        here = (places >= a) & (places < b)
        labels[places[here] - a] = moved[here]
        yield labels


def _candidates(
    stores: Sequence[Path],
    starts: npt.NDArray[np.int64],
    prices: npt.NDArray[np.float64],
    capacities: npt.NDArray[np.int64],
    limit: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(places of the `limit` documents nearest to a border, room that the others leave in each cluster)."""
    places, margins, nearest = (np.empty(0, kind) for kind in (np.int64, np.float64, np.int64))
    counts = np.zeros(len(capacities), np.int64)
    for store, start in zip(stores, starts, strict=False):
        priced = _costs(store) + prices
        best = np.argmin(priced, axis=1)
        two = np.partition(priced, 1, axis=1)
        counts += np.bincount(best, minlength=len(capacities))
        places = np.concatenate([places, start + np.arange(len(best))])
        margins = np.concatenate([margins, two[:, 1] - two[:, 0]])
        nearest = np.concatenate([nearest, best])
        if len(places) > limit:
            kept = np.sort(np.argpartition(margins, limit - 1)[:limit])
            places, margins, nearest = places[kept], margins[kept], nearest[kept]
    fixed = counts - np.bincount(nearest, minlength=len(capacities))
    left: npt.NDArray[np.int64] = capacities - fixed
    return places.astype(np.int64), left


def _costs(store: Path) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = read_arrays(store, ("costs",))["costs"]
    return found

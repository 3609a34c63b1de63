"""Slot -> (language, window): the whole data order of a run, as arithmetic on the slot's number.

In: each language's share and number of windows, and a seed. Out, for any slot alone and in O(log languages): which
language it is, and which of its windows. Nothing is drawn, built or stored, so there is nothing to save or restore.

How: the languages, sorted by name, are the leaves of a complete binary tree. A node that has weight Q, of which its
left child has P, sends floor(n*P/Q + 1/2) of its first n slots left. That count grows by 0 or 1 with n, so the n-th
slot's side, and its number on that side, need no history; at the leaf that number is the slot's rank in its language.
Rank r is in epoch r // W of the language's W windows, at place permute(r % W) of that epoch's order, which knows
the seed, the language's name and the epoch, but neither the mix, nor the run's length, nor the number of ranks.
A mirror goes through another language's orders from their ends: the two share no window until together they have used
the file up. With `block` b the tree places blocks of b slots, all of one language.

Guaranteed, with q = a share rounded to a multiple of 2^-30 (none below one such multiple) and D = ceil(log2 languages):
every prefix of n slots holds a language n*q times give or take D/2, and each epoch visits each window once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlmega.data.windows import MAX_SIZE, epoch_key, permute, stream_key
from xlmega.errors import ConfigError, DataError

SHARE_BITS = 30
"""Shares are multiples of 2^-30: products of two weights then fit in int64 with room for the rounding."""


def quantise(weights: Mapping[str, float]) -> dict[str, int]:
    """Integer weights that sum to 2^SHARE_BITS, by largest remainder, none below 1; exact on every machine."""
    whole = all(type(weight) is int and weight >= 1 for weight in weights.values())
    if whole and sum(weights.values()) == 1 << SHARE_BITS:
        return {name: int(weight) for name, weight in weights.items()}
    total = sum(map(Fraction, weights.values()))
    exact = {name: Fraction(weight) / total * (1 << SHARE_BITS) for name, weight in weights.items()}
    result = {name: max(1, math.floor(value)) for name, value in exact.items()}
    left = (1 << SHARE_BITS) - sum(result.values())
    if left > 0:
        by_remainder = sorted(result, key=lambda name: (result[name] - exact[name], name))
        for name in by_remainder[:left]:
            result[name] += 1
    while left < 0:  # tiny shares that were lifted to 1: the largest pay, one each
        payers = [name for name in sorted(result, key=lambda name: (-result[name], name)) if result[name] > 1]
        for name in payers[:-left]:
            result[name] -= 1
        left += len(payers[:-left])
    return result


class Blend:
    """Slot -> (language, window), see the module. `languages` is the tuple that language indices point into.

    `start_ranks` says how many windows of a language earlier stages of the run have served: slot 0 here goes on from
    there, so that a change of mix neither repeats nor skips a window. `mirrors` names, for a language, the one whose
    orders it goes through backwards.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        num_windows: Mapping[str, int],
        seed: int,
        start_ranks: Mapping[str, int] | None = None,
        *,
        mirrors: Mapping[str, str] | None = None,
        block: int = 1,
    ) -> None:
        self.languages: tuple[str, ...] = tuple(sorted(shares))
        if not 1 <= len(self.languages) <= 1 << (SHARE_BITS // 2):
            raise ConfigError(f"a blend takes 1 to {1 << (SHARE_BITS // 2)} languages, but got {len(self.languages)}.")
        for name in self.languages:
            if not (math.isfinite(shares[name]) and shares[name] > 0.0):
                raise ConfigError(
                    f"the share of '{name}' must be positive, but is {shares[name]}. Leave it out instead."
                )
            if not 1 <= num_windows.get(name, 0) <= MAX_SIZE:
                raise DataError(f"language '{name}' has {num_windows.get(name, 0)} windows; a blend needs at least 1.")
        self.start_ranks = starts = dict(start_ranks or {})
        assert all(rank >= 0 for rank in starts.values()), starts
        weights = quantise({name: shares[name] for name in self.languages})
        self._depth = (len(self.languages) - 1).bit_length()
        # Node k has the children 2k and 2k + 1; leaf i is node 2^depth + i. Leaves beyond the last language weigh 0.
        nodes = [0] * (2 << self._depth)
        nodes[1 << self._depth : (1 << self._depth) + len(self.languages)] = [weights[n] for n in self.languages]
        for node in range((1 << self._depth) - 1, 0, -1):
            nodes[node] = nodes[2 * node] + nodes[2 * node + 1]
        self._nodes = nodes
        self._node_weights = np.array(nodes, dtype=np.int64)
        self._num_windows = np.array([num_windows[name] for name in self.languages], dtype=np.int64)
        self._starts = np.array([starts.get(name, 0) for name in self.languages], dtype=np.int64)
        mirrors = mirrors or {}
        assert block >= 1, block
        self._block = block
        self._mirrored = np.array([name in mirrors for name in self.languages], dtype=np.bool_)
        orders = (stream_key(seed, mirrors.get(name, name)) for name in self.languages)
        self._keys = np.array(list(orders), dtype=np.uint64)

    def at(self, slot: int) -> tuple[int, int]:
        """(language index, window) of one slot."""
        assert 0 <= slot < MAX_SIZE, slot
        node = 1
        rank, within = divmod(slot, self._block)
        for _ in range(self._depth):
            total, left = self._nodes[node], self._nodes[2 * node]
            before = _left_of_first(rank, left, total)
            if _left_of_first(rank + 1, left, total) > before:
                node, rank = 2 * node, before
            else:
                node, rank = 2 * node + 1, rank - before
        language = node - (1 << self._depth)
        size = int(self._num_windows[language])
        epoch, place = divmod(rank * self._block + within + int(self._starts[language]), size)
        if self._mirrored[language]:
            place = size - 1 - place
        return language, permute(place, size, epoch_key(int(self._keys[language]), epoch))

    def slots(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(language indices [n], windows [n]) of slots [n], in any order."""
        assert slots.ndim == 1 and (slots.size == 0 or (slots.min() >= 0 and slots.max() < MAX_SIZE)), slots
        node = np.ones(slots.shape, dtype=np.int64)
        rank, within = np.divmod(slots.astype(np.int64), self._block)
        for _ in range(self._depth):
            total, left = self._node_weights[node], self._node_weights[2 * node]
            before = _left_of_first(rank, left, total)
            goes_right = _left_of_first(rank + 1, left, total) == before
            node = 2 * node + goes_right
            rank = np.where(goes_right, rank - before, before)
        language = node - (1 << self._depth)
        size = self._num_windows[language]
        epoch, place = np.divmod(rank * self._block + within + self._starts[language], size)
        place = np.where(self._mirrored[language], size - 1 - place, place)
        return language.astype(np.int32), permute(place, size, epoch_key(self._keys[language], epoch))

    def counts(self, num_slots: int) -> dict[str, int]:
        """How many of the first `num_slots` slots each language has: exact, known before the run."""
        assert 0 <= num_slots <= MAX_SIZE, num_slots
        whole, rest = divmod(num_slots, self._block)
        counts = np.array([whole], dtype=np.int64)
        for level in range(self._depth):
            node = np.arange(1 << level, 2 << level)
            total, left = self._node_weights[node], self._node_weights[2 * node]
            # A subtree with no language has no slots either; 1 keeps its division defined.
            to_left = _left_of_first(counts, left, np.maximum(total, 1))
            counts = np.stack([to_left, counts - to_left], axis=1).ravel()
        result = {name: int(count) * self._block for name, count in zip(self.languages, counts, strict=False)}
        if rest:
            result[self.languages[self.at(num_slots - 1)[0]]] += rest
        return result

    def epochs(self, num_slots: int) -> dict[str, float]:
        """Passes over each language's windows by the end of `num_slots` slots, earlier stages' included.

        Above 1, windows repeat.
        """
        return {
            name: (int(start) + count) / int(size)
            for (name, count), start, size in zip(
                self.counts(num_slots).items(), self._starts, self._num_windows, strict=True
            )
        }


def _left_of_first(n: Any, left: Any, total: Any) -> Any:
    """floor(n * left / total + 1/2), exact: n up to 2^50 and weights up to 2^30 never leave int64."""
    whole, rest = n // total, n % total
    return whole * left + (rest * left + total // 2) // total

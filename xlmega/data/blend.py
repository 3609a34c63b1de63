"""Slot -> (language, window): the whole data order of a run, as arithmetic on the slot's number.

In: each language's share and number of windows, and a seed. Out, for any slot alone and in O(log languages): which
language it is, and which of its windows. Nothing is drawn, built or stored, so there is nothing to save or restore.

How: the languages, sorted by name, are the leaves of a complete binary tree. A node that has weight Q, of which its
left child has P, sends floor(n*P/Q + 1/2) of its first n slots left. That count grows by 0 or 1 with n, so the n-th
slot's side, and its number on that side, need no history; at the leaf that number is the slot's rank in its language.
Rank r is in epoch r // W of the language's W windows, at place permute(r % W) of that epoch's order, which knows
the seed, the language's name and the epoch, but neither the mix, nor the run's length, nor the number of ranks.

Guaranteed, with q = a share rounded to a multiple of 2^-30 (none below one such multiple) and D = ceil(log2 languages):
every prefix of n slots holds a language n*q times give or take D/2, and each epoch visits each window once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlmega.data.windows import MAX_SIZE, epoch_key, permute, stream_key
from xlmega.errors import ConfigError, DataError, nearest

SHARE_BITS = 30
"""Shares are multiples of 2^-30: products of two weights then fit in int64 with room for the rounding."""


@dataclass(frozen=True)
class DataSettings:
    """A recipe's [data] table."""

    root: str = ""
    """Folder that tools/tokenize_corpus wrote."""
    sequence_length: int = 256
    """Targets of a window, in tokens."""
    languages: dict[str, float] = field(default_factory=dict)
    """Relative weights, all positive; all 0 picks the languages and leaves the weights to the temperature; empty
    picks every language of the root, weighted by the temperature too."""
    temperature: float = 1.0
    """Weights are tokens ** (1 / temperature): 1 is in proportion, large is uniform."""
    frac_validation: float = 0.01
    """Part of every language's windows, the last ones, held out when the root has no split but 'train'."""

    def problems(self) -> Iterator[str]:
        if self.sequence_length < 1:
            yield f"sequence_length must be at least 1, but is {self.sequence_length}."
        if self.temperature <= 0.0:
            yield f"temperature must be positive, but is {self.temperature}."
        if not 0.0 <= self.frac_validation < 1.0:
            yield f"frac_validation must be in [0, 1), but is {self.frac_validation}."
        negative = [name for name, weight in self.languages.items() if weight < 0.0]
        zero = [name for name, weight in self.languages.items() if weight == 0.0]
        if negative:
            yield f"languages.{negative[0]} must be positive, but is {self.languages[negative[0]]}."
        elif zero and len(zero) < len(self.languages):
            yield (
                f"languages.{zero[0]} is 0 while other weights are not. Leave it out to train without it, "
                "or set every weight to 0 to weight all by data.temperature."
            )
        elif self.languages and not zero and self.temperature != 1.0:
            yield (
                f"temperature={self.temperature} would be ignored, for every language has a weight. "
                "Set every weight to 0 to weight these languages by temperature."
            )


def shares(settings: DataSettings, tokens_by_language: Mapping[str, int]) -> dict[str, float]:
    """Each trained language's part of all slots, sorted by name; they sum to 1 but for rounding.

    ConfigError for a language that the corpus does not have, DataError for one whose files are empty.
    """
    for problem in settings.problems():
        raise ConfigError(f"recipe: data.{problem}")
    for name in settings.languages:
        if name not in tokens_by_language:
            hint = nearest(name, tokens_by_language)
            raise ConfigError(f"data.languages names '{name}', which the corpus does not have.{hint}")
    names = sorted(settings.languages or tokens_by_language)
    if not names:
        raise DataError("the corpus has no language to train on. Write one with tools/tokenize_corpus.")
    for name in names:
        if tokens_by_language[name] < 1:
            raise DataError(f"language '{name}' has 0 tokens. Give it text, or leave it out of data.languages.")
    weights = {name: settings.languages.get(name, 0.0) for name in names}
    if not all(weights.values()):
        most = max(math.log(tokens_by_language[name]) for name in names)
        weights = {name: math.exp((math.log(tokens_by_language[name]) - most) / settings.temperature) for name in names}
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def quantise(weights: Mapping[str, float]) -> dict[str, int]:
    """Integer weights that sum to 2^SHARE_BITS, by largest remainder, none below 1; exact on every machine."""
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
    there, so that a change of mix neither repeats nor skips a window.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        num_windows: Mapping[str, int],
        seed: int,
        start_ranks: Mapping[str, int] | None = None,
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
        starts = start_ranks or {}
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
        self._keys = np.array([stream_key(seed, name) for name in self.languages], dtype=np.uint64)

    def at(self, slot: int) -> tuple[int, int]:
        """(language index, window) of one slot."""
        assert 0 <= slot < MAX_SIZE, slot
        node, rank = 1, slot
        for _ in range(self._depth):
            total, left = self._nodes[node], self._nodes[2 * node]
            before = _left_of_first(rank, left, total)
            if _left_of_first(rank + 1, left, total) > before:
                node, rank = 2 * node, before
            else:
                node, rank = 2 * node + 1, rank - before
        language = node - (1 << self._depth)
        size = int(self._num_windows[language])
        epoch, place = divmod(rank + int(self._starts[language]), size)
        return language, permute(place, size, epoch_key(int(self._keys[language]), epoch))

    def slots(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(language indices [n], windows [n]) of slots [n], in any order."""
        assert slots.ndim == 1 and (slots.size == 0 or (slots.min() >= 0 and slots.max() < MAX_SIZE)), slots
        node, rank = np.ones(slots.shape, dtype=np.int64), slots.astype(np.int64)
        for _ in range(self._depth):
            total, left = self._node_weights[node], self._node_weights[2 * node]
            before = _left_of_first(rank, left, total)
            goes_right = _left_of_first(rank + 1, left, total) == before
            node = 2 * node + goes_right
            rank = np.where(goes_right, rank - before, before)
        language = node - (1 << self._depth)
        size = self._num_windows[language]
        epoch, place = np.divmod(rank + self._starts[language], size)
        return language.astype(np.int32), permute(place, size, epoch_key(self._keys[language], epoch))

    def counts(self, num_slots: int) -> dict[str, int]:
        """How many of the first `num_slots` slots each language has: exact, known before the run."""
        assert 0 <= num_slots <= MAX_SIZE, num_slots
        counts = np.array([num_slots], dtype=np.int64)
        for level in range(self._depth):
            node = np.arange(1 << level, 2 << level)
            total, left = self._node_weights[node], self._node_weights[2 * node]
            # A subtree with no language has no slots either; 1 keeps its division defined.
            to_left = _left_of_first(counts, left, np.maximum(total, 1))
            counts = np.stack([to_left, counts - to_left], axis=1).ravel()
        return {name: int(count) for name, count in zip(self.languages, counts, strict=False)}

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

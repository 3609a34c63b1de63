"""A file of tokens seen as windows of S + 1 ids, and the keyed order in which training visits them.

In: the tokens of one language and split, a sequence length S. Out: window w holds the ids w*S .. w*S + S, the last of
which opens window w + 1, so that every token but the file's first is a target exactly once.
`permute` is a bijection of range(size) that is computed, not stored: constant time and memory whatever the size. It
depends on (index, size, key) alone, the same for one integer and for arrays, on every machine.
Source: format-preserving encryption by a Feistel cipher with cycle walking (Black and Rogaway, 2002); the rounds use
the finaliser of SplitMix64 (Steele et al., 2014). It shuffles; it keeps no secrets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from xlmega.data.indexed import IndexedTokens

MAX_SIZE = 1 << 50
"""Largest number of windows or slots: bit lengths are read off float64 exactly, with room to spare."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# 8 rounds shuffle a large file well; a file of 5 to 7 windows takes 24 until all its orders are equally likely.
_ROUND_KEYS = tuple((i * _GOLDEN) & _MASK for i in range(1, 25))


@dataclass(frozen=True)
class Windows:
    """`count` windows of a file, from its window `first` on; only the file's last window may be short."""

    tokens: IndexedTokens
    sequence_length: int
    first: int
    count: int

    def __post_init__(self) -> None:
        last = num_windows(self.tokens.num_tokens, self.sequence_length, partial=True)
        assert 0 <= self.first <= self.first + self.count <= last, (self.first, self.count, last)

    def document_starts(self, window: int) -> NDArray[np.int64]:
        """The places in a window, from 1 to S - 1, at which another document than its first begins."""
        start = (self.first + window) * self.sequence_length
        return self.tokens.document_starts_within(start + 1, start + self.sequence_length) - start

    @property
    def total(self) -> int:
        """Whole windows of the file."""
        return num_windows(self.tokens.num_tokens, self.sequence_length)

    def ids(self, window: int) -> NDArray[Any]:
        """The ids of window `first + window`, in the file's dtype: [S + 1], or fewer (at least 2) at the file's end."""
        assert 0 <= window < self.count, (window, self.count)
        start = (self.first + window) * self.sequence_length
        # A plain view: slicing np.memmap itself costs several times as much.
        return np.asarray(self.tokens.tokens)[start : start + self.sequence_length + 1]


def num_windows(num_tokens: int, sequence_length: int, *, partial: bool = False) -> int:
    """Number of whole windows in a file; with `partial`, the short one at its end counts too."""
    targets = max(0, num_tokens - 1)
    return -(-targets // sequence_length) if partial else targets // sequence_length


def num_held_out(count: int, frac_validation: float) -> int:
    """How many of a language's `count` whole windows, the last ones, are kept from training: at least one.

    One window always stays for training, so 0 comes out only for a count below 2 or a fraction of 0.
    """
    if frac_validation <= 0.0 or count < 2:
        return 0
    return min(count - 1, max(1, round(frac_validation * count)))


def stream_key(seed: int, language: str) -> int:
    """The 64-bit key of a language's order; it knows the language's name and the seed, nothing else."""
    digest = hashlib.blake2b(f"{seed}/{language}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def epoch_key(key: Any, epoch: Any) -> Any:
    """The key of one pass over a language: integers, or arrays (key uint64) elementwise."""
    if isinstance(epoch, np.ndarray):
        return _mix(key + (epoch.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return _mix((key + (epoch + 1) * _GOLDEN) & _MASK)


def served_hash(keys: NDArray[np.uint64], slots: NDArray[np.int64], windows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """[n]: 32 bits that tell one (language, slot, window) from another; `keys` [n] are the languages' of seed 0."""
    return _mix(_mix(keys ^ slots.astype(np.uint64)) ^ windows.astype(np.uint64)) >> np.uint64(32)  # type: ignore[no-any-return]


@overload
def permute(index: int, size: int, key: int) -> int: ...
@overload
def permute(
    index: NDArray[np.int64], size: int | NDArray[np.int64], key: int | NDArray[np.uint64]
) -> NDArray[np.int64]: ...
def permute(index: Any, size: Any, key: Any) -> Any:
    """Where `index` goes in the order of range(size) that `key` names.

    Arrays [n] work elementwise, with one size and key or one for each element. Every index must be in range(size) and
    every size at most MAX_SIZE.
    """
    if isinstance(index, np.ndarray):
        return _permute_arrays(index, size, key)
    assert 0 <= index < size <= MAX_SIZE, (index, size)
    bits = (size - 1).bit_length()
    value = _cipher(index, bits // 2, bits - bits // 2, key)
    while value >= size:
        value = _cipher(value, bits // 2, bits - bits // 2, key)
    return value


def _permute_arrays(index: NDArray[Any], size: Any, key: Any) -> NDArray[np.int64]:
    # Sizes are at most 2^50, so a signed dtype keeps the arithmetic away from float64, which uint64 mixed with int64
    # would become; the cipher itself is uint64 throughout.
    size = np.broadcast_to(np.asarray(size, dtype=np.int64), index.shape)
    key = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    assert index.size == 0 or (index.min() >= 0 and (index < size).all() and size.max() <= MAX_SIZE)
    bits = np.frexp((size - 1).astype(np.float64))[1].astype(np.uint64)  # bit length: x = m * 2^bits, 1/2 <= m < 1
    high_bits = bits // np.uint64(2)
    low_bits = bits - high_bits
    limit = size.astype(np.uint64)
    value = _cipher(index.astype(np.uint64), high_bits, low_bits, key)
    outside = np.flatnonzero(value >= limit)
    while outside.size:  # the cipher's domain is below twice the size: on average less than one more turn
        value[outside] = _cipher(value[outside], high_bits[outside], low_bits[outside], key[outside])
        outside = outside[value[outside] >= limit[outside]]
    result: NDArray[np.int64] = value.astype(np.int64)
    return result


def _cipher(value: Any, high_bits: Any, low_bits: Any, key: Any) -> Any:
    """A Feistel bijection of range(2^(high_bits + low_bits)); the halves may differ by a bit, so none is swapped."""
    one = np.uint64(1) if isinstance(value, np.ndarray) else 1
    high_mask, low_mask = (one << high_bits) - one, (one << low_bits) - one
    high, low = value >> low_bits, value & low_mask
    for even, odd in zip(_ROUND_KEYS[::2], _ROUND_KEYS[1::2], strict=True):
        high = high ^ (_mix(low ^ ((key + even) & _MASK)) & high_mask)
        low = low ^ (_mix(high ^ ((key + odd) & _MASK)) & low_mask)
    return (high << low_bits) | low


def _mix(value: Any) -> Any:
    """SplitMix64's finaliser, for Python integers below 2^64 and for uint64 arrays (which wrap by themselves)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

"""Windows cover every target once; the keyed order is a bijection, uniform, and the same for integers and arrays."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmega.data.windows import MAX_SIZE, Windows, epoch_key, num_held_out, num_windows, permute, stream_key


def in_memory(num_tokens: int) -> Any:
    """Tokens 0, 1, 2, ... with what Windows asks of an IndexedTokens."""
    return SimpleNamespace(tokens=np.arange(num_tokens, dtype=np.uint16), num_tokens=num_tokens)


def test_windows_by_eye() -> None:
    windows = Windows(in_memory(11), 4, first=0, count=3)
    assert [windows.ids(w).tolist() for w in range(3)] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10]]
    assert Windows(in_memory(11), 4, first=1, count=1).ids(0).tolist() == [4, 5, 6, 7, 8]


def test_a_window_outside_the_file_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        Windows(in_memory(11), 4, first=0, count=4)
    with pytest.raises(AssertionError):
        Windows(in_memory(11), 4, first=1, count=1).ids(1)


@given(num_tokens=st.integers(0, 60), length=st.integers(1, 20))
def test_every_token_but_the_first_is_a_target_once(num_tokens: int, length: int) -> None:
    count = num_windows(num_tokens, length, partial=True)
    windows = Windows(in_memory(num_tokens), length, 0, count)
    targets = [int(token) for w in range(count) for token in windows.ids(w)[1:]]
    assert targets == list(range(1, num_tokens))
    assert num_windows(num_tokens, length) == sum(len(windows.ids(w)) == length + 1 for w in range(count))


@pytest.mark.parametrize(
    ("count", "frac", "held_out"),
    [(0, 0.01, 0), (1, 0.01, 0), (2, 0.01, 1), (2, 0.9, 1), (10, 0.01, 1), (1000, 0.01, 10), (1000, 0.0, 0)],
)
def test_held_out_windows(count: int, frac: float, held_out: int) -> None:
    assert num_held_out(count, frac) == held_out


SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 97, 128, 255, 256, 257, 1000, 4096, 4097, 65537]


@pytest.mark.parametrize("size", SIZES)
def test_permute_is_a_bijection(size: int) -> None:
    for key in (0, 1, (1 << 64) - 1):
        assert (np.sort(permute(np.arange(size), size, key)) == np.arange(size)).all()


@pytest.mark.parametrize("size", [10**6 + 3, 2**31 + 11, 2**40 - 1, 2**40, 2**40 + 1, MAX_SIZE])
def test_permute_of_big_sizes_repeats_nothing(size: int) -> None:
    index = np.unique(np.random.default_rng((0, size)).integers(0, size, 50_000))
    place = permute(index, size, 99)
    assert place.min() >= 0 and place.max() < size
    assert len(np.unique(place)) == len(index)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), key=st.integers(0, (1 << 64) - 1))
def test_one_integer_and_arrays_agree(data: st.DataObject, key: int) -> None:
    sizes = data.draw(st.lists(st.integers(1, MAX_SIZE) | st.integers(1, 9), min_size=1, max_size=5))
    index = [data.draw(st.integers(0, size - 1)) for size in sizes]
    keys = [(key + i) & ((1 << 64) - 1) for i in range(len(sizes))]
    together = permute(np.array(index), np.array(sizes), np.array(keys, dtype=np.uint64))
    assert together.tolist() == [permute(*one) for one in zip(index, sizes, keys)]


def test_the_order_never_changes_between_versions() -> None:
    # Golden: a checkpoint's position means the same windows for ever. These values may not be updated.
    key = epoch_key(stream_key(1, "en"), 0)
    assert [permute(i, 10, key) for i in range(10)] == GOLDEN_10
    assert permute(123_456_789, 10**12, key) == GOLDEN_BIG


GOLDEN_10 = [5, 2, 1, 7, 9, 4, 8, 6, 3, 0]
GOLDEN_BIG = 445959377984


@pytest.mark.parametrize("size", [7, 16, 50, 64])
def test_every_index_goes_everywhere_equally_often(size: int) -> None:
    # Chi-square over keys for each index: mean size - 1, variance 2 * (size - 1); six deviations over all indices.
    num_keys = 200 * size
    keys = np.array([epoch_key(stream_key(5, "x"), e) for e in range(num_keys)], dtype=np.uint64)
    for index in (0, 1, size // 2, size - 1):
        place = permute(np.full(num_keys, index), size, keys)
        observed = np.bincount(place, minlength=size)
        chi_square = float(((observed - 200.0) ** 2 / 200.0).sum())
        assert abs(chi_square - (size - 1)) < 6 * np.sqrt(2 * (size - 1)), (index, chi_square)


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_every_order_of_a_few_windows_is_equally_likely(size: int) -> None:
    num_orders = int(np.prod(np.arange(1, size + 1)))
    num_keys = 100 * num_orders
    keys = epoch_key(np.full(num_keys, stream_key(0, "x"), dtype=np.uint64), np.arange(num_keys))
    places = np.stack([permute(np.full(num_keys, index), size, keys) for index in range(size)], axis=1)
    observed = Counter(map(tuple, places.tolist()))
    assert len(observed) == num_orders
    chi_square = sum((count - 100.0) ** 2 / 100.0 for count in observed.values())
    assert abs(chi_square - (num_orders - 1)) < 6 * np.sqrt(2 * (num_orders - 1)), chi_square


@pytest.mark.parametrize("size", [1000, 1024, 2**20])
def test_neighbours_are_strewn_over_the_file(size: int) -> None:
    """Steps between consecutive places look like those of a random order: no runs, no preferred distance."""
    place = permute(np.arange(min(size, 20_000)), size, epoch_key(stream_key(3, "x"), 2))
    distance = (np.diff(place) % size) * 10 // size
    expected = len(distance) / 10
    chi_square = float(((np.bincount(distance, minlength=10) - expected) ** 2 / expected).sum())
    assert chi_square < 9 + 6 * np.sqrt(18.0)
    correlation = np.corrcoef(place[:-1], place[1:])[0, 1]
    assert abs(correlation) < 6 / np.sqrt(len(place))


def test_keys_tell_languages_seeds_and_epochs_apart() -> None:
    keys = {epoch_key(stream_key(seed, name), e) for seed in (0, 1, 11) for name in ("a", "b", "1a") for e in range(50)}
    assert len(keys) == 3 * 3 * 50
    base = stream_key(7, "en")
    epochs = np.array([0, 1, 2**40])
    assert epoch_key(np.full(3, base, dtype=np.uint64), epochs).tolist() == [epoch_key(base, int(e)) for e in epochs]

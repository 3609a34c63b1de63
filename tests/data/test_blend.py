"""The blend against a slot-by-slot count, its exact counts, its epochs, mirrors and blocks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmega.data.blend import SHARE_BITS, Blend, quantise
from xlmega.errors import ConfigError, DataError


def named(weights: list[float]) -> dict[str, float]:
    return {f"l{i:04d}": weight for i, weight in enumerate(weights)}


def plenty(weights: dict[str, float]) -> dict[str, int]:
    """More windows than any test has slots: one epoch."""
    return dict.fromkeys(weights, 10**9)


SHARES = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40)


def test_two_equal_languages_take_turns() -> None:
    blend = Blend({"b": 1.0, "a": 1.0}, {"a": 100, "b": 100}, seed=1)
    assert blend.languages == ("a", "b")
    assert [blend.at(slot)[0] for slot in range(6)] == [0, 1, 0, 1, 0, 1]


def test_a_quarter_and_three_quarters_by_eye() -> None:
    blend = Blend({"a": 0.25, "b": 0.75}, {"a": 100, "b": 100}, seed=1)
    assert [blend.at(slot)[0] for slot in range(8)] == [1, 0, 1, 1, 1, 0, 1, 1]
    assert blend.counts(8) == {"a": 2, "b": 6}


def test_four_equal_languages_are_all_in_every_four_slots() -> None:
    blend = Blend(named([1.0] * 4), plenty(named([1.0] * 4)), seed=1)
    languages, _ = blend.slots(np.arange(400))
    assert (np.sort(languages.reshape(100, 4), axis=1) == np.arange(4)).all()


def test_one_language() -> None:
    blend = Blend({"a": 0.3}, {"a": 5}, seed=1)
    assert sorted(blend.at(slot)[1] for slot in range(5)) == [0, 1, 2, 3, 4]
    assert blend.counts(7) == {"a": 7}
    assert blend.epochs(7) == {"a": 1.4}


@settings(max_examples=60, deadline=None)
@given(weights=SHARES, seed=st.integers(0, 2**63))
def test_slots_equal_a_count_slot_by_slot(weights: list[float], seed: int) -> None:
    """Ranks 0, 1, 2, ... of each language come in the order of the slots, whatever order they are asked in."""
    share = named(weights)
    windows = {name: 3 + i % 7 for i, name in enumerate(share)}
    blend = Blend(share, windows, seed)
    order = np.random.default_rng((seed, 0)).permutation(200)
    languages, places = np.empty(200, dtype=np.int32), np.empty(200, dtype=np.int64)
    languages[order], places[order] = blend.slots(order)
    assert [blend.at(slot) for slot in range(200)] == list(zip(languages.tolist(), places.tolist()))
    alone = {name: Blend({name: 1.0}, windows, seed) for name in share}
    seen = dict.fromkeys(share, 0)
    for slot in range(200):
        name = blend.languages[languages[slot]]
        assert places[slot] == alone[name].at(seen[name])[1], "a window depends on the language's rank alone"
        seen[name] += 1
        if slot % 50 == 49:
            assert blend.counts(slot + 1) == seen


@settings(max_examples=100, deadline=None)
@given(weights=SHARES, n=st.integers(0, 2**50 - 1))
def test_counts_are_near_the_shares_at_every_length(weights: list[float], n: int) -> None:
    share = named(weights)
    blend = Blend(share, plenty(share), 0)
    counts, exact = blend.counts(n), quantise(share)
    depth = (len(share) - 1).bit_length()
    assert sum(counts.values()) == n
    for name, count in counts.items():
        assert abs(count - Fraction(n * exact[name], 1 << SHARE_BITS)) <= Fraction(depth, 2)
    after = blend.counts(n + 1)
    language, _ = blend.at(n)
    assert {name for name in share if after[name] != counts[name]} == {blend.languages[language]}
    assert after[blend.languages[language]] == counts[blend.languages[language]] + 1


def test_a_thousand_languages() -> None:
    rng = np.random.default_rng((1, 1000))
    share = named((rng.dirichlet(np.full(1000, 0.3)) + 1e-7).tolist())
    blend = Blend(share, {name: int(w) for name, w in zip(share, rng.integers(1, 10_000, 1000))}, 0)
    start = 10**12
    languages, windows = blend.slots(np.arange(start, start + 5000))
    before, after = blend.counts(start), blend.counts(start + 5000)
    found = np.bincount(languages, minlength=1000)
    assert [after[name] - before[name] for name in blend.languages] == found.tolist()
    some = np.arange(0, 5000, 50)
    assert [blend.at(int(start + i)) for i in some] == list(zip(languages[some].tolist(), windows[some].tolist()))


def test_every_epoch_visits_each_window_once_in_an_order_of_its_own() -> None:
    blend = Blend({"a": 0.5, "b": 0.5}, {"a": 37, "b": 11}, seed=4)
    languages, windows = blend.slots(np.arange(2 * 37 * 3))
    epochs = windows[languages == 0].reshape(3, 37)
    assert (np.sort(epochs, axis=1) == np.arange(37)).all()
    assert len({tuple(order) for order in epochs.tolist()}) == 3


def test_the_order_of_a_language_knows_neither_the_mix_nor_the_other_languages() -> None:
    def order(blend: Blend, name: str) -> list[int]:
        languages, windows = blend.slots(np.arange(3000))
        result: list[int] = windows[languages == blend.languages.index(name)][:60].tolist()
        return result

    windows = {"a": 50, "b": 60, "c": 7}
    first = order(Blend({"a": 0.5, "b": 0.5}, windows, seed=4), "b")
    assert first == order(Blend({"a": 0.1, "b": 0.2, "c": 0.7}, windows, seed=4), "b")
    assert first != order(Blend({"a": 0.5, "b": 0.5}, windows, seed=5), "b")


def test_a_change_of_mix_neither_repeats_nor_skips_a_window() -> None:
    windows = {"a": 40, "b": 40}
    first = Blend({"a": 0.9, "b": 0.1}, windows, seed=2)
    second = Blend({"a": 0.2, "b": 0.8}, windows, seed=2, start_ranks=first.counts(30))
    served: list[tuple[int, int]] = [first.at(i) for i in range(30)] + [second.at(i) for i in range(20)]
    for language in (0, 1):
        whole = Blend({"ab"[language]: 1.0}, windows, seed=2)
        mine = [window for index, window in served if index == language]
        assert mine == [whole.at(rank)[1] for rank in range(len(mine))]
        assert len(set(mine)) == len(mine)
    assert second.epochs(20)["a"] == (first.counts(30)["a"] + second.counts(20)["a"]) / 40


@given(weights=st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=50))
def test_quantised_weights_are_exact_and_none_vanishes(weights: list[float]) -> None:
    share = named(weights)
    result = quantise(share)
    assert sum(result.values()) == 1 << SHARE_BITS and min(result.values()) >= 1
    total = sum(map(Fraction, weights))
    for name, weight in share.items():
        assert abs(result[name] - Fraction(weight) / total * (1 << SHARE_BITS)) <= len(weights)


def test_quantised_weights_by_eye() -> None:
    assert quantise({"a": 1.0, "b": 3.0}) == {"a": 2**28, "b": 3 * 2**28}
    assert quantise({"a": 1.0, "b": 1.0, "c": 1.0}) == {"a": 357913942, "b": 357913941, "c": 357913941}
    assert quantise({"a": 1.0, "b": 1e-20}) == {"a": 2**30 - 1, "b": 1}


def test_a_blend_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ConfigError, match="share of 'b' must be positive, but is 0.0"):
        Blend({"a": 1.0, "b": 0.0}, {"a": 1, "b": 1}, 0)
    with pytest.raises(DataError, match="'b' has 0 windows"):
        Blend({"a": 1.0, "b": 1.0}, {"a": 1}, 0)

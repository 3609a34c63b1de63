"""An expert's mix of languages: the dense model's within the cluster; what is too small; mixes that are not scaled."""

from __future__ import annotations

import pytest

from xlmega.data.settings import DataSettings, StageSettings
from xlmega.data.shares import Size
from xlmega.experts.sharing import expert_mix

WHOLE = {"a": Size(1600, 16, 16), "b": Size(400, 4, 4), "c": Size(100, 1, 1)}


def test_a_cluster_has_the_dense_mix_of_what_is_in_it() -> None:
    halves = DataSettings(temperature=2.0)  # dense: square roots, 40 : 20 : 10
    half = {"a": Size(800, 8, 8), "b": Size(400, 4, 4)}
    found = expert_mix(halves, WHOLE, half)
    assert found["a"] / found["b"] == pytest.approx(20 / 20)
    given = DataSettings(languages={"a": 1.0, "b": 3.0, "c": 1.0})
    found = expert_mix(given, WHOLE, half)
    assert found["a"] / found["b"] == pytest.approx(0.5 / 3)
    # Over all clusters each document has the weight that the dense model gives it.
    other = {"a": Size(800, 8, 8), "c": Size(100, 1, 1)}
    both = [expert_mix(given, WHOLE, part) for part in (half, other)]
    assert both[0]["a"] + both[1]["a"] == pytest.approx(0.2)


def test_whole_languages_are_left_to_the_recipe() -> None:
    assert expert_mix(DataSettings(temperature=2.0), WHOLE, {"a": WHOLE["a"], "b": WHOLE["b"]}) == {}


def test_less_than_a_window_is_left_out() -> None:
    part = {"a": Size(800, 8, 8), "c": Size(30, 1, 0)}
    assert set(expert_mix(DataSettings(), WHOLE, part)) == {"a"}


def test_other_mixes_are_the_recipes_within_the_cluster() -> None:
    part = {"a": Size(800, 8, 8), "b": Size(30, 1, 0)}
    unimax = DataSettings(sampling="unimax", max_epochs=5)
    assert expert_mix(unimax, WHOLE, part) == {"a": 0.0}
    assert expert_mix(unimax, WHOLE, {"a": Size(800, 8, 8)}) == {}
    staged = DataSettings(stages=(StageSettings("late", from_step=5, temperature=5.0),))
    assert expert_mix(staged, WHOLE, part) == {"a": 0.0}
    added = {"a": Size(800, 8, 8), "new": Size(100, 1, 1)}
    named = DataSettings(languages={"a": 1.0, "b": 1.0})
    assert expert_mix(named, {**WHOLE, "new": Size(100, 1, 1)}, added) == {"a": 0.0, "new": 0.0}

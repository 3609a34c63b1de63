"""Schedules at 0, before, at and past every boundary."""

from __future__ import annotations

import math

import pytest

from xlmega.schedules import LearningRate, Stages, constant


def test_stages_hold_from_their_start_until_the_next() -> None:
    stages = Stages((0, 10, 25), ("a", "b", "c"))
    assert [stages.at(step) for step in (0, 9, 10, 24, 25, 10**9)] == ["a", "a", "b", "b", "c", "c"]
    assert constant(7).at(0) == constant(7).at(10**9) == 7


@pytest.mark.parametrize("starts", [(), (1,), (0, 0), (0, 5, 3)])
def test_stages_that_do_not_ascend_are_a_bug(starts: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        Stages(starts, tuple("abc"[: len(starts)]))


def test_a_negative_step_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        constant(1).at(-1)


def test_cosine_after_the_warm_up() -> None:
    rate = LearningRate(peak=1.0, minimum=0.1, warmup_steps=10, decay_steps=110)
    assert rate.at(0) == pytest.approx(0.1)  # 1 / 10 of the peak, not zero
    assert rate.at(8) == pytest.approx(0.9)
    assert rate.at(9) == 1.0
    assert rate.at(10) == 1.0  # the decay begins here
    assert rate.at(60) == pytest.approx(0.55)  # half-way
    assert 0.1 < rate.at(109) < 0.101
    assert rate.at(110) == pytest.approx(0.1)
    assert rate.at(10**6) == pytest.approx(0.1)


def test_linear_and_constant() -> None:
    linear = LearningRate(1.0, 0.0, 0, 4, "linear")
    assert [linear.at(step) for step in range(6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    flat = LearningRate(1.0, 0.0, 2, 4, "constant")
    assert [flat.at(step) for step in range(6)] == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_languini_warm_up_multiplies_a_cosine_that_starts_at_zero() -> None:
    rate = LearningRate(6e-4, 6e-6, warmup_steps=200, decay_steps=18265, warmup_first=False)

    def cosine(step: int) -> float:
        return 6e-6 + (6e-4 - 6e-6) * 0.5 * (1 + math.cos(math.pi * step / 18265))

    assert rate.at(0) == pytest.approx(cosine(0) / 200)
    assert rate.at(99) == pytest.approx(cosine(99) * 0.5)
    assert rate.at(198) == pytest.approx(cosine(198) * 199 / 200)
    assert rate.at(199) == pytest.approx(cosine(199))
    assert rate.at(18264) == pytest.approx(cosine(18264))
    assert rate.at(18265) == rate.at(10**6) == pytest.approx(6e-6)


def test_no_warm_up_and_a_warm_up_as_long_as_the_decay() -> None:
    assert LearningRate(1.0, 0.0, 0, 10).at(0) == 1.0
    whole = LearningRate(1.0, 0.2, 5, 5)
    assert [whole.at(step) for step in (0, 4, 5, 6)] == pytest.approx([0.2, 1.0, 1.0, 0.2])

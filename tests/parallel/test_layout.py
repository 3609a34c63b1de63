"""Arithmetic on layouts, and the messages of those that do not work."""

from __future__ import annotations

import itertools

import pytest

from xlmega.errors import LayoutError
from xlmega.parallel.layout import Layout, check_interleaving, choose, divisors, fitting, spell


def test_what_is_left_is_data_parallel() -> None:
    assert choose(8, tp=2, pp=2) == Layout(2, 2, 2)
    assert choose(1) == Layout()
    chosen = choose(8, tp=2, pp=2, virtual_stages=3, sequence_parallel=True)
    assert chosen.world_size == 8 and chosen.describe() == "tp2 pp2 dp2 x3 interleaved sp"


def test_ranks_are_ordered_tp_then_dp_then_pp() -> None:
    layout = Layout(tp=2, pp=2, dp=2)
    assert [layout.coordinates(rank) for rank in range(8)] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1),
    ]  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 3, 4), (4, 1, 2), (1, 4, 2), (3, 2, 1)])
def test_coordinates_are_those_of_megatron(tp: int, pp: int, dp: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    ranks = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    layout = Layout(tp, pp, dp)
    for place, name in enumerate(("tp", "dp", "pp")):
        for group in ranks.get_ranks(name):
            assert [layout.coordinates(rank)[place] for rank in group] == list(range(len(group)))
            others = [layout.coordinates(rank)[:place] + layout.coordinates(rank)[place + 1 :] for rank in group]
            assert len(set(others)) == 1


def test_a_product_that_does_not_divide_names_layouts_that_do() -> None:
    with pytest.raises(LayoutError) as caught:
        choose(16, tp=4, pp=3)
    assert str(caught.value).splitlines() == [
        "tp=4 x pp=3 needs a multiple of 12 ranks, but WORLD_SIZE is 16.",
        "  With 16 ranks try: tp=4 pp=2 (dp=2) or tp=4 pp=4 (dp=1).",
    ]


def test_suggestions_work() -> None:
    for world, tp, pp in itertools.product(range(1, 13), range(1, 6), range(1, 6)):
        try:
            assert choose(world, tp=tp, pp=pp).world_size == world
        except LayoutError as error:
            for words in str(error).split("try: ")[1].rstrip(".").split(" or "):
                sizes = [int(word.split("=")[1].rstrip(")")) for word in words.split()]
                assert sizes[0] * sizes[1] * sizes[2] == world


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tp": 0}, "tp=0: sizes start at 1"),
        ({"pp": -1}, "pp=-1: sizes start at 1"),
        ({"virtual_stages": 0}, "virtual_stages=0: sizes start at 1"),
        ({"virtual_stages": 2}, "virtual_stages=2 interleaves a pipeline, but pp=1. Use pp=2"),
        ({"sequence_parallel": True}, "but tp=1. Drop it"),
    ],
)
def test_sizes_that_mean_nothing(asked: dict[str, int], words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        choose(4, **asked)  # type: ignore[arg-type]


def test_no_ranks_at_all() -> None:
    with pytest.raises(LayoutError, match="world_size=-4: sizes start at 1"):
        choose(-4)


def test_interleaving_needs_rounds_of_micro_batches() -> None:
    layout = Layout(pp=2, dp=3, virtual_stages=2)
    check_interleaving(layout, 4)
    check_interleaving(Layout(pp=2), 3)
    with pytest.raises(LayoutError, match=r"multiple of pp=2, but there are 3\. .*dp=3 x micro-batch"):
        check_interleaving(layout, 3)


def test_divisors_in_words() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(1) == [1]
    assert spell([1, 2]) == "1, 2" and spell([]) == "none here"


def test_elastic_takes_the_most_ranks_that_share_every_batch() -> None:
    how = {"tp": 2, "pp": 1, "virtual_stages": 1, "micro_batch_windows": 2}
    assert fitting(8, **how, batches=[16]) == 8
    assert fitting(6, **how, batches=[16]) == 4  # dp=3 does not divide 8 micro-batches
    assert fitting(7, **how, batches=[12]) == 6
    assert fitting(8, **how, batches=[4, 16]) == 4  # of every stage
    assert fitting(8, **{**how, "pp": 2, "virtual_stages": 2}, batches=[12]) == 4  # dp=2: 3 micro-batches over 2 stages
    with pytest.raises(
        LayoutError, match=r"--elastic: of 1 ranks no number shares batches of 16 .* so 2 are the least"
    ):
        fitting(1, **how, batches=[16])
    with pytest.raises(LayoutError, match="tp=0: sizes start at 1"):
        fitting(1, **{**how, "tp": 0}, batches=[16])

"""Clones and merged vocabularies: published values, brute force on made-up pieces, and every id's way back."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlmega.errors import ConfigError, DataError
from xlmega.text.remapping import IdSpace, clone_map, cloned, cloned_ids, num_shared, plain, second


def test_a_clone_by_eye() -> None:
    """id + clone * V; padding stays; the end of a document (2) is an id like any other."""
    assert clone_map(5, 1).tolist() == [0, 6, 7, 8, 9]
    assert clone_map(5, 3).tolist() == [0, 16, 17, 18, 19]
    assert clone_map(5, 0).tolist() == [0, 1, 2, 3, 4]
    assert clone_map(5, 1, pad_id=None).tolist() == [5, 6, 7, 8, 9]
    assert clone_map(5, 1, pad_id=1).tolist() == [5, 1, 7, 8, 9]
    space = cloned(5, 2)
    assert space.size == 15 and len(space.tables) == 3 and not space.is_plain


@pytest.mark.parametrize("frac", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_the_published_choice_of_cloned_ids(frac: float) -> None:
    """The first int(frac * V) of range(V) shuffled by random.Random(0), as the study's code draws them."""
    size = 16384
    order = list(range(size))
    random.Random(0).shuffle(order)
    chosen = {*order[: int(frac * size)]} - {0}
    assert set(np.flatnonzero(cloned_ids(size, frac)).tolist()) == chosen
    expected = [id + size if id in chosen else id for id in range(size)]
    assert clone_map(size, 1, frac).tolist() == expected
    assert cloned(size, 1, frac).size == 2 * size, "rows that a fraction leaves unused remain"


def test_the_shuffle_is_that_of_every_python() -> None:
    # Golden: random.Random(0).shuffle has given this order since Python 3.2. These values may not be updated.
    assert np.flatnonzero(cloned_ids(10, 0.5)).tolist() == GOLDEN


GOLDEN = [1, 3, 5, 7, 8]


def test_a_fraction_and_several_clones() -> None:
    with pytest.raises(ConfigError, match="frac_clone=0.5 with 2 cloned languages.*num_cloned_languages=1"):
        cloned(10, 2, 0.5)
    for num, frac in ((-1, 1.0), (1, 1.5), (1, float("nan"))):
        with pytest.raises(ConfigError, match="must not be negative"):
            cloned(10, num, frac)
    with pytest.raises(ConfigError, match="more than int32 can number"):
        cloned(10**6, 3000)


FIRST = ["<pad>", "<unk>", "<D>", "a", "b", "the", "s"]
SECOND = ["<pad>", "<unk>", "<D>", "b", "le", "a", "la", "s"]


def test_a_merge_by_eye() -> None:
    """b, a, s and the specials are shared; le and la are the next free ids, in the order in which they come."""
    space = second(FIRST, SECOND, merge=True)
    assert space.tables[1].tolist() == [0, 1, 2, 4, 7, 3, 8, 6]
    assert space.size == 9 and num_shared(space) == 6
    assert space.decode([7, 4]) == (1, [4, 3]) and space.decode([5, 4]) == (0, [5, 4])
    assert space.decode([4, 3]) == (0, [4, 3]), "what both know is read by the first"
    with pytest.raises(DataError, match="belong to several languages"):
        space.decode([5, 7])
    with pytest.raises(DataError, match="not all in the model's 0 to 8"):
        space.decode([9])


def test_two_vocabularies_apart() -> None:
    space = second(FIRST, SECOND, merge=False)
    assert space.tables[1].tolist() == [0, 8, 9, 10, 11, 12, 13, 14] and space.size == 15
    assert num_shared(space) == 1
    equal = second(FIRST, FIRST, merge=False)
    assert equal.size == 2 * len(FIRST)


def test_padding_of_other_numberings() -> None:
    """Wherever a vocabulary keeps its padding (XGLM: 1; none: None), it becomes the first's."""
    space = second(FIRST, ["<s>", "<pad>", "a"], merge=True, second_pad_id=1)
    assert space.tables[1].tolist() == [7, 0, 3]
    space = second(FIRST, ["<s>", "<pad>", "a"], merge=True, second_pad_id=0)
    assert space.tables[1].tolist() == [0, 7, 3], "a piece called <pad> that is not the padding is no padding"
    assert second(["x"], ["x", "y"], merge=True, first_pad_id=None, second_pad_id=None).tables[1].tolist() == [0, 1]
    assert second(["x"], ["x", "y"], merge=False, first_pad_id=None, second_pad_id=0).tables[1].tolist() == [1, 2]


PIECES = st.lists(st.text("abc", min_size=1, max_size=3), unique=True, max_size=30)


@given(first=PIECES, other=PIECES)
def test_merges_equal_a_walk_piece_by_piece(first: list[str], other: list[str]) -> None:
    first, other = ["<pad>", *first], ["<pad>", *other]
    space = second(first, other, merge=True)
    walked, added = [], 0
    for piece in other:
        if piece in first:
            walked.append(first.index(piece))
        else:
            walked.append(len(first) + added)
            added += 1
    assert space.tables[1].tolist() == walked
    assert space.size == len(first) + added == len({*first, *other})
    assert num_shared(space) == len({*first} & {*other})


@st.composite
def spaces(draw: st.DrawFn) -> IdSpace:
    size = draw(st.integers(1, 40))
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return cloned(size, draw(st.integers(0, 4)), pad_id=draw(st.integers(0, size - 1)))
    if kind == 1:
        return cloned(size, 1, draw(st.floats(0.0, 1.0)))
    return second(["<pad>", *draw(PIECES)], ["<pad>", *draw(PIECES)], merge=draw(st.booleans()))


@given(space=spaces(), data=st.data())
def test_every_text_comes_back(space: IdSpace, data: st.DataObject) -> None:
    for numbering, table in enumerate(space.tables):
        assert len(set(table.tolist())) == len(table), "no two ids become one"
        assert table.min() >= 0 and table.max() < space.size
        assert (space.back(numbering)[table] == np.arange(len(table))).all()
        ids = data.draw(st.lists(st.integers(0, len(table) - 1), max_size=10))
        read, back = space.decode(table[ids])
        assert space.tables[read][back].tolist() == table[ids].tolist()
    assert (space.tables[0] == np.arange(len(space.tables[0]))).all()


def test_clones_decode_by_the_remainder() -> None:
    space = cloned(100, 3)
    for clone in (1, 2, 3):
        assert space.decode([100 * clone + 7, 0, 100 * clone + 99]) == (clone, [7, 0, 99])


def test_bytes_of_combined_ids() -> None:
    assert cloned(3, 2).gather([np.array([0, 5, 7])]).tolist() == [0, 5, 7, 0, 5, 7, 0, 5, 7]
    space = second(FIRST, SECOND, merge=True)
    lengths = [np.array([0, 0, 0, *map(len, pieces[3:])]) for pieces in (FIRST, SECOND)]
    assert space.gather(lengths).tolist() == [0, 0, 0, 1, 1, 3, 1, 2, 2]
    assert second(FIRST, SECOND, merge=False).gather(lengths).tolist() == [*lengths[0], 0, *lengths[1][1:]]
    assert plain(4).gather([np.array([1, 2, 3, 4])]).tolist() == [1, 2, 3, 4] and plain(4).is_plain


def test_hashes_tell_numberings_apart() -> None:
    made = [plain(5), cloned(5, 1), cloned(5, 2), cloned(5, 1, 0.5), second(FIRST, SECOND, merge=True)]
    assert len({space.hash for space in made}) == 5
    assert cloned(5, 1).hash == cloned(5, 1).hash

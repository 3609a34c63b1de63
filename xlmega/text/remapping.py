"""Several numberings of pieces in one model: the ids of cloned languages and of a second vocabulary, as plain arrays.

In: the sizes or the pieces of vocabularies. Out: an `IdSpace`, the model's ids with one table for each numbering:
numbering 0 is the first vocabulary as it is; numbering k is clone k of it, or the second vocabulary. Looking an id up
in a table is all that makes a clone a clone. Guaranteed: within a numbering no two ids become one, so that every text
comes back; the padding id is everyone's. Knows neither a tokenizer's library nor the data.

Clones (`cloned`): id -> id + clone * V where the id is cloned, else unchanged. Which ids are cloned for a fraction is
the published choice, the first int(fraction * V) of range(V) shuffled by random.Random(0); padding never is, the end
of a document is an id like any other. The model has V ids for each language even where a fraction leaves rows unused.

Second vocabulary (`second`): merged, its pieces are walked in id order; one whose very string the first has takes the
first's id, any other the next free one, V + (number added so far). Unmerged, id j becomes V + j. Padding is the
first's.
Source: METHODS §1.3, §1.4 (arXiv 2404.07982).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.errors import ConfigError, DataError

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class IdSpace:
    """The ids of a model, and what each numbering's ids are among them."""

    size: int
    """Rows of the embedding."""
    tables: tuple[Ids, ...]
    """tables[k][id of numbering k] is the model's id; tables[0] is the identity."""

    @property
    def is_plain(self) -> bool:
        """Whether the model's ids are simply those of the first vocabulary."""
        return len(self.tables) == 1

    def back(self, numbering: int) -> Ids:
        """[size]: the id that a model's id has in a numbering, -1 where that numbering does not use it."""
        inverse = np.full(self.size, -1, dtype=np.int32)
        inverse[self.tables[numbering]] = np.arange(len(self.tables[numbering]), dtype=np.int32)
        return inverse

    def numbering_of(self, ids: Any) -> int:
        """The first numbering that uses all these ids: how to read what a model wrote.

        A text of ids that several numberings share (anchors, pieces of a merged vocabulary) is read by the first.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.size):
            raise DataError(f"ids from {ids.min()} to {ids.max()} are not all in the model's 0 to {self.size - 1}.")
        for numbering in range(len(self.tables)):
            if (self.back(numbering)[ids] >= 0).all():
                return numbering
        raise DataError("these ids belong to several languages, so there is no one text that they spell.")

    def decode(self, ids: Any) -> tuple[int, list[int]]:
        """(numbering, the ids in it) of a model's ids."""
        numbering = self.numbering_of(ids)
        found: list[int] = self.back(numbering)[np.asarray(ids, dtype=np.int64)].tolist()
        return numbering, found

    def gather(self, by_numbering: Sequence[npt.NDArray[Any]], fill: int = 0) -> npt.NDArray[Any]:
        """[size]: what the numberings' tables say of each id ('how many bytes it spells'); the first that has it wins.

        `by_numbering` has one array for each numbering, or one for all where they are clones. `fill` is for ids that
        no numbering uses.
        """
        values = np.full(self.size, fill, dtype=by_numbering[0].dtype)
        for numbering in reversed(range(len(self.tables))):
            values[self.tables[numbering]] = by_numbering[min(numbering, len(by_numbering) - 1)]
        return values

    @property
    def hash(self) -> str:
        """sha256 of every table: two models with one hash and one vocabulary mean the same by an id."""
        digest = hashlib.sha256(str(self.size).encode())
        for table in self.tables:
            digest.update(hashlib.sha256(table.astype("<i4").tobytes()).digest())
        return digest.hexdigest()


def plain(size: int) -> IdSpace:
    """The ids of one vocabulary as they are."""
    return IdSpace(size, (np.arange(size, dtype=np.int32),))


def cloned_ids(size: int, frac_clone: float, pad_id: int | None = 0) -> npt.NDArray[np.bool_]:
    """[size]: which ids of a vocabulary a clone has copies of; the rest are shared with the original."""
    order = list(range(size))
    random.Random(0).shuffle(order)
    cloned = np.zeros(size, dtype=np.bool_)
    cloned[order[: int(frac_clone * size)]] = True
    if pad_id is not None:
        cloned[pad_id] = False
    return cloned


def clone_map(size: int, clone: int, frac_clone: float = 1.0, pad_id: int | None = 0) -> Ids:
    """[size]: the ids of clone number `clone` (1, 2, ...; 0 is the original itself)."""
    ids = np.arange(size, dtype=np.int64)
    mapped = np.where(cloned_ids(size, frac_clone, pad_id), ids + clone * size, ids)
    return mapped.astype(np.int32)


def cloned(size: int, num_clones: int, frac_clone: float = 1.0, pad_id: int | None = 0) -> IdSpace:
    """A vocabulary and its clones: numbering k is clone k. With `frac_clone` below 1 there is one clone at most."""
    if num_clones < 0 or not 0.0 <= frac_clone <= 1.0:
        raise ConfigError(
            f"num_clones={num_clones} and frac_clone={frac_clone}: the first must not be negative and the second must "
            "be from 0 to 1."
        )
    if num_clones > 1 and frac_clone < 1.0:
        raise ConfigError(
            f"frac_clone={frac_clone} with {num_clones} cloned languages: ids are shared between two languages only. "
            "Set num_cloned_languages=1, or frac_clone=1.0."
        )
    _check_size(size * (num_clones + 1))
    return IdSpace(
        size * (num_clones + 1), tuple(clone_map(size, clone, frac_clone, pad_id) for clone in range(num_clones + 1))
    )


def second(
    first_pieces: Sequence[str],
    second_pieces: Sequence[str],
    *,
    merge: bool,
    first_pad_id: int | None = 0,
    second_pad_id: int | None = 0,
) -> IdSpace:
    """Two vocabularies, given as their pieces in id order: numbering 0 is the first and numbering 1 the second."""
    size = len(first_pieces)
    if merge:
        # Where a vocabulary has a piece twice (SentencePiece never does), the lower id stands for both.
        known = {piece: id for id, piece in reversed(list(enumerate(first_pieces)))}
        table, free = np.empty(len(second_pieces), dtype=np.int64), size
        for id, piece in enumerate(second_pieces):
            if id == second_pad_id and first_pad_id is not None:
                table[id] = first_pad_id
            elif piece in known and known[piece] != first_pad_id:
                table[id] = known.pop(piece)  # once: no two ids of a numbering may become one
            else:
                table[id], free = free, free + 1
    else:
        table, free = np.arange(len(second_pieces), dtype=np.int64) + size, size + len(second_pieces)
        if first_pad_id is not None and second_pad_id is not None:
            table[second_pad_id] = first_pad_id
    _check_size(free)
    return IdSpace(free, (np.arange(size, dtype=np.int32), table.astype(np.int32)))


def num_shared(space: IdSpace) -> int:
    """How many of the second numbering's ids are the first's too, padding included."""
    return int((space.tables[1] < len(space.tables[0])).sum())


def _check_size(size: int) -> None:
    if size >= 1 << 31:
        raise ConfigError(f"{size} ids are more than int32 can number. Use a smaller vocabulary or fewer clones.")

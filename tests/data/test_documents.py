"""One document a window against a walk document by document; which tokens of a packed window belong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import EOD, VOCABULARY, batches_of, in_memory, languages_of, plan_for, settings_of

from xlmega.data import documents
from xlmega.data.batches import Batches, Reading
from xlmega.data.documents import document_numbers, document_windows, num_parts
from xlmega.data.indexed import IndexedWriter, open_tokens
from xlmega.errors import DataError
from xlmega.text.remapping import cloned

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def walked(tokens: Any, length: int, split: bool) -> list[list[int]]:
    """Every window's ids, by slicing one document after the other."""
    found = []
    for index in range(tokens.num_documents):
        start, end = tokens.document_span(index)
        ids = tokens.tokens[start:end].tolist()
        if not split:
            found.append(ids[: length + 1])
        else:
            found += [ids[first : first + length + 1] for first in range(0, len(ids) - 1, length)]
    return found


@pytest.mark.parametrize("block", [1, 3, 4096])
@given(lengths=LENGTHS, length=st.integers(1, 16), split=st.booleans())
def test_windows_of_documents_are_a_walk(block: int, lengths: list[int], length: int, split: bool) -> None:
    kept, documents.BLOCK = documents.BLOCK, block
    try:
        tokens = in_memory(sum(lengths), documents=lengths)
        windows = document_windows(tokens, length, split=split)
        found = [windows.ids(w).tolist() for w in range(windows.count)]
        assert found == walked(tokens, length, split) and windows.total == windows.count
        if split:
            targets = [id for ids in found for id in ids[1:]]
            firsts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
            assert targets == np.delete(tokens.tokens, firsts).tolist(), "all but a document's first, once"
    finally:
        documents.BLOCK = kept


def test_parts_by_eye() -> None:
    """With 4 targets a window: 1 id has none, 5 ids have 4, 6 ids need two windows."""
    assert num_parts(np.array([1, 2, 5, 6, 9, 10]), 4).tolist() == [0, 1, 1, 2, 2, 3]
    tokens = in_memory(11, documents=[1, 3, 7])
    windows = document_windows(tokens, 4, split=True)
    assert [windows.ids(w).tolist() for w in range(windows.count)] == [[4, 5, EOD], [7, 8, 9, 10, 11], [11, 12, EOD]]
    assert document_windows(tokens, 4, split=False).ids(2).tolist() == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("long_documents", ["split", "cut"])
def test_batches_of_documents_are_padded_and_weigh_their_targets(long_documents: str) -> None:
    lengths = [3, 20, 9, 1, 8, 30, 2] * 6
    corpus = {"en": in_memory(sum(lengths), documents=lengths), "fr": in_memory(300, 1000, documents=[30] * 10)}
    table = {"windows": "documents", "long_documents": long_documents, "frac_validation": 0.0}
    batches = batches_of(corpus, table, batch=6)
    for step in range(20):
        batch = batches.at(step)
        for at in np.ndindex(batch.slots.shape):
            name = batches.languages[batch.languages[at]]
            ids = languages_of(settings_of(table), corpus)[name].windows.ids(int(batch.windows[at])).tolist()
            assert batch.tokens[at].tolist() == ids + [0] * (9 - len(ids))
            assert batch.weights[at].tolist() == [1.0] * (len(ids) - 1) + [0.0] * (9 - len(ids))


def test_documents_are_held_out_whole_from_the_end() -> None:
    tokens = {"en": in_memory(200, documents=[10] * 20)}
    made = settings_of({"windows": "documents", "frac_validation": 0.2})
    windows = languages_of(made, tokens)["en"].windows
    assert (windows.first, windows.count, windows.total) == (0, 32, 40)
    with pytest.raises(DataError, match="'en' makes 0 windows of documents: give it more documents"):
        languages_of(made, {"en": in_memory(3, documents=[1, 1, 1])})


def test_document_numbers_by_eye() -> None:
    """Documents of 3, 4 and 4 ids in windows of 5: the end of a document belongs to it."""
    assert document_numbers(5, [np.array([3]), np.array([2]), np.array([], int)]).tolist() == [
        [0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]
    ]  # fmt: skip


@given(lengths=LENGTHS, length=st.integers(1, 16))
def test_packed_windows_know_their_documents(lengths: list[int], length: int) -> None:
    tokens = in_memory(sum(lengths) + length + 2, documents=[*lengths, length + 2])
    corpus = {"en": tokens}
    table = {"reset_attention": True, "frac_validation": 0.0, "sequence_length": length}
    batches = batches_of(corpus, table, batch=3, micro=1)
    owner = np.repeat(np.arange(len(lengths) + 1), [*lengths, length + 2])
    for step in range(4):
        batch = batches.at(step)
        assert batch.documents is not None
        for at in np.ndindex(batch.slots.shape):
            first = int(batch.windows[at]) * length
            mine = owner[first : first + length]
            assert batch.documents[at].tolist() == (mine - mine[0]).tolist()
    assert batches_of(corpus, {**table, "reset_attention": False}, batch=3, micro=1).at(0).documents is None


def test_documents_of_real_files(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, 50, 300)
    writer = IndexedWriter(tmp_path / "train" / "en", "uint16")
    ids = generator.integers(3, 500, lengths.sum())
    writer.add_documents(ids, lengths)
    writer.finish(language="en", split="train", vocabulary_hash="v", vocabulary_size=500, eod_id=2, utf8_bytes=1)
    tokens = open_tokens(tmp_path / "train" / "en")
    starts = tokens.document_starts
    assert tokens.document_lengths.tolist() == lengths.tolist()
    assert [tokens.document_span(k) for k in range(300)] == list(zip(starts[:-1].tolist(), starts[1:].tolist()))
    for start, end in ((0, 10), (5, 5), (100, 900), (int(starts[7]), int(starts[9])), (0, tokens.num_tokens)):
        inside = [s for s in starts[:-1].tolist() if start <= s < end]
        assert tokens.document_starts_within(start, end).tolist() == inside
    windows = document_windows(tokens, 16, split=True)
    assert [windows.ids(w).tolist() for w in range(windows.count)] == walked(tokens, 16, True)
    path = tmp_path / "train" / "en.idx"
    data = bytearray(path.read_bytes())
    data[34 + 4 * 7] ^= 0x7F  # a length
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"en\.idx' is damaged: document 7 is no part of the tokens"):
        [open_tokens(tmp_path / "train" / "en").document_span(k) for k in range(300)]


def test_padding_stays_padding_in_a_clone_of_a_vocabulary_without_any() -> None:
    corpus = {"en": in_memory(30, documents=[5] * 6)}
    made = settings_of({"windows": "documents", "frac_validation": 0.0, "num_cloned_languages": 1, "p_clone": 1.0})
    languages = languages_of(made, corpus)
    reading = Reading(cloned(VOCABULARY, 1, pad_id=None))
    plan = plan_for(made, languages, batch=6)
    batch = Batches(languages, plan, reading, micro_batch_windows=6, dp_rank=0, dp_size=1).at(0)
    assert (batch.tokens[..., :5] >= VOCABULARY).all() and (batch.tokens[..., 5:] == 0).all()

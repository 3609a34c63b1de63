"""Pairs: the same step for every layout, each pair once an epoch, both sides padded; bad files by line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlmega.data.batches import Prefetched
from xlmega.data.pairs import Pairs, pair_file, read_pairs
from xlmega.errors import ConfigError, DataError, LayoutError
from xlmega.text.vocabulary import load_vocabulary


class Letters:
    """a is 10, b is 11, ...; what pairs need of a vocabulary."""

    pad_id: int | None = None
    eod_id = 2

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[Any]:
        return [np.array([ord(letter) - 87 for letter in text], dtype=np.int32) for text in texts]


def write(path: Path, pairs: list[Any]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """23 pairs: 'aaa' with 'aaaaa', 'bbb' with 'bbbbb', ..."""
    pairs = [{"translation": {"en": chr(97 + k) * 3, "fr": chr(97 + k) * 5}, "score": 0.9} for k in range(23)]
    return write(tmp_path / "en-fr.train.jsonl.gz", pairs)


def stream(file: Path, **place: Any) -> Pairs:
    keys = {"batch_pairs": 12, "micro_batch_pairs": 2, "dp_rank": 0, "dp_size": 1, "seed": 1, "max_length": 4, **place}
    return Pairs(read_pairs(file, "en", "fr"), Letters(), **keys)


def test_a_step_by_eye(file: Path) -> None:
    batch = stream(file).at(0)
    assert batch.source.shape == batch.target.shape == (6, 2, 4) and batch.slots.ravel().tolist() == list(range(12))
    for at in np.ndindex(batch.pairs.shape):
        letter = 10 + batch.pairs[at]
        assert batch.source[at].tolist() == [letter, letter, letter, 2], "padded with the end of a document"
        assert batch.target[at].tolist() == [letter] * 4, "truncated"
        assert (batch.source_lengths[at], batch.target_lengths[at]) == (3, 4)


def test_every_epoch_has_each_pair_once_in_an_order_of_its_own(file: Path) -> None:
    pairs = np.concatenate([stream(file).at(step).pairs.ravel() for step in range(23)])
    epochs = pairs.reshape(12, 23)
    assert (np.sort(epochs, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 12
    assert stream(file).epochs(23) == 12.0
    other = np.concatenate([stream(file, seed=2).at(step).pairs.ravel() for step in range(23)])
    reverse = Pairs(read_pairs(file, "fr", "en"), Letters(), max_length=4, batch_pairs=12, micro_batch_pairs=2,
                    dp_rank=0, dp_size=1, seed=1)  # fmt: skip
    assert (other != pairs).any() and (reverse.at(0).pairs.ravel() != pairs[:12]).any()
    assert (reverse.at(0).source_lengths == 4).all()


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 3])
def test_every_layout_serves_the_same_pairs_in_the_same_order(file: Path, dp_size: int, micro: int) -> None:
    whole = stream(file, batch_pairs=36, micro_batch_pairs=12)
    place = {"batch_pairs": 36, "micro_batch_pairs": micro, "dp_size": dp_size}
    parts = [stream(file, **place, dp_rank=rank) for rank in range(dp_size)]
    for step in (5, 0, 100):
        expected = whole.at(step)
        found: dict[int, Any] = {}
        for batch in (part.at(step) for part in parts):
            for at in np.ndindex(batch.slots.shape):
                found[int(batch.slots[at])] = (batch.pairs[at], batch.source[at].tolist(), batch.target[at].tolist())
        assert sorted(found) == expected.slots.ravel().tolist()
        for at in np.ndindex(expected.slots.shape):
            pair = (expected.pairs[at], expected.source[at].tolist(), expected.target[at].tolist())
            assert found[int(expected.slots[at])] == pair


def test_read_ahead_and_refusals(file: Path) -> None:
    ahead: Prefetched[Any] = Prefetched(stream(file), 0)
    assert (ahead.at(3).source == stream(file).at(3).source).all()
    ahead.close()
    with pytest.raises(ConfigError, match="max_length=0"):
        stream(file, max_length=0)
    with pytest.raises(LayoutError, match="12 .*dp=5"):
        stream(file, dp_size=5)


def test_the_file_of_two_languages(file: Path, tmp_path: Path) -> None:
    assert pair_file(tmp_path, "en", "fr") == pair_file(tmp_path, "fr", "en") == file
    assert len(read_pairs(tmp_path, "fr", "en")) == 23
    with pytest.raises(DataError, match=r"has no pairs of en and de: there is neither en-de.train.jsonl"):
        read_pairs(tmp_path, "en", "de")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "x"}, ":2: there is no 'translation'"),
        ({"translation": ["a", "b"]}, ":2: there is no 'translation'"),
        ({"translation": {"en": "a", "de": "b"}}, ":2: there is no text in 'fr', but in en, de"),
        ({"translation": {"en": "a", "fr": " "}}, ":2: there is no text in 'fr'"),
        ({"translation": {"en": "a", "fr": 3}}, ":2: there is no text in 'fr'"),
        ({"translation": {"en": "a", "fr": "\ud800"}}, ":2: the text cannot be encoded"),
    ],
)
def test_lines_that_are_no_pairs(tmp_path: Path, line: Any, words: str) -> None:
    good = {"translation": {"en": "a", "fr": "b"}}
    with pytest.raises(DataError, match=words):
        read_pairs(write(tmp_path / "x.jsonl.gz", [good, line]), "en", "fr")
    with pytest.raises(DataError, match="has no pairs"):
        read_pairs(write(tmp_path / "x.jsonl.gz", []), "en", "fr")


def test_the_made_corpus_and_a_vocabulary(made_corpus: Path, made_vocabulary: Path) -> None:
    vocabulary = load_vocabulary(made_vocabulary)
    first = next(iter(sorted((made_corpus / "parallel").glob("*.train.jsonl.gz"))))
    source, target = first.name.split(".")[0].split("-")
    texts = read_pairs(made_corpus / "parallel", source, target)
    pairs = Pairs(texts, vocabulary, max_length=32, batch_pairs=8, micro_batch_pairs=4, dp_rank=0, dp_size=1, seed=0)
    batch = pairs.at(1)
    for at in np.ndindex(batch.pairs.shape):
        text = texts.pair(int(batch.pairs[at]))[1]
        ids = vocabulary.encode(text)[:32]
        assert batch.target[at][: batch.target_lengths[at]].tolist() == ids
        assert (batch.target[at][batch.target_lengths[at] :] == vocabulary.pad_id).all()

"""Token files that Megatron-core wrote are trained on after one call, and ours are read by Megatron-core."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from xlmega.data import adopting, indexed
from xlmega.data.adopting import adopt_tokens
from xlmega.errors import DataError
from xlmega.text.vocabulary import load_vocabulary

DOCUMENTS = [[[5, 6], [7, 2]], [[9, 2]], [[300, 301, 2], [2]], [[12, 2]]]
"""Sequences by document."""
FLAT = [[id for sequence in document for id in sequence] for document in DOCUMENTS]


def write_pair(
    prefix: Path,
    code: int = 8,
    dtype: str = "<u2",
    documents: Sequence[Sequence[Sequence[int]]] = DOCUMENTS,
    modes: bool = False,
) -> Path:
    """The format by hand: header, lengths, pointers, document indices."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = [len(sequence) for document in documents for sequence in document]
    ends = np.cumsum(lengths) * np.dtype(dtype).itemsize
    starts = np.cumsum([0, *(len(document) for document in documents)])
    flat = [id for document in documents for sequence in document for id in sequence]
    Path(f"{prefix}.bin").write_bytes(np.array(flat, dtype=dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(documents) + 1)
        + np.array(lengths, "<i4").tobytes()
        + np.array([0, *ends[:-1]], "<i8").tobytes()
        + starts.astype("<i8").tobytes()
        + (b"\1" * len(lengths) if modes else b"")
    )
    return prefix


def documents_of(root: Path, language: str, split: str = "train") -> list[list[int]]:
    tokens = indexed.open_corpus(root, split)[language]
    indexed.verify(tokens.path)
    return [tokens.document(k).tolist() for k in range(tokens.num_documents)]


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (3, "<i2"), (4, "<i4"), (5, "<i8")])
def test_every_whole_number_dtype(code: int, dtype: str, made_vocabulary: Path, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "old" / "fr_text_document", code, dtype, modes=code == 4)
    before = prefix.with_name("fr_text_document.bin").read_bytes()
    (made,) = adopt_tokens({"fr": [prefix]}, made_vocabulary, tmp_path / "t")
    assert documents_of(tmp_path / "t", "fr") == FLAT
    assert (tmp_path / "t" / "train" / "fr.bin").is_symlink()
    assert prefix.with_name("fr_text_document.bin").read_bytes() == before
    piece_bytes = load_vocabulary(made_vocabulary).piece_bytes
    assert made.utf8_bytes == sum(int(piece_bytes[ids].sum()) for ids in FLAT)
    assert (made.documents, made.tokens, made.min_id, made.max_id, made.document_suffix) == (4, 12, 2, 301, (2,))
    (copied,) = adopt_tokens({"fr": [prefix]}, made_vocabulary, tmp_path / "c", copy=True)
    assert documents_of(tmp_path / "c", "fr") == FLAT and copied.dtype == "uint16"
    assert not (tmp_path / "c" / "train" / "fr.bin").is_symlink()


def test_several_prefixes_and_splits(made_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopting, "BLOCK_TOKENS", 3)
    monkeypatch.setattr(adopting, "BLOCK_DOCUMENTS", 2)
    other = [[[4, 4, 2]], [], [[8]]]
    pair = [write_pair(tmp_path / "a" / "en_0"), write_pair(tmp_path / "b" / "en_1", 5, "<i8", other)]
    said: list[str] = []
    adopt_tokens({"en": pair, "fr": pair[:1]}, made_vocabulary, tmp_path / "t", say=said.append)
    adopt_tokens({"en": pair[1:]}, made_vocabulary, tmp_path / "t", split="valid")
    assert documents_of(tmp_path / "t", "en") == [*FLAT, [4, 4, 2], [8]]
    assert documents_of(tmp_path / "t", "fr") == FLAT
    assert documents_of(tmp_path / "t", "en", "valid") == [[4, 4, 2], [8]]
    assert "en: not every document ends in id 2 (<D>)" in said
    with pytest.raises(DataError, match="train' exists.*--overwrite"):
        adopt_tokens({"en": pair}, made_vocabulary, tmp_path / "t")
    adopt_tokens({"en": pair[:1]}, made_vocabulary, tmp_path / "t", overwrite=True)
    assert documents_of(tmp_path / "t", "en") == FLAT


def test_what_changes_later_is_found(made_vocabulary: Path, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "old" / "fr")
    adopt_tokens({"fr": [prefix]}, made_vocabulary, tmp_path / "t")
    content = bytearray((tmp_path / "old" / "fr.bin").read_bytes())
    content[4] ^= 1
    (tmp_path / "old" / "fr.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"fr\.bin' is damaged"):
        indexed.verify(tmp_path / "t" / "train" / "fr")


def edited(suffix: str, edit: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def run(prefix: Path) -> None:
        content = bytearray(Path(f"{prefix}{suffix}").read_bytes())
        edit(content)
        Path(f"{prefix}{suffix}").write_bytes(content)

    return run


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no idx": (lambda prefix: Path(f"{prefix}.idx").unlink(), r"there is no '.*\.idx'"),
    "no bin": (lambda prefix: Path(f"{prefix}.bin").unlink(), r"there is no '.*\.bin'"),
    "another format": (edited(".idx", lambda c: c.__setitem__(0, 0)), "is not an index of Megatron"),
    "empty idx": (edited(".idx", bytearray.clear), "is not an index of Megatron"),
    "floats": (edited(".idx", lambda c: c.__setitem__(17, 7)), "dtype code 7, which is no whole number"),
    "idx cut": (edited(".idx", lambda c: c.__delitem__(slice(-9, None))), "was cut off or is of another format"),
    "bin cut": (edited(".bin", bytearray.pop), "describes 24 bytes of uint16"),
    "another dtype": (edited(".idx", lambda c: c.__setitem__(17, 4)), "do not follow one another"),
    "a length": (edited(".idx", lambda c: c.__setitem__(34, 9)), "do not follow one another"),
    "a document": (edited(".idx", lambda c: c.__setitem__(-8, 9)), "documents are not in order"),
    "an id": (edited(".bin", lambda c: c.__setitem__(3, 0x60)), r"has id \d+ at token 1, but the vocabulary has 800"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, made_vocabulary: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    damage(write_pair(tmp_path / "old" / "fr"))
    with pytest.raises(DataError, match=message):
        adopt_tokens({"fr": [tmp_path / "old" / "fr"]}, made_vocabulary, tmp_path / "t")
    assert not (tmp_path / "t" / "train").exists()


def test_names(made_vocabulary: Path, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "old" / "fr")
    for prefixes, split, message in (
        ({}, "train", "nothing to adopt"),
        ({"fr": [prefix]}, "vocabulary", "nothing to adopt as split 'vocabulary'"),
        ({"fr": [prefix]}, "../x", "nothing to adopt as split"),
        ({"../fr": [prefix]}, "train", "cannot be a language code"),
    ):
        with pytest.raises(DataError, match=message):
            adopt_tokens(prefixes, made_vocabulary, tmp_path / "t", split=split)


@pytest.mark.torch
def test_megatrons_builder_to_us_and_back(made_vocabulary: Path, tmp_path: Path) -> None:
    import torch

    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for name, dtype in (("en_0", np.uint16), ("en_1", np.int32), ("fr", np.int64)):
        (tmp_path / "old").mkdir(exist_ok=True)
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / "old" / f"{name}.bin"), dtype=dtype)
        for document in DOCUMENTS:
            for sequence in document:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
        builder.finalize(str(tmp_path / "old" / f"{name}.idx"))
    prefixes = {"en": [tmp_path / "old" / "en_0", tmp_path / "old" / "en_1"], "fr": [tmp_path / "old" / "fr"]}
    adopt_tokens(prefixes, made_vocabulary, tmp_path / "t")
    assert documents_of(tmp_path / "t", "en") == FLAT + FLAT and documents_of(tmp_path / "t", "fr") == FLAT
    for language, documents in (("en", FLAT + FLAT), ("fr", FLAT)):
        theirs = megatron.IndexedDataset(str(tmp_path / "t" / "train" / language))
        assert [theirs[k].tolist() for k in range(len(theirs))] == documents
        assert theirs.document_indices.tolist() == list(range(len(documents) + 1))

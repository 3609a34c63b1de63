"""Megatron token files in (`.bin` and `.idx`), a token folder of ours out: with manifests, and nothing retokenised.

Every id is read once: checked against the vocabulary, counted and hashed. One pair of files becomes
`OUTPUT/SPLIT/LANG.bin`, a link to the file where it lies, beside an index of ours (one sequence a document, without
documents that are empty) and the manifest. Several pairs for one language, or `copy`, are written anew, one after
another, in the dtype of the vocabulary. All whole-number dtypes of Megatron are read; memory is a few blocks.

What Megatron's files do not say cannot be checked: that the ids came from this very vocabulary. The first words are
shown, so that a person can.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.data.indexed import HEADER, MAGIC, IndexedWriter, token_dtype, with_suffix, write_errors, write_index
from xlmega.data.manifest import (
    DTYPE_CODES,
    HASH_BLOCK_BYTES,
    BlockHash,
    Manifest,
    root_of,
    write_manifest,
)
from xlmega.data.tokenizing import Say, place_vocabulary
from xlmega.errors import DataError
from xlmega.locking import locked
from xlmega.text.corpus import LANGUAGE
from xlmega.text.vocabulary import Vocabulary, load_vocabulary

BLOCK_TOKENS = 1 << 22
BLOCK_DOCUMENTS = 1 << 18
SHOWN_TOKENS = 40


@dataclass(frozen=True)
class Pair:
    """One .bin with its .idx, memory-mapped and found to agree."""

    prefix: Path
    dtype: str
    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    """[sequences]"""
    pointers: npt.NDArray[np.int64]
    """[sequences]: in bytes."""
    documents: npt.NDArray[np.int64]
    """[documents + 1]: at which sequence each begins."""

    def document_lengths(self) -> Iterator[npt.NDArray[np.int64]]:
        """Tokens of each document, in blocks; those without any are left out."""
        for first in range(0, len(self.documents) - 1, BLOCK_DOCUMENTS):
            at = self.documents[first : first + BLOCK_DOCUMENTS + 1]
            inside = np.minimum(at, len(self.pointers) - 1)
            starts = np.where(at < len(self.pointers), self.pointers[inside] // self.tokens.itemsize, len(self.tokens))
            lengths = np.diff(starts)
            if len(lengths := lengths[lengths > 0]):
                yield lengths


def open_pair(prefix: Path) -> Pair:
    """Map the files of a Megatron prefix after checking that they are whole and agree."""
    idx, bin_ = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
    for file in (idx, bin_):
        if not file.is_file():
            raise DataError(f"there is no '{file}'. A prefix is the common beginning of a .bin and an .idx file.")
    with idx.open("rb") as opened:
        header = opened.read(HEADER.size)
    magic, version, code, sequences, documents = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != 1:
        raise DataError(f"'{idx}' is not an index of Megatron: it begins with {header[:17]!r}.")
    names = {code: name for name, code in DTYPE_CODES.items()}
    if code not in names:
        known = ", ".join(names.values())
        raise DataError(f"'{idx}' has dtype code {code}, which is no whole number; ids are {known}.")
    plain = HEADER.size + 12 * sequences + 8 * documents
    # A byte for each sequence may follow: its mode, which only multimodal data has.
    if idx.stat().st_size not in (plain, plain + sequences) or documents < 2 or sequences < 1:
        raise DataError(
            f"'{idx}' has {idx.stat().st_size} bytes, but {sequences} sequences and {documents - 1} documents need "
            f"{plain}. It was cut off or is of another format: copy it again."
        )
    mapped: Any = partial(np.memmap, idx, mode="r")
    lengths = mapped(dtype="<i4", offset=HEADER.size, shape=(sequences,))
    pointers = mapped(dtype="<i8", offset=HEADER.size + 4 * sequences, shape=(sequences,))
    starts = mapped(dtype="<i8", offset=HEADER.size + 12 * sequences, shape=(documents,))
    dtype = np.dtype(names[code]).newbyteorder("<")
    end = 0
    for first in range(0, sequences, BLOCK_DOCUMENTS):
        block = lengths[first : first + BLOCK_DOCUMENTS].astype(np.int64)
        ends = end + np.cumsum(block) * dtype.itemsize
        if block.min() < 0 or np.any(pointers[first : first + BLOCK_DOCUMENTS] != ends - block * dtype.itemsize):
            raise DataError(f"'{idx}' is damaged: its sequences do not follow one another. Copy it again.")
        end = int(ends[-1])
    steps = (np.diff(starts[first : first + BLOCK_DOCUMENTS + 1]) for first in range(0, documents, BLOCK_DOCUMENTS))
    if starts[0] != 0 or starts[-1] != sequences or any(len(step) and step.min() < 0 for step in steps):
        raise DataError(f"'{idx}' is damaged: its documents are not in order. Copy it again.")
    if bin_.stat().st_size != end or not end:
        raise DataError(
            f"'{bin_}' has {bin_.stat().st_size} bytes, but '{idx.name}' describes {end} bytes of {names[code]}. "
            "They do not belong together, or one was cut off: copy both again."
        )
    return Pair(prefix, names[code], np.memmap(bin_, dtype=dtype, mode="r"), lengths, pointers, starts)


def adopt_tokens(
    prefixes: Mapping[str, Sequence[Path]],
    vocabulary_folder: Path,
    output: Path,
    *,
    split: str = "train",
    copy: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> list[Manifest]:
    """Make `output/split` of Megatron's files, by language, and copy the vocabulary beside it."""
    if not prefixes or split == "vocabulary" or not LANGUAGE.fullmatch(split):
        raise DataError(f"nothing to adopt as split '{split}': languages have prefixes, as in fr=old/fr_text.")
    for language in prefixes:
        if not LANGUAGE.fullmatch(language):
            raise DataError(f"'{language}' cannot be a language code: letters, digits, '_', '-' and '.' only.")
    vocabulary = load_vocabulary(vocabulary_folder)
    pairs = {language: [open_pair(prefix) for prefix in several] for language, several in sorted(prefixes.items())}
    folder, part = output / split, output / f"{split}.part"
    if folder.exists() and not (overwrite and any(folder.glob("*.idx"))):
        raise DataError(f"'{folder}' exists. Choose another output or --split, or add --overwrite.")
    with locked(output):
        place_vocabulary(vocabulary, output / "vocabulary", overwrite)
        with write_errors(part):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        made = []
        for language, several in pairs.items():
            first = several[0].tokens[:SHOWN_TOKENS].tolist()
            begins = vocabulary.decode([id for id in first if 0 <= id < vocabulary.size])
            say(f"{language}: {sum(len(pair.tokens) for pair in several):,} tokens, beginning {begins[:60]!r}")
            about: dict[str, Any] = {"language": language, "split": split, "vocabulary_hash": vocabulary.hash}
            adopt = _copied if copy or len(several) > 1 else _linked
            made.append(adopt(several, part / language, vocabulary, about))
            if made[-1].document_suffix is None:
                end = vocabulary.eod_id
                say(f"{language}: not every document ends in id {end} ({vocabulary.piece(end)})")
        with write_errors(part):
            if folder.exists():
                shutil.rmtree(folder)
            part.replace(folder)
    return made


def _linked(pairs: Sequence[Pair], prefix: Path, vocabulary: Vocabulary, about: Mapping[str, Any]) -> Manifest:
    (pair,) = pairs
    digest, utf8_bytes, low, high = BlockHash(HASH_BLOCK_BYTES), 0, vocabulary.size, -1
    for ids in _checked(pair, vocabulary):
        digest.update(np.ascontiguousarray(ids).data.cast("B"))
        utf8_bytes += int(vocabulary.piece_bytes[ids].sum(dtype=np.int64))
        low, high = min(low, int(ids.min())), max(high, int(ids.max()))
    documents = sum(len(lengths) for lengths in pair.document_lengths())
    idx, bin_ = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
    with write_errors(prefix):
        idx_blocks = write_index(idx, pair.dtype, documents, pair.document_lengths)
        bin_.symlink_to(with_suffix(pair.prefix, ".bin").resolve())
        manifest = Manifest(
            **about,
            vocabulary_size=vocabulary.size,
            eod_id=vocabulary.eod_id,
            documents=documents,
            tokens=len(pair.tokens),
            utf8_bytes=utf8_bytes,
            min_id=low,
            max_id=high,
            dtype=pair.dtype,
            bin_bytes=bin_.stat().st_size,
            idx_bytes=idx.stat().st_size,
            bin_sha256=root_of(digest.digests),
            idx_sha256=root_of(idx_blocks),
            block_bytes=HASH_BLOCK_BYTES,
            bin_blocks=digest.digests,
            idx_blocks=idx_blocks,
            document_suffix=_suffix(pairs, vocabulary),
        )
        write_manifest(with_suffix(prefix, ".json"), manifest)
    return manifest


def _copied(pairs: Sequence[Pair], prefix: Path, vocabulary: Vocabulary, about: Mapping[str, Any]) -> Manifest:
    writer = IndexedWriter(prefix, token_dtype(vocabulary.size))
    utf8_bytes = 0
    for pair in pairs:
        for ids in _checked(pair, vocabulary):
            utf8_bytes += int(vocabulary.piece_bytes[ids].sum(dtype=np.int64))
        at = 0
        for lengths in _groups(pair):
            ids = pair.tokens[at : at + int(lengths.sum())]
            writer.add_documents(ids, lengths)
            at += len(ids)
    return writer.finish(
        **about,
        vocabulary_size=vocabulary.size,
        eod_id=vocabulary.eod_id,
        utf8_bytes=utf8_bytes,
        document_suffix=_suffix(pairs, vocabulary),
    )


def _groups(pair: Pair) -> Iterator[npt.NDArray[np.int64]]:
    """Lengths of consecutive documents, about BLOCK_TOKENS together."""
    for lengths in pair.document_lengths():
        group = np.cumsum(lengths) // BLOCK_TOKENS
        yield from np.split(lengths, np.flatnonzero(np.diff(group)) + 1)


def _checked(pair: Pair, vocabulary: Vocabulary) -> Iterator[npt.NDArray[Any]]:
    """The tokens in blocks, each found to be ids of the vocabulary."""
    for first in range(0, len(pair.tokens), BLOCK_TOKENS):
        ids = pair.tokens[first : first + BLOCK_TOKENS]
        wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary.size))
        if len(wrong):
            raise DataError(
                f"'{pair.prefix}.bin' has id {ids[wrong[0]]} at token {first + wrong[0]}, but the vocabulary has "
                f"{vocabulary.size} ids, 0 to {vocabulary.size - 1}. It was made with another vocabulary."
            )
        yield ids


def _suffix(pairs: Sequence[Pair], vocabulary: Vocabulary) -> tuple[int, ...] | None:
    """The end of a document, where every document has it."""
    for pair in pairs:
        at = 0
        for lengths in pair.document_lengths():
            ends = at + np.cumsum(lengths)
            if np.any(pair.tokens[ends - 1] != vocabulary.eod_id):
                return None
            at = int(ends[-1])
    return (vocabulary.eod_id,)

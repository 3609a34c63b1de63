"""Aligned sentence pairs -> step -> two padded sides: what sense adaptation is trained on.

In: JSON lines with `translation: {SRC: text, TGT: text}` (.jsonl, .gz or .zst; or the folder that
tools/build_corpus.py writes them to), a vocabulary, a length. Out: `Pairs.at(step)` gives this data-parallel rank's
micro-batches of both sides, truncated and padded, without special tokens. Guaranteed: a function of the step alone;
each epoch visits every pair once, in an order that knows the seed, the two languages and the epoch; a step holds the
same pairs whatever the data-parallel size and the micro-batch, in the same order, as in-batch negatives need.

The texts are kept as bytes back to back; a pair is tokenised when its step is read, which read-ahead hides.
Source: METHODS §5.5 (arXiv 2601.10310).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xlmega.data.batches import num_micro_batches, slots_of_rank
from xlmega.data.windows import epoch_key, permute, stream_key
from xlmega.errors import ConfigError, DataError
from xlmega.text.records import SUFFIXES, read_records


class Tokenizes(Protocol):
    """What pairs need of a vocabulary."""

    pad_id: int | None
    eod_id: int

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[NDArray[np.int32]]: ...


@dataclass(frozen=True, eq=False)
class PairBatch:
    """M micro-batches of b pairs for one data-parallel rank, at most L ids a side."""

    source: NDArray[np.int64]
    """[M, b, L]."""
    target: NDArray[np.int64]
    """[M, b, L]."""
    source_lengths: NDArray[np.int64]
    """[M, b]: how many ids of each source are text; what follows is padding."""
    target_lengths: NDArray[np.int64]
    """[M, b]."""
    pairs: NDArray[np.int64]
    """[M, b]: which pair of the files each is."""
    slots: NDArray[np.int64]
    """[M, b]: its place in the run."""


@dataclass(frozen=True, eq=False)
class PairTexts:
    """Every pair of some files, in file order."""

    source_language: str
    target_language: str
    texts: bytes
    ends: NDArray[np.int64]
    """[2 * pairs]: where each text ends in `texts`; source and target in turns."""

    def __len__(self) -> int:
        return len(self.ends) // 2

    def pair(self, index: int) -> tuple[str, str]:
        """The two texts of a pair."""
        start = int(self.ends[2 * index - 1]) if index else 0
        middle, end = (int(end) for end in self.ends[2 * index : 2 * index + 2])
        return self.texts[start:middle].decode(), self.texts[middle:end].decode()


def pair_file(folder: Path, source_language: str, target_language: str, split: str = "train") -> Path:
    """The file of two languages, in either order, in a folder of pairs: A-B.SPLIT.jsonl(.gz, .zst)."""
    for first, second in ((source_language, target_language), (target_language, source_language)):
        for suffix in SUFFIXES:
            file = folder / f"{first}-{second}.{split}{suffix}"
            if file.is_file():
                return file
    raise DataError(
        f"'{folder}' has no pairs of {source_language} and {target_language}: there is neither "
        f"{source_language}-{target_language}.{split}.jsonl nor the reverse, plain, .gz or .zst."
    )


def read_pairs(path: Path, source_language: str, target_language: str, split: str = "train") -> PairTexts:
    """The pairs of a file, or of the two languages' file in a folder; a DataError names the first line that is none."""
    file = pair_file(path, source_language, target_language, split) if path.is_dir() else path
    buffer, ends = bytearray(), []
    for number, record in read_records(file):
        for text in _sides(file, number, record, source_language, target_language):
            try:
                buffer += text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{file}:{number}: the text cannot be encoded ({error}).") from None
            ends.append(len(buffer))
    if not ends:
        raise DataError(f"'{file}' has no pairs: each line is {{'translation': {{A: text, B: text}}}}.")
    return PairTexts(source_language, target_language, bytes(buffer), np.array(ends, dtype=np.int64))


def _sides(file: Path, number: int, record: Any, source: str, target: str) -> tuple[str, str]:
    sides = record.get("translation") if isinstance(record, dict) else None
    if not isinstance(sides, dict):
        raise DataError(f"{file}:{number}: there is no 'translation' with the texts of two languages.")
    texts = sides.get(source), sides.get(target)
    for code, text in zip((source, target), texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            known = ", ".join(map(str, sides))
            raise DataError(f"{file}:{number}: there is no text in '{code}', but in {known}.")
    return str(texts[0]), str(texts[1])


class Pairs:
    """The stream of pairs of one data-parallel rank, see the module."""

    def __init__(
        self,
        texts: PairTexts,
        vocabulary: Tokenizes,
        *,
        max_length: int,
        batch_pairs: int,
        micro_batch_pairs: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
    ) -> None:
        if max_length < 1:
            raise ConfigError(f"a side of a pair has at least 1 token, but max_length={max_length}.")
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self._texts, self._vocabulary, self._max_length = texts, vocabulary, max_length
        self._padding = vocabulary.eod_id if vocabulary.pad_id is None else vocabulary.pad_id
        count = num_micro_batches(batch_pairs, micro_batch_pairs, dp_size)
        self._batch_pairs = batch_pairs
        self._first_slots = slots_of_rank(count, micro_batch_pairs, dp_rank, dp_size)
        self._key = np.uint64(stream_key(seed, f"{texts.source_language}>{texts.target_language}"))

    def at(self, step: int) -> PairBatch:
        """The pairs of `step`, counted from 0; any step, in any order."""
        assert step >= 0, step
        slots = step * self._batch_pairs + self._first_slots
        epochs, places = np.divmod(slots.ravel(), len(self._texts))
        keys = epoch_key(np.full(places.shape, self._key), epochs)
        pairs = permute(places, np.full(places.shape, len(self._texts)), keys)
        both = [self._texts.pair(int(pair)) for pair in pairs]
        source, source_lengths = self._pad([texts[0] for texts in both])
        target, target_lengths = self._pad([texts[1] for texts in both])
        shape = slots.shape
        return PairBatch(
            source.reshape(*shape, -1),
            target.reshape(*shape, -1),
            source_lengths.reshape(shape),
            target_lengths.reshape(shape),
            pairs.reshape(shape),
            slots,
        )

    def epochs(self, steps: int) -> float:
        """Passes over the pairs in so many steps."""
        return steps * self._batch_pairs / len(self._texts)

    def _pad(self, texts: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([n, L] ids, [n] lengths)."""
        ids = np.full((len(texts), self._max_length), self._padding, dtype=np.int64)
        lengths = np.zeros(len(texts), dtype=np.int64)
        for row, found in enumerate(self._vocabulary.encode_batch(texts)):
            lengths[row] = min(len(found), self._max_length)
            ids[row, : lengths[row]] = found[: lengths[row]]
        return ids, lengths

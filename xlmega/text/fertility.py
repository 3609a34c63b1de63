"""A vocabulary and text in, how well it serves each language out: the fertility report.

For each language: tokens a word (between white space, so of little meaning where words are not spaced), a character and
a UTF-8 byte; the share of tokens that are single bytes standing in for characters without a piece, and of unknown
pieces. Where parallel text is given, also parity: tokens for the same sentences, relative to a reference language (1 is
equal service).

Source: arXiv:2305.15425 (parity).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xlmega.errors import ConfigError, DataError
from xlmega.text.corpus import Document
from xlmega.text.records import read_records
from xlmega.text.vocabulary import Vocabulary

BATCH = 256


@dataclass
class Fertility:
    """Counts of one language."""

    documents: int = 0
    words: int = 0
    characters: int = 0
    utf8_bytes: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    unk_tokens: int = 0
    parity: float | None = None
    """Tokens over those of the reference language for the same sentences."""

    def ratios(self) -> dict[str, float]:
        """What the table shows; 0 where there is nothing to divide by."""
        return {
            "tokens_per_word": self.tokens / max(1, self.words),
            "tokens_per_character": self.tokens / max(1, self.characters),
            "tokens_per_byte": self.tokens / max(1, self.utf8_bytes),
            "frac_byte_tokens": self.byte_tokens / max(1, self.tokens),
            "frac_unk_tokens": self.unk_tokens / max(1, self.tokens),
        }


@dataclass
class _Counter:
    vocabulary: Vocabulary
    found: dict[str, Fertility] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._is_byte = np.zeros(self.vocabulary.size, bool)
        # Every text of a byte-level BPE is bytes; a byte of ASCII is a character, and no stand-in for one.
        self._is_byte[[id for id in self.vocabulary.byte_ids if self.vocabulary.text_of(id)[0] >= 0x80]] = True

    def add(self, documents: Sequence[Document]) -> None:
        for document, ids in zip(documents, self.vocabulary.encode_batch([d.text for d in documents]), strict=True):
            row = self.found.setdefault(document.language, Fertility())
            row.documents += 1
            row.words += len(document.text.split())
            row.characters += len(document.text)
            row.utf8_bytes += len(document.text.encode())
            row.tokens += len(ids)
            row.byte_tokens += int(self._is_byte[ids].sum())
            row.unk_tokens += int((ids == self.vocabulary.unk_id).sum()) if self.vocabulary.unk_id is not None else 0


def measure_fertility(documents: Iterable[Document], vocabulary: Vocabulary) -> dict[str, Fertility]:
    """Counts by language, sorted by code; the text is streamed."""
    counter = _Counter(vocabulary)
    for batch in _batches(documents):
        counter.add(batch)
    return dict(sorted(counter.found.items()))


def measure_parity(files: Iterable[Path], vocabulary: Vocabulary, reference: str) -> dict[str, float]:
    """Each language's tokens over the reference's, for the sentences that `files` pair the two in.

    A line is {"translation": {"en": "...", "fr": "..."}}.
    """
    ours: dict[str, int] = {}
    theirs: dict[str, int] = {}
    for file in files:
        for batch in _batches(_pairs(file, reference)):
            ids = vocabulary.encode_batch([text for _, *texts in batch for text in texts])
            for k, (language, *_) in enumerate(batch):
                theirs[language] = theirs.get(language, 0) + len(ids[2 * k])
                ours[language] = ours.get(language, 0) + len(ids[2 * k + 1])
    return {language: ours[language] / max(1, theirs[language]) for language in sorted(ours)}


def _pairs(file: Path, reference: str) -> Iterator[tuple[str, str, str]]:
    for number, record in read_records(file):
        pair = record.get("translation")
        if not isinstance(pair, dict) or not all(isinstance(text, str) for text in pair.values()):
            raise DataError(f"{file}:{number}: no pair. Lines are {{'translation': {{'en': '...', 'fr': '...'}}}}.")
        if reference not in pair:
            raise ConfigError(f"{file}:{number}: a pair of {' and '.join(pair)}, without the reference '{reference}'.")
        for language, text in pair.items():
            if language != reference:
                yield language, pair[reference], text


def fertility_table(found: Mapping[str, Fertility]) -> str:
    """The report for reading."""
    head = ("language", "documents", "MB", "tokens/word", "tokens/char", "tokens/byte", "bytes", "unk", "parity")
    lines = [head]
    for language, row in found.items():
        ratios = row.ratios()
        lines.append(
            (
                language,
                f"{row.documents:,}",
                f"{row.utf8_bytes / 1e6:,.2f}",
                f"{ratios['tokens_per_word']:.3f}",
                f"{ratios['tokens_per_character']:.3f}",
                f"{ratios['tokens_per_byte']:.3f}",
                f"{100 * ratios['frac_byte_tokens']:.2f} %",
                f"{100 * ratios['frac_unk_tokens']:.2f} %",
                "" if row.parity is None else f"{row.parity:.3f}",
            )
        )
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    first, *others = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(w) for cell, w in zip(line[1:], others, strict=True))])
        for line in lines
    )


def fertility_json(found: Mapping[str, Fertility], vocabulary: Vocabulary) -> dict[str, Any]:
    """The report for programs: counts and ratios by language."""
    about = {"kind": vocabulary.kind, "size": vocabulary.size, "hash": vocabulary.hash}
    return {"vocabulary": about, "languages": {code: {**asdict(row), **row.ratios()} for code, row in found.items()}}


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch

"""Perplexity per language, with its numerator and denominators written out, under a definition that is named.

In: a Scorer, a vocabulary, and each language's documents as ids. Out: for each language a `Perplexity`: nats summed
over the targets that count, and how many tokens, characters and bytes these spell; every quotient is derived.

Definitions, all over documents that end with an end-of-document id <D>:
- `documents`: each document alone, after a <D>, cut to the model's length; all its ids count, <D> too (METHODS §2.8).
- `sliding`: all documents as one stream; windows of `length` move on by `last_n` ids, and the last `last_n` targets of
  each count. Nothing before the first `length - last_n` targets is ever scored (METHODS §1.8).
- `continuous`: all documents as one stream in windows of `length` that do not overlap; all targets count. What
  validation during training reports.
The published "mean of batch exponentials" (METHODS §4.7) is reported beside them on request: exp of each batch's mean
loss, averaged over batches. It depends on the batch size and is no perplexity of anything; it is for comparison alone.
Guaranteed: figures depend on neither batching nor the order of the languages, beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.errors import ConfigError, DataError
from xlmega.evaluation.scoring import Scorer, token_scores
from xlmega.text.vocabulary import Vocabulary

Ids = npt.NDArray[Any]
DEFINITIONS = ("documents", "sliding", "continuous")


@dataclass(frozen=True)
class Definition:
    """Which sequences are scored, and which of their targets count."""

    kind: str = "documents"
    length: int = 0
    """Positions of a window, or of the longest document; 0 takes the model's."""
    last_n: int = 128
    """Of `sliding`: how far a window moves, and how many of its targets count."""
    batch_windows: int = 0
    """Sequences in a batch of the mean of batch exponentials; 0 leaves that figure out."""

    def checked(self, max_positions: int) -> Definition:
        """With its length filled in; a ConfigError if the model or the rule does not allow it."""
        length = self.length or max_positions
        if self.kind not in DEFINITIONS:
            raise ConfigError(f"definition '{self.kind}' is not known. Known: {', '.join(DEFINITIONS)}.")
        if not 1 <= length <= max_positions:
            raise ConfigError(f"length={length}; the model has 1 to {max_positions} positions.")
        if self.kind == "sliding" and not 1 <= self.last_n <= length:
            raise ConfigError(f"last_n={self.last_n}; a window of length {length} can count 1 to {length} targets.")
        if self.batch_windows < 0:
            raise ConfigError(f"batch_windows={self.batch_windows} must not be negative.")
        return Definition(self.kind, length, self.last_n if self.kind == "sliding" else 0, self.batch_windows)


@dataclass(frozen=True)
class Span:
    """A sequence to score: targets are ids[1:], those from number `first` on count."""

    ids: Ids
    first: int = 0


@dataclass(frozen=True)
class Perplexity:
    """The sums over one language's targets that count."""

    nats: float = 0.0
    tokens: int = 0
    characters: int = 0
    bytes: int = 0
    sequences: int = 0
    cut_tokens: int = 0
    """Targets beyond the length of `documents`, or before the first that `sliding` counts: in no figure here."""
    batch_exponentials: tuple[float, ...] = field(default=(), repr=False)

    @property
    def perplexity(self) -> float:
        """Per token: comparable between models of one vocabulary only."""
        return _exp(self.nats, self.tokens)

    @property
    def nats_per_character(self) -> float:
        """§1.8's normalised loss."""
        return self.nats / self.characters if self.characters else math.nan

    @property
    def perplexity_per_character(self) -> float:
        """§1.8's normalised perplexity."""
        return _exp(self.nats, self.characters)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between vocabularies, and between languages as far as their bytes are."""
        return self.nats / math.log(2.0) / self.bytes if self.bytes else math.nan

    @property
    def mean_of_batch_exponentials(self) -> float | None:
        """§4.7's figure; None where it was not asked for."""
        return sum(self.batch_exponentials) / len(self.batch_exponentials) if self.batch_exponentials else None

    def table(self) -> dict[str, float | int | None]:
        """For result.json: sums first, then what follows from them."""
        told: dict[str, float | int | None] = {
            "nats": self.nats,
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "sequences": self.sequences,
            "cut_tokens": self.cut_tokens,
            "perplexity": self.perplexity,
            "nats_per_character": self.nats_per_character,
            "perplexity_per_character": self.perplexity_per_character,
            "bits_per_byte": self.bits_per_byte,
        }
        if self.batch_exponentials:
            told["mean_of_batch_exponentials"] = self.mean_of_batch_exponentials
        return told


def total(scores: Iterable[Perplexity]) -> Perplexity:
    """Languages together, each token counted alike (micro-averaged)."""
    found = list(scores)
    return Perplexity(
        nats=math.fsum(one.nats for one in found),
        tokens=sum(one.tokens for one in found),
        characters=sum(one.characters for one in found),
        bytes=sum(one.bytes for one in found),
        sequences=sum(one.sequences for one in found),
        cut_tokens=sum(one.cut_tokens for one in found),
        batch_exponentials=tuple(value for one in found for value in one.batch_exponentials),
    )


@dataclass(frozen=True)
class Spelling:
    """How much text each id of a model stands for, by the id as the model has it."""

    bytes: npt.NDArray[np.int64]
    characters: npt.NDArray[np.int64]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Spelling:
        """Characters are counted by their first bytes, so letters that are spelt in byte pieces count once."""
        texts = [vocabulary.text_of(id) for id in range(vocabulary.size)]
        sizes = np.array([len(text) for text in texts], dtype=np.int64)
        # Bytes 0b10...... continue a character of UTF-8.
        first = np.array([sum(byte & 0xC0 != 0x80 for byte in text) for text in texts], dtype=np.int64)
        return cls(sizes, first)


def spans_of(documents: Iterable[Ids], definition: Definition, eod_id: int) -> Iterator[Span]:
    """The sequences of a checked definition; every document ends with `eod_id`."""
    if definition.kind == "documents":
        for ids in documents:
            yield Span(np.concatenate([[eod_id], ids[: definition.length]]))
        return
    length = definition.length
    step = definition.last_n or length
    buffer: Ids = np.empty(0, dtype=np.int64)
    parts: list[Ids] = []
    held = 0
    for ids in documents:
        parts.append(np.asarray(ids, dtype=np.int64))
        held += len(ids)
        if held > length:
            buffer, parts = np.concatenate([buffer, *parts]), []
            at = 0
            while len(buffer) - at > length:
                yield Span(buffer[at : at + length + 1], length - step)
                at += step
            buffer = buffer[at:]
            held = len(buffer)
    rest = np.concatenate([buffer, *parts])
    # The last window is short. Its first targets have been counted, as in every window.
    if len(rest) - 1 > length - step:
        yield Span(rest, length - step)


def perplexity(
    scorer: Scorer,
    documents: Iterable[Ids],
    definition: Definition,
    spelling: Spelling,
    eod_id: int,
    *,
    batch_tokens: int = 8192,
    numbering: npt.NDArray[Any] | None = None,
) -> Perplexity:
    """The sums of one language. `numbering` gives the model's id for each id of the documents (a clone, a second
    vocabulary); text is counted by the documents' own ids, which `spelling` is of."""
    definition = definition.checked(scorer.max_positions)
    num_targets = 0

    def counted() -> Iterator[Ids]:
        nonlocal num_targets
        for ids in documents:
            num_targets += len(ids)
            yield ids

    pending: list[Span] = []

    def sequences() -> Iterator[Ids]:
        for span in spans_of(counted(), definition, eod_id):
            pending.append(span)
            if span.ids.max(initial=0) >= len(spelling.bytes):
                raise DataError(
                    f"id {span.ids.max()} is not one of the vocabulary's {len(spelling.bytes)}: the tokens were made "
                    "with another vocabulary."
                )
            yield span.ids if numbering is None else numbering[span.ids]

    sums = {"tokens": 0, "characters": 0, "bytes": 0}
    nats: list[float] = []
    batch: list[npt.NDArray[np.float64]] = []
    exponentials: list[float] = []
    for scores in token_scores(scorer, sequences(), batch_tokens):
        span = pending.pop(0)
        targets = span.ids[span.first + 1 :]
        nats.append(-float(scores[span.first :].sum()))
        sums["tokens"] += len(targets)
        sums["characters"] += int(spelling.characters[targets].sum())
        sums["bytes"] += int(spelling.bytes[targets].sum())
        if definition.batch_windows:
            batch.append(scores[span.first :])
            if len(batch) == definition.batch_windows:  # a batch that is not full is not drawn by the published code
                losses = -np.concatenate(batch)
                exponentials.append(_exp(float(losses.sum()), len(losses)))
                batch = []
    scoreable = num_targets if definition.kind == "documents" else max(0, num_targets - 1)
    return Perplexity(
        nats=math.fsum(nats),
        sequences=len(nats),
        cut_tokens=scoreable - sums["tokens"],
        batch_exponentials=tuple(exponentials),
        **sums,
    )


def report(scores: Mapping[str, Perplexity]) -> list[str]:
    """A table, one language a line, and all together where there are several."""
    columns: list[tuple[str, int, Callable[[Perplexity], str]]] = [
        ("perplexity", 11, lambda one: f"{one.perplexity:.4f}"),
        ("bits/byte", 10, lambda one: f"{one.bits_per_byte:.4f}"),
        ("nats/char", 10, lambda one: f"{one.nats_per_character:.4f}"),
        ("nats", 14, lambda one: f"{one.nats:.2f}"),
        ("tokens", 11, lambda one: f"{one.tokens:,}"),
        ("characters", 12, lambda one: f"{one.characters:,}"),
        ("bytes", 12, lambda one: f"{one.bytes:,}"),
        ("cut", 9, lambda one: f"{one.cut_tokens:,}"),
    ]
    if any(one.batch_exponentials for one in scores.values()):
        columns.append(("mean exp", 13, lambda one: f"{one.mean_of_batch_exponentials or math.nan:.4f}"))
    rows = {**scores, **({"all": total(scores.values())} if len(scores) > 1 else {})}
    width = max(8, *(len(name) for name in rows))
    lines = ["language".ljust(width) + "".join(title.rjust(size) for title, size, _ in columns)]
    return lines + [
        name.ljust(width) + "".join(cell(one).rjust(size) for _, size, cell in columns) for name, one in rows.items()
    ]


def _exp(nats: float, count: int) -> float:
    if not count:
        return math.nan
    return math.exp(nats / count) if nats / count < 700.0 else math.inf

"""Per-language scores on named validation sets, in nats per token and bits per byte.

In come validation batches and the vocabulary's bytes per piece; out go, for each set and language, the sums and the two
quotients. Numerators and denominators are kept: nats are summed over every predicted token, bytes are those of the text
that these tokens spell. Every rank calls it; the figures do not depend on the layout beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from xlmega.data.batches import ValidationBatches
from xlmega.training.engine import Engine


@dataclass(frozen=True)
class Score:
    """Sums over the predicted tokens of one language (or of a whole set)."""

    nats: float
    tokens: float
    bytes: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.tokens, 1.0)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2.0) / max(self.bytes, 1.0)

    def table(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {
            "nats_per_token": self.nats_per_token,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


class ValidationSet:
    """One named set, ready to be scored again and again."""

    def __init__(self, name: str, batches: ValidationBatches, piece_bytes: npt.NDArray[np.int32]):
        self.name = name
        self.languages = batches.languages
        self._batches = batches
        self._piece_bytes = piece_bytes

    def score(self, engine: Engine, before_batch: Callable[[], None] = lambda: None) -> dict[str, Score]:
        """The score of each language; the same on every rank. `before_batch` is for whoever watches the time."""
        sums = np.zeros((3, len(self.languages)))
        for batch in self._batches:
            before_batch()
            # Bytes ride along as a sum over ranks: each rank knows those of its own windows.
            sizes = self._piece_bytes[batch.tokens[..., 1:]] * batch.weights
            spelt = np.zeros(len(self.languages))
            np.add.at(spelt, batch.languages.ravel(), sizes.reshape(batch.languages.size, -1).sum(1))
            report = engine.evaluate(batch, num_languages=len(self.languages), extra=spelt)
            sums += np.array([report.nll, report.targets, report.extra])
        return {name: Score(*sums[:, k].tolist()) for k, name in enumerate(self.languages)}


def total(scores: dict[str, Score]) -> Score:
    """All languages of a set together, each token counted alike."""
    values = scores.values()
    return Score(sum(s.nats for s in values), sum(s.tokens for s in values), sum(s.bytes for s in values))

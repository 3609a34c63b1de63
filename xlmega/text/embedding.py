"""Sentence pairs in, how alike their meanings are: the door of sentence-transformers (LaBSE), which is optional.

The score of a pair is the cosine of the two sentences' embeddings. Scores depend on the model and, in their last
digits, on the machine; on one machine the same pairs in the same batches give the same scores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xlmega.errors import DataError

MODEL = "sentence-transformers/LaBSE"
WITHOUT = "or add --embedding_threshold 0 to go without sentence embeddings"


class Similarity:
    """A model of sentences. Constructing one fails at once where the package or the model is not to be had."""

    def __init__(self, model: str = MODEL, batch_size: int = 512) -> None:
        try:
            import sentence_transformers
        except ImportError:
            raise DataError(
                "sentence embeddings need the package sentence-transformers: pip install sentence-transformers; "
                f"{WITHOUT}."
            ) from None
        self._batch_size = batch_size
        try:
            self._model: Any = sentence_transformers.SentenceTransformer(model, trust_remote_code=False)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"cannot load the sentence embeddings '{model}': {first} Give --embedding_model a folder that holds "
                f"them, {WITHOUT}."
            ) from None

    def scores(self, sources: Sequence[str], targets: Sequence[str]) -> list[float]:
        """The cosine of each source with its target, rounded to 6 digits."""
        embedded = [
            self._model.encode(
                list(texts),
                batch_size=self._batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            ).astype("float64")
            for texts in (sources, targets)
        ]
        return [round(float(score), 6) for score in (embedded[0] * embedded[1]).sum(axis=1)]


def identity(model: str) -> str:
    """What makes a model the same one: its name, and for a folder also the sizes and times of its files."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return os.fspath(folder.resolve()) + ";" + ";".join(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)

"""Models that are told the cluster of a document, by ids in front of it: the ablation beside experts (METHODS §2.6).

A mark is made of byte pieces that UTF-8 never uses, so every vocabulary with bytes has marks, their rows are in every
model, and no text contains one: one piece up to 13 clusters, two up to 169. Training tokens get them from
`parts.divide_tokens`; `ToldScorer` puts them into what is scored, where they are seen and never count.

What a document's mark tells of it is known from all of its text, up to log2(k) bits of it: a model that is told looks
better by that much than one that is not, also where it has learnt nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from xlmega.errors import ConfigError
from xlmega.evaluation.scoring import Scorer
from xlmega.experts.clusterer import Clusterer, LanguageClusterer, TextClusterer
from xlmega.text.vocabulary import Vocabulary

_UNUSED_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))


def cluster_marks(vocabulary: Vocabulary, num_clusters: int) -> list[tuple[int, ...]]:
    """For each cluster the ids that stand in front of its documents."""
    by_byte = {vocabulary.text_of(id): id for id in vocabulary.byte_ids}
    unused = [by_byte[bytes([value])] for value in _UNUSED_BYTES if bytes([value]) in by_byte]
    length = 1 if num_clusters <= len(unused) else 2
    if num_clusters > len(unused) ** length:
        raise ConfigError(
            f"{num_clusters} clusters need marks of byte pieces that text never has, and this {vocabulary.kind} "
            f"vocabulary gives {len(unused) ** 2}. Take one of tools/train_vocabulary.py, or at most 169 clusters."
        )
    return list(itertools.islice(itertools.product(unused, repeat=length), num_clusters))


class ToldScorer:
    """A model that was trained with marks, as a Scorer of texts without: each after an end-of-document id."""

    def __init__(
        self, inner: Scorer, marks: Sequence[tuple[int, ...]], cluster_of: Callable[[list[int]], int], eod_id: int
    ) -> None:
        self._inner, self._marks, self._cluster_of, self._eod_id = inner, torch.tensor(marks), cluster_of, eod_id
        self._length = self._marks.shape[1]
        self.vocab_size, self.max_positions = inner.vocab_size, inner.max_positions - self._length

    def log_probabilities(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        """fp32 [B, L]; each row is a document's beginning or all of it."""
        marks_BM = self._of(torch.cat([inputs_BL[:, 1:], targets_BL[:, -1:]], 1))
        marked = torch.cat([inputs_BL[:, :1], marks_BM, inputs_BL[:, 1:]], 1)
        targets = torch.cat([marks_BM, targets_BL], 1)
        return self._inner.log_probabilities(marked, targets)[:, self._length :]

    def next_distribution(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B, V]; the cluster is that of the text so far."""
        texts = inputs_BL[:, 1:].clone()
        for row, length in enumerate(lengths_B.tolist()):
            texts[row, length - 1 :] = self._eod_id
        marked = torch.cat([inputs_BL[:, :1], self._of(texts), inputs_BL[:, 1:]], 1)
        return self._inner.next_distribution(marked, lengths_B + self._length)

    def _of(self, texts_BL: torch.Tensor) -> torch.Tensor:
        clusters = []
        for ids in texts_BL.tolist():
            end = ids.index(self._eod_id) if self._eod_id in ids else len(ids)
            clusters.append(self._cluster_of(ids[:end]))
        return self._marks[torch.tensor(clusters)]


def told(inner: Scorer, clusterer: Clusterer, vocabulary: Vocabulary, language: str) -> ToldScorer:
    """A model that was trained with the marks of a clusterer's clusters, for text of one language."""
    if isinstance(clusterer, LanguageClusterer):
        if language not in clusterer.clusters:
            raise ConfigError(f"no cluster has '{language}': they have {', '.join(sorted(clusterer.clusters))}.")
        home = clusterer.clusters[language]
        cluster_of: Callable[[list[int]], int] = lambda ids: home  # noqa: E731
    elif isinstance(clusterer, TextClusterer):

        def cluster_of(ids: list[int]) -> int:
            vectors = clusterer.features.vectors([vocabulary.decode(ids)])
            return int(np.argmin(clusterer.distances(vectors)[0]))
    else:
        raise ConfigError("clusters by lot say nothing of a text, so a model cannot be told them.")
    return ToldScorer(inner, cluster_marks(vocabulary, clusterer.num_clusters), cluster_of, vocabulary.eod_id)

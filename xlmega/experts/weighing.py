"""How much each expert counts at each position of a text: rules from a prefix, from the experts' own words, or fixed.

For target l of a text, a rule sees `inputs[: l + 1]` only. `clustering` embeds the text of that prefix and compares it
with the clusters' centres,

    w_e ~ exp(-d_e^2 / T)        `published_square` squares d^2 once more, as the released c-BTM code does

`product` multiplies these weights by what each expert gave the token before, `bayes` a prior instead, and `posterior` a
prior by all tokens before; at the first target, where there is none, product is uniform and the other two the prior.
`cluster_ratio` r computes cluster weights for the first r of a text's positions and keeps the last of them.
Source: METHODS §2.8; weights always sum to 1, after `top_k` too.

Shape letters: B texts, L positions, E experts.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from xlmega.errors import ConfigError
from xlmega.experts.clusterer import TextClusterer
from xlmega.experts.features import prefix_vectors
from xlmega.text.vocabulary import Vocabulary

Weights = npt.NDArray[np.float64]
KINDS = ("clustering", "product", "bayes", "posterior", "uniform", "fixed")
USE_EXPERTS = ("product", "bayes", "posterior")
"""Kinds whose weights need every expert's probabilities."""


@dataclass(frozen=True)
class WeighingSettings:
    """Which rule, and its numbers."""

    kind: Literal["clustering", "product", "bayes", "posterior", "uniform", "fixed"] = "clustering"
    temperature: float = 0.1
    published_square: bool = False
    top_k: int = 0
    """Keep so many of the largest weights of each position; 0 keeps all."""
    cluster_ratio: float = 1.0
    prior: tuple[float, ...] = ()
    """Of bayes and posterior, and the weights of fixed; need not sum to 1; empty is uniform."""

    def problems(self) -> Iterator[str]:
        if self.kind not in KINDS:
            yield f"kind '{self.kind}' is not known. Known: {', '.join(KINDS)}."
        if not (math.isfinite(self.temperature) and self.temperature > 0.0):
            yield f"temperature must be positive, but is {self.temperature}."
        if self.top_k < 0:
            yield f"top_k must not be negative, but is {self.top_k}."
        if not 0.0 < self.cluster_ratio <= 1.0:
            yield f"cluster_ratio must be above 0 and at most 1, but is {self.cluster_ratio}."
        if any(not (math.isfinite(p) and p >= 0.0) for p in self.prior) or (self.prior and not any(self.prior)):
            yield f"prior must be numbers from 0, not all 0, but is {list(self.prior)}."
        if self.kind == "fixed" and not self.prior:
            yield "fixed weights are given by prior, and it is empty."


class Weighing:
    """A rule over `num_experts` experts."""

    def __init__(
        self,
        settings: WeighingSettings,
        num_experts: int,
        clusterer: TextClusterer | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        problems = list(settings.problems())
        if settings.prior and len(settings.prior) != num_experts:
            problems.append(f"prior has {len(settings.prior)} numbers, but there are {num_experts} experts.")
        if settings.top_k > num_experts:
            problems.append(f"top_k={settings.top_k}, but there are {num_experts} experts.")
        if settings.kind in ("clustering", "product"):
            if clusterer is None or vocabulary is None:
                problems.append(
                    f"{settings.kind} weights need the clusterer of the experts' clusters, and a vocabulary."
                )
            elif clusterer.num_clusters != num_experts:
                problems.append(f"the clusterer has {clusterer.num_clusters} clusters for {num_experts} experts.")
        if problems:
            raise ConfigError("\n  ".join(problems))
        self.settings, self.num_experts = settings, num_experts
        self._clusterer, self._vocabulary = clusterer, vocabulary
        prior = np.array(settings.prior or [1.0] * num_experts)
        self._prior = prior / prior.sum()

    @property
    def uses_experts(self) -> bool:
        """The weights depend on what the experts say, so all of them must be asked."""
        return self.settings.kind in USE_EXPERTS

    def before_experts(self, inputs: Sequence[Sequence[int]], targets: int) -> Weights:
        """[B, L, E] for texts of equal, padded length; what can be known without asking any expert."""
        if self.settings.kind in ("clustering", "product"):
            found = np.stack([self._by_cluster(ids) for ids in inputs])
        else:
            found = np.broadcast_to(self._prior, (len(inputs), targets, self.num_experts)).copy()
        return found if self.uses_experts else kept(found, self.settings.top_k)

    def with_experts(self, weights: Weights, log_p: Weights) -> Weights:
        """[B, L, E] from `before_experts` and the experts' log p of the targets [B, L, E]."""
        if not self.uses_experts:
            return weights
        if self.settings.kind == "posterior":
            said = np.cumsum(log_p, axis=1)
        else:
            said = log_p
        before = np.concatenate([np.zeros_like(said[:, :1]), said[:, :-1]], axis=1)
        with np.errstate(divide="ignore"):
            scores = np.log(weights) + before
        if self.settings.kind == "product":
            scores[:, 0] = 0.0
        scores -= scores.max(axis=2, keepdims=True)
        found = np.exp(scores)
        found /= found.sum(axis=2, keepdims=True)
        return kept(found, self.settings.top_k)

    def _by_cluster(self, ids: Sequence[int]) -> Weights:
        """[L, E] of one text."""
        assert self._clusterer is not None and self._vocabulary is not None
        length = len(ids)
        number = max(1, math.ceil(self.settings.cluster_ratio * length))
        pieces = texts_of(ids[:number], self._vocabulary)
        distances = self._clusterer.distances(prefix_vectors(self._clusterer.features, pieces))
        weights = cluster_weights(distances, self.settings.temperature, self.settings.published_square)
        return np.concatenate([weights, np.repeat(weights[-1:], length - number, axis=0)])


def cluster_weights(squared: npt.NDArray[np.floating], temperature: float, published_square: bool = False) -> Weights:
    """[..., E]: softmax of -d^2 / T for squared distances; `published_square` takes -(d^2)^2 / T."""
    scores = -(np.asarray(squared, np.float64) ** (2 if published_square else 1)) / temperature
    scores -= scores.max(axis=-1, keepdims=True)
    found: Weights = np.exp(scores)
    found /= found.sum(axis=-1, keepdims=True)
    return found


def kept(weights: Weights, top_k: int) -> Weights:
    """The `top_k` largest weights of each position, scaled to sum to 1; of equal ones the first. 0 keeps all."""
    if not top_k or top_k >= weights.shape[-1]:
        return weights
    order = np.argsort(-weights, axis=-1, kind="stable")
    result = weights.copy()
    np.put_along_axis(result, order[..., top_k:], 0.0, axis=-1)
    result /= result.sum(axis=-1, keepdims=True)
    return result


def texts_of(ids: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """What each id adds to the text so far; a character spelt in byte pieces comes with its last byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(vocabulary.text_of(int(id))) for id in ids]

"""What the senses of a Backpack mean: by the tokens they make likely, across languages, and in use.

In: a logical Backpack, its vocabulary, words, pairs of words, and token windows. Out: figures as plain data, which
`analysis.sense_reports` turns into tables and pictures. Nothing is trained.
- A sense of a word is read by E C(x)_k: how much it adds to every token's log-odds (METHODS §4.1).
- A word of several sub-words has the mean of their senses. (The published script adds them up and divides by the number
  of characters; for cosines the two agree, for log-odds they do not.)
- Use: how the mix is shared among senses, by the norms of what each contributes, and what is lost without them
  (METHODS §5.11; contributions are left out or levelled, never rescaled).

Shape letters: N words, K senses, D hidden_size, V vocabulary, B windows, L positions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from xlmega.errors import DataError
from xlmega.text.vocabulary import Vocabulary
from xlmega.weights.backpack_forward import alpha_of, check_backpack, queries_and_keys, sense_vectors
from xlmega.weights.directory import cast
from xlmega.weights.forward import PlainDecoder
from xlmega.weights.names import WORD_EMBEDDING, LogicalTensors


class SenseBook:
    """A Backpack's sense vectors by word."""

    def __init__(self, source: LogicalTensors, vocabulary: Vocabulary) -> None:
        check_backpack(source.config)
        self.config, self.vocabulary, self.source = source.config, vocabulary, source
        kept: dict[str, torch.Tensor] = {}

        def read(name: str) -> torch.Tensor:
            if name not in kept:
                kept[name] = cast(source.read(name), torch.float32, name)  # refuses what is no number
            return kept[name]

        self.read = read

    @functools.cached_property
    def words_VD(self) -> torch.Tensor:
        """The word embedding E, of ids that the vocabulary has."""
        return self.read(WORD_EMBEDDING)[: self.vocabulary.size]

    def ids_of(self, word: str) -> list[int]:
        """The sub-words of a word as it stands in running text, behind a space."""
        before, ids = self.vocabulary.encode("a"), self.vocabulary.encode(f"a {word.strip()}")
        if ids[: len(before)] == before and len(ids) > len(before):
            return ids[len(before) :]
        return self.vocabulary.encode(word.strip())

    def senses_of(self, word: str) -> torch.Tensor:
        """[K, D]: the mean over the word's sub-words."""
        ids = self.ids_of(word)
        if not ids:
            raise DataError(f"the vocabulary has no tokens for the word {word!r}.")
        return sense_vectors(self.config, self.read, torch.tensor(ids)).mean(0)

    def senses(self, words: Sequence[str]) -> torch.Tensor:
        """[N, K, D]."""
        return torch.stack([self.senses_of(word) for word in words])


# -------------------------------------------------------------------- what a sense makes likely


def token_languages(
    counts: Mapping[str, npt.NDArray[np.int64]], share: float = 0.5
) -> dict[str, npt.NDArray[np.bool_]]:
    """Which ids are of which language, from counts by language [V].

    An id is of every language in which it is at least `share` times as frequent (per token) as in the language where it
    is most frequent; one that never occurs is of none.
    """
    languages = sorted(counts)
    rates = np.stack([counts[language] / max(1, counts[language].sum()) for language in languages])
    own = (rates > 0) & (rates >= share * rates.max(0))
    return dict(zip(languages, own, strict=True))


@dataclass(frozen=True)
class WordSenses:
    """For one word the tokens that each sense makes likeliest: senses[k][language] has (text, logit) pairs."""

    word: str
    language: str
    senses: tuple[dict[str, tuple[tuple[str, float], ...]], ...]


def top_tokens(
    book: SenseBook, word: str, language: str, of_language: Mapping[str, npt.NDArray[np.bool_]], count: int = 5
) -> WordSenses:
    """The `count` likeliest tokens of each sense of a word, among those of each language ('' for all of them)."""
    logits_KV = book.senses_of(word) @ book.words_VD.T
    masks = of_language or {"": np.ones(book.vocabulary.size, dtype=bool)}
    senses = []
    for logits_V in logits_KV:
        by_language = {}
        for code, mask in masks.items():
            allowed_V = torch.from_numpy(mask[: len(logits_V)])
            best = logits_V.masked_fill(~allowed_V, float("-inf")).topk(min(count, int(allowed_V.sum())))
            by_language[code] = tuple(
                (book.vocabulary.text_of(id).decode("utf-8", errors="replace"), round(value, 4))
                for value, id in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
        senses.append(by_language)
    return WordSenses(word, language, tuple(senses))


# -------------------------------------------------------------------- senses across languages


def sense_distribution(book: SenseBook, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float64]:
    """[K, K]: mean cosine between sense i of a word and sense j of its translation."""
    if not pairs:
        raise DataError("there are no pairs of words to compare.")
    first, second = (F.normalize(book.senses([pair[side] for pair in pairs]), dim=-1) for side in (0, 1))
    mean: npt.NDArray[np.float64] = torch.einsum("nid,njd->ij", first, second).div(len(pairs)).double().numpy()
    return mean


@dataclass(frozen=True)
class Similarity:
    """How cosines of senses order pairs of words, against people's scores: by 'sense 0', ..., 'least', 'greatest'."""

    pairs: int
    spearman: dict[str, float]
    pearson: dict[str, float]


def lexical_similarity(book: SenseBook, rows: Sequence[tuple[str, str, float]]) -> Similarity:
    """Correlations of people's scores with the cosine of each sense, and with the least and greatest over senses."""
    if len(rows) < 3:
        raise DataError(f"a correlation needs 3 pairs of words at least, but there are {len(rows)}.")
    first, second = (book.senses([row[side] for row in rows]) for side in (0, 1))  # type: ignore[misc]
    cosines_NK = F.cosine_similarity(first, second, dim=-1).double().numpy()
    columns = {f"sense {k}": cosines_NK[:, k] for k in range(cosines_NK.shape[1])}
    columns |= {"least": cosines_NK.min(1), "greatest": cosines_NK.max(1)}
    gold = np.array([row[2] for row in rows], dtype=np.float64)
    if (gold == gold[0]).all():
        raise DataError(f"a correlation needs scores that differ, but all {len(rows)} are {gold[0]:g}.")
    return Similarity(
        len(rows),
        {name: correlation(ranks(column), ranks(gold)) for name, column in columns.items()},
        {name: correlation(column, gold) for name, column in columns.items()},
    )


def ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: npt.NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2.0
    return mean_rank[inverse]


def correlation(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Pearson's; nan where one side does not vary."""
    a, b = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")


# -------------------------------------------------------------------- senses in use


@dataclass(frozen=True)
class Usage:
    """How a model uses its senses on some text; losses in nats per predicted token."""

    tokens: int
    loss: float
    loss_largest_sense: float
    """Of each position only the sense that contributes most is kept."""
    loss_levelled: float
    """Every sense of a token is replaced by the mean of them: what telling senses apart is worth."""
    loss_without: tuple[float, ...]
    """Without each sense in turn."""
    entropy: float
    """Mean entropy of the shares of the contributions' norms over senses, divided by log K: 1 is even use."""
    cosine: float
    """Mean cosine between different senses of a token: 1 is collapse."""

    def describe(self) -> list[str]:
        without = ", ".join(f"{k}: {loss - self.loss:+.3f}" for k, loss in enumerate(self.loss_without))
        with_one, levelled = self.loss_largest_sense, self.loss_levelled
        told = (
            f"loss {self.loss:.4f} over {self.tokens:,} tokens; with each position's largest sense alone {with_one:.4f}"
        )
        return [
            f"{told}, with senses levelled {levelled:.4f}",
            f"what is lost without each sense: {without}",
            f"usage entropy {self.entropy:.3f} (1: even); cosine of a token's senses {self.cosine:.3f} (1: collapse)",
        ]


@torch.inference_mode()
def usage(book: SenseBook, windows: Sequence[npt.NDArray[Any]]) -> Usage:
    """Figures over windows of ids [L + 1], one at a time."""
    if not windows:
        raise DataError("there are no windows of text to measure the use of senses on.")
    config, model, read = book.config, PlainDecoder(book.source), book.read
    head_VD, count = model.head().float(), 0
    sums = np.zeros(5 + config.num_senses)  # losses: whole, largest, levelled; entropy; cosine; without each
    for ids in windows:
        ids_BL = torch.from_numpy(np.asarray(ids[:-1], dtype=np.int64))[None]
        targets_L = torch.from_numpy(np.asarray(ids[1:], dtype=np.int64))
        query_BKLH, key_BKLH = queries_and_keys(config, read, model.contextualised(ids_BL))
        alpha_KLL = alpha_of(query_BKLH, key_BKLH)[0]
        senses_KLD = sense_vectors(config, read, ids_BL[0]).transpose(0, 1)
        parts_KLD = alpha_KLL @ senses_KLD
        whole_LD = parts_KLD.sum(0)
        share_LK = F.normalize(parts_KLD.norm(dim=-1).t(), p=1, dim=-1)
        largest_LD = parts_KLD.gather(0, share_LK.argmax(1)[None, :, None].expand(1, -1, config.hidden_size))[0]
        levelled_LD = (alpha_KLL @ senses_KLD.mean(0)).sum(0)
        mixes = [whole_LD, largest_LD, levelled_LD, *(whole_LD - part_LD for part_LD in parts_KLD)]
        losses = [F.cross_entropy(mix @ head_VD.T, targets_L, reduction="sum").item() for mix in mixes]
        entropy = -(share_LK * share_LK.clamp(min=1e-12).log()).sum()
        unit_LKD = F.normalize(senses_KLD.transpose(0, 1), dim=-1)
        cosine_L = (unit_LKD.sum(1).square().sum(-1) - config.num_senses) / max(
            1, config.num_senses**2 - config.num_senses
        )
        sums += [*losses[:3], entropy.item(), cosine_L.sum().item(), *losses[3:]]
        count += len(targets_L)
    whole, largest, levelled, entropy_sum, cosine, *without = (sums / count).tolist()
    even = float(np.log(config.num_senses)) or 1.0
    return Usage(count, whole, largest, levelled, tuple(without), entropy_sum / even, cosine)


# -------------------------------------------------------------------- steering


def steering_factors(book: SenseBook, wishes: Sequence[tuple[str, int, float]]) -> torch.Tensor:
    """[V, K] for `PlainDecoder(sense_factors_VK=...)`: each (word, sense, factor) multiplies that sense of the word."""
    factors_VK = torch.ones(book.config.vocab_size, book.config.num_senses)
    for word, sense, factor in wishes:
        if not 0 <= sense < book.config.num_senses:
            raise DataError(f"{word!r} has senses 0 to {book.config.num_senses - 1}, not {sense}.")
        if not np.isfinite(factor):
            raise DataError(f"the factor of sense {sense} of {word!r} must be a finite number, but is {factor}.")
        factors_VK[torch.tensor(book.ids_of(word)), sense] *= factor
    if not torch.isfinite(factors_VK).all():
        raise DataError("the factors of a sense, multiplied, are beyond the numbers of float32: take smaller ones.")
    return factors_VK


@torch.inference_mode()
def next_tokens(
    book: SenseBook, prompt: str, factors_VK: torch.Tensor | None = None, count: int = 10
) -> list[tuple[str, float]]:
    """The likeliest tokens after a prompt at a document's beginning, with their probabilities."""
    ids = [book.vocabulary.eod_id, *book.vocabulary.encode(prompt)][-book.config.max_positions :]
    model = PlainDecoder(book.source, sense_factors_VK=factors_VK)
    logits_V = model.hidden(torch.tensor([ids]))[0, -1] @ model.head().T
    best = logits_V[: book.vocabulary.size].softmax(-1).topk(count)
    return [
        (book.vocabulary.text_of(id).decode("utf-8", errors="replace"), value)
        for value, id in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]

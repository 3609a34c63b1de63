"""Corpora of sentence pairs in, one clean, shuffled corpus of pairs out, in stages that are each kept on disk.

    fetch (each corpus) -> filter (each corpus) -> merge without duplicates -> score by embeddings -> select and shuffle

OUTPUT/parallel/A-B.train.jsonl.gz (and .valid where asked for) hold {"translation": {A: ..., B: ...}}; what is between
is under OUTPUT/stages/. A changed setting makes only the stages after it anew: another threshold or target size scores
nothing again. Scores come in pieces of 16,384 pairs, each a stage of its own, so an interruption loses at most one.
Memory is a piece of pairs and about 30 bytes for each pair.

Source: the corpus construction of SENSIA, with its defects mended: a limit that holds for every corpus, languages
without a two-letter code, no filter silently left out, no pair lost on resuming.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from xlmega.errors import ConfigError, DataError
from xlmega.text import embedding
from xlmega.text.duplicates import digest, first_occurrences
from xlmega.text.filters import Filters, Sieve
from xlmega.text.parallel_sources import Opus, PairSource, find_pairs
from xlmega.text.records import read_records, write_errors
from xlmega.text.sources import check_language
from xlmega.text.stages import Made, Records, Workshop, workshop
from xlmega.text.tally import Progress, Statistics

PIECE_PAIRS = 16_384
BUCKET_PAIRS = 65_536
MAX_BUCKETS = 256
DUPLICATE, UNLIKE, BEYOND = "duplicate", "below the embedding threshold", "beyond the target size"


@dataclass(frozen=True)
class Selection:
    """What becomes of the pairs that pass the filters; the defaults are those of the published corpus."""

    max_per_corpus: int = 500_000
    """Pairs read from each corpus, whatever its kind; 0: all."""
    embedding_threshold: float = 0.74
    """Cosine of the two sentences at least; 0: no embeddings."""
    embedding_model: str = embedding.MODEL
    """A name of the hub, or a folder."""
    embedding_batch_size: int = 512
    target_size: int = 100_000
    """Training pairs at most; 0: all."""
    valid_pairs: int = 0
    """Taken for validation after the training pairs."""
    seed: int = 13

    def __post_init__(self) -> None:
        for name in ("max_per_corpus", "target_size", "valid_pairs", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}.")
        if not math.isfinite(self.embedding_threshold) or not 0 <= self.embedding_threshold <= 1:
            raise ConfigError(f"embedding_threshold must be from 0 to 1, but is {self.embedding_threshold}.")
        if self.embedding_batch_size < 1:
            raise ConfigError(f"embedding_batch_size must be at least 1, but is {self.embedding_batch_size}.")


NO_FILTERS_CHANGED, SELECTION, OPUS = Filters(), Selection(), Opus()


def build_bitext(
    corpora: Sequence[str],
    source: str,
    target: str,
    output: Path,
    *,
    filters: Filters = NO_FILTERS_CHANGED,
    selection: Selection = SELECTION,
    opus: Opus = OPUS,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Statistics]:
    """Build the corpus of `source` and `target` from the places in `corpora`, in their order; statistics by stage."""
    for code in (source, target):
        check_language(code, "a language")
    if source == target:
        raise ConfigError(f"two languages are needed, but both are '{source}'.")
    found = [find_pairs(where, source, target, opus) for where in corpora]
    names = [one.name for one in found]
    if not found or len(set(names)) < len(names):
        raise ConfigError(f"give one or more corpora of different names, not {', '.join(names) or 'none'}.")
    # What a missing package or an unknown language forbids is said before anything is fetched.
    sieve = Sieve(filters, source, target)
    scorer = None
    if selection.embedding_threshold:
        scorer = embedding.Similarity(selection.embedding_model, selection.embedding_batch_size)
    settings = {
        "corpora": list(corpora), "source": source, "target": target, "opus": [opus.release, opus.preprocess],
        **asdict(filters), **asdict(selection),
    }  # fmt: skip
    inputs = [path for one in found for path in one.identities if isinstance(path, Path)]
    with workshop(output, "bitext", settings, inputs, overwrite=overwrite, say=say) as shop:
        build = _Build(shop, source, target)
        fetched = [build.fetch(one, selection.max_per_corpus) for one in found]
        filtered = [build.filter(one.name, made, filters, sieve) for one, made in zip(found, fetched, strict=True)]
        merged = build.merge(names, filtered)
        scored = [merged]
        if scorer:
            scored = build.score(merged, scorer, selection)
        build.select(scored, selection)
        return shop.statistics


class _Build:
    """The stages, over one workshop and one pair of languages."""

    def __init__(self, shop: Workshop, source: str, target: str) -> None:
        self._shop, self._codes = shop, (source, target)

    def _record(self, pair: tuple[str, str], **more: Any) -> dict[str, Any]:
        return {"translation": dict(zip(self._codes, pair, strict=True)), **more}

    def _pairs(self, made: Made) -> Iterator[tuple[str, str]]:
        for _, record in read_records(self._shop.path(made)):
            sides = record["translation"]
            yield sides[self._codes[0]], sides[self._codes[1]]

    def fetch(self, corpus: PairSource, limit: int) -> Made:
        """A copy of a corpus, or of its first pairs."""

        def records(statistics: Statistics) -> Records:
            progress = Progress(self._shop.say, f"fetch {corpus.name}", "pairs", limit or None)
            scratch = self._shop.folder / "stages" / f"unpacked-{corpus.name}.part"
            for pair in islice(corpus.pairs(scratch), limit or None):
                progress.step(statistics.keep(corpus.name, *pair))
                yield "", self._record(pair)

        how = {"languages": self._codes, "max_per_corpus": limit}
        name = f"stages/fetch-{corpus.name}.jsonl.gz"
        stage = f"fetch {corpus.name}"
        return self._shop.make(stage, {"": name}, how, corpus.identities, records, shown_as="fetch")[""]

    def filter(self, corpus: str, fetched: Made, filters: Filters, sieve: Sieve) -> Made:
        """The pairs of a corpus that pass, normalised."""

        def records(statistics: Statistics) -> Records:
            progress = Progress(self._shop.say, f"filter {corpus}", "pairs", fetched.lines)
            for pair in self._pairs(fetched):
                first, second, reason = sieve.judge(*pair)
                progress.step(len(first) + len(second))
                if reason:
                    statistics.drop(corpus, reason)
                else:
                    statistics.keep(corpus, first, second)
                    yield "", self._record((first, second))

        how = {"languages": self._codes, **asdict(filters)}
        name = f"stages/filter-{corpus}.jsonl.gz"
        return self._shop.make(f"filter {corpus}", {"": name}, how, [fetched], records, shown_as="filter")[""]

    def merge(self, names: Sequence[str], filtered: Sequence[Made]) -> Made:
        """All corpora in order, each pair once: where it stood first."""

        def records(statistics: Statistics) -> Records:
            scratch = self._shop.folder / "stages" / "digests.part"
            digests = (digest(*pair) for made in filtered for pair in self._pairs(made))
            first = iter(first_occurrences(digests, scratch))
            progress = Progress(self._shop.say, "merge", "pairs", sum(made.lines for made in filtered))
            for name, made in zip(names, filtered, strict=True):
                for pair in self._pairs(made):
                    if next(first):
                        progress.step(statistics.keep(name, *pair))
                        yield "", self._record(pair, corpus=name)
                    else:
                        progress.step()
                        statistics.drop(name, DUPLICATE)

        made = self._shop.make("merge", {"": "stages/merged.jsonl.gz"}, {"names": names}, filtered, records)[""]
        if not made.lines:
            raise DataError(
                "no pair passed the filters. The reasons:\n"
                + (
                    "\n".join(
                        f"  {name}: {count:,} {reason}"
                        for name, row in sorted(self._shop.statistics["filter"].rows.items())
                        for reason, count in row.dropped.items()
                    )
                    or f"  {', '.join(names)}: no pairs at all"
                )
            )
        return made

    def score(self, merged: Made, scorer: embedding.Similarity, selection: Selection) -> list[Made]:
        """The same pairs with their scores, in pieces."""
        identity = embedding.identity(selection.embedding_model)
        how: dict[str, Any] = {"model": identity, "batch_size": selection.embedding_batch_size}
        pairs: Iterator[tuple[int, dict[str, Any]]] | None = None
        position = 0
        pieces = []
        begun = Progress(self._shop.say, "score", "pieces", -(-merged.lines // PIECE_PAIRS))
        for number, start in enumerate(range(0, merged.lines, PIECE_PAIRS)):

            def records(statistics: Statistics, start: int = start) -> Records:
                nonlocal pairs, position
                pairs = pairs or read_records(self._shop.path(merged))
                piece = [record for _, record in islice(pairs, start - position, start - position + PIECE_PAIRS)]
                position = start + len(piece)
                first, second = ([record["translation"][code] for record in piece] for code in self._codes)
                for record, score in zip(piece, scorer.scores(first, second), strict=True):
                    yield "", record | {"score": score}

            name = f"stages/scored-{number:05d}.jsonl.gz"
            pieces.append(
                self._shop.make(f"score {number:05d}", {"": name}, how | {"start": start}, [merged], records)[""]
            )
            begun.step()
        return pieces

    def select(self, scored: Sequence[Made], selection: Selection) -> None:
        """The pairs that are alike enough, shuffled, and of them the first."""
        names = {"train": f"parallel/{'-'.join(self._codes)}.train.jsonl.gz"}
        if selection.valid_pairs:
            names["valid"] = f"parallel/{'-'.join(self._codes)}.valid.jsonl.gz"

        def all_records() -> Iterator[dict[str, Any]]:
            for made in scored:
                for _, record in read_records(self._shop.path(made)):
                    yield record

        def records(statistics: Statistics) -> Records:
            threshold = selection.embedding_threshold
            alike = np.fromiter((record.get("score", 1.0) >= threshold for record in all_records()), dtype=np.bool_)
            places = np.flatnonzero(alike)
            # Seeded as `Dataset.shuffle(seed)` of Hugging Face is, so that the same pairs come in the same order.
            order = np.random.default_rng(selection.seed).permutation(len(places))
            num_valid = min(selection.valid_pairs, len(places))
            num_train = min(selection.target_size or len(places), len(places) - num_valid)
            ranks = np.full(len(alike), -1, dtype=np.int64)
            ranks[places[order[: num_train + num_valid]]] = np.arange(num_train + num_valid)
            for record, like, rank in zip(all_records(), alike, ranks, strict=True):
                if rank < 0:
                    statistics.drop(record["corpus"], BEYOND if like else UNLIKE)
            scratch = self._shop.folder / "stages" / "buckets.part"
            for place, record in enumerate(_in_order(all_records, ranks, scratch)):
                split = "train" if place < num_train else "valid"
                pair = record["translation"]
                statistics.keep(record["corpus"], *pair.values())
                yield split, {"translation": pair}

        how = {
            "embedding_threshold": selection.embedding_threshold, "target_size": selection.target_size,
            "valid_pairs": selection.valid_pairs, "seed": selection.seed,
        }  # fmt: skip
        self._shop.make("select", names, how, scored, records)


def _in_order(
    records: Callable[[], Iterator[dict[str, Any]]], ranks: np.ndarray, scratch: Path
) -> Iterator[dict[str, Any]]:
    """The records with a rank of 0 or more, by rank. They pass through files, so that few are in memory at once."""
    total = int(ranks.max(initial=-1)) + 1
    size = max(BUCKET_PAIRS, -(-total // MAX_BUCKETS))
    shutil.rmtree(scratch, ignore_errors=True)
    with write_errors(scratch):
        scratch.mkdir(parents=True)
        buckets = [(scratch / f"{number:03d}.part").open("w+", encoding="utf-8") for number in range(-(-total // size))]
    try:
        for record, rank in zip(records(), ranks, strict=True):
            if rank >= 0:
                with write_errors(scratch):
                    buckets[rank // size].write(json.dumps([int(rank), record], ensure_ascii=False) + "\n")
        for bucket in buckets:
            with write_errors(scratch):
                bucket.seek(0)
            for _, record in sorted(map(json.loads, bucket), key=lambda ranked: int(ranked[0])):
                yield record
    finally:
        for bucket in buckets:
            try:
                bucket.close()
            except OSError:  # what a full disk did not take
                pass
        shutil.rmtree(scratch, ignore_errors=True)

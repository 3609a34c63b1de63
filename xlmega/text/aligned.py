"""Line-aligned pairs of files in (Europarl, MultiUN, any Moses pair), two monolingual corpora and their pairs out.

OUTPUT/{train,valid,test}/LANG/NAME.jsonl.gz hold documents of up to 100 consecutive lines of one split, and
OUTPUT/parallel/A-B.NAME.{train,valid,test}.jsonl.gz the same lines as pairs. A line is in the same split on both sides:
1 % of the lines are held out, half of them for validation (one more when they are odd) and half for testing, drawn as
Hugging Face's `train_test_split(0.01, seed=2357)` and then `(0.5, seed=2357)` draw them, so these are the very lines
that the multilingual Backpack's preparation held out. As there, MultiUN is its first 8,030,892 lines, split in shards
of 2,007,723, and a shard of 10 million lines or more holds out its end. Pairs with a blank side are dropped and
counted. Memory is one document and some bytes a line of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xlmega.errors import ConfigError, DataError
from xlmega.text.records import read_records, read_text_lines
from xlmega.text.sources import check_language
from xlmega.text.stages import Records, Workshop, workshop
from xlmega.text.tally import Progress, Statistics

SPLITS = ("train", "valid", "test")
SEED = 2357
FRAC_HELD_OUT = 0.01
UNSHUFFLED_LINES = 10_000_000
LINES_PER_DOCUMENT = 100


@dataclass(frozen=True)
class Pair:
    """Two files of which line n of one translates line n of the other."""

    name: str
    first: Path
    second: Path
    max_lines: int | None = None
    """Only so many lines are used."""
    lines_per_shard: int | None = None
    """Each such run of lines is split by itself."""


def europarl(first: Path, second: Path) -> Pair:
    """Europarl: all of it, as one."""
    return Pair("europarl", first, second)


def multiun(first: Path, second: Path) -> Pair:
    """MultiUN with the published limits."""
    return Pair("multiun", first, second, max_lines=8_030_892, lines_per_shard=2_007_723)


def split_aligned(
    pairs: Sequence[Pair],
    languages: tuple[str, str],
    output: Path,
    *,
    seed: int = SEED,
    lines_per_document: int = LINES_PER_DOCUMENT,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Statistics]:
    """Write the splits of every pair; returns the statistics by pair."""
    names = [pair.name for pair in pairs]
    if not pairs or len(set(names)) < len(names):
        raise ConfigError(f"give one or more corpora of different names, not {', '.join(names) or 'none'}.")
    for code in (*languages, *names):
        check_language(code, "a language or name")
    if languages[0] == languages[1]:
        raise ConfigError(f"two languages are needed, but both are '{languages[0]}'.")
    if seed < 0 or lines_per_document < 1:
        raise ConfigError(
            f"seed must be at least 0 and lines_per_document at least 1, but they are {seed} and {lines_per_document}."
        )
    settings = {
        "pairs": [[str(value) for value in vars(pair).values()] for pair in pairs],
        "languages": list(languages), "seed": seed, "lines_per_document": lines_per_document,
    }  # fmt: skip
    inputs = [path for pair in pairs for path in (pair.first, pair.second)]
    with workshop(output, "europarl", settings, inputs, overwrite=overwrite, say=say) as shop:
        for pair in pairs:
            _split_pair(shop, pair, languages, seed, lines_per_document)
        return shop.statistics


def split_of_lines(num_lines: int, seed: int) -> np.ndarray:
    """[num_lines] uint8: the index into SPLITS of each line."""
    splits = np.zeros(num_lines, dtype=np.uint8)
    num_held_out = math.ceil(FRAC_HELD_OUT * num_lines)
    if num_lines < UNSHUFFLED_LINES:
        held_out = np.random.default_rng(seed).permutation(num_lines)[:num_held_out]
    else:
        held_out = np.arange(num_lines - num_held_out, num_lines)
    # The generator is seeded as the published splits were, or the lines would be others.
    order = np.random.default_rng(seed).permutation(num_held_out)
    num_valid = math.ceil(0.5 * num_held_out)
    splits[held_out[order[:num_valid]]] = SPLITS.index("valid")
    splits[held_out[order[num_valid:]]] = SPLITS.index("test")
    return splits


def _split_pair(
    shop: Workshop,
    pair: Pair,
    languages: tuple[str, str],
    seed: int,
    lines_per_document: int,
) -> None:
    total = _count(shop, pair)
    if not total:
        raise DataError(f"'{pair.first}' and '{pair.second}' hold no lines.")
    used = min(total, pair.max_lines or total)
    per_shard = pair.lines_per_shard or max(used, 1)
    names = {f"{split} {code}": f"{split}/{code}/{pair.name}.jsonl.gz" for split in SPLITS for code in languages}
    names |= {split: f"parallel/{'-'.join(languages)}.{pair.name}.{split}.jsonl.gz" for split in SPLITS}

    def records(statistics: Statistics) -> Records:
        progress = Progress(shop.say, pair.name, "lines", used)
        lines = aligned_lines(pair.first, pair.second)
        for begun in range(0, used, per_shard):
            splits = split_of_lines(min(per_shard, used - begun), seed)
            gathered: dict[str, list[tuple[int, str, str]]] = {split: [] for split in SPLITS}
            for offset, index in enumerate(splits):
                split, (first, second) = SPLITS[index], next(lines, ("", ""))
                progress.step(len(first) + len(second))
                if not first.strip() or not second.strip():
                    statistics.drop(split, "a side is blank")
                    continue
                statistics.keep(split, first, second)
                yield split, {"translation": dict(zip(languages, (first, second), strict=True))}
                gathered[split].append((begun + offset + 1, first, second))
                if len(gathered[split]) == lines_per_document:
                    yield from _document(pair.name, split, languages, gathered[split])
                    gathered[split] = []
            for split, rest in gathered.items():
                if rest:
                    yield from _document(pair.name, split, languages, rest)
        if beyond := total - used:
            statistics.drop("unused", f"beyond the first {used:,} lines", beyond)

    how = {
        "max_lines": pair.max_lines, "lines_per_shard": pair.lines_per_shard, "languages": list(languages),
        "seed": seed, "lines_per_document": lines_per_document,
    }  # fmt: skip
    shop.make(pair.name, names, how, [pair.first, pair.second], records)


def aligned_lines(first: Path, second: Path) -> Iterator[tuple[str, str]]:
    """The lines of two files side by side; a DataError when one has more."""
    if first.resolve() == second.resolve():
        raise DataError(f"'{first}' was given for both languages. Give each its own file.")
    one, other = read_text_lines(first), read_text_lines(second)
    end = object()
    number = 0
    while True:
        pair = next(one, end), next(other, end)
        if pair[0] is end and pair[1] is end:
            return
        if not isinstance(pair[0], str) or not isinstance(pair[1], str):
            shorter, longer = (first, second) if pair[0] is end else (second, first)
            raise DataError(
                f"'{shorter}' has {number:,} lines, but '{longer}' has more: line n of one must translate line n of "
                "the other. Take both files from the same archive."
            )
        number += 1
        yield pair[0], pair[1]


def _count(shop: Workshop, pair: Pair) -> int:
    """The number of lines, which both files must have."""

    def records(statistics: Statistics) -> Records:
        progress = Progress(shop.say, f"counting {pair.name}", "lines")
        number = 0
        for first, second in aligned_lines(pair.first, pair.second):
            number += 1
            progress.step(len(first) + len(second))
        yield "", {"lines": number}

    name = f"stages/count-{pair.name}.jsonl"
    made = shop.make(f"counting {pair.name}", {"": name}, {}, [pair.first, pair.second], records)[""]
    return sum(int(record["lines"]) for _, record in read_records(shop.path(made)))


def _document(
    name: str, split: str, languages: tuple[str, str], lines: list[tuple[int, str, str]]
) -> Iterator[tuple[str, dict[str, str]]]:
    key = f"{name}:{lines[0][0]}-{lines[-1][0]}"
    for side, code in enumerate(languages, start=1):
        text = "\n".join(str(line[side]) for line in lines)
        yield f"{split} {code}", {"text": text, "lang": code, "id": key}

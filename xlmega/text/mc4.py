"""Files of many languages in, shards that mix the languages out: the layout that X-ELM trains from.

OUTPUT/train/{00000, 00001, ...}/mc4.jsonl hold in each shard the s-th part of every language, languages by code;
OUTPUT/valid/00000/mc4.jsonl holds the validation text of all and OUTPUT/valid_LANG/00000/mc4.jsonl that of one.
Each line has `text`, `lang`, `id` (its index within the language and shard) and, where there was one, `url`.

Every language is cut into as many parts as it had files, as evenly as whole documents allow (the first n % k parts have
one more), and the first `num_shards` parts are written, so shard folders are contiguous from 0. Files are read once to
count and once to write, one line of each language in memory; a shard that is whole is passed over without parsing.
`iw`, the code that mC4 has for Hebrew, becomes `he`. Source: the mC4 preparation of X-ELM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmega.errors import ConfigError, DataError
from xlmega.text.records import has_surrogate, kind, parse_record, read_lines, read_records
from xlmega.text.sources import JSON, SPLITS, check_language, walk
from xlmega.text.stages import Made, Records, Workshop, workshop
from xlmega.text.tally import Progress, Statistics

PUBLISHED = re.compile(r"c4-(?P<lang>[A-Za-z][A-Za-z-]*?)(?P<valid>-validation)?\.tfrecord-\d+-of-\d+\.json\.gz")
RENAMED = {"iw": "he"}
SHARDS = 1024
COMPRESSIONS = {"none": ".jsonl", "gz": ".jsonl.gz", "zst": ".jsonl.zst"}


@dataclass(frozen=True)
class Part:
    """One language of one split."""

    language: str
    files: tuple[Path, ...]
    documents: int
    pieces: int
    """Into how many shards it is cut."""

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first document of a shard, and the first after it."""
        size, larger = divmod(self.documents, self.pieces)
        shard = min(shard, self.pieces)
        start = shard * size + min(shard, larger)
        return start, min(start + size + (shard < larger), self.documents)


def shard_languages(
    source: Path,
    output: Path,
    *,
    languages: Sequence[str] = (),
    num_shards: int = SHARDS,
    pieces: int | None = None,
    compression: str = "none",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Statistics]:
    """Write the sharded corpus; returns the statistics by split.

    `source` holds SPLIT/LANG/*.json[l][.gz|.zst], or mC4's own files by their published names. `pieces` cuts every
    language of the training split into that many parts, whatever its files.
    """
    if num_shards < 1 or (pieces is not None and pieces < 1):
        raise ConfigError(f"num_shards and pieces must be at least 1, but they are {num_shards} and {pieces}.")
    if compression not in COMPRESSIONS:
        raise ConfigError(f"compression must be one of {', '.join(COMPRESSIONS)}, but is '{compression}'.")
    suffix = COMPRESSIONS[compression]
    found = _find(source, languages)
    settings = {
        "source": str(source),
        "languages": sorted(found["train"]),
        "num_shards": num_shards,
        "pieces": pieces,
        "compression": compression,
    }
    with workshop(output, "mc4", settings, [source], overwrite=overwrite, say=say) as shop:
        train, counted = _count_all(shop, "train", found["train"], pieces)
        if not any(part.documents for part in train):
            raise DataError(f"'{source}' holds no document to train on.")
        _train(shop, train, counted, num_shards, suffix)
        if found["valid"]:
            _valid(shop, *_count_all(shop, "valid", found["valid"], 1), suffix)
        return shop.statistics


def _find(source: Path, wanted: Sequence[str]) -> dict[str, dict[str, tuple[Path, ...]]]:
    """The files of each split and language, under the languages' new names."""
    if not source.is_dir():
        raise DataError(f"there is no folder '{source}'.")
    found: dict[str, dict[str, list[Path]]] = {"train": {}, "valid": {}}
    for file in walk(source):
        parts = file.relative_to(source).parts
        published = PUBLISHED.fullmatch(file.name)
        if published:
            split, language = "valid" if published["valid"] else "train", published["lang"]
        elif len(parts) == 3 and SPLITS.get(parts[0]) in found and JSON.search(file.name):
            split, language = SPLITS[parts[0]], parts[1]
        else:
            continue
        language = check_language(RENAMED.get(language, language), str(file))
        if not wanted or language in wanted or any(RENAMED.get(code) == language for code in wanted):
            found[split].setdefault(language, []).append(file)
    missing = [code for code in wanted if RENAMED.get(code, code) not in found["train"]]
    if missing or not found["train"]:
        raise DataError(
            f"'{source}' holds no training files{f' of {chr(44).join(missing)}' if missing else ''}. It must hold "
            "train/LANG/*.jsonl.gz (and valid/LANG/*.jsonl.gz), or mC4's files as they are published."
        )
    return {split: {language: tuple(files) for language, files in of.items()} for split, of in found.items()}


def _count_all(
    shop: Workshop, split: str, found: dict[str, tuple[Path, ...]], pieces: int | None
) -> tuple[list[Part], list[Made]]:
    """Every language of a split with the number of its documents, and the files that these numbers stand in."""
    parts, counts = [], []
    for language, files in sorted(found.items()):

        def records(statistics: Statistics, files: Sequence[Path] = files) -> Records:
            for file in files:
                progress = Progress(shop.say, f"counting {file}", "documents")
                number = 0
                for line in read_lines(file):
                    if line and not line.isspace():
                        number += 1
                        progress.step(len(line))
                yield "", {"file": str(file), "documents": number}

        name = f"stages/count-{split}-{language}.jsonl"
        made = shop.make(f"counting {split} {language}", {"": name}, {}, files, records)[""]
        documents = sum(int(record["documents"]) for _, record in read_records(shop.path(made)))
        parts.append(Part(language, files, documents, pieces or len(files)))
        counts.append(made)
    return parts, counts


def _train(shop: Workshop, parts: list[Part], counted: list[Made], num_shards: int, suffix: str) -> None:
    streams = {part.language: _Stream(part) for part in parts}
    for shard in range(num_shards):
        bounds = {part.language: part.bounds(shard) for part in parts}
        if all(start == stop for start, stop in bounds.values()):
            break
        name = f"train/{shard:05d}/mc4{suffix}"

        def records(statistics: Statistics, bounds: dict[str, tuple[int, int]] = bounds, name: str = name) -> Records:
            progress = Progress(shop.say, name, "documents", sum(stop - start for start, stop in bounds.values()))
            for language, (start, stop) in bounds.items():
                for record in streams[language].take(start, stop):
                    progress.step(statistics.keep(language, record["text"]))
                    yield "", record

        shop.make(name, {"": name}, {"bounds": bounds}, counted, records, shown_as="train")
    left_out = Statistics()
    for part in parts:
        if beyond := part.documents - part.bounds(min(num_shards, part.pieces) - 1)[1]:
            left_out.drop(part.language, f"beyond the first {num_shards:,} shards", beyond)
    shop.statistics["train"].add(left_out)


def _valid(shop: Workshop, parts: list[Part], counted: list[Made], suffix: str) -> None:
    files = {"": f"valid/00000/mc4{suffix}"} | {
        part.language: f"valid_{part.language}/00000/mc4{suffix}" for part in parts
    }

    def records(statistics: Statistics) -> Records:
        progress = Progress(shop.say, "valid", "documents", sum(part.documents for part in parts))
        for part in parts:
            for record in _Stream(part).take(0, part.documents):
                progress.step(statistics.keep(part.language, record["text"]))
                yield "", record
                yield part.language, record

    shop.make("valid", files, {}, counted, records)


class _Stream:
    """The documents of one language from the first on; those before a shard that is taken are passed over unparsed."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._lines = self._read()
        self._position = 0

    def take(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The records of documents [start, stop); `start` never goes back."""
        while self._position < stop:
            file, number, line = next(self._lines, (None, 0, b""))
            if file is None:
                raise DataError(
                    f"the files of '{self._part.language}' hold {self._position:,} documents, but held "
                    f"{self._part.documents:,} when they were counted. Run again when nobody writes them."
                )
            self._position += 1
            if self._position > start:
                yield self._record(file, number, line, self._position - 1 - start)

    def _read(self) -> Iterator[tuple[Path, int, bytes]]:
        for file in self._part.files:
            for number, line in enumerate(read_lines(file), start=1):
                if line and not line.isspace():
                    yield file, number, line

    def _record(self, file: Path, number: int, line: bytes, index: int) -> dict[str, Any]:
        told = parse_record(file, number, line)
        text, url, language = told.get("text"), told.get("url"), told.get("lang")
        if not isinstance(text, str):
            what = "no 'text'" if "text" not in told else f"a 'text' that is {kind(text)}, not a string"
            raise DataError(f"{file}:{number}: a document with {what}.")
        if language is not None and RENAMED.get(str(language), language) != self._part.language:
            raise DataError(
                f"{file}:{number}: a document with lang {language!r} in a file of '{self._part.language}'. Correct it."
            )
        if has_surrogate(text):
            raise DataError(f"{file}:{number}: the text holds half of a surrogate pair, which is no character.")
        record = {"text": text, "lang": self._part.language, "id": index}
        return record | ({"url": url} if isinstance(url, str) else {})

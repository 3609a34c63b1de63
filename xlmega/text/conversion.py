"""Sources in, a corpus in xlmega's layout out: all the text, or its first megabytes with validation taken after them.

`convert_text` writes OUTPUT/SPLIT/LANG/NNNNN.jsonl.gz (or SPLIT/00000/ where the documents say their language).
`take_megabytes` writes OUTPUT/{train,valid}/LANG/00000.jsonl.gz: of each language the first megabytes of UTF-8 are for
training and the following share of that is for validation, in whole documents. Blank documents are dropped and counted.
Source of the second: the OSCAR preparation of CLP-Transfer, whose megabyte is 1024 * 1024 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from xlmega.errors import ConfigError, DataError
from xlmega.text.corpus import Document
from xlmega.text.sources import Reading, Source, find_sources
from xlmega.text.stages import Records, Workshop, workshop
from xlmega.text.tally import Progress, Statistics

MEGABYTE = 1 << 20
PLAIN = Reading()
GROUP_BYTES = 256 * MEGABYTE
"""Sources are put together into output files of about this much input; an interruption costs at most one of them."""


def convert_text(
    where: str,
    output: Path,
    *,
    reading: Reading = PLAIN,
    language: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Statistics]:
    """Write every document found at `where`; returns the statistics by split."""
    sources = find_sources(where, reading, language, say)
    settings = {"source": where, "text_key": reading.text_key, "documents": reading.documents, "language": language}
    with workshop(output, "text", settings, _inputs(where), overwrite=overwrite, say=say) as shop:
        for (split, folder), of in groupby(
            sorted(sources, key=lambda source: (source.split, source.language or "00000")),
            key=lambda source: (source.split, source.language or "00000"),
        ):
            for number, group in enumerate(_groups(of)):
                name = f"{split}/{folder}/{number:05d}.jsonl.gz"
                how = {"text_key": reading.text_key, "documents": reading.documents, "language": folder}
                identities = [source.identity for source in group]

                def records(statistics: Statistics, group: Sequence[Source] = group, name: str = name) -> Records:
                    progress = Progress(say, name, "documents")
                    for document in _documents(group, statistics):
                        progress.step(statistics.keep(document.language, document.text))
                        yield "", _record(document)

                shop.make(name, {"": name}, how, identities, records, shown_as=split)
        _check_not_empty(shop, where)
        return shop.statistics


def take_megabytes(
    where: str,
    output: Path,
    languages: Sequence[str],
    *,
    megabytes: float,
    valid_percent: float = 10.0,
    reading: Reading = PLAIN,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Statistics]:
    """Write the first `megabytes` of each language and the following `valid_percent` of it.

    '{language}' in `where` stands for the language in turn. A document that crosses the end of a part belongs to it. A
    DataError when there is not enough text.
    """
    if not math.isfinite(megabytes) or megabytes <= 0 or not 0 <= valid_percent <= 100:
        raise ConfigError(
            f"megabytes must be above 0 and valid_percent in [0, 100], but they are {megabytes} and {valid_percent}."
        )
    if not languages or len(set(languages)) < len(languages):
        raise ConfigError(f"languages must be one or more different codes, but are {', '.join(languages) or 'none'}.")
    places = {language: where.replace("{language}", language) for language in languages}
    settings = {
        "source": where, "languages": list(languages), "megabytes": megabytes, "valid_percent": valid_percent,
        "text_key": reading.text_key, "documents": reading.documents,
    }  # fmt: skip
    found = {language: _first_split(find_sources(place, reading, language, say)) for language, place in places.items()}
    inputs = [path for place in places.values() for path in _inputs(place)]
    with workshop(output, "oscar", settings, inputs, overwrite=overwrite, say=say) as shop:
        for language, sources in found.items():
            files = {"train": f"train/{language}/00000.jsonl.gz"}
            due = {"train": max(1, int(megabytes * MEGABYTE))}
            if valid_percent:
                files["valid"] = f"valid/{language}/00000.jsonl.gz"
                due["valid"] = max(1, int(megabytes * MEGABYTE * valid_percent / 100))

            def records(
                statistics: Statistics, sources: Sequence[Source] = sources, due: dict[str, int] = due
            ) -> Records:
                return _parts(_documents(sources, statistics), due, statistics, say)

            how = {"due": due, "text_key": reading.text_key, "documents": reading.documents}
            shop.make(language, files, how, [source.identity for source in sources], records)
        return shop.statistics


def _parts(
    documents: Iterable[Document], due: dict[str, int], statistics: Statistics, say: Callable[[str], None]
) -> Records:
    """(part, record) for the first due['train'] bytes, then the next due['valid']; what comes after is not read."""
    parts = iter(due.items())
    part, left = next(parts)
    progress = Progress(say, "taking", "documents")
    taken = 0
    for document in documents:
        utf8_bytes = statistics.keep(f"{part} {document.language}", document.text)
        yield part, _record(document)
        progress.step(utf8_bytes)
        taken += utf8_bytes
        left -= utf8_bytes
        if left <= 0:
            part, left = next(parts, ("", 0))
            if not part:
                return
    total = sum(due.values())
    raise DataError(
        f"there are {taken / MEGABYTE:.3f} MB of text, but {total / MEGABYTE:.3f} were asked for, validation included "
        f"(1 MB is 1024 x 1024 bytes). Ask for at most {taken / total * due['train'] / MEGABYTE:.3f} megabytes."
    )


def _documents(sources: Iterable[Source], statistics: Statistics) -> Iterator[Document]:
    """The documents of sources, one after the other; blank ones are counted as dropped."""
    for source in sources:
        for document in source.documents():
            if not document.text or document.text.isspace():
                statistics.drop(document.language, "blank")
            else:
                yield document


def _record(document: Document) -> dict[str, str]:
    return {"text": document.text, "lang": document.language, "id": document.id}


def _groups(sources: Iterable[Source]) -> Iterator[list[Source]]:
    group: list[Source] = []
    size = 0
    for source in sources:
        if group and size + source.size > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(source)
        size += source.size
    yield group


def _first_split(sources: list[Source]) -> list[Source]:
    """Those for training; the rest are a validation set already, and the stream is one split's."""
    return [source for source in sources if source.split == "train"] or sources


def _inputs(where: str) -> list[Path]:
    return [] if where.startswith("hf:") else [Path(where)]


def _check_not_empty(shop: Workshop, where: str) -> None:
    if not any(row.kept for statistics in shop.statistics.values() for row in statistics.rows.values()):
        raise DataError(f"'{where}' holds no document with text in it.")

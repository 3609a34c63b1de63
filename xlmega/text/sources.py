"""Text as people have it in, documents of known language out.

A source is one file: JSON lines (.jsonl, .json, and .gz or .zst of either), plain text (.txt, .txt.gz, .txt.zst) or
parquet; or one split of a folder that Hugging Face's `save_to_disk` wrote; or a data set of its hub (`hf:NAME`,
`hf:NAME:CONFIG` or `hf:NAME:CONFIG:SPLIT`). The language of a document is that of the folder, of `--language`, or the
document's own `lang`; where two of them speak they must agree. Every file is streamed, except that a plain text file
that is one document is held whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from xlmega.errors import ConfigError, DataError
from xlmega.text import hub
from xlmega.text.corpus import LANGUAGE, Document
from xlmega.text.records import has_surrogate, kind, read_records, read_text_lines

JSON = re.compile(r"\.jsonl?(\.gz|\.zst)?$")
TEXT = re.compile(r"\.txt(\.gz|\.zst)?$")
PARQUET = re.compile(r"\.parquet$")
DOCUMENTS = ("file", "paragraph", "line")
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
"""Folders and splits of these names, and what they are called here."""


@dataclass(frozen=True)
class Reading:
    """How documents stand in the sources."""

    text_key: str = "text"
    """The key or column that holds the text."""
    documents: str = "paragraph"
    """In plain text: each file is one, each paragraph (blank lines between), or each line."""

    def __post_init__(self) -> None:
        if self.documents not in DOCUMENTS:
            raise ConfigError(f"documents must be one of {', '.join(DOCUMENTS)}, but is '{self.documents}'.")


@dataclass(frozen=True)
class Source:
    """One file or data set."""

    name: str
    """Unique among those found together; document ids begin with it."""
    split: str
    language: str | None
    """None when the documents say it."""
    identity: Path | str
    size: int
    """In bytes; 0 where unknown."""
    read: Callable[[], Iterator[tuple[str, str, str]]]
    """(text, id, lang or '') of each document."""

    def documents(self) -> Iterator[Document]:
        """Every document, blank ones included."""
        for text, key, lang in self.read():
            language = lang or self.language
            if language is None:
                raise DataError(
                    f"{key}: of which language? Put the file into a folder named after it, give --language, "
                    "or give each record a 'lang'."
                )
            if self.language is not None and language != self.language:
                raise DataError(f"{key}: a document with lang '{language}' where '{self.language}' is expected.")
            yield Document(text, check_language(language, key), key)


def check_language(language: str, where: str) -> str:
    """The code itself, when it can name files."""
    if not LANGUAGE.fullmatch(language):
        raise DataError(
            f"{where}: {language!r} cannot be a language code. It is made of letters, digits, '_', '-' and '.', "
            "begins with a letter or digit and has at most 64 characters."
        )
    return language


def find_sources(
    where: str, reading: Reading, language: str | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Source]:
    """Every source at `where`, by split and name. Files of other kinds are passed over, and `say` tells how many.

    A folder may hold splits (train, valid, test), each holding languages or files; or languages; or files.
    """
    if language is not None:
        check_language(language, "--language")
    if where.startswith("hf:"):
        return [_hub_source(where, reading, language)]
    path = Path(where)
    if path.is_file():
        if not _is_text(path):
            raise DataError(f"'{path}' is none of .jsonl, .json, .txt (also .gz, .zst) or .parquet.")
        return [_file_source(path, path.name, "train", language, reading)]
    if not path.is_dir():
        raise DataError(f"there is no '{path}'. Give a file, a folder, or hf:NAME for a data set of the hub.")
    if saved := hub.saved_splits(path):
        return [_saved_source(path / name, name or "train", files, language, reading) for name, files in saved.items()]
    folders = {child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")}
    has_splits = bool(folders) and folders <= SPLITS.keys()
    sources, others = [], 0
    empty = {child for child in path.glob("*/*" if has_splits else "*") if child.is_dir() and child.name[0] != "."}
    for file in walk(path):
        parts = file.relative_to(path).parts
        if not _is_text(file) or (has_splits and len(parts) < 2):
            others += 1
            continue
        split = SPLITS[parts[0]] if has_splits else "train"
        folder = parts[has_splits] if len(parts) > 1 + has_splits else ""
        if folder.isdecimal():
            folder = ""
        if language is not None and folder and folder != language:
            others += 1  # another language's
            continue
        empty.discard(path.joinpath(*parts[: 1 + has_splits]))
        sources.append(_file_source(file, "/".join(parts), split, folder or language, reading))
    for bare in sorted(empty) if language is None else ():
        say(f"'{bare}' holds no file of text: nothing comes from it")
    if others:
        say(f"{others:,} files of '{path}' are of other kinds or languages and are passed over")
    if not sources:
        hint = f" of '{language}': the first folder below it names the language" if language and others else ""
        raise DataError(f"'{path}' holds no .jsonl, .json, .txt (also .gz, .zst) or .parquet file{hint}.")
    return sources


def walk(folder: Path) -> list[Path]:
    """Every file below a folder, by name; links to folders are followed, hidden files and folders are not."""
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def size_of(file: Path) -> int:
    """The bytes of a file; a DataError when it has gone or leads nowhere."""
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read '{file}': {error.strerror}.") from None


def _is_text(file: Path) -> bool:
    return any(pattern.search(file.name) for pattern in (JSON, TEXT, PARQUET))


def _file_source(file: Path, name: str, split: str, language: str | None, reading: Reading) -> Source:
    if language is not None:
        check_language(language, str(file))
    read: Callable[[], Iterator[tuple[str, str, str]]]
    if TEXT.search(file.name):
        read = partial(_plain, file, name, reading.documents)
    elif PARQUET.search(file.name):
        columns = (reading.text_key, "lang", "id")
        read = partial(_rows, partial(hub.parquet_rows, file, columns), name, reading.text_key)
    else:
        read = partial(_rows, partial(read_records, file), str(file), reading.text_key, name)
    return Source(name, split, language, file, size_of(file), read)


def _saved_source(folder: Path, split: str, files: list[Path], language: str | None, reading: Reading) -> Source:
    identity = ";".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
    read = partial(_rows, partial(hub.saved_rows, folder), str(folder), reading.text_key)
    size = sum(file.stat().st_size for file in files)
    return Source(folder.name, SPLITS.get(split, split), language, f"{folder.resolve()};{identity}", size, read)


def _hub_source(where: str, reading: Reading, language: str | None) -> Source:
    parts = where.split(":")[1:]
    if not 1 <= len(parts) <= 3 or not parts[0]:
        raise ConfigError(f"'{where}' is none of hf:NAME, hf:NAME:CONFIG, hf:NAME:CONFIG:SPLIT.")
    name, config, split = [*parts, "", ""][:3]
    split = split or "train"
    read = partial(
        _rows, partial(hub.hub_rows, name, split, hub.one_config(name, config or None)), where, reading.text_key
    )
    return Source(name, SPLITS.get(split, split), language, where, 0, read)


def _rows(
    rows: Callable[[], Iterator[tuple[int, dict[str, Any]]]], where: str, text_key: str, name: str = ""
) -> Iterator[tuple[str, str, str]]:
    for number, row in rows():
        place = f"{where}:{number}"
        text, lang, key = row.get(text_key), row.get("lang"), row.get("id")
        if not isinstance(text, str):
            known = ", ".join(sorted(row)) or "nothing"
            what = f"is {kind(text)}, not a string" if text_key in row else f"is missing (there: {known})"
            raise DataError(f"{place}: '{text_key}' {what}. --text_key names the key that holds the text.")
        if not isinstance(lang, str | None):
            raise DataError(f"{place}: a 'lang' that is {kind(lang)}, not a string.")
        key = f"{name or where}:{number}" if key is None else str(key)
        if has_surrogate(text) or has_surrogate(key):
            raise DataError(f"{place}: half of a surrogate pair, which is no character, in the text or the id.")
        yield text, key, lang or ""


def _plain(file: Path, name: str, documents: str) -> Iterator[tuple[str, str, str]]:
    lines = enumerate(read_text_lines(file), start=1)
    if documents == "file":
        yield "\n".join(line for _, line in lines), name, ""
    elif documents == "line":
        for number, line in lines:
            yield line, f"{name}:{number}", ""
    else:
        paragraph: list[str] = []
        begun = 1
        for number, line in lines:
            if line and not line.isspace():
                begun = begun if paragraph else number
                paragraph.append(line)
            elif paragraph:
                yield "\n".join(paragraph), f"{name}:{begun}", ""
                paragraph = []
        if paragraph:
            yield "\n".join(paragraph), f"{name}:{begun}", ""

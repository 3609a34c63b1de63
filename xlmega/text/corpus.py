"""Folders of JSON lines in, documents out, and back.

A corpus split is a folder of folders of files, `SPLIT/SHARD-OR-LANGUAGE/*.jsonl[.gz|.zst]`, one document a line with
the keys `text`, `lang` and `id`. A folder whose name is a number is a shard: its documents say their `lang`. Any other
folder is a language: a missing `lang` is its name, and a `lang` that says otherwise is refused, since one of the two is
wrong and nobody can tell which. A missing `id` is where the document stands. Files come in a fixed order (folders, then
files, by name) and are streamed. Every damage ends in a DataError that names file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmega.errors import DataError
from xlmega.text.records import CHUNK_BYTES, SUFFIXES, has_surrogate, kind, read_records, write_records

__all__ = [
    "CHUNK_BYTES", "SUFFIXES", "Document", "corpus_files", "parse_document", "read_corpus", "read_documents",
    "read_records", "sibling_splits", "write_documents", "write_records",
]  # fmt: skip
LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of one language."""

    text: str
    language: str
    """The code as the data has it; it also names files, so letters, digits, '_', '-' and '.' only."""
    id: str


def corpus_files(split: Path) -> list[Path]:
    """Every file of a split in reading order; a DataError when `split` is not laid out as one."""
    if not split.is_dir():
        raise DataError(f"there is no folder '{split}'. A split is a folder such as DATA/train.")
    if any((split / "train").glob("*/*.jsonl*")):
        raise DataError(f"'{split}' is a corpus with splits in it, not a split. Did you mean '{split / 'train'}'?")
    files = [
        file
        for folder in sorted(path for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
        for file in sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    ]
    if files:
        return files
    if any(path.name.endswith(SUFFIXES) for path in split.iterdir()):
        raise DataError(
            f"'{split}' holds JSON lines directly, but a split is SPLIT/SHARD-OR-LANGUAGE/*.jsonl: "
            f"move them to '{split}/LANGUAGE/', or to '{split}/00000/' when each line has its own 'lang'."
        )
    raise DataError(f"'{split}' holds no SHARD-OR-LANGUAGE/*.jsonl, *.jsonl.gz or *.jsonl.zst.")


def sibling_splits(split: Path) -> list[Path]:
    """The other folders beside `split` that are laid out as splits, by name."""
    return sorted(
        path
        for path in split.resolve().parent.iterdir()
        if path.is_dir()
        and path.name != split.resolve().name
        and not path.name.startswith(".")
        and path.suffix != ".part"
        and any(file.name.endswith(SUFFIXES) for file in path.glob("*/*.jsonl*"))
    )


def read_corpus(split: Path) -> Iterator[Document]:
    """Every document of a split, streamed in the order of `corpus_files`."""
    for file in corpus_files(split):
        yield from read_documents(file)


def read_documents(file: Path) -> Iterator[Document]:
    """Every document of one file, streamed."""
    for number, record in read_records(file):
        yield parse_document(file, number, record)


def parse_document(file: Path, number: int, record: Mapping[str, Any], *, escaped: bool = True) -> Document:
    """The document that a line of a file is; a DataError that says what is wrong with it.

    `escaped` says whether the line may hold `\\u` escapes: without any, nothing in it is half of a surrogate pair.
    """
    folder = file.parent.name
    text, language, key = record.get("text"), record.get("lang"), record.get("id")
    if not isinstance(text, str):
        what = "no 'text'" if "text" not in record else f"a 'text' that is {kind(text)}, not a string"
        raise DataError(f"{file}:{number}: a document with {what}. Each line needs {{'text': '...'}}.")
    if language is None:
        if folder.isdecimal():
            raise DataError(
                f"{file}:{number}: a document without 'lang', and its folder '{folder}' is a shard number. "
                "Give each line a 'lang', or move the file to a folder named after its language."
            )
        language = folder
    if not isinstance(language, str) or not LANGUAGE.fullmatch(language):
        raise DataError(
            f"{file}:{number}: {language!r} cannot be a language code. It names files, so it is made of letters, "
            "digits, '_', '-' and '.', begins with a letter or digit and has at most 64 characters."
        )
    if escaped and has_surrogate(text):
        raise DataError(
            f"{file}:{number}: the text holds half of a surrogate pair, which is no character. "
            "Write it again with whole characters, for example text.encode('utf-8', 'replace').decode()."
        )
    if not folder.isdecimal() and language != folder:
        raise DataError(
            f"{file}:{number}: a document with lang '{language}' in the folder '{folder}'. Correct the 'lang' or "
            "move the document; documents of several languages go into numbered folders, such as 00000."
        )
    key = f"{folder}/{file.name}:{number}" if key is None else str(key)
    if escaped and has_surrogate(key):
        raise DataError(f"{file}:{number}: the id {key!r} holds half of a surrogate pair, which is no character.")
    return Document(text, language, key)


def write_documents(file: Path, documents: Iterable[Document]) -> int:
    """Write documents so that `read_documents` gives them back; returns their number."""
    return write_records(file, ({"text": doc.text, "lang": doc.language, "id": doc.id} for doc in documents))

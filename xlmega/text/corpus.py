"""Folders of JSON lines in, documents out, and back.

A corpus split is a folder of folders of files, `SPLIT/SHARD-OR-LANGUAGE/*.jsonl[.gz|.zst]`, one document a line with
the keys `text`, `lang` and `id`. A missing `lang` is the folder's name, unless that is a shard number; a missing `id`
is where the document stands. Files come in a fixed order (folders, then files, by name) and are streamed. Every damage
ends in a DataError that names file and line: nothing is skipped and nothing is repaired in silence.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from xlmega.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
CHUNK_BYTES = 1 << 20
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
    folder = file.parent.name
    for number, record in read_records(file):
        text, language, key = record.get("text"), record.get("lang"), record.get("id")
        if not isinstance(text, str):
            what = "no 'text'" if "text" not in record else f"a 'text' that is {_kind(text)}, not a string"
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
        if not text.isascii() and _has_surrogate(text):
            raise DataError(
                f"{file}:{number}: the text holds half of a surrogate pair, which is no character. "
                "Write it again with whole characters, for example text.encode('utf-8', 'replace').decode()."
            )
        yield Document(text, language, f"{folder}/{file.name}:{number}" if key is None else str(key))


def read_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of one file, streamed; blank lines are passed over."""
    for number, line in enumerate(_lines(file), start=1):
        if not line or line.isspace():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}:{number}: not UTF-8 (byte {error.start} of the line is 0x{line[error.start]:02x}). "
                f"Convert the file first, for example: iconv -f latin1 -t utf-8."
            ) from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{file}:{number}: not JSON ({error}). Each line is one object: {{...}}.") from None
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number}: {_kind(record)} where an object {{'text': ...}} is due.")
        yield number, record


def write_records(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one object a line, compressed by the name's suffix, whole or not at all; returns the number of lines.

    The same records give the same bytes: no time or file name goes into a .gz.
    """
    number = 0
    with _compressed(file) as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
            number += 1
    return number


def write_documents(file: Path, documents: Iterable[Document]) -> int:
    """Write documents so that `read_documents` gives them back; returns their number."""
    return write_records(file, ({"text": doc.text, "lang": doc.language, "id": doc.id} for doc in documents))


@contextmanager
def _compressed(file: Path) -> Iterator[IO[bytes]]:
    if not file.name.endswith(SUFFIXES):
        raise DataError(f"cannot write '{file}': the name ends in none of {', '.join(SUFFIXES)}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with part.open("wb") as raw:
        if file.suffix == ".gz":
            # filename='' and mtime=0: the bytes depend on the content alone.
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=6) as packed:
                yield packed  # type: ignore[misc]
        elif file.suffix == ".zst":
            with _zstandard().ZstdCompressor(level=3).stream_writer(raw, closefd=False) as packed:
                yield packed
        else:
            yield raw
        raw.flush()
        os.fsync(raw.fileno())
    part.replace(file)


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file without their '\\n'; damage in the compression becomes a DataError at the line it hit."""
    number, pieces = 1, []  # the line being gathered; pieces, so that a huge line costs linear time
    chunks = _chunks(file)
    while True:
        try:
            chunk = next(chunks, b"")
        except OSError as error:
            if isinstance(error, (FileNotFoundError, PermissionError)):
                raise DataError(f"cannot read '{file}': {error.strerror}.") from None
            raise _damaged(file, number, error) from None
        except (EOFError, zlib.error, ValueError) as error:
            raise _damaged(file, number, error) from None
        if not chunk:
            break
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        if rest:
            yield b"".join(pieces)
            yield from rest[:-1]
            pieces = [rest[-1]]
            number += len(rest)
    if last := b"".join(pieces):
        yield last


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as raw:
        if file.suffix == ".zst":
            yield from _zst_chunks(raw)
            return
        stream: IO[bytes] = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if file.suffix == ".gz" else raw
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _zst_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    # Frame by frame, since zstandard's stream_reader takes a cut-off frame for the end of the file.
    zstandard = _zstandard()
    frame = None
    while data := raw.read(CHUNK_BYTES // 8):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                chunk = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from None
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
            if chunk:
                yield chunk
    if frame is not None:
        raise EOFError("the last frame is cut off")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise DataError("reading or writing .zst needs the package zstandard: pip install zstandard.") from None
    return zstandard


def _damaged(file: Path, number: int, error: Exception) -> DataError:
    return DataError(
        f"{file}:{number}: the compressed data is damaged or cut off here ({error}). "
        f"Fetch or write the file again; `{'zstd' if file.suffix == '.zst' else 'gzip'} -t` tests it."
    )


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")

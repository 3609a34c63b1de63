"""Lines and JSON objects of files in, the same out: plain, .gz or .zst by the end of the name.

Files are streamed: memory holds one line and one chunk however large the file. Whatever a person or a disk can do to a
file ends in a DataError that names the file and, where there is one, the line: nothing is skipped, nothing is repaired
in silence. What is written is whole or not there (`NAME.part`, fsync, rename); the same content gives the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from xlmega.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
CHUNK_BYTES = 1 << 20


def read_records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of one file, streamed; blank lines are passed over."""
    for number, line in enumerate(read_lines(file), start=1):
        if line and not line.isspace():
            yield number, parse_record(file, number, line)


def parse_record(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """The JSON object that a line is."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(file, number, line, error) from None
    # ValueError is also what an integer of thousands of digits gives.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{number}: not JSON ({error}). Each line is one object: {{...}}.") from None
    if not isinstance(record, dict):
        raise DataError(f"{file}:{number}: {kind(record)} where an object {{'text': ...}} is due.")
    return record


def read_text_lines(file: Path) -> Iterator[str]:
    """The lines of a plain text file without their ends ('\\n' or '\\r\\n'); a byte order mark is not text.

    Other separators of Unicode, such as U+2028, stay inside their line: files that are aligned by line count '\\n'.
    """
    for number, line in enumerate(read_lines(file), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(file, number, line, error) from None
        if "\0" in text:
            raise DataError(f"{file}:{number}: a NUL byte. Is this UTF-16 or no text? Convert it to UTF-8 first.")
        yield text[:-1] if text.endswith("\r") else text


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines of a file without their '\\n'; damage in the compression becomes a DataError at the line it hit."""
    number, pieces = 1, []  # the line being gathered; pieces, so that a huge line costs linear time

    def line() -> int:
        return number

    for chunk, _ in _whole_chunks(file, line):
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        if rest:
            yield b"".join(pieces)
            yield from rest[:-1]
            pieces = [rest[-1]]
            number += len(rest)
    if last := b"".join(pieces):
        yield last


@dataclass(frozen=True)
class Block:
    """Whole lines of a file as they stand there."""

    file: Path
    first: int
    """The number of its first line, from 1."""
    data: bytes
    offset: int
    """Where the block ends in the file's content."""
    file_bytes: int
    """How much of the file itself, which may be compressed, was read for it."""


def read_blocks(file: Path, size: int, *, first: int = 1, offset: int = 0) -> Iterator[Block]:
    """The content of a file in blocks of about `size` bytes, or one longer line; from `offset`, where line `first`
    begins, on."""
    number, held, passed = first, bytearray(), 0

    def line() -> int:
        return number + held.count(b"\n")

    at = offset
    for chunk, position in _whole_chunks(file, line):
        if passed < offset:  # compressed files cannot be entered in the middle
            skipped = min(len(chunk), offset - passed)
            passed += skipped
            chunk = chunk[skipped:]
        held += chunk
        if len(held) >= size and (cut := held.rfind(b"\n", len(held) - len(chunk)) + 1):
            data = bytes(held[:cut])
            del held[:cut]
            at += len(data)
            yield Block(file, number, data, at, position)
            number += data.count(b"\n")
    if held:
        yield Block(file, number, bytes(held), at + len(held), file.stat().st_size)


def _whole_chunks(file: Path, line: Callable[[], int]) -> Iterator[tuple[bytes, int]]:
    """(content, bytes of the file read so far); damage becomes a DataError at the line that `line()` then says."""
    chunks = _chunks(file)
    while True:
        try:
            found = next(chunks, None)
        except (EOFError, zlib.error, ValueError, gzip.BadGzipFile) as error:
            raise _damaged(file, line(), error) from None
        except OSError as error:
            raise DataError(f"cannot read '{file}': {error.strerror or error}.") from None
        if found is None:
            return
        yield found


class RecordWriter:
    """One file of JSON lines under construction. `finish` makes it whole as NAME.part, `publish` gives it its name."""

    def __init__(self, file: Path) -> None:
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"cannot write '{file}': the name ends in none of {', '.join(SUFFIXES)}.")
        compressor = zstandard().ZstdCompressor(level=3) if file.suffix == ".zst" else None
        self.file, self.part = file, file.with_name(file.name + ".part")
        self.lines = 0
        with write_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._raw: IO[bytes] = self.part.open("wb")
        self._stream: Any = self._raw
        if file.suffix == ".gz":
            # filename='' and mtime=0: the bytes depend on the content alone.
            self._stream = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, mtime=0, compresslevel=6)
        elif compressor:
            self._stream = compressor.stream_writer(self._raw, closefd=False)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one object as a line."""
        try:
            line = json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"
        except UnicodeEncodeError as error:
            raise DataError(
                f"record {self.lines + 1} for '{self.file}' holds half of a surrogate pair, which is no character: "
                f"{error.object[max(0, error.start - 20) : error.start]!r} comes before it."
            ) from None
        with write_errors(self.file):
            self._stream.write(line)
        self.lines += 1

    def finish(self) -> None:
        """End the compression and see NAME.part safely onto the disk."""
        with write_errors(self.file):
            if self._stream is not self._raw:
                self._stream.close()
            self._raw.flush()
            os.fsync(self._raw.fileno())
            self._raw.close()

    def publish(self) -> None:
        """Give the finished file its name."""
        with write_errors(self.file):
            self.part.replace(self.file)

    def abandon(self) -> None:
        """Let go of the file after an error; NAME.part stays as it is."""
        for stream in (self._stream, self._raw):
            try:
                stream.close()
            except (OSError, ValueError):  # what could not be written before cannot be flushed now
                pass


def write_records(file: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write one object a line, compressed by the name's suffix, whole or not at all; returns the number of lines."""
    writer = RecordWriter(file)
    try:
        for record in records:
            writer.write(record)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    writer.publish()
    return writer.lines


@contextmanager
def write_errors(file: Path) -> Iterator[None]:
    """What a disk or a folder can refuse while `file` is written, as a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write '{file}': {error.strerror or error}. What was whole before is still there."
        ) from None


def has_surrogate(text: str) -> bool:
    """Whether a string holds half of a surrogate pair, which UTF-8 cannot write."""
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def kind(value: Any) -> str:
    """What a JSON value is, for a message."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def zstandard() -> Any:
    """The package zstandard, or a DataError that says how to get it."""
    try:
        import zstandard
    except ImportError:
        raise DataError("reading or writing .zst needs the package zstandard: pip install zstandard.") from None
    return zstandard


def _chunks(file: Path) -> Iterator[tuple[bytes, int]]:
    with file.open("rb") as raw:
        if file.suffix == ".zst":
            for chunk in _zst_chunks(raw):
                yield chunk, raw.tell()
            return
        stream: IO[bytes] = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if file.suffix == ".gz" else raw
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk, raw.tell()


def _zst_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    # Frame by frame, since zstandard's stream_reader takes a cut-off frame for the end of the file.
    package = zstandard()
    frame = None
    while data := raw.read(CHUNK_BYTES // 8):
        while data:
            frame = frame or package.ZstdDecompressor().decompressobj()
            try:
                chunk = frame.decompress(data)
            except package.ZstdError as error:
                raise ValueError(str(error)) from None
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
            if chunk:
                yield chunk
    if frame is not None:
        raise EOFError("the last frame is cut off")


def _not_utf8(file: Path, number: int, line: bytes, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{file}:{number}: not UTF-8 (byte {error.start} of the line is 0x{line[error.start]:02x}). "
        f"Convert the file first, for example: iconv -f latin1 -t utf-8."
    )


def _damaged(file: Path, number: int, error: Exception) -> DataError:
    return DataError(
        f"{file}:{number}: the compressed data is damaged or cut off here ({error}). "
        f"Fetch or write the file again; `{'zstd' if file.suffix == '.zst' else 'gzip'} -t` tests it."
    )

"""Any bytes in any file: the readers give what the bytes say or one DataError; never another error or other text."""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmega.errors import DataError
from xlmega.text import aligned, corpus, records
from xlmega.text.parallel_sources import Opus, find_pairs
from xlmega.text.sources import Reading, find_sources

TEXTS = st.text(alphabet=st.one_of(st.sampled_from('ab \n\r\t\0\\"{}é語\u2028\ufeff😀'), st.characters()), max_size=20)
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "text": st.one_of(TEXTS, st.none(), st.integers()),
        "lang": st.one_of(st.sampled_from(["fr", "de", "", "../x"]), st.none(), st.integers()),
        "id": st.one_of(TEXTS, st.integers(), st.none(), st.lists(st.integers(), max_size=2)),
        "translation": st.dictionaries(st.sampled_from(["en", "fr", "fra_Latn"]), st.one_of(TEXTS, st.none())),
    },
)
LINES = st.lists(
    st.one_of(
        RECORDS.map(lambda record: json.dumps(record).encode()),
        TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=20),
        st.sampled_from(
            [b"", b" ", b"[" * 5000, b"1" * 5000, b'{"text": 1e999}', b'{"text": "\\ud800"}', b"null", b"\xff"]
        ),
    ),
    max_size=6,
)
FUZZED = settings(deadline=None)
CONTENTS = LINES.map(b"\n".join)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content, cut off, with a byte changed, or with something after it."""
    kind = draw(st.sampled_from(["whole", "cut", "changed", "longer"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "changed" and content:
        place = draw(st.integers(0, len(content) - 1))
        return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    return content + (draw(st.binary(min_size=1, max_size=9)) if kind == "longer" else b"")


def outcome(read: Callable[[], Iterable[Any]]) -> list[Any] | None:
    """All that is read, or None for a DataError; anything else fails the test."""
    try:
        return list(read())
    except DataError:
        return None


def in_file(name: str, content: bytes, read: Callable[[Path], Iterable[Any]]) -> list[Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "fr", name)
        file.parent.mkdir()
        file.write_bytes(content)
        return outcome(lambda: read(file))


def expected_records(content: bytes) -> list[Any] | None:
    """What JSON lines mean, written as shortly as it can be."""
    try:
        found = [json.loads(line.decode()) for line in content.split(b"\n") if line.strip()]
    except (ValueError, RecursionError):
        return None
    return found if all(isinstance(record, dict) for record in found) else None


@FUZZED
@given(CONTENTS)
def test_records(content: bytes) -> None:
    found = in_file("a.jsonl", content, records.read_records)
    assert (None if found is None else [record for _, record in found]) == expected_records(content)


@FUZZED
@given(st.data(), st.sampled_from([".gz", ".zst"]), CONTENTS)
def test_compressed_records(data: st.DataObject, suffix: str, content: bytes) -> None:
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    packed = data.draw(damaged(pack(content)))
    found = in_file(f"a.jsonl{suffix}", packed, records.read_lines)
    try:
        if suffix == ".gz":
            whole = gzip.decompress(packed)
        else:
            whole, rest = b"", packed
            while rest:
                frame = zstandard.ZstdDecompressor().decompressobj()
                whole += frame.decompress(rest)
                if not frame.eof:
                    raise EOFError
                rest = frame.unused_data
    except (OSError, EOFError, zlib.error, zstandard.ZstdError):
        # Refused, as the library refuses it.
        assert found is None
    else:
        assert found is not None and b"\n".join(found) == whole.removesuffix(b"\n")


@FUZZED
@given(CONTENTS)
def test_documents(content: bytes) -> None:
    found = in_file("a.jsonl", content, corpus.read_documents)
    told = expected_records(content)
    if found is not None:
        assert told is not None
        assert [document.text for document in found] == [record["text"] for record in told]
        assert {document.language for document in found} <= {"fr"}
        for document in found:
            (document.text + document.id).encode()  # whole characters


@FUZZED
@given(CONTENTS, st.sampled_from(["a.jsonl", "a.txt"]), st.sampled_from(["file", "paragraph", "line"]))
def test_sources(content: bytes, name: str, documents: str) -> None:
    def read(file: Path) -> Iterable[Any]:
        for source in find_sources(str(file.parent.parent), Reading(documents=documents)):
            yield from source.documents()

    found = in_file(name, content, read)
    if found is None or name == "a.jsonl":
        return
    text = content.decode().removeprefix("\ufeff")
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    kept = [line for document in found for line in document.text.split("\n") if line.strip()]
    assert kept == [line for line in lines if line.strip()]


@FUZZED
@given(CONTENTS, CONTENTS)
def test_aligned_lines(first: bytes, second: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "a"), Path(folder, "b")
        for file, content in zip(files, (first, second)):
            file.write_bytes(content)
        found = outcome(lambda: aligned.aligned_lines(*files))
    if found is not None:
        for side, content in enumerate((first, second)):
            text = content.decode().removeprefix("\ufeff").removesuffix("\n")
            expected = [line.removesuffix("\r") for line in text.split("\n")] if content else []
            assert [pair[side] for pair in found] == expected


@FUZZED
@given(CONTENTS)
def test_pairs_of_records(content: bytes) -> None:
    def read(file: Path) -> Iterable[Any]:
        return find_pairs(str(file), "en", "fr", Opus()).pairs(file.parent / "scratch")

    for pair in in_file("a.jsonl", content, read) or []:
        assert len(pair) == 2
        "".join(pair).encode()


@FUZZED
@given(st.binary(max_size=200))
def test_archives(content: bytes) -> None:
    assert (
        in_file("a.zip", content, lambda file: find_pairs(str(file), "en", "fr", Opus()).pairs(file.parent / "s"))
        is None
    )

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from xlmega.errors import DataError
from xlmega.text import corpus
from xlmega.text.corpus import Document

DOCUMENTS = [
    Document("bonjour\n\tmonde", "fr", "a"),
    Document("", "fr", "b"),
    Document("日本 \u2028 語 😀\0", "ja", "c"),
]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("suffix", corpus.SUFFIXES)
def test_what_is_written_is_read_and_the_bytes_repeat(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / "00000" / f"x{suffix}", tmp_path / "00000" / f"y{suffix}"
    assert corpus.write_documents(first, DOCUMENTS) == 3
    corpus.write_documents(second, iter(DOCUMENTS))
    assert list(corpus.read_documents(first)) == DOCUMENTS
    assert first.read_bytes() == second.read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_a_failing_writer_leaves_no_file_under_the_name(tmp_path: Path) -> None:
    def documents():
        yield DOCUMENTS[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        corpus.write_documents(tmp_path / "x.jsonl.gz", documents())
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl.gz.part"]


def test_files_come_by_folder_and_name_and_defaults_say_where_a_document_stands(tmp_path: Path) -> None:
    write(tmp_path / "fr" / "b.jsonl", lines({"text": "2"}))
    write(tmp_path / "fr" / "a.jsonl.gz", gzip.compress(lines({"text": "1", "id": 7})))
    write(tmp_path / "00000" / "z.jsonl", b"\n" + lines({"text": "0", "lang": "de"}) + b"  \r\n")
    write(tmp_path / "fr" / "notes.txt", b"not text of the corpus")
    assert list(corpus.read_corpus(tmp_path)) == [
        Document("0", "de", "00000/z.jsonl:2"),
        Document("1", "fr", "7"),
        Document("2", "fr", "fr/b.jsonl:1"),
    ]


def test_a_line_longer_than_a_chunk_and_a_last_line_without_its_end(tmp_path: Path) -> None:
    long = "é" * (2 * corpus.CHUNK_BYTES)
    file = write(tmp_path / "fr" / "a.jsonl", lines({"text": long}, {"text": "end"}).rstrip(b"\n"))
    assert [document.text for document in corpus.read_documents(file)] == [long, "end"]


def test_zst_of_several_frames(tmp_path: Path) -> None:
    frames = [zstandard.compress(lines({"text": text})) for text in "ab"]
    file = write(tmp_path / "fr" / "a.jsonl.zst", b"".join(frames))
    assert [document.text for document in corpus.read_documents(file)] == ["a", "b"]


GOOD = lines({"text": "good", "lang": "fr"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b'{"text": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8 \(byte 13 of the line is 0xe9\)\..*iconv"),
        (GOOD + b'{"text": "cut', r"a\.jsonl:2: not JSON \(Unterminated string.*Each line is one object"),
        (GOOD + b"[" * 100_000, r"a\.jsonl:2: not JSON"),
        (GOOD + b"[1]\n", r"a\.jsonl:2: a list where an object"),
        (GOOD + b'{"lang": "fr"}\n', r"a\.jsonl:2: a document with no 'text'\. Each line needs"),
        (GOOD + b'{"text": null}\n', r"a\.jsonl:2: a document with a 'text' that is null, not a string"),
        (GOOD + b'{"text": "x"}\n', r"a\.jsonl:2: a document without 'lang', and its folder '00000' is a shard number"),
        (GOOD + b'{"text": "x", "lang": "../fr"}\n', r"a\.jsonl:2: '\.\./fr' cannot be a language code"),
        (GOOD + b'{"text": "x", "lang": 3}\n', r"a\.jsonl:2: 3 cannot be a language code"),
        (GOOD + b'{"text": "\\ud83d", "lang": "fr"}\n', r"a\.jsonl:2: the text holds half of a surrogate pair"),
    ],
)
def test_damage_is_named_by_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = write(tmp_path / "00000" / "a.jsonl", content)
    with pytest.raises(DataError, match=message):
        list(corpus.read_documents(file))


@pytest.mark.parametrize(("suffix", "test"), [(".gz", "gzip -t"), (".zst", "zstd -t")])
def test_a_cut_off_or_overwritten_file_is_damaged_where_it_ends(tmp_path: Path, suffix: str, test: str) -> None:
    file = tmp_path / "fr" / f"a.jsonl{suffix}"
    corpus.write_documents(file, [Document(f"text {k} {k * k}", "fr", str(k)) for k in range(2000)])
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:2000] + bytes(100) + whole[2100:], b"plain text\n"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix}:\d+: .*damaged or cut off here.*{test}"):
            list(corpus.read_documents(file))


def test_a_folder_that_is_no_split_is_told_what_one_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        corpus.corpus_files(tmp_path / "absent")
    write(tmp_path / "data" / "train" / "fr" / "a.jsonl", GOOD)
    with pytest.raises(DataError, match="Did you mean '.*/data/train'"):
        corpus.corpus_files(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no SHARD-OR-LANGUAGE"):
        corpus.corpus_files(tmp_path / "empty")
    with pytest.raises(DataError, match="holds JSON lines directly"):
        corpus.corpus_files(tmp_path / "data" / "train" / "fr")


def test_siblings_are_the_other_folders_of_the_same_layout(made_corpus: Path, tmp_path: Path) -> None:
    assert [path.name for path in corpus.sibling_splits(made_corpus / "train")] == ["valid"]
    for name in ("train", "test", "test.part", ".cache"):
        write(tmp_path / name / "fr" / "a.jsonl", GOOD)
    assert {path.name for path in corpus.sibling_splits(tmp_path / "train")} == {"test"}

import sys
from pathlib import Path
from typing import Any

import pytest

from xlmega.errors import ConfigError, DataError
from xlmega.text import corpus, hub
from xlmega.text.conversion import MEGABYTE, convert_text, take_megabytes
from xlmega.text.corpus import Document
from xlmega.text.records import write_records
from xlmega.text.sources import Reading

PYDOCS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pydocs"


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def convert(where: Path | str, output: Path, **options: Any) -> list[Document]:
    convert_text(str(where), output, **options)
    return list(corpus.read_corpus(output / "train"))


TEXT = "\ufeffun\r\ndeux\n\n \t\ntrois\n"


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", [("un\ndeux\n\n \t\ntrois", "fr/a.txt")]),
        ("paragraph", [("un\ndeux", "fr/a.txt:1"), ("trois", "fr/a.txt:5")]),
        ("line", [("un", "fr/a.txt:1"), ("deux", "fr/a.txt:2"), ("trois", "fr/a.txt:5")]),
    ],
)
def test_plain_text(tmp_path: Path, documents: str, expected: list[tuple[str, str]]) -> None:
    write(tmp_path / "in" / "fr" / "a.txt", TEXT)
    found = convert(tmp_path / "in", tmp_path / "out", reading=Reading(documents=documents))
    assert found == [Document(text, "fr", key) for text, key in expected]


def test_a_folder_of_languages_and_kinds_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "fr" / "b" / "deep.txt", "plus bas")
    write_records(folder / "fr" / "a.jsonl.zst", [{"text": "haut"}, {"text": " \n"}, {"text": "x", "lang": "fr"}])
    write(folder / "00000" / "mixed.json", '{"text": "gut", "lang": "de", "id": 5}\n{"text": "good", "lang": "en"}')
    write(folder / "de" / "notes.md", "no text of the corpus")
    write(folder / ".cache" / "x.txt", "hidden")
    said: list[str] = []
    statistics = convert_text(str(folder), tmp_path / "out", say=said.append)
    assert list(corpus.read_corpus(tmp_path / "out" / "train")) == [
        Document("gut", "de", "5"),
        Document("good", "en", "00000/mixed.json:2"),
        Document("haut", "fr", "fr/a.jsonl.zst:1"),
        Document("x", "fr", "fr/a.jsonl.zst:3"),
        Document("plus bas", "fr", "fr/b/deep.txt:1"),
    ]
    assert said == [
        f"'{folder / 'de'}' holds no file of text: nothing comes from it",
        f"1 files of '{folder}' are of other kinds or languages and are passed over",
    ]
    assert {name: (row.kept, row.dropped) for name, row in statistics["train"].rows.items()} == {
        "de": (1, {}), "en": (1, {}), "fr": (3, {"blank": 1}),
    }  # fmt: skip


def test_folders_named_as_splits_are_splits(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        write(tmp_path / "in" / split / "fr" / "a.txt", split)
    convert_text(str(tmp_path / "in"), tmp_path / "out")
    found = {s: [d.text for d in corpus.read_corpus(tmp_path / "out" / s)] for s in ("train", "valid", "test")}
    assert found == {"train": ["train"], "valid": ["dev"], "test": ["test"]}


def test_one_file_needs_its_language_and_a_key_may_have_another_name(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    write_records(file, [{"content": "x"}])
    with pytest.raises(DataError, match=r"in\.jsonl:1: 'text' is missing \(there: content\)\. --text_key"):
        convert(file, tmp_path / "out")
    reading = Reading(text_key="content")
    with pytest.raises(DataError, match=r"in\.jsonl:1: of which language\?.*--language"):
        convert(file, tmp_path / "out", reading=reading)
    assert convert(file, tmp_path / "out", reading=reading, language="sw") == [Document("x", "sw", "in.jsonl:1")]


def test_a_document_that_contradicts_its_folder_is_refused(tmp_path: Path) -> None:
    write_records(tmp_path / "in" / "fr" / "a.jsonl", [{"text": "x"}, {"text": "y", "lang": "de"}])
    with pytest.raises(DataError, match=r"fr/a\.jsonl:2: a document with lang 'de' where 'fr' is expected"):
        convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match=r"a\.jsonl:2: a document with lang 'de' in the folder 'fr'"):
        list(corpus.read_corpus(tmp_path / "in"))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no '.*absent'. Give a file, a folder, or hf:NAME"):
        convert(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        convert(tmp_path / "empty", tmp_path / "out")
    write(tmp_path / "folders" / "part1" / "a.txt", "x")
    with pytest.raises(DataError, match=r"file of 'fr': the first folder below it names the language"):
        convert(tmp_path / "folders", tmp_path / "out", language="fr")
    (tmp_path / "folders" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot read '.*gone\.txt': No such file"):
        convert(tmp_path / "folders", tmp_path / "out", language="part1")
    with pytest.raises(DataError, match=r"is none of \.jsonl, \.json"):
        convert(write(tmp_path / "x.pdf", b"%PDF"), tmp_path / "out")
    with pytest.raises(DataError, match="holds no document with text in it"):
        convert(write(tmp_path / "x.txt", b"\n \n"), tmp_path / "out", language="fr")
    with pytest.raises(ConfigError, match="the output .* lies in the input"):
        convert(tmp_path, tmp_path / "x", language="fr")
    with pytest.raises(DataError, match=r"--language: '\.\./x' cannot be a language code"):
        convert(tmp_path / "x.txt", tmp_path / "out", language="../x")
    with pytest.raises(ConfigError, match="documents must be one of file, paragraph, line, but is 'word'"):
        Reading(documents="word")
    with pytest.raises(ConfigError, match="is none of hf:NAME"):
        convert("hf:a:b:c:d", tmp_path / "out")


def test_without_the_optional_packages_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="needs the package datasets: pip install datasets"):
        convert("hf:somebody/corpus", tmp_path / "out", language="fr")
    with pytest.raises(DataError, match="needs the package pyarrow: pip install pyarrow"):
        convert(write(tmp_path / "fr" / "a.parquet", b"PAR1"), tmp_path / "out", language="fr")


def test_parquet_streams_its_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"text": [f"t{n}" for n in range(2500)], "number": list(range(2500))}
    file = tmp_path / "in" / "fr" / "a.parquet"
    file.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table(rows), file)
    found = convert(tmp_path / "in", tmp_path / "out")
    assert [document.text for document in found] == rows["text"] and found[-1].id == "fr/a.parquet:2500"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:4] + bytes(200) + whole[204:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read '.*a\.parquet'"):
            convert(tmp_path / "in", tmp_path / "out")


def test_data_sets_saved_on_disk_and_loaded_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["a", "b"], "lang": ["fr", "sw"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "validation": one.select([1])}).save_to_disk(tmp_path / "both")
    assert [d.text for d in convert(tmp_path / "one", tmp_path / "out1")] == ["a", "b"]
    convert(tmp_path / "both", tmp_path / "out2")
    assert [d.language for d in corpus.read_corpus(tmp_path / "out2" / "train")] == ["fr", "sw"]
    assert [d.language for d in corpus.read_corpus(tmp_path / "out2" / "valid")] == ["sw"]
    # A folder of JSON lines is a data set by name too, without a network.
    write_records(tmp_path / "byname" / "train.jsonl", [{"text": "c"}])
    found = convert(f"hf:{tmp_path / 'byname'}", tmp_path / "out3", language="fr")
    assert found == [Document("c", "fr", f"hf:{tmp_path / 'byname'}:1")]
    with pytest.raises(DataError, match="has no configuration 'xx'. Name one of: default"):
        convert(f"hf:{tmp_path / 'byname'}:xx", tmp_path / "out4", language="fr")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot read '.*one'"):
        convert(tmp_path / "one", tmp_path / "out5")
    assert hub.saved_splits(tmp_path) == {}


# ------------------------------------------------------------ first megabytes


def test_the_first_megabytes_and_then_validation_in_whole_documents(tmp_path: Path) -> None:
    # 1,000 documents of 10 bytes: characters are not bytes.
    write_records(tmp_path / "in" / "de" / "a.jsonl", [{"text": f"ää{n:06d}"} for n in range(1000)])
    statistics = take_megabytes(
        str(tmp_path / "in"), tmp_path / "out", ["de"], megabytes=5001 / MEGABYTE, valid_percent=10
    )
    train, valid = ([d.text for d in corpus.read_corpus(tmp_path / "out" / split)] for split in ("train", "valid"))
    assert train == [f"ää{n:06d}" for n in range(501)]  # the last document overshoots
    assert valid == [f"ää{n:06d}" for n in range(501, 551)]  # 500 bytes
    assert statistics["de"].rows["train de"].utf8_bytes == 5010


def test_too_little_text_is_refused_with_what_there_is(tmp_path: Path) -> None:
    write_records(tmp_path / "in" / "de" / "a.jsonl", [{"text": "x" * 1024}] * 1024)
    with pytest.raises(DataError, match=r"there are 1\.000 MB of text, but 1\.100 were.*at most 0\.909 megabytes"):
        take_megabytes(str(tmp_path / "in"), tmp_path / "out", ["de"], megabytes=1)
    assert not (tmp_path / "out").exists()
    write_records(tmp_path / "blank" / "de" / "a.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match=r"there are 0\.000 MB of text"):
        take_megabytes(str(tmp_path / "blank"), tmp_path / "out", ["de"], megabytes=1e-9, valid_percent=0)
    for megabytes, percent in ((float("nan"), 10), (0, 10), (-1, 10), (1, 101), (1, float("nan")), (float("inf"), 1)):
        with pytest.raises(ConfigError, match=r"megabytes must be above 0 and valid_percent in \[0, 100\]"):
            take_megabytes("x", tmp_path / "out", ["de"], megabytes=megabytes, valid_percent=percent)


@pytest.mark.skipif(not PYDOCS.is_dir(), reason=f"real text: {PYDOCS} is not there")
def test_real_text(tmp_path: Path) -> None:
    take_megabytes(str(PYDOCS / "train" / "{language}"), tmp_path / "out", ["fr", "zh"], megabytes=0.5)
    for code in ("fr", "zh"):
        source = [d.text for d in corpus.read_documents(PYDOCS / "train" / code / "00000.jsonl.gz")]
        train, valid = (
            [d.text for d in corpus.read_documents(tmp_path / "out" / s / code / "00000.jsonl.gz")]
            for s in ("train", "valid")
        )
        assert train + valid == source[: len(train) + len(valid)]
        size, last = sum(len(text.encode()) for text in train), len(train[-1].encode())
        assert size - last < 0.5 * MEGABYTE <= size
        size, last = sum(len(text.encode()) for text in valid), len(valid[-1].encode())
        assert size - last < 0.05 * MEGABYTE <= size + 1


def test_links_to_folders_are_followed_and_not_round_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.txt", "x")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "fr").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "out") == [Document("x", "fr", "fr/a.txt:1")]

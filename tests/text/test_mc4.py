from pathlib import Path

import numpy as np
import pytest

from xlmega.errors import ConfigError, DataError
from xlmega.text import corpus, mc4
from xlmega.text.records import read_records, write_records

PYDOCS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pydocs"


def texts(file: Path) -> list[tuple[str, str, int]]:
    return [(record["text"], record["lang"], record["id"]) for _, record in read_records(file)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """English in three files, Hebrew under its old code in two, Corsican in one; 7, 3 and 1 documents."""
    for code, files in {"en": (3, 2, 2), "iw": (1, 2), "co": (1,)}.items():
        number = 0
        for part, size in enumerate(files):
            lines = [{"text": f"{code}{number + k}", "timestamp": "t", "url": f"u{number + k}"} for k in range(size)]
            write_records(tmp_path / "mc4" / "train" / code / f"{part}.jsonl.gz", lines)
            number += size
    write_records(tmp_path / "mc4" / "valid" / "en" / "0.jsonl.gz", [{"text": "v1"}, {"text": "v2"}])
    write_records(tmp_path / "mc4" / "valid" / "iw" / "0.jsonl.zst", [{"text": "v3", "lang": "iw"}])
    return tmp_path / "mc4"


def test_shards_mix_the_parts_of_every_language(source: Path, tmp_path: Path) -> None:
    statistics = mc4.shard_languages(source, tmp_path / "out")
    out = tmp_path / "out"
    assert texts(out / "train" / "00000" / "mc4.jsonl") == [
        ("co0", "co", 0), ("en0", "en", 0), ("en1", "en", 1), ("en2", "en", 2), ("iw0", "he", 0), ("iw1", "he", 1),
    ]  # fmt: skip
    assert texts(out / "train" / "00001" / "mc4.jsonl") == [("en3", "en", 0), ("en4", "en", 1), ("iw2", "he", 0)]
    assert texts(out / "train" / "00002" / "mc4.jsonl") == [("en5", "en", 0), ("en6", "en", 1)]
    assert texts(out / "valid" / "00000" / "mc4.jsonl") == [("v1", "en", 0), ("v2", "en", 1), ("v3", "he", 0)]
    assert texts(out / "valid_he" / "00000" / "mc4.jsonl") == [("v3", "he", 0)]
    assert sorted(path.name for path in (out / "train").iterdir()) == ["00000", "00001", "00002"]
    assert next(read_records(out / "train" / "00001" / "mc4.jsonl"))[1] == {
        "text": "en3", "lang": "en", "id": 0, "url": "u3",
    }  # fmt: skip
    assert {name: row.kept for name, row in statistics["train"].rows.items()} == {"co": 1, "en": 7, "he": 3}
    assert len(list(corpus.read_corpus(out / "train"))) == 11
    assert [split.name for split in corpus.sibling_splits(out / "train")] == ["valid", "valid_en", "valid_he"]


def test_only_the_first_shards_are_written_and_the_rest_is_counted(source: Path, tmp_path: Path) -> None:
    statistics = mc4.shard_languages(source, tmp_path / "out", num_shards=1, languages=["iw", "en"], compression="zst")
    assert [path.name for path in (tmp_path / "out" / "train").iterdir()] == ["00000"]
    assert len(texts(tmp_path / "out" / "train" / "00000" / "mc4.jsonl.zst")) == 5
    assert statistics["train"].rows["en"].dropped == {"beyond the first 1 shards": 4}
    assert statistics["train"].rows["en"].read == 7


@pytest.mark.parametrize("documents", [0, 1, 5, 6, 7, 100])
@pytest.mark.parametrize("pieces", [1, 2, 6, 7])
def test_parts_are_those_of_array_split(documents: int, pieces: int) -> None:
    part = mc4.Part("x", (), documents, pieces)
    expected = [list(piece) for piece in np.array_split(np.arange(documents), pieces)]
    assert [list(range(*part.bounds(shard))) for shard in range(pieces)] == expected
    assert part.bounds(pieces) == part.bounds(pieces + 5) == (documents, documents)


def test_published_names_are_known_and_missing_shards_are_made_again(source: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted(source.rglob("*.jsonl.gz")):
        split, code, name = file.relative_to(source).parts
        valid = "-validation" if split == "valid" else ""
        (flat / f"c4-{code}{valid}.tfrecord-0000{name[0]}-of-00003.json.gz").write_bytes(file.read_bytes())
    one, other = tmp_path / "one", tmp_path / "other"
    mc4.shard_languages(source, one, languages=["en"])
    mc4.shard_languages(flat, other, languages=["en"])
    for shard in ("train/00000", "train/00001", "train/00002", "valid/00000", "valid_en/00000"):
        assert (one / shard / "mc4.jsonl").read_bytes() == (other / shard / "mc4.jsonl").read_bytes()
    whole = (one / "train" / "00001" / "mc4.jsonl").read_bytes()
    (one / "train" / "00001" / "mc4.jsonl").unlink()
    said: list[str] = []
    mc4.shard_languages(source, one, languages=["en"], say=said.append)
    assert (one / "train" / "00001" / "mc4.jsonl").read_bytes() == whole
    assert "train/00000/mc4.jsonl: made before, kept" in said and "train/00002/mc4.jsonl: made before, kept" in said


def test_refusals(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no training files of xx\. It must hold train/LANG"):
        mc4.shard_languages(source, tmp_path / "out", languages=["en", "xx"])
    with pytest.raises(ConfigError, match="num_shards and pieces must be at least 1, but they are 0"):
        mc4.shard_languages(source, tmp_path / "out", num_shards=0)
    write_records(source / "train" / "en" / "9.jsonl", [{"text": "x", "lang": "de"}])
    with pytest.raises(DataError, match=r"9\.jsonl:1: a document with lang 'de' in a file of 'en'"):
        mc4.shard_languages(source, tmp_path / "out")


@pytest.mark.skipif(not PYDOCS.is_dir(), reason=f"real text: {PYDOCS} is not there")
def test_real_text_is_all_there_once(tmp_path: Path) -> None:
    mc4.shard_languages(PYDOCS, tmp_path / "out", languages=["id", "it", "pl", "tr"], pieces=7)
    shards = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    assert shards == [f"{shard:05d}" for shard in range(7)]
    written = sorted((doc.language, doc.text) for doc in corpus.read_corpus(tmp_path / "out" / "train"))
    codes = {"id", "it", "pl", "tr"}
    assert written == sorted(
        (doc.language, doc.text)
        for file in corpus.corpus_files(PYDOCS / "train")
        if file.parent.name in codes
        for doc in corpus.read_documents(file)
    )

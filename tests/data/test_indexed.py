import dataclasses
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlmega import config
from xlmega.data import indexed
from xlmega.data.manifest import read_manifest, write_manifest
from xlmega.errors import DataError

NEW_IN_VERSION_2 = ("block_bytes", "bin_blocks", "idx_blocks", "document_prefix", "document_suffix")
ABOUT = {"split": "train", "vocabulary_hash": "abc", "vocabulary_size": 300, "eod_id": 2, "utf8_bytes": 9}


def write(prefix: Path, documents: list[list[int]], dtype: str = "uint16", **about: object) -> indexed.Manifest:
    writer = indexed.IndexedWriter(prefix, dtype)
    for ids in documents:
        writer.add_document(np.array(ids))
    return writer.finish(**{"language": prefix.name, **ABOUT, **about})


def test_golden_bytes(tmp_path: Path) -> None:
    manifest = write(tmp_path / "fr", [[5, 6, 2], [2], [299, 2]])
    assert (tmp_path / "fr.bin").read_bytes() == struct.pack("<6H", 5, 6, 2, 2, 299, 2)
    assert (tmp_path / "fr.idx").read_bytes() == (
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, 3, 4)  # version, uint16, sequences, documents + 1
        + struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert (manifest.documents, manifest.tokens, manifest.min_id, manifest.max_id) == (3, 6, 2, 299)
    assert indexed.read_manifest(tmp_path / "fr.json") == manifest == indexed.verify(tmp_path / "fr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fr.bin", "fr.idx", "fr.json"]

    tokens = indexed.open_tokens(tmp_path / "fr")
    assert tokens.tokens.tolist() == [5, 6, 2, 2, 299, 2] and tokens.tokens.dtype == np.uint16
    assert tokens.document_starts.tolist() == [0, 3, 4, 6] and tokens.document_starts.dtype == np.int64
    assert tokens.document(2).tolist() == [299, 2]
    assert (tokens.num_tokens, tokens.num_documents, tokens.path) == (6, 3, tmp_path / "fr")


def test_streamed_in_blocks_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[k, *[2] * (k % 5)] for k in range(100)]
    whole = write(tmp_path / "a", documents, language="x")
    monkeypatch.setattr(indexed, "BLOCK", 7)
    blocks = write(tmp_path / "b", documents, language="x")
    assert whole == blocks
    writer = indexed.IndexedWriter(tmp_path / "c", "uint16")
    writer.add_documents(np.array([k for ids in documents for k in ids]), np.array([len(ids) for ids in documents]))
    assert writer.finish(language="x", **ABOUT) == whole


def test_dtype_boundary(tmp_path: Path) -> None:
    assert [indexed.token_dtype(size) for size in (1, 65_500, 65_501)] == ["uint16", "uint16", "int32"]
    manifest = write(tmp_path / "zh.Hant", [[65_500, 2]], dtype="int32", vocabulary_size=65_501)
    assert manifest.bin_bytes == 8 and indexed.open_tokens(tmp_path / "zh.Hant").tokens.tolist() == [65_500, 2]
    with pytest.raises(DataError, match=r"ids from 2 to 70000 do not fit into uint16 \(0 to 65535\)"):
        write(tmp_path / "x", [[70_000, 2]])
    with pytest.raises(DataError, match="ids from -1 to 2 do not fit"):
        write(tmp_path / "x", [[-1, 2]])


@pytest.mark.torch
def test_megatron_reads_the_same_sequences(made_tokens: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for language, ours in indexed.open_corpus(made_tokens, "train").items():
        theirs = indexed_dataset.IndexedDataset(str(made_tokens / "train" / language))
        assert len(theirs) == ours.num_documents
        assert theirs.document_indices.tolist() == list(range(ours.num_documents + 1))
        for k in range(len(theirs)):
            assert np.array_equal(theirs[k], ours.document(k))
            assert theirs[k].dtype == ours.tokens.dtype


def test_until_it_is_finished_there_is_nothing(tmp_path: Path) -> None:
    write(tmp_path / "train" / "fr", [[5, 2]])
    writer = indexed.IndexedWriter(tmp_path / "train" / "fr", "uint16")
    writer.add_document(np.array([7, 2]))
    with pytest.raises(DataError, match="no manifest '.*fr.json'.*never finished"):
        indexed.open_tokens(tmp_path / "train" / "fr")
    with pytest.raises(DataError, match="never finished"):
        indexed.open_corpus(tmp_path, "train")
    writer.close()
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "no document was written"), ([[300, 2]], "id 300 was written, but the vocabulary has 300 ids, 0 to 299")],
)
def test_what_cannot_be_finished(tmp_path: Path, documents: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path / "fr", documents)
    assert not (tmp_path / "fr.json").exists()


def test_an_empty_document_and_lengths_that_do_not_add_up(tmp_path: Path) -> None:
    writer = indexed.IndexedWriter(tmp_path / "fr", "uint16")
    for ids, lengths in (([], [0]), ([1, 2], [1]), ([1], [2])):
        with pytest.raises(DataError, match="A document has 1 to"):
            writer.add_documents(np.array(ids, dtype=np.int64), np.array(lengths))


def test_damage_is_found_at_open_or_by_verify(tmp_path: Path) -> None:
    prefix = tmp_path / "fr"
    write(prefix, [[5, 6, 2], [7, 2]])
    whole = {suffix: (tmp_path / f"fr{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")}

    def damaged(suffix: str, content: bytes) -> None:
        for name, kept in whole.items():
            (tmp_path / f"fr{name}").write_bytes(content if name == suffix else kept)

    damaged(".bin", whole[".bin"][:-2])
    with pytest.raises(DataError, match=r"fr\.bin' has 8 bytes, but its manifest says 10"):
        indexed.open_tokens(prefix)
    damaged(".idx", b"X" + whole[".idx"][1:])
    with pytest.raises(DataError, match=r"fr\.idx' and its manifest disagree"):
        indexed.open_tokens(prefix)
    damaged(".idx", whole[".idx"][:17] + b"\4" + whole[".idx"][18:])
    with pytest.raises(DataError, match="the header is"):
        indexed.open_tokens(prefix)
    damaged(".json", whole[".json"].replace(b'"tokens": 5', b'"tokens": 6'))
    with pytest.raises(DataError, match="its own checksum does not fit"):
        indexed.open_tokens(prefix)
    damaged("", b"")
    write_manifest(tmp_path / "fr.json", dataclasses.replace(read_manifest(tmp_path / "fr.json"), tokens=6))
    with pytest.raises(DataError, match="disagree"):
        indexed.open_tokens(prefix)
    damaged(".json", whole[".json"].replace(b'"format_version": 2', b'"format_version": 9'))
    with pytest.raises(DataError, match="reads version 1 and 2"):
        indexed.open_tokens(prefix)
    for content in (b"{", b"[]", b"{}", b"[" * 100_000, whole[".json"].replace(b'"tokens": 5', b'"tokens": "5"')):
        damaged(".json", content)
        with pytest.raises(DataError, match="is not a token manifest"):
            indexed.open_tokens(prefix)
    damaged(".bin", b"\1" + whole[".bin"][1:])
    indexed.open_tokens(prefix)
    with pytest.raises(DataError, match=r"fr\.bin' is damaged: bytes 0 to 10 have sha256"):
        indexed.verify(prefix)
    damaged(".idx", whole[".idx"][:-1] + b"\1")
    with pytest.raises(DataError, match=r"fr\.idx' is damaged"):
        indexed.verify(prefix)
    damaged("", b"")
    (tmp_path / "fr.bin").unlink()
    with pytest.raises(DataError, match=r"fr\.bin' is missing"):
        indexed.open_tokens(prefix)


def test_a_corpus_is_every_language_of_one_vocabulary(tmp_path: Path) -> None:
    for split, language in (("train", "fr"), ("train", "de"), ("valid", "fr"), ("x.part", "fr")):
        write(tmp_path / split / language, [[5, 2]], split=split)
    (tmp_path / "vocabulary").mkdir()
    assert indexed.splits(tmp_path) == ["train", "valid"]
    assert list(indexed.open_corpus(tmp_path, "train")) == ["de", "fr"]
    with pytest.raises(DataError, match="has no split 'test'; it has train, valid"):
        indexed.open_corpus(tmp_path, "test")
    with pytest.raises(DataError, match="there is no token folder"):
        indexed.splits(tmp_path / "absent")
    with pytest.raises(DataError, match=f"it has none. It is a split itself: did you mean '{tmp_path}'"):
        indexed.open_corpus(tmp_path / "train", "train")
    (tmp_path / "text" / "train" / "fr").mkdir(parents=True)
    (tmp_path / "text" / "train" / "fr" / "a.jsonl.gz").touch()
    with pytest.raises(DataError, match=r"It holds text: tools/tokenize_corpus.py '.*text/train'"):
        indexed.open_corpus(tmp_path / "text", "train")
    write(tmp_path / "train" / "ja", [[5, 2]], vocabulary_hash="xyz")
    with pytest.raises(DataError, match=r"mixes 2 vocabularies \(abc: de, fr; xyz: ja\)"):
        indexed.open_corpus(tmp_path, "train")
    write(tmp_path / "valid" / "en", [[5, 2]], language="de")
    with pytest.raises(DataError, match="says that its language is 'de'"):
        indexed.open_corpus(tmp_path, "valid")


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    manifest = write(tmp_path / "fr", [[5, 2]])
    table = json.loads((tmp_path / "fr.json").read_text())
    assert len(table.pop("manifest_sha256")) == 64 and table == config.to_table(manifest)


def test_manifests_of_version_1_are_read(tmp_path: Path) -> None:
    manifest = write(tmp_path / "fr", [[5, 6, 2], [2]])
    table = {
        **{key: value for key, value in config.to_table(manifest).items() if key not in NEW_IN_VERSION_2},
        **{
            f"{name}_sha256": hashlib.sha256((tmp_path / f"fr.{name}").read_bytes()).hexdigest()
            for name in ("bin", "idx")
        },
        "format_version": 1,
    }
    (tmp_path / "fr.json").write_text(json.dumps(table))
    assert indexed.verify(tmp_path / "fr").documents == 2
    (tmp_path / "fr.bin").write_bytes(b"\0" * 8)
    with pytest.raises(DataError, match=r"fr\.bin' is damaged"):
        indexed.verify(tmp_path / "fr")


def test_one_large_file_is_verified_in_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "HASH_BLOCK_BYTES", 16)
    manifest = write(tmp_path / "fr", [[k, 2] for k in range(20)])
    assert len(manifest.bin_blocks) == 5 and len(manifest.idx_blocks) == -(-manifest.idx_bytes // 16)
    shares = 5 + len(manifest.idx_blocks)
    assert [indexed.damage([tmp_path / "fr"], k, shares) for k in range(shares)] == [""] * shares
    content = bytearray((tmp_path / "fr.bin").read_bytes())
    content[33] ^= 1
    (tmp_path / "fr.bin").write_bytes(content)
    told = [indexed.damage([tmp_path / "fr"], k, shares) for k in range(shares)]
    assert [k for k, line in enumerate(told) if line] == [2] and "bytes 32 to 48" in told[2]
    assert "fr.bin' is damaged" in indexed.damage([tmp_path / "fr"])


def test_a_writer_goes_on_from_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "HASH_BLOCK_BYTES", 16)
    documents = [[k, *[2] * (k % 5)] for k in range(40)]
    whole = write(tmp_path / "a" / "fr", documents)
    for kept in (0, 1, 17, 40):
        prefix = tmp_path / str(kept) / "fr"
        first = indexed.IndexedWriter(prefix, "uint16")
        for ids in documents[:kept]:
            first.add_document(ids)
        state = json.loads(json.dumps(first.state()))
        for ids in documents[kept : kept + 3]:
            first.add_document(ids)
        first.flush()
        second = indexed.IndexedWriter(prefix, "uint16", state)
        for ids in documents[kept:]:
            second.add_document(ids)
        assert second.finish(language="fr", **ABOUT) == whole
        for suffix in (".bin", ".idx", ".json"):
            assert (prefix.parent / f"fr{suffix}").read_bytes() == (tmp_path / "a" / f"fr{suffix}").read_bytes()
    (tmp_path / "0" / "fr.bin").write_bytes(b"")
    with pytest.raises(DataError, match="shorter than the 80 bytes"):
        indexed.IndexedWriter(tmp_path / "0" / "fr", "uint16", {**state, "tokens": 40})


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; import numpy as np; from xlmega.data import indexed;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "writer = indexed.IndexedWriter(Path(sys.argv[1]), 'uint16');"
        "writer.add_document(np.zeros(600, int)); writer.flush()"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "fr")], capture_output=True, text=True)
    assert "DataError: cannot write the tokens" in run.stderr and "File too large. Nothing was published" in run.stderr


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_a_file_gives_other_tokens(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any bytes in place of any part of any of the three files: a DataError, or the very documents."""
    folder = tmp_path_factory.mktemp("fuzz")
    documents = [[5, 6, 2], [7, 2], [2]]
    write(folder / "fr", documents)
    for _ in range(data.draw(st.integers(1, 3))):
        file = folder / f"fr{data.draw(st.sampled_from(['.bin', '.idx', '.json']))}"
        content = file.read_bytes()
        first = data.draw(st.integers(0, len(content)))
        last = data.draw(st.integers(first, min(len(content), first + 9)))
        file.write_bytes(content[:first] + data.draw(st.binary(max_size=9)) + content[last:])
    try:
        tokens = indexed.open_tokens(folder / "fr")
        opened = [tokens.document(k).tolist() for k in range(tokens.num_documents)]
        assert len(opened) == tokens.num_documents == 3
        assert sum(map(len, opened)) == len(tokens.tokens) == 6
        indexed.verify(folder / "fr")
    except DataError:
        return
    assert opened == documents

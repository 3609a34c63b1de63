import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from xlmega.data import indexed, tokenizing
from xlmega.errors import DataError
from xlmega.text import corpus, vocabulary
from xlmega.text.corpus import Document


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_document_is_its_ids_and_the_end_of_document(
    made_corpus: Path, made_vocabulary: Path, made_tokens: Path
) -> None:
    vocab = vocabulary.load_vocabulary(made_vocabulary)
    assert vocabulary.load_vocabulary(made_tokens / "vocabulary").hash == vocab.hash
    piece_bytes = np.load(made_tokens / "vocabulary" / "piece_bytes.npy")
    assert indexed.splits(made_tokens) == ["train", "valid"]
    for split in ("train", "valid"):
        documents: dict[str, list[str]] = {}
        for document in corpus.read_corpus(made_corpus / split):
            documents.setdefault(document.language, []).append(document.text)
        tokens = indexed.open_corpus(made_tokens, split)
        assert list(tokens) == sorted(documents)
        for language, texts in documents.items():
            found = tokens[language]
            assert found.num_documents == len(texts) and found.manifest.vocabulary_hash == vocab.hash
            for k in (0, len(texts) // 2, len(texts) - 1):
                assert found.document(k).tolist() == [*vocab.encode(texts[k]), vocab.eod_id]
            assert found.manifest.utf8_bytes == sum(len(text.encode()) for text in texts)
            assert found.manifest.utf8_bytes == int(piece_bytes[found.tokens].sum())
            indexed.verify(made_tokens / split / language)


def test_threads_and_batches_do_not_matter(
    made_corpus: Path, made_vocabulary: Path, made_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 1000)
    said: list[str] = []
    tokenizing.tokenize_corpus(made_corpus / "train", made_vocabulary, tmp_path / "t", num_threads=3, say=said.append)
    assert contents(tmp_path / "t") == contents(made_tokens)
    assert [line.split(":")[0] for line in said] == ["train and the splits beside it", "train", "valid"]
    assert "MB/s" in said[1]


def test_shards_of_several_languages(made_vocabulary: Path, tmp_path: Path) -> None:
    split = tmp_path / "train"
    corpus.write_documents(split / "00000" / "a.jsonl", [Document("x", "fr", "1"), Document("", "de", "2")])
    corpus.write_documents(split / "00001" / "a.jsonl.zst", [Document("y", "fr", "3")])
    (result,) = tokenizing.tokenize_corpus(split, made_vocabulary, tmp_path / "t")
    vocab = vocabulary.load_vocabulary(made_vocabulary)
    tokens = indexed.open_corpus(tmp_path / "t", "train")
    assert tokens["de"].tokens.tolist() == [2]
    assert tokens["fr"].tokens.tolist() == [*vocab.encode("x"), 2, *vocab.encode("y"), 2]
    assert (result.utf8_bytes, result.tokens) == (2, tokens["fr"].num_tokens + 1)


def test_an_interrupted_run_is_taken_up(
    made_corpus: Path, made_vocabulary: Path, made_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**settings: object) -> list[tokenizing.TokenizedSplit]:
        return tokenizing.tokenize_corpus(made_corpus / "train", made_vocabulary, tmp_path / "t", **settings)

    finish = indexed.IndexedWriter.finish
    left = 8  # train's five languages and three of valid's

    def fail(self: indexed.IndexedWriter, **about: object) -> indexed.Manifest:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return finish(self, **about)

    with monkeypatch.context() as patch:
        patch.setattr(indexed.IndexedWriter, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert indexed.splits(tmp_path / "t") == ["train"]
    written = (tmp_path / "t" / "train" / "qla.bin").stat().st_mtime_ns
    train, valid = run()
    assert (train.seconds, written) == (0.0, (tmp_path / "t" / "train" / "qla.bin").stat().st_mtime_ns)
    assert valid.seconds > 0 and valid.tokens > 0
    assert contents(tmp_path / "t") == contents(made_tokens)

    with pytest.raises(DataError, match="is complete: it holds train, valid.*--overwrite"):
        run()
    assert all(split.seconds > 0 for split in run(overwrite=True))
    assert contents(tmp_path / "t") == contents(made_tokens)


def test_what_is_there_is_not_mixed_with_what_comes(made_corpus: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "t"
    shutil.copytree(made_corpus, data)
    other = tmp_path / "v"
    vocabulary.train_vocabulary((d.text for d in corpus.read_corpus(data / "train")), 700, other)
    (train,) = tokenizing.tokenize_corpus(data / "train", made_vocabulary, output, only=True)
    assert train.name == "train" and indexed.splits(output) == ["train"]
    with pytest.raises(DataError, match="exists, made with another vocabulary"):
        tokenizing.tokenize_corpus(data / "train", other, output)
    with pytest.raises(DataError, match="train' was made with another vocabulary and is not among valid"):
        tokenizing.tokenize_corpus(data / "valid", other, output, overwrite=True)
    with pytest.raises(DataError, match="'.*vocabulary' holds another vocabulary"):
        tokenizing.tokenize_corpus(data / "valid", other, output)
    corpus.write_documents(data / "train" / "qla" / "00001.jsonl", [Document("more", "qla", "1")])
    with pytest.raises(DataError, match="made from other files"):
        tokenizing.tokenize_corpus(data / "train", made_vocabulary, output)
    train, valid = tokenizing.tokenize_corpus(data / "train", other, output, overwrite=True)
    assert {manifest.vocabulary_size for manifest in train.manifests + valid.manifests} == {700}
    (output / "test").mkdir()
    (output / "test" / "precious").touch()
    shutil.copytree(data / "valid", data / "test")
    with pytest.raises(DataError, match="test' holds no tokens, so it is not removed"):
        tokenizing.tokenize_corpus(data / "test", other, output, overwrite=True)


def test_damaged_text_stops_it_and_publishes_nothing(made_vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "train" / "fr").mkdir(parents=True)
    (tmp_path / "train" / "fr" / "a.jsonl").write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        tokenizing.tokenize_corpus(tmp_path / "train", made_vocabulary, tmp_path / "t")
    assert indexed.splits(tmp_path / "t") == []
    (tmp_path / "train" / "fr" / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no document"):
        tokenizing.tokenize_corpus(tmp_path / "train", made_vocabulary, tmp_path / "t")
    with pytest.raises(DataError, match="at least 1 thread"):
        tokenizing.tokenize_corpus(tmp_path / "train", made_vocabulary, tmp_path / "t", num_threads=0)

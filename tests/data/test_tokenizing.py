import hashlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlmega.data import indexed, tokenizing
from xlmega.errors import ConfigError, DataError
from xlmega.locking import locked
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


def test_workers_blocks_and_journals_do_not_matter(
    made_corpus: Path, made_vocabulary: Path, made_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(tokenizing, "PENDING_BYTES", 3000)
    monkeypatch.setattr(tokenizing, "JOURNAL_SECONDS", 0.1)
    said: list[str] = []
    tokenizing.tokenize_corpus(made_corpus / "train", made_vocabulary, tmp_path / "t", workers=3, say=said.append)
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
    corpus.write_documents(tmp_path / "train" / "de" / "a.jsonl", [Document("one", "de", "1")])
    said: list[str] = []
    tokenizing.tokenize_corpus(tmp_path / "train", made_vocabulary, tmp_path / "t", say=said.append)
    assert "train: no document in fr, so no tokens are written for it" in said
    with pytest.raises(DataError, match="at least 1 process"):
        tokenizing.tokenize_corpus(tmp_path / "train", made_vocabulary, tmp_path / "t", workers=0)


# Kills itself at the n-th of the moments at which something is written, renamed or made safe.
KILLED = """
import os, signal, sys, threading
from pathlib import Path
from xlmega.data import indexed, tokenizing

tokenizing.BLOCK_BYTES, tokenizing.PENDING_BYTES, tokenizing.JOURNAL_SECONDS = 20_000, 10_000, 0
left, lock = int(sys.argv[4]), threading.Lock()

def counted(call):
    def run(*args, **settings):
        global left
        with lock:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **settings)
    return run

os.fsync, Path.replace, Path.unlink = counted(os.fsync), counted(Path.replace), counted(Path.unlink)
indexed.IndexedWriter.flush = counted(indexed.IndexedWriter.flush)
tokenizing.tokenize_corpus(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), workers=int(sys.argv[5]))
print(left)
"""


def test_killed_at_any_moment_the_same_command_finishes_to_the_same_bytes(
    made_corpus: Path, made_vocabulary: Path, tmp_path: Path
) -> None:
    def run(output: str, moment: int, workers: int = 1) -> subprocess.CompletedProcess[str]:
        where = [str(made_corpus / "valid"), str(made_vocabulary), str(tmp_path / output)]
        command = [sys.executable, "-c", KILLED, *where, str(moment), str(workers)]
        return subprocess.run(command, capture_output=True, text=True)

    moments = 10**6 - int(run("whole", 10**6).stdout)
    assert moments > 100
    whole = contents(tmp_path / "whole")
    # In one output, ever later: each run goes on from where the one before was killed.
    for k, moment in enumerate((3, 25, 50, moments // 2)):
        killed = run("a", moment, workers=1 + k % 2)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "a" / "valid").exists()
    assert run("a", 10**6).returncode == 0
    assert contents(tmp_path / "a") == whole
    # While the languages' files are put in place at the end, where most is renamed.
    for before_the_end in (2, 5, 9, 14):
        output = f"b{before_the_end}"
        assert run(output, moments - before_the_end).returncode == -signal.SIGKILL
        assert run(output, 10**6).returncode == 0
        assert contents(tmp_path / output) == whole


def test_a_damaged_journal_or_part_means_from_the_start(
    made_corpus: Path, made_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[tokenizing.TokenizedSplit]:
        return tokenizing.tokenize_corpus(made_corpus / "valid", made_vocabulary, tmp_path / "t", say=said.append)

    monkeypatch.setattr(tokenizing, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(tokenizing, "JOURNAL_SECONDS", 0)
    part, said = tmp_path / "t" / "valid.part", []
    add, left = tokenizing._Work.add, 0

    def stop(self: tokenizing._Work, *given: object) -> None:
        nonlocal left
        add(self, *given)  # type: ignore[arg-type]
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizing._Work, "add", stop)
        for hurt in (
            lambda: (part / "journal").write_text("{"),
            lambda: (part / "journal").write_text("[]"),
            lambda: (part / "qla.bin.part").write_bytes(b""),
            lambda: (part / "qla.lengths.part").unlink(),
        ):
            left = 4
            with pytest.raises(KeyboardInterrupt):
                run()
            hurt()
        assert not any("going on" in line for line in said)
        left = 4
        with pytest.raises(KeyboardInterrupt):
            run()
    run()
    assert sum("going on at" in line for line in said) == 1
    tokenizing.tokenize_corpus(made_corpus / "valid", made_vocabulary, tmp_path / "u")
    assert contents(tmp_path / "t") == contents(tmp_path / "u")


def test_two_writers_of_one_output(made_corpus: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "t"), pytest.raises(DataError, match="is being written by another process"):
        tokenizing.tokenize_corpus(made_corpus / "valid", made_vocabulary, tmp_path / "t")
    with pytest.raises(DataError, match="is where the text lies"):
        tokenizing.tokenize_corpus(made_corpus / "valid", made_vocabulary, made_corpus)


def test_what_stands_around_a_document(made_vocabulary: Path, tmp_path: Path) -> None:
    split, vocab = tmp_path / "train", vocabulary.load_vocabulary(made_vocabulary)
    corpus.write_documents(split / "fr" / "a.jsonl", [Document("x", "fr", "1"), Document("", "fr", "2")])

    def tokens(output: str, **form: Any) -> indexed.IndexedTokens:
        tokenizing.tokenize_corpus(split, made_vocabulary, tmp_path / output, **form)
        return indexed.open_corpus(tmp_path / output, "train")["fr"]

    x = vocab.encode("x")
    both = tokens("a", prefix=["<D>"], suffix=["<D>"])  # X-ELM's form
    assert both.tokens.tolist() == [2, *x, 2, 2, 2] and both.num_documents == 2
    assert (both.manifest.document_prefix, both.manifest.document_suffix) == ((2,), (2,))
    none = tokens("b", suffix=[])  # lines of a text, each with its newline
    assert none.tokens.tolist() == x and none.num_documents == 1 and none.manifest.document_suffix == ()
    assert tokens("c").manifest.document_suffix == (2,)
    with pytest.raises(DataError, match="with another prefix or suffix around its documents"):
        tokens("a")
    with pytest.raises(ConfigError, match="has no piece '</s>'"):
        tokens("d", prefix=["</s>"])


def test_a_worker_that_is_killed_is_one_message(made_corpus: Path, made_vocabulary: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from xlmega.data import encoding, tokenizing;"
        "from xlmega.errors import run_main;"
        "encoding.parse_document = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL);"
        "run_main(lambda: tokenizing.tokenize_corpus(*map(Path, sys.argv[1:]), workers=2))"
    )
    where = [str(made_corpus / "valid"), str(made_vocabulary), str(tmp_path / "t")]
    run = subprocess.run([sys.executable, "-c", script, *where], capture_output=True, text=True)
    assert run.returncode == 2 and "was killed, most likely for want of memory" in run.stderr


def test_many_languages_in_one_file_need_few_open_files(made_vocabulary: Path, tmp_path: Path) -> None:
    codes = [f"l{k:03d}" for k in range(300)]
    split = tmp_path / "train"
    corpus.write_documents(split / "00000" / "a.jsonl", [Document(f"{code} tel", code, "1") for code in codes * 2])
    script = (
        "import resource, sys; from pathlib import Path; from xlmega.data import tokenizing;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
        "tokenizing.tokenize_corpus(*map(Path, sys.argv[1:]), workers=2)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, (split, made_vocabulary, tmp_path / "t"))], check=False
    )
    assert run.returncode == 0
    vocab = vocabulary.load_vocabulary(made_vocabulary)
    tokens = indexed.open_corpus(tmp_path / "t", "train")
    assert list(tokens) == codes
    assert all(one.tokens.tolist() == [*vocab.encode(f"{code} tel"), 2] * 2 for code, one in tokens.items())

"""The verbs of tools/build_corpus.py on small text: what they say, write and refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xlmega.text import corpus
from xlmega.text.records import read_records, write_records

ROOT = Path(__file__).resolve().parents[1]


def call(*words: str | Path, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(ROOT / "tools" / "build_corpus.py"), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for code in ("en", "fr"):
        write_records(tmp_path / "texts" / "train" / code / "a.jsonl", [{"text": f"{code} {n} x"} for n in range(300)])
        write_records(tmp_path / "texts" / "valid" / code / "a.jsonl", [{"text": f"{code} valid"}])
        (tmp_path / f"lines.{code}").write_text("".join(f"{code} {n} x\n" for n in range(300)))
    return tmp_path / "texts"


def test_every_verb_writes_what_it_says_and_a_second_call_changes_nothing(texts: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.en", tmp_path / "lines.fr"
    verbs: dict[str, list[str | Path]] = {
        "text": [texts],
        "mc4": [texts, "--pieces", "3", "--compression", "gz"],
        "oscar": [texts / "train" / "{language}", "--languages", "en", "fr", "--megabytes", "0.001"],
        "europarl": ["--languages", "en", "fr", "--europarl", *lines, "--multiun", *lines, "--pair", "x", *lines],
        "bitext": [
            f"{lines[0]},{lines[1]}", "--languages", "en", "fr", "--skip_language_id", "--embedding_threshold", "0",
            "--valid_pairs", "9",
        ],
    }  # fmt: skip
    for verb, words in verbs.items():
        output = tmp_path / "out" / verb
        said = call(verb, *words, "--output", output).stdout.splitlines()
        assert said[-1] == f"wrote {output}"
        assert any(line.split()[:4] == ["stage", "of", "read", "kept"] for line in said)
        if verb != "bitext":
            assert len(list(corpus.read_corpus(output / "train"))) > 0
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*.gz")}
        again = call(verb, *words, "--output", output).stdout
        assert "kept" in again and "anew" not in again
        assert before and {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in output.rglob("*.gz")} == before
    pairs = tmp_path / "out" / "bitext" / "parallel"
    sizes = {path.name: len(list(read_records(path))) for path in pairs.glob("*.gz")}
    assert sizes == {"en-fr.train.jsonl.gz": 291, "en-fr.valid.jsonl.gz": 9}
    assert sorted(path.name for path in (tmp_path / "out" / "mc4").iterdir() if path.is_dir()) == [
        "stages", "train", "valid", "valid_en", "valid_fr",
    ]  # fmt: skip
    assert len(list((tmp_path / "out" / "europarl" / "parallel").glob("en-fr.*.train.jsonl.gz"))) == 3


def test_a_users_error_is_one_message_and_nothing_is_written(texts: Path, tmp_path: Path) -> None:
    told = call("text", texts, "--output", texts, code=2).stderr
    assert told == f"ConfigError: the output '{texts}' is the input '{texts}'. Choose an output apart from it.\n"
    told = call("oscar", texts, "--languages", "en", "--megabytes", "nan", "--output", tmp_path / "out", code=2).stderr
    assert told.startswith("ConfigError: megabytes must be above 0")
    assert "VERB" in call(code=2).stderr
    assert not (tmp_path / "out").exists()


def test_made_languages_as_option_and_as_verb(tmp_path: Path) -> None:
    for name, words in (("one", ["--made"]), ("two", ["made"])):
        call(*words, "--megabytes", "0.02", "--output", tmp_path / name)
    for file in sorted((tmp_path / "one").rglob("*.gz")):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()

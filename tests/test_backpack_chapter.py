"""The README's chapter on Backpacks: every command of its block, on a small corpus and a small model."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parents[1]
# What makes the published sizes small enough for a test; everything else is the README's.
SMALLER = {
    "train_vocabulary.py": ["--size", "600"],
    "pretrain.py": [
        *("--set", "model.num_layers=2", "--set", "model.hidden_size=32", "--set", "model.num_heads=2"),
        *("--set", "model.ffn_hidden_size=64", "--set", "data.sequence_length=32", "--set", "model.max_positions=32"),
        *("--set", "training.total_steps=2", "--set", "training.batch_windows=4", "--set", "optimizer.warmup_steps=1"),
        *("--set", "training.validation_windows=2"),
    ],
    "evaluate_cloze.py": ["--count", "2"],
}


def commands() -> list[list[str]]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    chapter = readme[readme.index("## Backpacks\n") :]
    block = re.search(r"```\n(.*?)```", chapter, flags=re.DOTALL)
    assert block is not None
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines()]


def words_of(lexicon: dict[str, dict[str, list[str]]]) -> list[tuple[str, str]]:
    """Words of the first two made languages that mean the same."""
    first, second = sorted(lexicon)[:2]
    by_sense = {of[0]: word for word, of in lexicon[second]["words"].items()}  # type: ignore[index,call-overload]
    pairs = [(word, by_sense[of[0]]) for word, of in lexicon[first]["words"].items() if of[0] in by_sense]  # type: ignore[index,call-overload]
    return pairs[:6]


def test_from_two_aligned_files_to_a_sense_picture(made_corpus: Path, tmp_path: Path) -> None:
    pairs = [
        list(json.loads(line)["translation"].values())[:2]
        for path in sorted((made_corpus / "parallel").rglob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).decode().splitlines()
    ]
    pairs = (pairs * 8)[:1200]  # enough lines for a held-out half per cent with whole sentences
    for side, code in enumerate(("en", "fr")):
        lines = [" ".join(text.split()) for text in (pair[side] for pair in pairs)]
        (tmp_path / f"EP.{code}").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    words = words_of(json.loads((made_corpus / "lexicon.json").read_text(encoding="utf-8"))["languages"])
    (tmp_path / "words.tsv").write_text("".join(f"en\t{a}\nfr\t{b}\n" for a, b in words), encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in words), encoding="utf-8")
    for python, script, *rest in commands():
        assert python == "python"
        rest = [str(ROOT / word) if word.startswith("ds_configs/") else word for word in rest]
        line = [sys.executable, str(ROOT / script), *rest, *SMALLER.get(Path(script).name, [])]
        told = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert told.returncode == 0, (line, told.stdout[-2000:], told.stderr[-4000:])
    for picture in ("words.png", "distribution.png"):
        assert (tmp_path / "senses" / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert np.loadtxt(tmp_path / "senses" / "distribution.tsv").shape == (16, 16)
    assert (tmp_path / "cloze.jsonl").is_file() and (tmp_path / "exports/backpack/modeling_backpack.py").is_file()

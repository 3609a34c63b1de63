"""The README's commands, chapter by chapter, as they stand there, on data and models of a size for tests."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import worlds

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "data.sequence_length=32",
    "training.batch_windows=16", "training.total_steps=4", "training.validation_windows=2",
]  # fmt: skip


def commands(chapter: str) -> list[str]:
    """The command lines in the code blocks of '## chapter' (or of '### chapter')."""
    text = re.split(r"^##+ ", README, flags=re.MULTILINE)
    (found,) = [part for part in text if part.startswith(f"{chapter}\n")]
    blocks = re.findall(r"```\n(.*?)```", found, flags=re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def run_chapter(chapter: str, place: Path, changes: Mapping[str, str], given: Mapping[str, Path]) -> list[str]:
    """Run a chapter's commands in `place` and give back what each said.

    `changes` replaces words of the commands; `given` puts what earlier chapters made at the places that they name.
    """
    for name in ("xlmega", "tools", "ds_configs"):
        (place / name).symlink_to(ROOT / name)
    for name, made in given.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(made)
    said = []
    for line in commands(chapter):
        words = shlex.split(line, comments=True)
        words = [changes.get(word, word) for word in words]
        words = [re.sub(r"[\w/.-]+", lambda match: changes.get(match[0], match[0]), word) for word in words]
        if "xlmega/pretrain.py" in words:
            words += [part for one in TINY for part in ("--set", one)]
        if words[0] == "deepspeed":
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            words[:1] = [sys.executable, launcher, "--master_port", str(worlds.free_port())]
        words[0] = sys.executable if words[0] == "python" else words[0]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        said.append(done.stdout)
    return said


@pytest.mark.multiprocess
def test_stopping_resuming_failing(made_tokens: Path, tmp_path: Path) -> None:
    changes = {"100": "2", "runs/second/checkpoints/step-00000100": "runs/second/checkpoints/step-00000002"}
    first, second, inspected, compared = run_chapter(
        "Stopping, resuming, failing", tmp_path, changes, {"tokens/pydocs": made_tokens}
    )
    assert "done: step 2 of 4" in first
    assert "resuming from step 2" in second and "ZeRO-2, bf16" in second and "done: step 4 of 4" in second
    assert "tp1 pp1 dp1 ZeRO-1 fp32" in inspected and "tp1 pp1 dp2 ZeRO-2 bf16" in inspected
    assert inspected.count(", whole") == 2 and "DAMAGED" not in inspected
    assert "DIFFERENT: 0 of" in compared


def test_chapters_are_found() -> None:
    assert commands("Two commands") == [line for line in commands("Two commands") if line.startswith(("make", "pip"))]
    assert any("train_vocabulary" in line for line in commands("From your text to a model"))

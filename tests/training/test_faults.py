"""Killed and failing runs end as the run left alone: the short form of benchmarks/checkpoint_faults.py.

Every run goes through pretrain.py, its ranks forked.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def keep_promises(tokens: Path, kills: int, *options: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/checkpoint_faults.py"), "--tokens", str(tokens)]
    command += ["--count", str(kills), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"{kills} kills" in done.stdout and done.stdout.endswith("every promise kept\n")


@pytest.mark.multiprocess
def test_runs_survive_kills_failing_disks_and_damaged_files(made_tokens: Path) -> None:
    keep_promises(made_tokens, 4, "--layouts", "dp2_zero3", "--failing", "1", "--bits", "3")


@pytest.mark.multiprocess
@pytest.mark.parametrize(("model", "layout"), [("original", "tp2_pp2"), ("nano", "dp2_zero3")])
def test_backpacks_resume_bit_for_bit(model: str, layout: str, made_tokens: Path) -> None:
    keep_promises(made_tokens, 3, "--model", model, "--layouts", layout, "--failing", "0", "--bits", "1")

"""Killed and failing runs end as the run left alone: the short form of benchmarks/checkpoint_faults.py.

Every run goes through pretrain.py, its ranks forked.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.multiprocess
def test_runs_survive_kills_failing_disks_and_damaged_files(made_tokens: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/checkpoint_faults.py"), "--tokens", str(made_tokens)]
    command += ["--layouts", "dp2_zero3", "--count", "4", "--failing", "1", "--bits", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "4 kills" in done.stdout and done.stdout.endswith("every promise kept\n")


@pytest.mark.multiprocess
@pytest.mark.parametrize(("model", "layout"), [("original", "tp2_pp2"), ("nano", "dp2_zero3")])
def test_backpacks_resume_bit_for_bit(model: str, layout: str, made_tokens: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/checkpoint_faults.py"), "--tokens", str(made_tokens)]
    command += ["--model", model, "--layouts", layout, "--count", "3", "--failing", "0", "--bits", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "3 kills" in done.stdout and done.stdout.endswith("every promise kept\n")

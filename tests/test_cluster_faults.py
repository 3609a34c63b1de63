"""Faults injected into runs of pretrain.py: the short form of benchmarks/cluster_faults.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAULTS = (
    "dp2/SIGKILL/save/1/False",
    "dp2/SIGSTOP/reduce/0/False",
    "dp2/two jobs/save",
    "dp2/stale lock/half a save",
    "tp2/NaN gradient/reduce/1",
    "tp2-zero2/NaN gradient/reduce/1",
    "tp2-zero3/NaN gradient/reduce/1",
    "tp2/SIGTERM/init/0/True",
    "tp2/port in use",
    "tp2/version/start/1",
    "pp2/exception/meeting/0",
    "dp3/perturbed/update/1",
)


@pytest.mark.multiprocess
def test_no_fault_is_silent_and_runs_go_on_bitwise(made_tokens: Path, tmp_path: Path) -> None:
    results = tmp_path / "faults.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks/cluster_faults.py"), "--results", str(results), "--parallel", "4"]
    command += ["--tokens", str(made_tokens), "--only", *FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    wrong = [f"{one['key']}: {one['wrong']}\n{one['log'][-2000:]}" for one in found if one["wrong"]]
    assert done.returncode == 0, "\n".join([done.stdout[-3000:], done.stderr[-3000:], *wrong])
    assert len(found) == len(FAULTS)
    table = subprocess.run([*command[:4], "--table"], capture_output=True, text=True, timeout=300).stdout
    assert f"{len(FAULTS)} faults; {len(FAULTS)} ended as they must" in table and "Processes left behind: 0" in table

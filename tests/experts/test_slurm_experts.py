"""slurm/train_experts.sbatch on a real Slurm of two nodes: arrays side by side, rounds in order, a job after all."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import until
from stand_in import write_plan

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]
ROOT = Path(__file__).resolve().parents[2]
ROUNDS = [
    {"languages": [["qla", "qlb"], ["qcy", "qgr", "qhn"]], "total_steps": 4},
    {"languages": [["qla"], ["qlb"], ["qcy"], ["qgr", "qhn"]], "total_steps": 4},
]


def test_rounds_are_arrays_and_the_last_job_comes_after_all(made_tokens: Path, tmp_path: Path) -> None:
    plan, output = write_plan(tmp_path, made_tokens, ROUNDS), tmp_path / "out"
    (tmp_path / "hold").touch()
    (tmp_path / "fail").write_text("round-1/expert-1")
    path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
    tool = ["exec", "env", path, f"PYTHONPATH={ROOT}", "python", str(ROOT / "tools/train_experts.py"), str(plan)]
    tool += ["--output", str(output)]
    with slurm_cluster.cluster() as cluster:
        told = cluster.call(*tool, "--slurm", "--sbatch_args=--nodes=1 --ntasks=1", "--then", f"ls {output}/round-2")
        jobs = {name: int(job) for name, job in re.findall(r"([a-z0-9-]+): (\d+)", told.splitlines()[-1])}
        assert set(jobs) == {"round-1", "round-2", "dense", "then"}

        def begun() -> set[str]:
            return {str(path.parent.relative_to(output)) for path in output.glob("**/metrics.jsonl")}

        # The expert that may train and the dense model run at one time; the next round and the last job wait.
        until(lambda: {"round-1/expert-0", "round-1/expert-1", "dense"} <= begun(), lambda: str(begun()))
        assert not any(name.startswith("round-2") for name in begun())
        assert cluster.job(jobs["then"])["JobState"] == "PENDING"
        (tmp_path / "hold").unlink()
        cluster.await_state(jobs["then"], "COMPLETED", "FAILED")
        status = cluster.call(*tool, "--status")
        assert "round-1/expert-1: FAILED with 2" in status and "the disk is full of sand" in status
        assert "round-2/expert-0: done" in status and "round-2/expert-1: done" in status and "dense: done" in status
        assert "round-2/expert-2: waits for round-1/expert-1" in status
        (tmp_path / "fail").unlink()
        again = cluster.call(*tool, "--slurm", "--sbatch_args=--nodes=1 --ntasks=1")
        last = int(re.findall(r"round-2: (\d+)", again)[0])
        cluster.await_state(last, "COMPLETED", "FAILED")
        until(lambda: cluster.call(*tool, "--status").count(": done") == 7, lambda: cluster.call(*tool, "--status"))

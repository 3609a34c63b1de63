"""slurm/*.sbatch of experts on a real Slurm of two nodes: arrays side by side, rounds in order, a job after all; an
assignment shared out among nodes; an ensemble scored."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster, until
from stand_in import write_plan

from xlmega.experts.assignment import assign_clusters

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]
ROOT = Path(__file__).resolve().parents[2]
ROUNDS = [
    {"languages": [["qla", "qlb"], ["qcy", "qgr", "qhn"]], "total_steps": 4},
    {"languages": [["qla"], ["qlb"], ["qcy"], ["qgr", "qhn"]], "total_steps": 4},
]


PATHS = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster.cluster() as running:
        yield running


def test_rounds_are_arrays_and_the_last_job_comes_after_all(
    cluster: Cluster, made_tokens: Path, tmp_path: Path
) -> None:
    plan, output = write_plan(tmp_path, made_tokens, ROUNDS), tmp_path / "out"
    (tmp_path / "hold").touch()
    (tmp_path / "fail").write_text("round-1/expert-1")
    tool = ["exec", "env", PATHS, f"PYTHONPATH={ROOT}", "python", str(ROOT / "tools/train_experts.py"), str(plan)]
    tool += ["--output", str(output)]
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


def submit(cluster: Cluster, script: str, log: Path, *words: str | Path, sbatch: tuple[str, ...] = ()) -> int:
    export = f"--export=ALL,{PATHS},PYTHONPATH={ROOT}"
    return cluster.submit(export, f"--output={log}", *sbatch, ROOT / "slurm" / script, *words)


def test_an_assignment_is_shared_out_among_nodes_or_an_array(
    cluster: Cluster, made_corpus: Path, models: Path, tmp_path: Path
) -> None:
    split, clusterer, log = made_corpus / "train", models / "text2", tmp_path / "log"
    wanted = assign_clusters(split, clusterer, tmp_path / "alone", balanced=True, only=True)
    for name, sbatch in {"nodes": ("--nodes=2",), "array": ("--nodes=1", "--array=0-1")}.items():
        words = (split, "--clusterer", clusterer, "--balanced", "--only", "--output", tmp_path / name)
        job = submit(cluster, "assign_clusters.sbatch", log, *words, sbatch=sbatch)
        until(
            lambda job=job: "PENDING" not in states(cluster, job) and "RUNNING" not in states(cluster, job), lambda: ""
        )
        assert json.loads((tmp_path / name / "clusters.json").read_text()) == wanted, log.read_text()
        for file in (tmp_path / "alone/train").rglob("*.jsonl"):
            assert file.read_bytes() == (tmp_path / name / file.relative_to(tmp_path / "alone")).read_bytes()
    told = log.read_text()  # of five files each task took two or three
    assert told.count("train: 2 of 2 files") == told.count("train: 3 of 3 files") == 2, told


def test_an_ensemble_is_scored(cluster: Cluster, made_tokens: Path, models: Path, tmp_path: Path) -> None:
    words = (models / "m0", models / "m1", "--clusterer", models / "text2", "--data", made_tokens)
    words += ("--max_documents", "2", "--output", tmp_path / "scores")
    job = submit(cluster, "evaluate_ensemble.sbatch", tmp_path / "log", *words)
    ended = cluster.await_state(job, "COMPLETED", "FAILED")
    assert ended["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert set(json.loads((tmp_path / "scores/result.json").read_text())["rows"]) == {"clustering"}


def states(cluster: Cluster, number: int) -> list[str]:
    """Of every task of an array."""
    return re.findall(r"JobState=(\w+)", cluster.call("exec", "scontrol", "-o", "show", "job", str(number)))

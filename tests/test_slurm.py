"""The shipped sbatch files, unchanged, on a real Slurm of two nodes with two ranks each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from launched import ROOT, TINY, losses
from slurm_cluster import Cluster, until

from xlmega.training.checkpoint import list_checkpoints

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with slurm_cluster.cluster() as running:
        yield running


def submit(cluster: Cluster, script: str, run: Path, tokens: Path, *options: str, sbatch: tuple[str, ...]) -> int:
    """One of slurm/*.sbatch for a tiny model, with this interpreter's folder first on the PATH."""
    config = run.with_suffix(".json")
    config.write_text('{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}')
    overrides = [part for one in (f"data.root={tokens}", *TINY) for part in ("--set", one)]
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    export = f"--export=ALL,PATH={path},DS_CONFIG={config},OMP_NUM_THREADS=1"
    log = f"--output={run.with_suffix('.log')}"
    script = str(ROOT / "slurm" / script)
    return cluster.submit(export, log, *sbatch, script, run, "--recipe", "xglm_tiny", *overrides, *options)


@pytest.mark.parametrize(
    ("script", "layout"),
    [
        ("pretrain.sbatch", ("--tp", "2")),
        ("pretrain_torchrun.sbatch", ("--pp", "2")),
        ("pretrain_deepspeed.sbatch", ("--tp", "2")),
    ],
)
def test_two_nodes_of_two_ranks_finish(
    cluster: Cluster, script: str, layout: tuple[str, ...], made_tokens: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sets = ("--set", "training.total_steps=4")
    job = submit(cluster, script, run, made_tokens, *layout, *sets, sbatch=())
    ended = cluster.await_state(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
    told = (tmp_path / "run.log").read_text(errors="replace")
    assert ended["JobState"] == "COMPLETED" and ended["NumNodes"] == "2", told[-3000:]
    assert list_checkpoints(run) == [4] and set(losses(run)) == {1, 2, 3, 4}, told[-3000:]
    assert "dp2" in told and "4 ranks" in told


def test_a_warned_job_saves_is_requeued_and_goes_on(cluster: Cluster, made_tokens: Path, tmp_path: Path) -> None:
    """SIGUSR1 to the batch shell is what `--signal=B:USR1@300` sends ahead of the time limit."""
    run = tmp_path / "run"
    sets = ("--set", "training.total_steps=100000", "--set", "training.keep_checkpoints=0")
    job = submit(cluster, "pretrain.sbatch", run, made_tokens, "--tp", "2", *sets, sbatch=())

    def told() -> str:
        return (tmp_path / "run.log").read_text(errors="replace")[-3000:]

    until(lambda: max(losses(run), default=0) >= 3, told)
    cluster.call("exec", "scancel", "--batch", "--signal=USR1", str(job))
    until(lambda: bool(list_checkpoints(run)), told)
    (stopped,) = list_checkpoints(run)
    until(lambda: max(losses(run)) >= stopped + 2, told)
    assert cluster.job(job)["Restarts"] == "1"
    log = (tmp_path / "run.log").read_text(errors="replace")
    assert f"step {stopped} is saved" in log and f"resuming from step {stopped}" in log
    cluster.call("exec", "scancel", str(job))
    cluster.await_state(job, "CANCELLED")
    assert set(losses(run)) == set(range(1, max(losses(run)) + 1))

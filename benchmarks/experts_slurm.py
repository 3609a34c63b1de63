"""Experts as a Slurm array on a real cluster of two nodes, one of which is lost while it trains.

    python benchmarks/experts_slurm.py --folder runs/slurm

Real runs of pretrain.py, one on each node. When both are some steps in, every process of one node is killed as when a
machine dies. Slurm notices, requeues the task, and it goes on from its last checkpoint when the node is back; the job
that scores the ensemble runs after both. Weights and moments must be bitwise those of an undisturbed run here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

import experts_faults  # noqa: E402
import slurm_cluster  # noqa: E402
from slurm_cluster import Cluster, until  # noqa: E402

STEPS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    if why := slurm_cluster.missing():
        print(f"skipped: {why}")
        return
    folder = args.folder.resolve()
    experts_faults.make_data(folder)
    plan = folder / "slurm.toml"
    overrides = [*experts_faults.OVERRIDES, "training.save_every_steps=20"]
    plan.write_text(
        f'recipe = "xglm_tiny"\ndata = "{folder}/tokens"\nds_config = "{ROOT}/ds_configs/cpu_debug.json"\n'
        f"overrides = {json.dumps(overrides)}\ndense = false\n"
        f'[[rounds]]\nlanguages = [["qla"], ["qcy", "qgr", "qhn", "qlb"]]\ntotal_steps = {STEPS}\n'
    )
    for name in ("alone", "lost", "scores"):
        shutil.rmtree(folder / name, ignore_errors=True)
    tool = [sys.executable, str(ROOT / "tools/train_experts.py"), str(plan), "--output"]
    experts_faults.finish([*tool, str(folder / "alone"), "--parallel", "2"])
    wanted = [experts_faults.digest(folder / "alone", k, STEPS) for k in range(2)]
    output = folder / "lost"
    path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
    login = ["exec", "env", path, f"PYTHONPATH={ROOT}", *tool, str(output)]
    with slurm_cluster.cluster() as cluster:
        begun = time.monotonic()
        score = f"python {ROOT}/tools/evaluate_ensemble.py {output} --data {folder}/tokens --output {folder}/scores"
        told = cluster.call(
            *login, "--slurm", "--sbatch_args=--nodes=1 --ntasks=1 --exclusive", "--then", f"{score} --max_documents 5"
        )
        job, after = (int(re.findall(rf"{name}: (\d+)", told)[0]) for name in ("round-1", "then"))
        until(lambda: min(steps(output, k) for k in range(2)) >= 30, lambda: "not both experts are on their way")
        nodes = sorted(set(re.findall(r" NodeList=(n\d)", states(cluster, job))))
        print(f"both experts train, on {' and '.join(nodes)}; node n2 dies", flush=True)
        cluster.call("crash-node", "n2")
        until(lambda: "Restarts=1" in states(cluster, job), lambda: states(cluster, job))
        noticed = time.monotonic()
        assert not (folder / "scores").exists(), "the last job did not wait"
        cluster.call("start-node", "n2")
        cluster.await_state(after, "COMPLETED", "FAILED")
        rows = json.loads((folder / "scores/result.json").read_text())["rows"]
        assert set(rows) == {"routing"} and rows["routing"]["all"]["sequences"] > 0
        print(
            f"requeued; all done after {time.monotonic() - begun:.0f} s, {time.monotonic() - noticed:.0f} s after it",
            flush=True,
        )
    found = [experts_faults.digest(output, k, STEPS) for k in range(2)]
    assert found == wanted, "other weights than without the loss"
    print("weights and moments of both experts are bitwise those of the undisturbed run")


def steps(output: Path, number: int) -> int:
    metrics = output / f"round-1/expert-{number}/metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.is_file() else 0


def states(cluster: Cluster, number: int) -> str:
    """What Slurm says of every task of an array."""
    return cluster.call("exec", "scontrol", "-o", "show", "job", str(number))


if __name__ == "__main__":
    main()

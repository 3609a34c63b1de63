"""The part of cluster_faults.py that needs nodes: one dies with all on it, or its network is cut, at each moment.

A real Slurm of two nodes in network namespaces; slurm/pretrain.sbatch unchanged, one rank a node (dp 2). The rank of
the node that is struck waits at its moment (tests/striking.py) until its node is dead or cut off; then Slurm is left to
notice, to requeue the job and, once the node is back, to run it to its end. Recorded as the other faults are; detected
means here: until Slurm had requeued the job.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_faults as base
import cluster_faults
import slurm_cluster
import striking
from cluster_faults import Case
from slurm_cluster import Cluster, until

from xlmega.training.checkpoint import damage, folder_of, list_checkpoints

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"node crash": ("crash-node", "start-node"), "network cut": ("cut-node", "join-node")}


def cases() -> Iterator[Case]:
    """Both faults at every moment, on the node of rank 1 and, at some, on that of rank 0 and of the batch script."""
    for moment in striking.MOMENTS:
        for kind in KINDS:
            yield Case("slurm", kind, moment, 1, False, 1)
    for moment in ("forward", "save"):
        for kind in KINDS:
            yield Case("slurm", kind, moment, 0, False, 1)


def meet(cluster: Cluster, folder: Path, tokens: Path, alone: Path, number: int, case: Case) -> dict[str, Any]:
    """One job from its start to its end, with its fault; what was seen of it."""
    name = f"job{number}"
    run, log, marker = folder / name, folder / f"{name}.log", folder / f"{name}.struck"
    fault = striking.Fault("waits", case.moment, case.rank, nth=case.nth, marker=str(marker))
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    hook = {"STRIKE": json.dumps(dataclasses.asdict(fault)), "PYTHONPATH": f"{ROOT}/tests/hook:{ROOT}", "PATH": path}
    hook |= {"DS_CONFIG": str(folder / "how.json"), "OMP_NUM_THREADS": "1", "MAX_RESTARTS": "9"}
    os.environ.update(hook)  # --export takes no value with commas
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--export=ALL", f"--output={log}"]
    begun = time.monotonic()
    told = cluster.submit(*options, str(ROOT / "slurm/pretrain.sbatch"), run, *arguments(folder, tokens))

    def words() -> str:
        return log.read_text(errors="replace")[-3000:] if log.exists() else "no log"

    until(marker.exists, words, 300)
    struck = float(marker.read_text().split()[0])
    before, node = list_checkpoints(run), f"n{case.rank + 1}"
    strike, mend = KINDS[case.kind]
    cluster.call(strike, node)
    Path(f"{marker}.go").touch()  # a rank that is cut off goes on for a while
    until(lambda: cluster.job(told)["Restarts"] != "0" or "FAILED" in cluster.job(told)["JobState"], words, 300)
    noticed = time.monotonic() - struck
    cluster.call(mend, node, check=False)
    ended = cluster.await_state(told, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=500)
    wrong = []
    if ended["JobState"] != "COMPLETED":
        wrong.append(f"the job ended {ended['JobState']}: {words()}")
    found = list_checkpoints(run)
    bad = [one for step in found for one in damage(folder_of(run, step))]
    if bad or max(found, default=0) < max(before, default=0):
        wrong.append(f"checkpoints {before} became {found} {bad}")
    if not wrong:
        try:
            base.STEPS = cluster_faults.STEPS
            base.check_same(run, alone)
        except base.Broken as broken:
            wrong.append(str(broken))
    left = [pid for one in ("n1", "n2") for pid in ranks_on(cluster, one)]
    wrong += [f"{len(left)} processes left"] if left else []
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    record = {"key": case.key, **dataclasses.asdict(case), "codes": [ended["JobState"]], "seconds": round(noticed, 1)}
    record |= {"told": told_of(log), "left": len(left), "lost_steps": 0}
    record |= {"wrong": wrong, "same": not wrong, "restarts": ended["Restarts"], "log": words() if wrong else ""}
    took = time.monotonic() - begun
    print(
        f"{case.key}: {noticed:.1f} s, {ended['Restarts']} restarts, {took:.0f} s in all -> {wrong}",
        flush=True,
    )
    return record


def told_of(log: Path) -> str:
    """What the job's log says of the node: Slurm's own words, or those of the ranks that were left."""
    lines = log.read_text(errors="replace").splitlines()
    found = [line.strip() for line in lines if "DUE TO" in line or line.startswith("LostRankError")]
    return found[-1] if found else "nothing"


def ranks_on(cluster: Cluster, node: str) -> list[int]:
    """Processes of pretrain.py on a node."""
    found = []
    for pid in cluster.call("pids", node, check=False).split():
        with contextlib.suppress(OSError):
            if b"xlmega/pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def arguments(folder: Path, tokens: Path) -> list[str]:
    """Of pretrain.py, without those that the sbatch file gives."""
    told = ["--recipe", str(folder / "model.toml"), "--set", f"data.root={tokens}", "--silent_seconds", "10"]
    return [*told, "--hang_timeout_seconds", "40", "--rendezvous_timeout_seconds", "60"]


def main(args: argparse.Namespace) -> int:
    if why := slurm_cluster.missing():
        print(f"skipped: {why}")
        return 0
    done = {one["key"] for one in cluster_faults.read(args.results) if not (args.again and one["wrong"])}
    todo = [case for case in cases() if case.key not in done and any(words in case.key for words in args.only)]
    todo = todo[: args.count or None]
    import forked

    forked.warm_up()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nodes")))
        tokens = (args.tokens or base.in_another_process(base.make_tokens, folder)).resolve()
        (folder / "model.toml").write_text(cluster_faults.RECIPE)
        (folder / "how.json").write_text('{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}')
        (folder / "alone.log").write_text("")
        given = ["--ds_config", str(folder / "how.json"), "--output", str(folder / "alone"), *arguments(folder, tokens)]
        codes = forked.start(given, 2, folder / "alone.log").wait()
        base.check(not any(codes), (folder / "alone.log").read_text())
        cluster = stack.enter_context(slurm_cluster.cluster(gpus=0, mode="netns"))
        found = []
        for number, case in enumerate(todo):
            found.append(meet(cluster, folder, tokens, folder / "alone", number, case))
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"at": time.time(), **found[-1]}) + "\n")
    wrong = [one for one in found if one["wrong"]]
    seconds = [one["seconds"] for one in found]
    middle = statistics.median(seconds)
    print(f"{len(found)} faults of nodes, {len(wrong)} not as they must be; noticed in {middle:.0f} s")
    return 1 if wrong else 0

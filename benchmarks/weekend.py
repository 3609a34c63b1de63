"""A run left alone on a cluster that keeps failing: does it reach its last step, and does it train most of the time?

slurm/pretrain.sbatch, unchanged, on a real Slurm of two nodes with two ranks each (tp 2 x dp 2). At random moments, on
average every `--every` seconds, something ends it: a rank is killed or stopped, all ranks of a node are, a node dies
with everything on it and comes back 20 s later, or Slurm warns the job that its time is up. Nobody does anything: Slurm
requeues the job, which goes on from its newest checkpoint. Faults strike while it starts as well as while it trains.

A step is made to last `--step_seconds` by waiting, so that the two cores of this machine are not what is measured. The
run that is never disturbed does not wait. Reported are the share of the time that went into steps which counted, how
long it took from a fault to the next new step, and how many steps were done again; the losses and gradient norms of all
steps must be bitwise those of the run that was left alone.

    python benchmarks/weekend.py --minutes 40
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import checkpoint_faults as base  # noqa: E402
import slurm_cluster  # noqa: E402
from slurm_cluster import Cluster  # noqa: E402

SAVE_EVERY = 10
NODES = ("n1", "n2")
RECIPE = """
[model]
preset = "xglm_tiny"
hidden_size = 32
ffn_hidden_size = 64
num_layers = 2
[data]
sequence_length = 32
[training]
total_steps = {steps}
batch_windows = 8
save_every_steps = {save_every}
validation_windows = 1
keep_checkpoints = 2
"""
KINDS = {"rank killed": 8, "ranks of a node killed": 3, "rank stopped": 3, "node died": 3, "time is up": 3}
"""How often each strikes, of 20."""
BACK_AFTER = 20.0


@dataclass
class Struck:
    """One fault and what came of it."""

    kind: str
    at: float
    step: int
    """The newest step then."""
    training: bool
    """Whether it trained then; else it was waiting in the queue, or starting."""
    resumed_at: float = 0.0
    lost_steps: int = 0


class Weekend:
    """The job, and what is known of it from outside."""

    def __init__(self, cluster: Cluster, run: Path, log: Path):
        self.cluster, self.run, self.log = cluster, run, log
        self.faults: list[Struck] = []
        self._seen: tuple[int, int] = (0, 0)

    def step(self) -> tuple[int, int]:
        """(newest step, inode of metrics.jsonl): another file is another life."""
        path = self.run / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError, IndexError):
            with path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                file.seek(max(0, path.stat().st_size - 4000))
                lines = [line for line in file.read().splitlines() if line.endswith(b"}") and b'"loss"' in line]
            return int(json.loads(lines[-1])["step"]), inode
        return 0, 0

    def pids(self, node: str) -> list[int]:
        """The ranks on a node."""
        found = []
        for pid in self.cluster.call("pids", node, check=False).split():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"xlmega/pretrain.py" in line and b"python" in line[0]:
                    found.append(int(pid))
        return found

    def strike(self, kind: str, generator: random.Random) -> None:
        """Do it; what is not there cannot be struck, which is a fault without effect."""
        node = generator.choice(NODES)
        if kind == "node died":
            self.cluster.call("crash-node", node, check=False)
            return
        if kind == "time is up":
            self.cluster.call("exec", "scancel", "--batch", "--signal=USR1", self.job, check=False)
            return
        pids = self.pids(node)
        number = signal.SIGSTOP if kind == "rank stopped" else signal.SIGKILL
        for pid in pids if kind == "ranks of a node killed" else [generator.choice(pids)] if pids else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def watch(self, seconds: float, every: float, seed: int, kinds: list[str]) -> None:
        """Strike for so long; then leave it alone until it is done."""
        generator = random.Random(seed)
        begun = time.monotonic()
        coming = begun + generator.expovariate(1 / every)
        down: dict[str, float] = {}
        newest = self.step()
        moved = time.monotonic()
        names = [kind for kind, weight in KINDS.items() if kind in kinds for _ in range(weight)]
        while True:
            now = time.monotonic()
            step = self.step()
            if step != newest:
                self._resumed(newest, step, now)
                newest, moved = step, now
            for node in [node for node, since in down.items() if now > since + BACK_AFTER]:
                del down[node]
                self.cluster.call("start-node", node, check=False)
            if now > coming and now < begun + seconds:
                kind = generator.choice(names)
                self.faults.append(Struck(kind, now, step[0], now - moved < 5.0))
                print(f"{now - begun:6.0f} s, step {step[0]}: {kind}", flush=True)
                before = {node: self._up(node) for node in NODES}
                self.strike(kind, generator)
                for node in NODES:
                    if before[node] and not self._up(node) and node not in down:
                        down[node] = time.monotonic()
                coming = now + generator.expovariate(1 / every)
            if self._state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
                return
            time.sleep(0.2)

    def _up(self, node: str) -> bool:
        return (self.cluster.state / f"pid.slurmd.{node}").exists()

    def _state(self) -> str:
        now = time.monotonic()
        if now - getattr(self, "_asked", 0.0) > 2.0:
            self._asked = now
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self._told = self.cluster.job(int(self.job)).get("JobState", "")
        return getattr(self, "_told", "")

    def _resumed(self, before: tuple[int, int], step: tuple[int, int], now: float) -> None:
        """A new file of metrics begins with the first step after the resume."""
        if before[1] == step[1] or not before[1]:
            return
        for fault in self.faults:
            if not fault.resumed_at:
                fault.resumed_at = now
        if self.faults:
            self.faults[-1].lost_steps = max(0, before[0] - step[0] + 1)

    def submit(self, recipe: Path, config: Path, tokens: Path, pace: float) -> None:
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        python = f"PYTHONPATH={ROOT / 'tests' / 'hook'}:{ROOT}"
        export = f"--export=ALL,PATH={path},DS_CONFIG={config},OMP_NUM_THREADS=1,{python},PACE_SECONDS={pace}"
        export += ",MAX_RESTARTS=1000"
        # No fake GPUs: after a node has come back, Slurm 22.05 may not know for a while that it has them.
        told = [
            export,
            "--gpus-per-node=0",
            f"--output={self.log}",
            "--time=24:00:00",
            str(ROOT / "slurm" / "pretrain.sbatch"),
            self.run,
        ]
        options = ["--recipe", recipe, "--set", f"data.root={tokens}", "--tp", "2", "--silent_seconds", "20"]
        options += ["--rendezvous_timeout_seconds", "120"]
        self.job = str(self.cluster.submit(*told, *options))


def alone(folder: Path, recipe: Path, config: Path, tokens: Path) -> Path:
    """The same run, never disturbed, without Slurm and without waiting."""
    import forked

    forked.warm_up()
    log = folder / "alone.log"
    log.write_text("")
    arguments = ["--recipe", str(recipe), "--ds_config", str(config), "--set", f"data.root={tokens}", "--tp", "2"]
    codes = forked.start([*arguments, "--output", str(folder / "alone")], 4, log).wait(3600)
    base.check(not any(codes), log.read_text()[-3000:])
    return folder / "alone"


def report(weekend: Weekend, steps: int, pace: float, wall: float, undisturbed: Path) -> None:
    """What came of it, in figures."""
    ours, theirs = base.figures(weekend.run), base.figures(undisturbed)
    base.check(set(ours) == set(range(1, steps + 1)), f"steps are missing: {sorted(set(theirs) - set(ours))[:10]}")
    different = [step for step in theirs if ours[step] != theirs[step]]
    base.check(not different, f"losses or gradient norms differ at steps {different[:10]}")
    faults = weekend.faults
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(one.kind for one in faults).items()))
    training = [one for one in faults if one.training and one.resumed_at]
    again = [one.resumed_at - one.at for one in training]
    lost = [one.lost_steps for one in faults]
    restarts = weekend.cluster.job(int(weekend.job))["Restarts"]
    print(f"{len(faults)} faults in {wall / 60:.1f} min: {kinds}; {restarts} restarts by Slurm, none by hand")
    print(f"all {steps} steps are there; every loss and gradient norm is bitwise that of the undisturbed run")
    print(f"share of the time spent in steps that counted: {100 * steps * pace / wall:.1f} %")
    if again:
        print(
            f"from a fault that struck while it trained to the next new step: median {statistics.median(again):.1f} s, "
            f"{min(again):.1f} to {max(again):.1f} ({len(again)} faults; {len(faults) - len(training)} struck while it "
            "was starting or waiting, or did not end it)"
        )
    print(
        f"steps done again, of {pace:g} s: median {statistics.median(lost or [0]):.0f}, most {max(lost or [0])}, "
        f"in all {sum(lost)}"
    )
    (weekend.run.parent / "faults.json").write_text(json.dumps([vars(one) for one in faults], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0, help="how long it is struck")
    parser.add_argument("--every", type=float, default=120.0, help="seconds between faults, on average")
    parser.add_argument("--step_seconds", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=0.55, help="of that time, as steps: what the run's length is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="strike with these only")
    parser.add_argument("--folder", type=Path, help="keep logs here")
    args = parser.parse_args()
    if why := slurm_cluster.missing():
        print(f"skipped: {why}")
        return
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        steps = max(20, round(args.minutes * 60 * args.share / args.step_seconds))
        tokens = base.in_another_process(base.make_tokens, folder)
        recipe, config = folder / "tiny.toml", folder / "fp32.json"
        recipe.write_text(RECIPE.format(steps=steps, save_every=SAVE_EVERY))
        config.write_text('{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}')
        undisturbed = alone(folder, recipe, config, tokens)
        print(f"the undisturbed run of {steps} steps is done", flush=True)
        cluster = stack.enter_context(slurm_cluster.cluster(gpus=0))
        weekend = Weekend(cluster, folder / "run", folder / "run.log")
        begun = time.monotonic()
        weekend.submit(recipe, config, tokens, args.step_seconds)
        weekend.watch(args.minutes * 60, args.every, args.seed, args.kinds)
        wall = time.monotonic() - begun
        base.check(weekend._state() == "COMPLETED", weekend.log.read_text(errors="replace")[-3000:])
        report(weekend, steps, args.step_seconds, wall, undisturbed)


if __name__ == "__main__":
    main()

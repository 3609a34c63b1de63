"""Experts as Slurm jobs: an array for each round, after the round before has ended, and a last job after all.

A task is `slurm/train_experts.sbatch`, which runs tools/train_experts.py for one expert: what is done, waits or failed
is read from the output directory as everywhere, so a task that Slurm requeues goes on where it stood. Assignment is
shared out among the tasks of a job step, of an array, or of both.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from xlmega.errors import ConfigError
from xlmega.experts.branching import Experts
from xlmega.experts.plan import DENSE, Expert

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "train_experts.sbatch"


def submit(
    experts: Experts, chosen: Sequence[Expert], plan: Path, sbatch_args: Sequence[str] = (), then: str = ""
) -> dict[str, str]:
    """Submit what is not done; returns the job of each round, of 'dense' and of 'then'."""
    pending = [expert for expert in chosen if experts.state(expert).kind != "done"]
    experts.divide(pending)
    jobs: dict[str, str] = {}
    for name in dict.fromkeys(expert.round for expert in pending):
        members = [expert for expert in pending if expert.round == name]
        line = ["sbatch", "--parsable", *_named(experts, name), *sbatch_args]
        if name != DENSE:
            line.append(f"--array={','.join(str(expert.cluster) for expert in members)}")
            before = [job for round_, job in jobs.items() if round_ != DENSE]
            if before:
                # A failed expert holds up only its own children, and those see it when they start.
                line.append(f"--dependency=afterany:{before[-1]}")
        jobs[name] = _sbatch([*line, str(SCRIPT), str(plan), str(experts.output), name])
    if then:
        line = ["sbatch", "--parsable", *_named(experts, "then"), *sbatch_args]
        if jobs:
            line.append(f"--dependency=afterany:{':'.join(jobs.values())}")
        jobs["then"] = _sbatch([*line, f"--wrap={then}"])
    return jobs


def share_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """(share, shares) of a task that srun started, in an array or not; a ConfigError outside of Slurm."""

    def number(name: str, default: int) -> int:
        return int(environment.get(f"SLURM_{name}", default))

    if "SLURM_PROCID" not in environment:
        raise ConfigError("--share slurm is for commands that srun starts. Elsewhere say which, as in --share 0/4.")
    first, last = number("ARRAY_TASK_MIN", 0), number("ARRAY_TASK_MAX", 0)
    step, count = number("ARRAY_TASK_STEP", 1) or 1, number("ARRAY_TASK_COUNT", 1)
    if (last - first) // step + 1 != count:
        raise ConfigError(f"--share slurm needs an array without gaps, such as --array=0-{count - 1}.")
    tasks = number("NTASKS", 1)
    return (number("ARRAY_TASK_ID", 0) - first) // step * tasks + number("PROCID", 0), count * tasks


def _named(experts: Experts, name: str) -> list[str]:
    return [f"--job-name={experts.output.name}-{name}", f"--output={experts.output}/slurm-{name}-%A_%a.log"]


def _sbatch(line: list[str]) -> str:
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("there is no sbatch on this machine. Run this on a login node of a Slurm cluster.") from None
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().partition(";")[0]

"""Train the experts of a plan, and the dense baseline beside them; run again to go on.

    python tools/train_experts.py PLAN.toml --output experts/tfidf4 --parallel 2
    python tools/train_experts.py PLAN.toml --output experts/tfidf4 --status
    python tools/train_experts.py PLAN.toml --output experts/tfidf4 --slurm --sbatch_args "--gpus-per-node=8"

The plan is described in xlmega/experts/plan.py; README.md has one.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from xlmega.errors import ConfigError, run_main
from xlmega.experts.branching import STOPPED, Experts
from xlmega.experts.forgetting import summary
from xlmega.experts.plan import Resolved, read_plan
from xlmega.experts.slurm import submit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parallel", type=int, default=1, help="experts trained side by side on this machine")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these experts, as round-1/expert-0 or dense")
    parser.add_argument(
        "--train_cluster", default="", metavar="1,3,5", help="experts of these clusters, in every round"
    )
    parser.add_argument("--status", action="store_true", help="say how far every expert is, and train nothing")
    parser.add_argument(
        "--slurm", action="store_true", help="submit every round as an array, each after the one before"
    )
    parser.add_argument("--sbatch_args", default="", help="what sbatch needs here: partition, account, GPUs, time")
    parser.add_argument("--then", default="", metavar="COMMAND", help="with --slurm: a job after all have ended")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    if not args.slurm and (args.sbatch_args or args.then):
        raise ConfigError("--sbatch_args and --then are for --slurm.")
    try:
        clusters = [int(part) for part in args.train_cluster.split(",") if part]
    except ValueError:
        raise ConfigError(f"--train_cluster takes numbers, such as 1,3,5; got '{args.train_cluster}'.") from None
    experts = Experts(Resolved(read_plan(args.plan), args.output), say)
    chosen = experts.choose([name for name in args.only.split(",") if name], clusters)
    if args.status:
        for line in summary(experts):
            print(line)
        return 0
    experts.prepare()
    if args.slurm:
        jobs = submit(experts, chosen, args.plan, shlex.split(args.sbatch_args), args.then)
        print(f"wrote {args.output}/plan.json; submitted {', '.join(f'{name}: {job}' for name, job in jobs.items())}")
        return 0
    failed = experts.train(chosen, args.parallel)
    for line in summary(experts):
        print(line)
    print(f"wrote {args.output}: {len(chosen) - len(failed)} of {len(chosen)} experts are trained")
    if failed and all(state.kind == "stopped" for state in failed):
        return STOPPED
    return 1 if failed else 0


if __name__ == "__main__":
    run_main(main)

"""Does a plan come true? Peak memory and step time of twelve ways to run one model, predicted and measured.

Each configuration is a real run of pretrain.py on this machine's CPU: layouts of one to four ranks, ZeRO stages,
precisions, micro-batches and recomputation. Predicted is with `xlmega.training.planning` from recipe, layout and what
`xlmega.training.calibration` measured beforehand on two layers of the model, with as many ranks at a time and in the
same precision; nothing of the configurations themselves is fitted. Measured is the peak of the fullest rank (VmHWM,
begun anew before the model is built) and the fastest of four steps, in two passes: for memory, glibc gives back what is
freed (MALLOC_MMAP_THRESHOLD_), or its heap would be measured; for time it is as it comes.

    python benchmarks/plan_accuracy.py --results plan.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import checkpoint_faults as base  # noqa: E402
import forked  # noqa: E402
import worlds  # noqa: E402

from xlmega import config  # noqa: E402
from xlmega.parallel import groups  # noqa: E402
from xlmega.parallel.layout import Layout, choose  # noqa: E402
from xlmega.training import calibration, planning  # noqa: E402
from xlmega.training.recipe import build_recipe  # noqa: E402
from xlmega.training.runtime import runtime  # noqa: E402

CONFIGURATIONS: list[dict[str, Any]] = [
    {"name": "one rank, ZeRO-0, fp32", "zero": 0, "micro": 4},
    {"name": "one rank, ZeRO-1, bf16", "precision": "bf16", "micro": 4},
    {"name": "one rank, ZeRO-1, fp32, recompute full", "micro": 8, "recompute": "full"},
    {"name": "one rank, ZeRO-1, bf16, all windows at once", "precision": "bf16", "micro": 8},
    {"name": "dp2, ZeRO-1, fp32", "ranks": 2, "micro": 4},
    {
        "name": "dp2, ZeRO-1, bf16, recompute selective",
        "ranks": 2,
        "micro": 4,
        "precision": "bf16",
        "recompute": "selective",
    },
    {"name": "dp2, ZeRO-2, bf16", "ranks": 2, "zero": 2, "precision": "bf16", "micro": 4},
    {"name": "dp2, ZeRO-3, bf16", "ranks": 2, "zero": 3, "precision": "bf16", "micro": 4},
    {"name": "tp2, ZeRO-1, fp32", "ranks": 2, "tp": 2, "micro": 8},
    {"name": "pp2, ZeRO-1, bf16", "ranks": 2, "pp": 2, "precision": "bf16", "micro": 2},
    {"name": "tp2 pp2, ZeRO-1, bf16", "ranks": 4, "tp": 2, "pp": 2, "precision": "bf16", "micro": 4},
    {"name": "tp2 dp2, ZeRO-1, fp32, recompute full", "ranks": 4, "tp": 2, "micro": 4, "recompute": "full"},
]
STEPS = {"memory": 2, "times": 5}
RECIPE = """
[model]
preset = "xglm_tiny"
hidden_size = 512
ffn_hidden_size = 2048
num_layers = 8
num_heads = 8
vocab_size = 8192
[data]
sequence_length = 256
[training]
total_steps = {steps}
batch_windows = 8
validation_windows = 1
"""
WINDOWS, LENGTH = 8, 256


def watch_memory(folder: Path) -> Any:
    """What each rank does first: note its memory as it goes."""

    def prepare(rank: int) -> None:
        from xlmega.training.engine import Engine

        told: dict[str, list[float]] = {}

        def note(what: str) -> None:
            lines = Path("/proc/self/status").read_text().splitlines()
            figures = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.startswith("Vm")}
            told.setdefault(what, []).append(figures["VmHWM"])
            told.setdefault(f"{what} now", []).append(figures["VmRSS"])
            (folder / f"memory{rank}.json").write_text(json.dumps(told))

        init, forward, apply = Engine.__init__, Engine.forward_backward, Engine.apply

        def built(self: Any, *arguments: Any, **keywords: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5")
            note("base")
            init(self, *arguments, **keywords)
            note("built")

        def stepped(self: Any, *arguments: Any, **keywords: Any) -> Any:
            found = forward(self, *arguments, **keywords)
            note("backward")
            return found

        def applied(self: Any, *arguments: Any, **keywords: Any) -> Any:
            found = apply(self, *arguments, **keywords)
            note("applied")
            return found

        evaluate = Engine.evaluate

        def evaluated(self: Any, *arguments: Any, **keywords: Any) -> Any:
            note("before validation")
            found = evaluate(self, *arguments, **keywords)
            note("validated")
            return found

        Engine.evaluate = evaluated  # type: ignore[method-assign]
        Engine.__init__, Engine.forward_backward, Engine.apply = built, stepped, applied  # type: ignore[method-assign]

    return prepare


def measure(folder: Path, tokens: Path, number: int, case: dict[str, Any], what: str) -> dict[str, Any]:
    """Peak of the fullest rank in MiB and median step in seconds of one configuration."""
    place = folder / f"case{number}"
    place.mkdir()
    (place / "model.toml").write_text(RECIPE.format(steps=STEPS[what]))
    (place / "how.json").write_text(json.dumps(settings_of(case)))
    arguments = ["--recipe", str(place / "model.toml"), "--ds_config", str(place / "how.json"), "--output"]
    arguments += [str(place / "run"), "--set", f"data.root={tokens}", "--recompute", case.get("recompute", "none")]
    arguments += ["--tp", str(case.get("tp", 1)), "--pp", str(case.get("pp", 1))]
    log = place / "log"
    log.write_text("")
    ranks = case.get("ranks", 1)
    codes = forked.start(arguments, ranks, log, watch_memory(place)).wait(600)
    base.check(not any(codes), log.read_text()[-3000:])
    told = [json.loads((place / f"memory{rank}.json").read_text()) for rank in range(ranks)]
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    seconds = [one["seconds"] for one in lines if "loss" in one][1:]
    peaks = [one["applied"][-1] for one in told]
    return {"peak": max(peaks), "seconds": min(seconds), "memory": told[peaks.index(max(peaks))]}


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed file of a configuration."""
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": case["micro"]}
    settings["zero_optimization"] = {"stage": case.get("zero", 1)}
    return {**settings, case["precision"]: {"enabled": True}} if case.get("precision") else settings


def calibrated(folder: Path, ranks: int, precision: str) -> dict[str, float]:
    """What calibration measures with so many ranks at a time; each is a process of its own."""
    told, port, pids = folder / f"calibrated{ranks}{precision}.json", worlds.free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                case = {"micro": 4, **({"precision": precision} if precision != "fp32" else {})}
                process = groups.Process(rank, ranks, rank, "127.0.0.1", port, "fork")
                with groups.joined(process, Layout(dp=ranks)) as device:
                    found = calibration.calibrate(model(), runtime(settings_of(case)), LENGTH, device)
                if rank == 0:
                    told.write_text(json.dumps(found))
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    base.check(not any(os.waitpid(pid, 0)[1] for pid in pids), "the calibration failed")
    return dict(json.loads(told.read_text()))


def model() -> Any:
    return build_recipe(config.tomllib.loads(RECIPE.format(steps=1))).model  # type: ignore[attr-defined]


def predicted(case: dict[str, Any], measured: dict[str, float]) -> tuple[float, float]:
    """(MiB of the fullest rank, seconds of a step)."""
    ranks = case.get("ranks", 1)
    layout = choose(ranks, tp=case.get("tp", 1), pp=case.get("pp", 1))
    how = runtime(settings_of(case))
    job = planning.Job(model(), layout, how, WINDOWS, LENGTH, case.get("recompute", "none"), on_gpu=False)
    told = {"devices_per_node": ranks, "on_gpu": False, **measured}
    cluster = config.build(planning.Cluster, told, what="calibration")
    plan = planning.plan(job, cluster)
    return plan.bytes / 2**20 + cluster.reserved_gib * 1024, plan.step


def kendall(ours: list[float], theirs: list[float]) -> float:
    """Concordant less discordant pairs, as a share of all."""
    pairs = [(a, b) for a in range(len(ours)) for b in range(a)]
    agree = [math.copysign(1, (ours[a] - ours[b]) * (theirs[a] - theirs[b])) for a, b in pairs]
    return sum(agree) / max(1, len(pairs))


def work(what: str, results: Path, only: list[int]) -> None:
    """One pass over the configurations; lines are appended to the results."""
    forked.warm_up()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plan")))
        tokens = base.in_another_process(base.make_tokens, folder)
        known: dict[tuple[int, str], dict[str, float]] = {}
        for number, case in enumerate(CONFIGURATIONS):
            if only and number not in only:
                continue
            key = (case.get("ranks", 1), case.get("precision", "fp32"))
            if key not in known:
                known[key] = calibrated(folder, *key)
            found = measure(folder, tokens, number, case, what)
            line = {"what": what, "number": number, **found, "calibration": known[key]}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{what} {number} {case['name']}: {found['peak']:.0f} MiB, {found['seconds']:.2f} s", flush=True)


def table(results: Path) -> str:
    """Predicted beside measured, as Markdown."""
    found = {(one["what"], one["number"]): one for one in map(json.loads, results.read_text().splitlines())}
    lines = [
        "| configuration | peak MiB, predicted | measured | off | s/step, predicted | measured |",
        "|---" * 6 + "|",
    ]
    off, ours, theirs = [], [], []
    for number, case in enumerate(CONFIGURATIONS):
        one, other = found.get(("memory", number)), found.get(("times", number))
        if one is None or other is None:
            continue
        peak, seconds = predicted(case, one["calibration"])[0], predicted(case, other["calibration"])[1]
        off.append(peak / one["peak"] - 1)
        ours.append(seconds)
        theirs.append(other["seconds"])
        lines.append(
            f"| {case['name']} | {peak:,.0f} | {one['peak']:,.0f} | {100 * off[-1]:+.1f} % | {seconds:.2f} | "
            f"{other['seconds']:.2f} |"
        )
    if not off:
        return "nothing has been measured in both passes yet"
    worst = max(map(abs, off))
    lines.append(
        f"\n{len(off)} configurations: memory at most {100 * worst:.1f} % off (aim 10 %), median "
        f"{100 * statistics.median(map(abs, off)):.1f} %; Kendall's tau of the step times {kendall(ours, theirs):.2f} "
        "(aim 0.8)"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSONL that results are appended to")
    parser.add_argument("--only", nargs="+", type=int, default=[], help="numbers of configurations")
    parser.add_argument("--passes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--worker", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print the results as Markdown and end")
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.results, args.only)
        return
    for what in args.passes if not args.table else ():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {"MALLOC_MMAP_THRESHOLD_": "262144"} if what == "memory" else {}
        line = [sys.executable, __file__, "--results", str(args.results), "--worker", what]
        line += ["--only", *map(str, args.only)] if args.only else []
        subprocess.run(line, check=True, env=environment)
    print(table(args.results))


if __name__ == "__main__":
    main()

"""Does a plan come true? Peak memory and step time of twelve ways to run one model, predicted and measured.

Each configuration is a real run of pretrain.py on this machine's CPU: layouts of one to four ranks, ZeRO stages,
precisions, micro-batches and recomputation. Predicted is with `xlmega.training.planning` from recipe, layout and
what a calibration measured beforehand (a process without a model, a matrix product, a sum over ranks), none of it from
the configurations themselves. Measured is the process's peak (VmHWM, begun anew before the model is built) of the
fullest rank, and the median step.

    python benchmarks/plan_accuracy.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import checkpoint_faults as base  # noqa: E402
import forked  # noqa: E402

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
STEPS = 3
RECIPE = f"""
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
total_steps = {STEPS}
batch_windows = 8
validation_windows = 1
"""


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


def measure(folder: Path, tokens: Path, number: int, case: dict[str, Any]) -> dict[str, Any]:
    """Peak of the fullest rank in MiB and median step in seconds of one configuration."""
    place = folder / f"case{number}"
    place.mkdir()
    (place / "model.toml").write_text(RECIPE)
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": case["micro"]}
    settings["zero_optimization"] = {"stage": case.get("zero", 1)}
    if case.get("precision"):
        settings[case["precision"]] = {"enabled": True}
    (place / "how.json").write_text(json.dumps(settings))
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
    return {"peak": max(peaks), "seconds": statistics.median(seconds), "memory": told[peaks.index(max(peaks))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    forked.warm_up()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plan")))
        tokens = base.in_another_process(base.make_tokens, folder)
        for number, case in enumerate(CONFIGURATIONS):
            if args.only and number not in args.only:
                continue
            found = measure(folder, tokens, number, case)
            print(number, case["name"], json.dumps(found), flush=True)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps({"number": number, **case, **found}) + "\n")


if __name__ == "__main__":
    main()

"""Training steps of xlmega beside what could be used instead: tokens/s, memory, and the share of the machine's rate.

    python benchmarks/train_step.py [--quick] [--only xlmega,bare] [--output FOLDER]

Each contender lives in a process of its own and they take turns step by step, so that other work on the machine falls
on all of them alike; each takes the micro-batch at which it was fastest in a first trial. Out come medians and ratios
as a markdown table, and the same with every single time as `train_step.json`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

NAMES = ("xlmega", "bare", "megatron", "huggingface", "nanogpt", "nanogpt_bf16_loss")
MICRO_BATCHES = (8, 4)
WARM_UP_STEPS = 2
LARGE_VOCABULARY = {
    "num_layers": 2,
    "hidden_size": 1024,
    "ffn_hidden_size": 4096,
    "num_heads": 16,
    "vocab_size": 256_008,
    "batch_windows": 2,
    "sequence_length": 1024,
}
TINY = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 256, "num_heads": 4}
TINY.update(vocab_size=509, sequence_length=64)


class Worker:
    """A contender in its own process, which takes steps when told to."""

    def __init__(self, name: str, micro: int, threads: int, sizes: dict[str, int]):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
            "DS_ACCELERATOR": "cpu",
        }
        self.name, self.micro = name, micro
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--micro", str(micro), "--sizes", json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if os.environ.get("QUIET", "1") == "1" else None,
            text=True,
            env=environment,
        )
        self.ask("ready")

    def ask(self, what: str) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            error = self._process.stderr.read() if self._process.stderr else ""
            raise SystemExit(f"{self.name} stopped:\n{error[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.stderr:
            self._process.stderr.close()
        self._process.wait(60)


def peak_megabytes() -> float:
    """This process's own peak of resident memory (ru_maxrss would begin at its parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmHWM")


def work_as_told(name: str, micro: int, sizes: dict[str, int]) -> None:
    """The worker's side: one JSON line for each line that is read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import time

    import peers
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = peers.Workload(**sizes)

    def reply(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def orders() -> Any:
        return (line.split() for line in sys.stdin)

    if name.startswith("matmul"):
        for _ in orders():
            reply(peers.matmul_rate())
        return
    if name.startswith("once_"):
        for order in orders():
            loss = 0.0 if order == ["ready"] else peers.forward_backward(name[5:], work)
            reply({"loss": loss, "peak": peak_megabytes()})
        return
    with peers.CONTENDERS[name](work, micro) as step:
        index = 0
        for order in orders():
            if order[0] == "ready":
                reply(None)
            elif order[0] == "peak":
                reply(peak_megabytes())
            else:
                start = time.perf_counter()
                loss = step(work.tokens(index))
                index += 1
                reply({"seconds": time.perf_counter() - start, "loss": loss})


def choose_micro_batches(names: list[str], threads: int, sizes: dict[str, int], steps: int) -> dict[str, int]:
    """The fastest micro-batch of each contender: the best of some steps each. The bare loop takes the engine's."""
    chosen: dict[str, int] = {}
    for name in names:
        if name == "bare" and "xlmega" in names:
            continue
        best: list[tuple[float, int]] = []
        for micro in MICRO_BATCHES:
            worker = Worker(name, micro, threads, sizes)
            best.append((min(worker.ask("step")["seconds"] for _ in range(steps)), micro))
            worker.close()
            print(f"{name}: {best[-1][0]:.3f} s with micro-batches of {micro}", file=sys.stderr)
        chosen[name] = min(best)[1]
    if "bare" in names and "xlmega" in names:
        chosen["bare"] = chosen["xlmega"]
    return chosen


def measure(
    names: list[str], chosen: dict[str, int], threads: int, sizes: dict[str, int], rounds: int
) -> dict[str, dict[str, Any]]:
    """Every contender's times, losses and peak memory, and the rate of a bf16 product, in turns."""
    workers = [Worker(name, chosen[name], threads, sizes) for name in names]
    matmul = Worker("matmul", 1, threads, sizes)
    results: dict[str, dict[str, Any]] = {
        worker.name: {"micro_batch": worker.micro, "seconds": [], "losses": []} for worker in workers
    }
    rates = []
    for turn in range(WARM_UP_STEPS + rounds):
        # Every other round backwards: no contender always follows the same neighbour.
        for worker in workers if turn % 2 == 0 else workers[::-1]:
            answer = worker.ask("step")
            results[worker.name]["losses"].append(answer["loss"])
            if turn >= WARM_UP_STEPS:
                results[worker.name]["seconds"].append(answer["seconds"])
        rates.append(matmul.ask("rate"))
        print(f"round {turn + 1} of {WARM_UP_STEPS + rounds}", file=sys.stderr)
    for worker in workers:
        results[worker.name]["peak_megabytes"] = worker.ask("peak")
        worker.close()
    matmul.close()
    results["matmul"] = {"flops_per_second": statistics.median(rates)}
    return results


def large_vocabulary(threads: int) -> dict[str, Any]:
    """Peak memory of one forward and backward pass with 256,008 pieces."""
    found = {}
    for name in ("xlmega", "megatron"):
        worker = Worker(f"once_{name}", 1, threads, LARGE_VOCABULARY)
        found[name] = worker.ask("step")
        worker.close()
    return found


def table(results: dict[str, dict[str, Any]], step_tokens: int, step_flops: float) -> str:
    """The markdown table; ratios are medians over rounds of xlmega's time against the other's in the same round."""
    lines = [
        "| contender | micro-batch | s/step (median) | tokens/s | share of bf16 rate | peak MB | xlmega is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    rate = results["matmul"]["flops_per_second"]
    own = results.get("xlmega", {}).get("seconds")
    for name, found in results.items():
        if name == "matmul":
            continue
        seconds = statistics.median(found["seconds"])
        ratio = "-"
        if own:
            pairs = zip(found["seconds"], own, strict=True)
            found["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
            ratio = f"{found['ratio']:.2f} x"
        found["share"] = step_flops / seconds / rate
        lines.append(
            f"| {name} | {found['micro_batch']} | {seconds:.3f} | {step_tokens / seconds:,.0f} | {found['share']:.0%} "
            f"| {found['peak_megabytes']:,.0f} | {ratio} |"
        )
    lines.append(f"\nbf16 product of 2048 x 2048: {rate / 1e12:.2f} TFLOP/s; a step is {step_flops / 1e12:.3f} TFLOP.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds: does it run?")
    parser.add_argument("--only", default=",".join(NAMES), help="contenders, comma-separated")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contender")
    parser.add_argument("--micro_batch", type=int, default=0, help="the same for all; 0: the fastest for each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip_large_vocabulary", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for train_step.json")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--micro", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", default="{}", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work_as_told(asked.worker, asked.micro, json.loads(asked.sizes))
        return
    names = asked.only.split(",")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        parser.error(f"--only does not know {', '.join(unknown)}; there are {', '.join(NAMES)}")
    sizes = TINY if asked.quick else {}
    rounds = 2 if asked.quick else asked.rounds
    if asked.micro_batch or asked.quick:
        chosen = dict.fromkeys(names, asked.micro_batch or 8)
    else:
        chosen = choose_micro_batches(names, asked.threads, sizes, steps=3)
    results = measure(names, chosen, asked.threads, sizes, rounds)

    import peers

    work = peers.Workload(**sizes)
    print(table(results, work.step_tokens, work.step_flops()))
    report: dict[str, Any] = {"workload": dataclasses.asdict(work), "threads": asked.threads, "results": results}
    if not (asked.quick or asked.skip_large_vocabulary):
        memory = report["large_vocabulary"] = large_vocabulary(asked.threads)
        ours, theirs = memory["xlmega"]["peak"], memory["megatron"]["peak"]
        print(
            f"\n256,008 pieces, forward and backward: xlmega {ours:,.0f} MB, Megatron-core {theirs:,.0f} MB "
            f"({ours / theirs:.2f} of it)."
        )
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / "train_step.json"
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()

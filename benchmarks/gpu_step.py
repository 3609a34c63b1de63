"""XGLM's training step on one GPU, beside Hugging Face's XGLM and Megatron-core: time, tokens/s, MFU, memory.

    python benchmarks/gpu_step.py                     XGLM-564M and 1.7B, bf16, ZeRO-1, windows of 2,048 tokens
    python benchmarks/gpu_step.py --models 564m --contenders xlmega --micro_batches 8

Random weights and tokens; 256,008 pieces. Each contender has the GPU to itself, in a process of its own, and takes the
first of the micro-batches with which it fits. MFU counts 6 FLOPs per parameter and token (the tied head once) and
causal attention, over the card's dense bf16 rate. Contenders and what is the same for all: benchmarks/peers.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = {
    "564m": {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_heads": 16},
    "1.7b": {"num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_heads": 16},
    "tiny": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 256, "num_heads": 4},
}
VOCABULARY, LENGTH = 256_008, 2048
WARM_UP_STEPS = 3


def measure(name: str, micro: int, sizes: dict[str, int], steps: int) -> None:
    """The worker's side: one JSON line of results, the last of its output."""
    import peers
    import torch

    work = peers.Workload(**sizes)
    on_gpu = peers.DEVICE.type == "cuda"
    seconds, losses = [], []
    try:
        with peers.CONTENDERS[name](work, micro) as step:
            for index in range(WARM_UP_STEPS + steps):
                peers.synchronize()
                start = time.perf_counter()
                losses.append(step(work.tokens(index)))
                peers.synchronize()
                seconds.append(time.perf_counter() - start)
            peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0
            print(json.dumps({"seconds": seconds[WARM_UP_STEPS:], "losses": losses, "peak": peak}), flush=True)
    except torch.OutOfMemoryError:
        print(json.dumps({"out_of_memory": True}), flush=True)


def ask(name: str, micro: int, sizes: dict[str, int], steps: int) -> dict[str, Any]:
    """A worker's results."""
    words = ["--worker", name, "--micro_batches", str(micro), "--sizes", json.dumps(sizes), "--steps", str(steps)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    told = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment)
    lines = told.stdout.splitlines()
    if told.returncode or not lines:
        return {"failed": told.stderr[-1500:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="564m,1.7b", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--contenders", default="xlmega,huggingface,megatron", help="comma-separated")
    parser.add_argument("--micro_batches", default="8,4,2,1", help="windows, the first that fits is taken")
    parser.add_argument("--windows", type=int, default=16, help="windows of a step")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for gpu_step.json")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", default="{}", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    micros = [int(word) for word in asked.micro_batches.split(",")]
    if asked.worker:
        measure(asked.worker, micros[0], json.loads(asked.sizes), asked.steps)
        return
    import peers
    import torch

    from xlmega.training.metrics import peak_flops

    card = torch.cuda.get_device_name() if peers.DEVICE.type == "cuda" else "CPU"
    peak = peak_flops(card, 1)
    rate = peers.matmul_rate(8192 if peers.DEVICE.type == "cuda" else 1024)
    print(f"{card}, torch {torch.__version__}; bf16 product at {rate / 1e12:.0f} TFLOP/s\n")
    print("| model | contender | micro-batch | s/step (median) | tokens/s | TFLOP/s | MFU | GB | first, last loss |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    report: dict[str, Any] = {"card": card, "matmul": rate}
    for model in asked.models.split(","):
        shape = {"vocab_size": asked.vocabulary, "batch_windows": asked.windows, "sequence_length": asked.length}
        work = peers.Workload(**MODELS[model], **shape)
        for name in asked.contenders.split(","):
            found: dict[str, Any] = {}
            for micro in micros:
                found = ask(name, micro, dataclasses.asdict(work), asked.steps)
                if not found.get("out_of_memory"):
                    break
            report[f"{model} {name}"] = {**found, "micro_batch": micro}
            if "seconds" not in found:
                print(f"| {model} | {name} | {micro} | {'out of memory' if not found.get('failed') else 'failed'} |")
                print(found.get("failed", ""), file=sys.stderr, flush=True)
                continue
            seconds = statistics.median(found["seconds"])
            flops = work.step_flops() / seconds
            ends = ", ".join(f"{found['losses'][index]:.3f}" for index in (0, -1))
            mfu = f"{flops / peak:.1%}" if peak else "-"
            print(
                f"| {model} | {name} | {micro} | {seconds:.3f} | {work.step_tokens / seconds:,.0f} "
                f"| {flops / 1e12:.0f} | {mfu} | {found['peak'] / 1024:.1f} | {ends} |",
                flush=True,
            )
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "gpu_step.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

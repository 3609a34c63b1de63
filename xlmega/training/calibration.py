"""What a plan's Cluster should say of the device at hand, measured in half a minute.

In come a model and how it is to be executed; out go the figures of `planning.Cluster` that can be measured here: the
rate of a large product in both precisions, the share of it that training steps of two layers of the model reach, what
a process takes beside the parts that `planning.memory` counts, and, started with several ranks, how fast these sum.
All ranks of the group call it; the rest of the Cluster (price, failures, networks of more nodes) is the user's to say.
"""

from __future__ import annotations

import math
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from xlmega.data.batches import Batch
from xlmega.models.config import ModelConfig
from xlmega.parallel.layout import Layout
from xlmega.training import planning
from xlmega.training.engine import DTYPES, Engine
from xlmega.training.optimizer import OptimizerSettings
from xlmega.training.planning import GIB, Job
from xlmega.training.runtime import Runtime
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes

_SIDE = {"cpu": 1024, "cuda": 8192}
_SUM_BYTES = 16 * 2**20


def calibrate(model: ModelConfig, runtime: Runtime, sequence_length: int, device: torch.device) -> dict[str, float]:
    """Keys of a Cluster and their measured values."""
    rates = {name: product_tflops(DTYPES[name], device) for name in ("bf16", "fp32")}
    narrow = replace(model, num_layers=min(2, model.num_layers))
    ranks = dist.get_world_size()
    windows = ranks * runtime.micro_batch_windows
    job = Job(narrow, Layout(dp=ranks), runtime, windows, sequence_length, on_gpu=device.type == "cuda")
    seconds, held = _steps(job, device)
    flops = narrow.flops_per_token(sequence_length) * job.micro_tokens
    rate = rates["fp32" if runtime.precision == "fp32" else "bf16"]
    told = {
        "tflops": rates["bf16"],
        "fp32_tflops": rates["fp32"],
        "matmul_share": min(1.0, flops / seconds / (rate * 1e12)),
        "reserved_gib": max(0.0, held - sum(planning.memory(job).values())) / GIB,
        "memory_gib": _memory_bytes(device) / GIB,
        "memory_gb_per_second": _copy_gb_per_second(device),
    }
    if ranks > 1:
        told |= _sums(device)
    digits = {name: float(f"{value:.4g}") for name, value in told.items()}
    assert all(math.isfinite(value) for value in digits.values()), digits
    return digits


def product_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of the product of two large square matrices: the best of some."""
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2e-12 * side**3 / _best(lambda: left @ right, device)


def _best(action: Callable[[], object], device: torch.device, times: int = 5) -> float:
    found = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return min(found[1:])


def _steps(job: Job, device: torch.device) -> tuple[float, float]:
    """(seconds of forward and backward of a micro-batch, most bytes that the process held)."""
    _held_bytes(device, reset=True)
    engine = Engine(
        job.model, job.layout, job.runtime, OptimizerSettings(), device=device, micro_batches=1, languages=("a",)
    )
    engine.write_state(InitialWeights(job.model, 0, logical_shapes(job.model)))
    windows, length = job.runtime.micro_batch_windows, job.sequence_length
    rows = np.arange(windows)[None]
    batch = Batch(
        tokens=np.random.default_rng((0, 0)).integers(0, job.model.vocab_size, (1, windows, length + 1)),
        weights=np.ones((1, windows, length), np.float32),
        languages=np.zeros((1, windows), np.int32),
        slots=rows,
    )
    seconds = []
    for step in range(4):
        begun = time.perf_counter()
        engine.forward_backward(batch, step=step)
        seconds.append(time.perf_counter() - begun)
        engine.apply(1e-4, step=step)
    return statistics.median(seconds[1:]), _held_bytes(device)


def _held_bytes(device: torch.device, *, reset: bool = False) -> float:
    """The process's peak on the device since the last reset: resident memory on a CPU."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()  # contexts and libraries
        return float(outside + torch.cuda.max_memory_reserved())
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if reset and clear.exists():
        clear.write_text("5")
    lines = status.read_text().splitlines() if status.exists() else []
    told = [int(line.split()[1]) * 1024.0 for line in lines if line.startswith("VmHWM")]
    return told[0] if told else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info()[1])
    words = Path("/proc/meminfo").read_text().split()
    return float(words[words.index("MemTotal:") + 1]) * 1024 / dist.get_world_size()


def _copy_gb_per_second(device: torch.device) -> float:
    values = torch.zeros(2**25, device=device)
    other = torch.empty_like(values)
    return 2 * values.nbytes / 1e9 / _best(lambda: other.copy_(values), device)


def _sums(device: torch.device) -> dict[str, float]:
    """How fast the ranks sum a large tensor, and how long a small one takes."""
    ranks = dist.get_world_size()
    large, small = torch.zeros(_SUM_BYTES // 4, device=device), torch.zeros(1, device=device)
    seconds = _best(lambda: dist.all_reduce(large), device)
    latency = _best(lambda: dist.all_reduce(small), device)
    return {
        "node_gb_per_second": 2 * _SUM_BYTES * (ranks - 1) / ranks / 1e9 / max(seconds - latency, 1e-9),
        "latency_seconds": latency,
    }

"""What a checkpoint costs: seconds for each GB against the disk's own, how long training waits, and memory.

One process, bf16 with fp32 master weights and moments (ZeRO-1). In each round, in turn: the checkpoint's bytes written
and brought to the disk by plain `write` and `fsync`; the same and read back; a synchronous save; an asynchronous one,
of which the time that the caller waits counts; a load, and a plain read of the same bytes. Medians over rounds. Peak
memory is that of the process above what it held before (VmHWM, reset before each).

    python benchmarks/checkpoint_speed.py --rounds 5 --output /var/tmp/speed
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import worlds  # noqa: E402

from xlmega.data.batches import Batch  # noqa: E402
from xlmega.models.config import model_config  # noqa: E402
from xlmega.parallel import groups  # noqa: E402
from xlmega.parallel.layout import Layout  # noqa: E402
from xlmega.training.checkpoint import Checkpoint, damage, restore  # noqa: E402
from xlmega.training.engine import Engine  # noqa: E402
from xlmega.training.optimizer import OptimizerSettings  # noqa: E402
from xlmega.training.runtime import runtime  # noqa: E402
from xlmega.training.saving import Retention, Saver  # noqa: E402
from xlmega.weights.initial import InitialWeights  # noqa: E402
from xlmega.weights.names import logical_shapes  # noqa: E402

BLOCK = 1 << 23


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def measured(action: Callable[[], Any]) -> tuple[float, int]:
    """(seconds, peak resident bytes above those before)."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    started = time.monotonic()
    action()
    return time.monotonic() - started, max(0, resident("VmHWM") - before)


def plain_write(path: Path, size: int, block: memoryview, *, read_back: bool) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for start in range(0, size, BLOCK):
        os.write(descriptor, block[: min(BLOCK, size - start)])
    os.fsync(descriptor)
    os.close(descriptor)
    if read_back:
        plain_read(path)


def plain_read(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(BLOCK)
    while os.readv(descriptor, [buffer]):
        pass
    os.close(descriptor)


def forget(folder: Path) -> None:
    """Ask the system to drop its copies of a folder's files."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(engine: Engine, folder: Path, rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Seconds and bytes of each thing, round by round; the first round is left out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    synchronous = Saver(engine, folder / "run", Retention(newest=1))
    asynchronous = Saver(engine, folder / "run", Retention(newest=1), asynchronous=True)
    found: dict[str, list[tuple[float, int]]] = {}
    block = memoryview(os.urandom(BLOCK))
    for index in range(rounds + 1):
        step = 2 * index + 1

        def save(step: int = step) -> None:
            (outcome,) = synchronous.save(step, {})
            assert not outcome.problem, outcome

        kept = {"synchronous save": measured(save)}
        path = next((folder / f"run/checkpoints/step-{step:08d}").glob("*.safetensors"))
        size = path.stat().st_size
        checkpoint = Checkpoint(path.parent)
        forget(path.parent)
        kept["load"] = measured(lambda checkpoint=checkpoint: restore(engine, checkpoint))
        kept["checking the sums"] = measured(lambda path=path: list(damage(path.parent)))
        kept["plain read"] = measured(lambda path=path: plain_read(path))
        plain = folder / "plain"
        for words, read_back in (("plain write, fsync", False), ("plain write, fsync, read back", True)):
            write = functools.partial(plain_write, plain, size, block, read_back=read_back)
            kept[words] = measured(write)
            plain.unlink()
        kept["asynchronous save, the caller waits"] = measured(lambda step=step: list(asynchronous.save(step + 1, {})))
        (outcome,) = asynchronous.finish()
        assert not outcome.problem, outcome
        kept["asynchronous save, until published"] = (outcome.seconds, 0)
        if index:
            for name, value in kept.items():
                found.setdefault(name, []).append(value)
    found["size"] = [(size / 1e9, 0)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_layers", type=int, default=10)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--output", type=Path, help="a folder on the disk to measure; it is emptied")
    args = parser.parse_args()
    d = args.hidden_size
    model = model_config(
        preset="xglm_tiny", num_layers=args.num_layers, hidden_size=d, ffn_hidden_size=4 * d, num_heads=d // 64,
        vocab_size=args.vocabulary,
    )  # fmt: skip
    folder = args.output or Path(tempfile.mkdtemp())
    process = groups.Process(0, 1, 0, "127.0.0.1", worlds.free_port(), "single")
    how = runtime({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}})
    with groups.joined(process, Layout()) as device:
        engine = Engine(model, Layout(), how, OptimizerSettings(), device=device, micro_batches=1, languages=("a",))
        engine.write_state(InitialWeights(model, 0, logical_shapes(model)))
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, 1, 17))
        slots = np.zeros((1, 1), np.int64)
        engine.forward_backward(Batch(tokens, np.ones((1, 1, 16), np.float32), slots.astype(np.int32), slots))
        engine.apply(1e-3)
        found = measure(engine, folder, args.rounds)
    shutil.rmtree(folder)
    largest = max(parameter.numel() for _, parameter in engine.shards) * 4
    (gigabytes, _), *_ = found.pop("size")
    print(
        f"{model.num_parameters():,} parameters, {gigabytes:.2f} GB a checkpoint; largest tensor {largest / 1e6:.0f} MB"
    )
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores; medians of {args.rounds} rounds\n")
    print("| | s | s/GB | peak memory above before, MB |\n|---|---|---|---|")
    medians = {name: statistics.median(seconds for seconds, _ in values) for name, values in found.items()}
    for name, values in found.items():
        peak = max(size for _, size in values) / 1e6
        print(f"| {name} | {medians[name]:.2f} | {medians[name] / gigabytes:.2f} | {peak:.0f} |")
    ratios = {
        "save / plain write and fsync": ("synchronous save", "plain write, fsync"),
        "save / plain write, fsync and read back": ("synchronous save", "plain write, fsync, read back"),
        "load / plain read": ("load", "plain read"),
        "waiting for an asynchronous save / a synchronous one": (
            "asynchronous save, the caller waits", "synchronous save",
        ),
    }  # fmt: skip
    for words, (one, other) in ratios.items():
        each = [a / b for (a, _), (b, _) in zip(found[one], found[other], strict=True)]
        print(
            f"{words}: {statistics.median(each):.2f} (median of the rounds' ratios; {min(each):.2f} to {max(each):.2f})"
        )
    print(json.dumps({name: [round(seconds, 3) for seconds, _ in values] for name, values in found.items()}))


if __name__ == "__main__":
    main()

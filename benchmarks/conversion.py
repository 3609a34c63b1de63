"""What a conversion costs: a bf16 model of a preset's shape from logical form to Hugging Face, side by side.

In each round, in turn, each in a process of its own and with the source's pages out of the cache: plain reads of the
source's files and plain writes of as many bytes as the target has, brought to the disk; the export by
tools/convert_checkpoint.py, start-up included; transformers' from_pretrained and save_pretrained of the same model,
its files then brought to the disk as well; and the way back to logical form. Medians over rounds, peak resident memory
as the kernel counts it (pages of mapped files included). The weights are random.

    python benchmarks/conversion.py --preset xglm_1.7b --rounds 3 --output /var/tmp/conversion
    python benchmarks/conversion.py --preset xglm_7.5b --rounds 1 --only plain export --output /var/tmp/conversion
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
BLOCK = 1 << 23

PLAIN = """
import os, sys
source, target, size = sys.argv[1:]
for name in sorted(os.listdir(source)):
    if name.endswith(".safetensors"):
        with open(os.path.join(source, name), "rb", buffering=0) as file:
            while file.read(1 << 23):
                pass
os.makedirs(target)
block, left = os.urandom(1 << 23), int(size)
with open(os.path.join(target, "bytes"), "wb", buffering=0) as file:
    while left:
        left -= file.write(block[:left])
    os.fsync(file.fileno())
"""
TRANSFORMERS = """
import os, sys
import transformers
source, target = sys.argv[1:]
transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True).save_pretrained(target)
for name in os.listdir(target):
    with open(os.path.join(target, name), "rb") as file:
        os.fsync(file.fileno())
"""


class Random:
    """A model of random weights that costs nothing to make: every tensor is a cut of one pool."""

    def __init__(self, config: Any) -> None:
        import torch

        from xlmega.weights.names import logical_shapes

        self.config = config
        self._shapes = logical_shapes(config)
        self._pool = torch.empty(1 << 26).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).bfloat16()

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Any:
        return self.read_slice(name, tuple(slice(0, size) for size in self._shapes[name]))

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> Any:
        import torch

        sizes = [len(range(*one.indices(size))) for one, size in zip(slices, self._shapes[name], strict=True)]
        start = zlib.crc32(f"{name}{slices[0]}".encode()) % (1 << 20)
        return self._pool[start:][: torch.Size(sizes).numel()].view(sizes)


def out_of_cache(folder: Path) -> None:
    """Have the next read of the folder's files come from the disk."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(command: list[str], source: Path, target: Path) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak resident MB) of a process; the target is removed before it starts, and the
    source's pages are out of the cache."""
    shutil.rmtree(target, ignore_errors=True)
    out_of_cache(source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    with (target.parent / "log").open("wb") as log:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit((target.parent / "log").read_text(errors="replace"))
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xglm_1.7b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the preset has, for a trial")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["plain", "export", "transformers", "import"])
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, required=True, help="a folder for all of it, removed at the end")
    args = parser.parse_args()
    from xlmega.models.config import model_config

    source, target, loaded, back = (args.output / name for name in ("logical", "hf", "theirs", "back"))
    config = model_config(preset=args.preset, **({"num_layers": args.layers} if args.layers else {}))
    if args.make:
        from xlmega.weights.directory import write_logical

        write_logical(Random(config), source, dtype="bfloat16")
        return
    args.output.mkdir(parents=True)
    try:
        # Made by a process of its own: what a child has in memory at its peak begins with what its parent has.
        subprocess.run([sys.executable, *sys.argv, "--make"], check=True)
        convert = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
        export = [*convert, str(source), "--to", "hf", "--output", str(target), "--dtype", "bfloat16"]
        size = 2 * config.num_parameters()
        print(f"load {os.getloadavg()[0]:.1f}")
        print(f"{args.preset}: {config.num_parameters():,} parameters, {size / 1e9:.2f} GB, {args.rounds} rounds")
        python = [sys.executable, "-c"]
        steps: dict[str, Callable[[], tuple[float, float, float]]] = {
            "plain": lambda: measured([*python, PLAIN, str(source), str(loaded), str(size)], source, loaded),
            "export": lambda: measured(export, source, target),
            "transformers": lambda: measured([*python, TRANSFORMERS, str(target), str(loaded)], target, loaded),
            "import": lambda: measured(
                [*convert, str(target), "--to", "logical", "--output", str(back), "--dtype", "bfloat16"], target, back
            ),
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps if name in args.only}
        for _ in range(args.rounds):
            for name in found:
                found[name].append(steps[name]())
                for folder in (loaded, back):
                    shutil.rmtree(folder, ignore_errors=True)
        plain = statistics.median(seconds for seconds, _, _ in found["plain"])
        for name, figures in found.items():
            seconds, processor = (statistics.median(one[k] for one in figures) for k in (0, 1))
            runs = " ".join(f"{one[0]:.1f}" for one in figures)
            print(
                f"{name:>12}: {seconds:6.1f} s (runs {runs}), {seconds / plain:.2f} x plain, processor "
                f"{processor:.1f} s, peak {max(one[2] for one in figures):,.0f} MB"
            )
    finally:
        shutil.rmtree(args.output, ignore_errors=True)


if __name__ == "__main__":
    main()

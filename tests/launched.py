"""Ranks of xlmega/pretrain.py as plain processes on tiny data, for tests that stop, kill or starve them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import worlds

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_layers=4",
    "data.sequence_length=32",
    "training.batch_windows=8",
    "training.validate_every_steps=0",
    "training.validation_windows=2",
]


class Ranks:
    """A run of several ranks, each of which can be sent signals; its output goes to files in `folder`."""

    def __init__(
        self, folder: Path, count: int, tokens: Path, run: Path, *options: str, sets: tuple[str, ...] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "fp32.json"
        settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
        config.write_text(json.dumps(settings))
        overrides = [part for one in (f"data.root={tokens}", *TINY, *sets) for part in ("--set", one)]
        script = [str(ROOT / "xlmega" / "pretrain.py"), "--ds_config", str(config), "--recipe", "xglm_tiny"]
        line = [sys.executable, *script, "--output", str(run), *overrides, *options]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(worlds.free_port()), "WORLD_SIZE": str(count)}
        where |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
        self.run, self._folder = run, folder
        self.ranks: list[subprocess.Popen[bytes]] = []
        for rank in range(count):
            with (folder / f"rank{rank}.log").open("wb") as log:
                environment = {**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.ranks.append(
                    subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.ranks:
            if one.poll() is None:
                one.kill()
            one.wait()

    def told(self, rank: int) -> str:
        """What a rank has written so far, on stdout and stderr."""
        return (self._folder / f"rank{rank}.log").read_text(errors="replace")

    def await_step(self, step: int, seconds: float = 300) -> None:
        """Return once `step` updates stand in metrics.jsonl."""
        self.until(lambda: max(losses(self.run), default=0) >= step, seconds)

    def until(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "not in time:\n" + self.told(0)[-3000:]
            assert any(one.poll() is None for one in self.ranks) or condition(), self.told(0)[-3000:]
            time.sleep(0.005)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            self.ranks[rank].send_signal(number)

    def codes(self, seconds: float = 300) -> list[int]:
        """Exit codes of all ranks, which must end by themselves."""
        deadline = time.monotonic() + seconds
        return [one.wait(max(0.1, deadline - time.monotonic())) for one in self.ranks]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) of every whole line of metrics.jsonl that tells of a step."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and "loss" in (record := json.loads(line)):
            found[record["step"]] = (record["loss"], record["gradient_norm"])
    return found

"""Worlds of gloo ranks for tests: a function of a test module runs in n processes, and what each returned comes back.

Starting a rank costs seconds of imports, so a test starts one world and does all its work in it: the function gets a
`World`, which can form smaller groups of its first ranks as often as it likes.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def run(num_ranks: int, function: Callable[..., Any], *arguments: Any, folder: Path, timeout: float = 600) -> list[Any]:
    """`function(rank, folder, *arguments)` in every rank; JSON-able results in rank order. A failed rank is raised."""
    name = f"{Path(sys.modules[function.__module__].__file__ or '').resolve().relative_to(TESTS)}:{function.__name__}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "call.json").write_text(json.dumps({"function": name, "arguments": arguments}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    logs = [(folder / f"rank{rank}.log").open("wb") for rank in range(num_ranks)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "worlds.py"), str(folder), str(rank)],
            env=environment,
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(num_ranks)
    ]
    deadline = time.monotonic() + timeout
    try:
        while any(one.poll() is None for one in ranks):
            failed = [rank for rank, one in enumerate(ranks) if one.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                rank = failed[0] if failed else 0
                log = (folder / f"rank{rank}.log").read_text(errors="replace")[-6000:]
                raise AssertionError(f"rank {rank} {'failed' if failed else 'is not done in time'}:\n{log}")
            time.sleep(0.05)
    finally:
        for one in ranks:
            if one.poll() is None:
                one.kill()
            one.wait()
        for log_file in logs:
            log_file.close()
    failed = [rank for rank, one in enumerate(ranks) if one.returncode]
    assert not failed, (folder / f"rank{failed[0]}.log").read_text(errors="replace")[-6000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meet(folder: Path, name: str, rank: int) -> int:
    """A port for the ranks of the group `name`: rank 0 finds a free one when the group forms and tells by a file."""
    told = folder / f"{name}.port"
    if rank == 0:
        part = told.with_suffix(".part")
        part.write_text(str(free_port()))
        part.replace(told)
    while not told.exists():
        time.sleep(0.01)
    return int(told.read_text())


def forget_groups() -> None:
    """Let the next group of this process start afresh: DeepSpeed and Megatron-core keep groups in module variables."""
    import deepspeed.comm.comm as comm
    import deepspeed.utils.groups as deepspeed_groups
    from megatron.core import parallel_state

    comm.cdb = None
    for module in (deepspeed_groups, parallel_state):
        for name, value in vars(module).items():
            if name.startswith("_") and not name.startswith("__") and not callable(value):
                setattr(module, name, {} if isinstance(value, dict) else None)
    deepspeed_groups.mpu = None


def _main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    call = json.loads((folder / "call.json").read_text())
    path, name = call["function"].split(":")
    sys.path[:0] = [str(TESTS), str((TESTS / path).parent)]
    function = getattr(importlib.import_module(Path(path).stem), name)
    result = function(rank, folder, *call["arguments"])
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main()

"""Worlds of gloo ranks for tests: a function of a test module runs in n processes, and what each returned comes back.

Starting a rank costs seconds of imports, so one process imports what the test module does and the ranks are forks of
it; and a test starts one world and does all its work in it: the function gets its rank, and can form smaller groups of
the world's first ranks as often as it likes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def run(num_ranks: int, function: Callable[..., Any], *arguments: Any, folder: Path, timeout: float = 600) -> list[Any]:
    """`function(rank, folder, *arguments)` in every rank; JSON-able results in rank order. A failed rank is raised."""
    return run_in_turn((num_ranks, function, arguments, folder), timeout=timeout)[0]


def run_in_turn(*calls: tuple[int, Callable[..., Any], Sequence[Any], Path], timeout: float = 600) -> list[list[Any]]:
    """Several worlds (ranks, function, arguments, folder), one after the other, for the imports of one."""
    folder, table = calls[0][3], []
    for num_ranks, function, arguments, place in calls:
        module = Path(sys.modules[function.__module__].__file__ or "").resolve().relative_to(TESTS)
        place.mkdir(parents=True, exist_ok=True)
        table.append([num_ranks, str(module), function.__name__, arguments, str(place)])
    (folder / "calls.json").write_text(json.dumps(table))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(TESTS / "worlds.py"), str(folder)]
    with (folder / "world.log").open("wb") as log:
        world = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = world.wait(timeout)
        finally:
            if code != 0:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(world.pid, signal.SIGKILL)  # the world and every rank of it
            world.wait()
    if code != 0:
        failed = [log for *_, place in calls for log in sorted(place.glob("rank*.failed"))]
        state = f"{failed[0].stem} failed" if failed else "not done in time" if code is None else "no rank could start"
        logs = [*failed, *sorted(calls[-1][3].glob("rank*.log")), folder / "world.log"]
        words = next((text for log in logs if (text := log.read_text(errors="replace"))), "")
        raise AssertionError(f"{state}:\n{words[-6000:]}")
    return [
        [json.loads((place / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
        for num_ranks, *_, place in calls
    ]


def free_port() -> int:
    """A port that was free a moment ago, below those that the kernel gives to connections of other processes."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


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
    calls = json.loads((Path(sys.argv[1]) / "calls.json").read_text())
    sys.path[:0] = [str(TESTS), *(str((TESTS / module).parent) for _, module, *_ in calls)]
    functions = [getattr(importlib.import_module(Path(module).stem), name) for _, module, name, *_ in calls]
    if "xlmega.training.engine" in sys.modules:
        importlib.import_module("deepspeed")
    for function, (num_ranks, *_, arguments, folder) in zip(functions, calls, strict=True):
        ranks = {}
        for rank in range(num_ranks):
            pid = os.fork()
            if pid == 0:
                _be(rank, Path(folder), function, arguments)
            ranks[pid] = rank
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            if status:
                log = Path(folder) / f"rank{rank}.log"
                log.replace(log.with_suffix(".failed"))
                sys.exit(1)  # whoever started the world ends the other ranks


def _be(rank: int, folder: Path, function: Callable[..., Any], arguments: list[Any]) -> None:
    code = 1
    try:
        log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        result = function(rank, folder, *arguments)
        (folder / f"rank{rank}.json").write_text(json.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _main()

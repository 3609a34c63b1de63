"""Runs of pretrain.py whose ranks are forks of this process: the seconds of imports are spent once for many runs.

Import this in a process that has started no threads (a script of its own). `start` forks the ranks of a run; each may
get something to do first, such as arranging its own death. Exit codes come back as Popen tells them (-9: SIGKILL).
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import worlds

from xlmega import pretrain
from xlmega.errors import run_main

torch.set_num_threads(1)


def warm_up() -> None:
    """Import what the engine imports when it is built."""
    import deepspeed
    from deepspeed.runtime import engine, zero

    assert deepspeed and engine and zero


class Ranks:
    """The running ranks of one run, in a process group of their own."""

    def __init__(self, pids: Sequence[int], log: Path):
        self.pids, self.log = list(pids), log
        self.codes: dict[int, int] = {}

    def wait(self, timeout: float = 300.0, grace: float = 3.0) -> list[int]:
        """Exit codes in rank order; when a rank dies, the others are killed after `grace` seconds, as launchers do."""
        deadline = time.monotonic() + timeout
        while len(self.codes) < len(self.pids):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in self.pids:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                if self.codes[pid] != 0:
                    deadline = min(deadline, time.monotonic() + grace)
            elif time.monotonic() > deadline:
                for one in self.pids:
                    if one not in self.codes:
                        os.kill(one, signal.SIGKILL)
                deadline = time.monotonic() + 60
            else:
                time.sleep(0.005)
        return [self.codes[pid] for pid in self.pids]


def start(arguments: Sequence[str], ranks: int, log: Path, prepare: Callable[[int], None] = lambda rank: None) -> Ranks:
    """Fork the ranks of `python pretrain.py ARGUMENTS`; `prepare(rank)` runs in each before anything else."""
    port, pids = worlds.free_port(), list[int]()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _be(rank, ranks, port, arguments, log, prepare)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    return Ranks(pids, log)


def _be(rank: int, ranks: int, port: int, arguments: Sequence[str], log: Path, prepare: Callable[[int], None]) -> None:
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = ["pretrain.py", *arguments]
        prepare(rank)
        run_main(pretrain.main, pretrain.speaks)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

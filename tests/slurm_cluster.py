"""A real Slurm of a few nodes on this machine, for tests of what runs under one.

The cluster comes from `shared/tools/slurm_local.sh` beside the repository; where that or its packages are absent, or
the tests do not run as root, `cluster()` says why, and tests skip with these words.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import worlds

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT.parent / "shared" / "tools" / "slurm_local.sh"
NODE_VERBS = ("pids", "crash-node", "start-node", "cut-node", "join-node")


def missing() -> str:
    """Why no cluster can be started here; '' where one can."""
    if not SCRIPT.is_file():
        return f"Slurm: {SCRIPT} is not there"
    if os.geteuid() != 0:
        return "Slurm: the local cluster is started as root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=path)]
    return f"Slurm: {', '.join(absent)} not installed ('{SCRIPT.name} install' does it)" if absent else ""


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    state: Path

    def call(self, *words: str, check: bool = True) -> str:
        """A verb of the script, or with 'exec' a command as on a login node."""
        verb, rest = words[0], list(words[1:])
        node = [rest.pop(0)] if verb in NODE_VERBS else []  # these take the node before any option
        line = ["bash", str(SCRIPT), verb, *node, "-d", str(self.state), *rest]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
        assert not check or done.returncode == 0, (line, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *words: str | Path) -> int:
        """`sbatch WORDS`; the job's number."""
        told = self.call("exec", "sbatch", "--parsable", *map(str, words))
        return int(told.strip().splitlines()[-1].split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says of a job."""
        told = self.call("exec", "scontrol", "-o", "show", "job", str(number))
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def await_state(self, number: int, *states: str, seconds: float = 400) -> dict[str, str]:
        """The job, once it is in one of the states."""
        until(lambda: self.job(number)["JobState"] in states, lambda: str(self.job(number)), seconds)
        return self.job(number)


def until(condition: Callable[[], bool], told: Callable[[], str], seconds: float = 400) -> None:
    """Return once the condition holds; where it does not in time, an AssertionError with what is told."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


@contextlib.contextmanager
def cluster(nodes: int = 2, gpus: int = 2, mode: str = "auto") -> Iterator[Cluster]:
    """A cluster for the length of a `with` block."""
    state = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # sockets lie in it: the path must be short
    running = Cluster(state)
    try:
        running.call("start", "-n", str(nodes), "-g", str(gpus), "-m", mode, "-p", str(_free_ports(nodes + 1)))
        yield running
    finally:
        running.call("stop", check=False)
        shutil.rmtree(state, ignore_errors=True)


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that look free."""
    for _ in range(100):
        first = worlds.free_port()
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")

"""One process at a time for an output: a folder or file that is being made, or a run directory.

In: the path, which need not exist. While the context lasts, a lock file is held with flock; a second holder, of this or
another process, is refused at once with a message that names the first, or waits where that is asked for. The lock is
the kernel's: a killed process leaves none behind, and forked children do not inherit it. On a file system without locks
nothing is held and nothing is refused. Beside an output the file `OUTPUT.lock` goes with the writer; in a run directory
the file `lock` stays and tells who had it last.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xlmega.errors import CheckpointError, DataError

LOCK_NAME = "lock"
ASK_EVERY_SECONDS = 0.05


@contextmanager
def locked(output: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an `output` that is being made; while another holds it `wait`, or raise a DataError that says
    which process that is."""
    path = output.with_name(output.name + ".lock")
    try:
        lock = _Lock(path, passing=True, wait_seconds=math.inf if wait else 0.0)
    except BlockingIOError:
        pid, host, since = _holder(path)
        by = f" (pid {pid}) on {host}, since {since}" if pid else ""
        raise DataError(
            f"'{output}' is being written by another process{by}. Wait for it to end, or choose another output."
        ) from None
    except OSError as error:
        raise DataError(f"'{output}' cannot be written: '{path}': {error.strerror or error}.") from None
    with lock.released():
        yield


@contextmanager
def held(run: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of a `run` directory, made if it is not there, or raise a CheckpointError that says who has it.

    It is asked for again for so many seconds: whoever has it may be about to end.
    """
    path = run / LOCK_NAME
    try:
        lock = _Lock(path, passing=False, wait_seconds=wait_seconds)
    except BlockingIOError:
        pid, host, since = _holder(path)
        by = f"process {pid} on {host}, since {since}" if pid else "another process"
        raise CheckpointError(
            f"--output '{run}' is in use by {by}. Let it end, or stop it, and start again; or choose another --output."
        ) from None
    except OSError as error:
        raise CheckpointError(f"--output '{run}' cannot be written: {error.strerror or error}.") from None
    with lock.released():
        yield


_held: set[_Lock] = set()
"""Of this process: a child that kept one open would keep the lock after its parent's death."""


class _Lock:
    """The lock file `path`, held; BlockingIOError where another has it for so long, OSError where none can be made."""

    def __init__(self, path: Path, *, passing: bool, wait_seconds: float) -> None:
        self._path, self._passing, self._deadline = path, passing, time.monotonic() + wait_seconds
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, f"'{path.parent}' is a file") from None
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if self._taken():
                    break
            except BaseException:
                os.close(self._descriptor)
                raise
            os.close(self._descriptor)
        _held.add(self)

    def _taken(self) -> bool:
        """Whether what was locked is still the file of that name: its last holder may have removed it meanwhile."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= self._deadline:
                raise
            time.sleep(ASK_EVERY_SECONDS)
            return False
        except OSError:
            return True  # a file system without locks
        try:
            if not os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
                return False
        except FileNotFoundError:
            return False
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # a full disk does not keep the lock from being held
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, (json.dumps(me) + "\n").encode(), 0)
        return True

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let go of it at the end, except in a forked child, which has none."""
        try:
            yield
        finally:
            if self in _held:
                # Removed while it is held: whoever opened the old file sees that it is not the named one any more.
                if self._passing:
                    with suppress(OSError):
                        self._path.unlink()
                self.close()

    def close(self) -> None:
        """Close the file, and with the last descriptor of it the lock ends."""
        _held.discard(self)
        os.close(self._descriptor)


def _holder(path: Path) -> tuple[int, str, str]:
    """Process, host and time that the lock file tells; process 0 where it tells none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return int(told["pid"]), str(told["host"]), str(told["since"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, "", ""


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_let_go_in_child)

"""Disks that fail and processes that die at a chosen operation on files: stand-ins for the `os` of weights.storage."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

# Every call of weights.storage that touches a file or folder; shutil.rmtree only takes away what is given up already.
OPERATIONS = {"open", "write", "fsync", "readv", "pread", "preadv", "replace", "rename", "makedirs", "unlink"}


class FaultyOs:
    """The module `os`, but `fault(name)` comes before operations number `at` (from 1) to `at + times - 1`."""

    def __init__(self, at: int, fault: Callable[[str], None], times: int = 1):
        self.log: list[str] = []
        self._at, self._fault, self._times = at, fault, times
        self._lock = threading.Lock()

    def arm(self, after: int) -> None:
        """Strike at operation number `after`, counted from now on."""
        self._at = len(self.log) + after

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def operation(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                self.log.append(name)
                strikes = self._at <= len(self.log) < self._at + self._times
            if strikes:
                self._fault(name)
            return real(*arguments, **keywords)

        return operation


def failing(code: int) -> Callable[[str], None]:
    """A fault that is an OSError of this number."""

    def fault(name: str) -> None:
        raise OSError(code, f"{os.strerror(code)} (injected at {name})")

    return fault


FULL, BROKEN = failing(errno.ENOSPC), failing(errno.EIO)

"""A new file written past the page cache, where the file system allows it.

In come bytes in any amounts; what `finish` returned for is on the disk. A copy of gigabytes gains nothing from the
cache, and filling it costs more than the disk: on a virtual machine 1.5 s of processor time a GB against 0.05 s here.
Where O_DIRECT is not to be had (tmpfs, some network file systems, other systems than Linux) writes are plain ones.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

BUFFER_BYTES = 1 << 23
# What offsets and lengths must be multiples of: no disk has larger blocks, and a buffer from mmap begins at one.
ALIGNMENT = 4096


class DirectFile:
    """Created, or emptied; the context closes it."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._direct = getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor = os.open(path, flags | self._direct, 0o666)
        except OSError:
            self._direct = 0
            self._descriptor = os.open(path, flags, 0o666)
        self._buffer = mmap.mmap(-1, BUFFER_BYTES)
        self._filled = 0
        self._size = 0

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)

    def write(self, data: bytes | memoryview) -> None:
        """Append; an OSError may come later, at the latest from `finish`."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        while len(view):
            count = min(len(view), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER_BYTES:
                self._flush(BUFFER_BYTES)

    def finish(self) -> None:
        """Bring all of it to the disk."""
        if self._filled:
            end = -(-self._filled // ALIGNMENT) * ALIGNMENT
            self._buffer[self._filled : end] = bytes(end - self._filled)
            self._flush(end)
            os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)

    def _flush(self, length: int) -> None:
        done = 0
        with memoryview(self._buffer) as view:
            while done < length:
                try:
                    done += os.write(self._descriptor, view[done:length])
                except OSError:
                    if not self._direct:
                        raise
                    # The file system opens files so and then refuses, or its blocks are larger: do without.
                    self._give_up()
                if done % ALIGNMENT and self._direct:
                    self._give_up()
        self._filled = 0

    def _give_up(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~self._direct)
        self._direct = 0

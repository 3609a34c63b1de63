"""One writer at a time for an output.

In: the path of an output, a folder or a file that need not exist. While the context lasts, `PATH.lock` beside it is
held with flock; a second writer, of this or another process, is refused at once. The lock is the kernel's, so that a
killed writer leaves none behind (on network file systems as far as they support flock), and forked children do not
inherit it; the file goes when the writer ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xlmega.errors import DataError

_held: set[int] = set()
"""Descriptors of this process's locks: a child that kept one open would keep the lock after its parent's death."""


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of `output`, or raise a DataError that says which process holds it."""
    path = output.with_name(output.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(path)
    except BlockingIOError:
        holder = path.read_text(errors="replace").strip() if path.is_file() else ""
        raise DataError(
            f"'{output}' is being written by another process{f' (pid {holder})' if holder else ''}. "
            "Wait for it to end, or choose another output."
        ) from None
    except OSError as error:
        raise DataError(f"'{output}' cannot be written: '{path}': {error.strerror or error}.") from None
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)
        # Removed while it is held: whoever opened the old file meanwhile sees that it is not the named one any more.
        path.unlink(missing_ok=True)
        os.close(file)


def _take(path: Path) -> int:
    """The descriptor of the locked file that `path` names; BlockingIOError when another holds it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
                return file
        except FileNotFoundError:  # removed between the two looks
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _let_go_in_child() -> None:
    for file in _held:
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)

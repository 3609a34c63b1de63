"""Being asked to stop: signals and a file in, one answer at the next step boundary out.

SIGTERM and SIGUSR1 (what Slurm sends ahead of a time limit or a preemption), Ctrl-C, and a file `RUN/stop` for
launchers that pass no signals on: each asks the run to save at the next step boundary and to end with a code that
says "start me again". One rank that was asked is enough: its wish rides on the step's own sum over all ranks, so all
stop at the same step. A second SIGTERM or Ctrl-C ends the process at once; one that follows within two seconds is
taken for the same wish, since launchers pass on what the terminal or Slurm has sent to everybody already.

Guaranteed: a handler only notes the wish, so nothing is interrupted in the middle; handlers are restored on leaving.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from xlmega.errors import CheckpointError, StoppedError

_ASKED_BY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_POLL_SECONDS = 1.0
_ECHO_SECONDS = 2.0
_AT_ONCE = "xlmega: asked a second time, ending at once\n"


class StopRequest:
    """Whether this process was asked to stop; use as a context manager, in the main thread."""

    def __init__(self, stop_file: Path | None = None) -> None:
        self.asked_by = ""
        """What asked, in words; empty while nothing did."""
        self.saved = False
        """Set by the loop once its last save is on disk: further signals then change nothing."""
        self._stop_file = stop_file
        self._looked = self._asked = float("-inf")
        self._before: dict[int, Any] = {}
        self._stale: tuple[int, int] | None = None

    def __enter__(self) -> StopRequest:
        self._stale = _identity(self._stop_file) if self._stop_file else None
        for number in _ASKED_BY:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """The run directory is this run's: a file that was there before it was meant for one that has ended since.

        Not before: a start that is refused must not take away what is meant for the run that lives. One that came
        while the ranks met is meant for this run.
        """
        if self._stop_file is None or self._stale is None or _identity(self._stop_file) != self._stale:
            return
        try:
            self._stop_file.unlink(missing_ok=True)
        except IsADirectoryError:
            error = CheckpointError(f"'{self._stop_file}' is a folder, but a file of that name asks to stop. Move it.")
            error.of_one_rank = True
            raise error from None

    def pending(self) -> bool:
        """Whether this rank wants the run to stop; looks for the file at most once a second."""
        if not self.asked_by and self._stop_file is not None and time.monotonic() - self._looked >= _POLL_SECONDS:
            self._looked = time.monotonic()
            if self._stop_file.exists():
                self.asked_by = f"the file '{self._stop_file}'"
        return bool(self.asked_by)

    def error(self, step: int) -> StoppedError:
        """What ends the run after its save of `step`; the file that asked is taken away, or it would ask again."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)
        by = self.asked_by or "another rank, which was asked to"
        stopped = StoppedError(f"stopped by {by}: step {step} is saved. Go on with the same command and --resume.")
        if self.asked_by == signal.SIGINT.name:
            stopped.exit_code = 130
        return stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.saved:
            return
        now = time.monotonic()
        if not self.asked_by:
            self.asked_by, self._asked = signal.Signals(number).name, now
        elif number != signal.SIGUSR1 and now - self._asked > _ECHO_SECONDS:
            os.write(2, _AT_ONCE.encode())
            os._exit(128 + number)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from a later one of the same name; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns

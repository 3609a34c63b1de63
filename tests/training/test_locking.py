"""Two runs never share a directory, and a killed one does not keep it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xlmega.errors import CheckpointError
from xlmega.training.locking import LOCK_NAME, held

HOLD = """
import sys, time
from pathlib import Path
from xlmega.training.locking import held

with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_holder_is_named_and_a_kill_frees(tmp_path: Path) -> None:
    run = tmp_path / "a/run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"is in use by process {other.pid} on .*, since .*Let it end"):
            with held(run):
                pass
        (run / LOCK_NAME).write_text("rubbish")
        with pytest.raises(CheckpointError, match="is in use by another process"):
            with held(run):
                pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with held(run):
        assert f'"pid": {os.getpid()}' in (run / LOCK_NAME).read_text()
    with held(run):  # and once more after the end
        pass


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        with held(tmp_path / "file/run"):
            pass

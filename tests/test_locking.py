"""Two processes never write one output or share one run directory, and a killed one does not keep it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from xlmega.errors import CheckpointError, DataError
from xlmega.locking import LOCK_NAME, held, locked

HOLD = """
import os
import sys
from pathlib import Path
from xlmega import locking
with getattr(locking, sys.argv[1])(Path(sys.argv[2])):
    if not os.fork():
        print("held", flush=True)  # once the child, too, is ready: it lets go of what it inherited as it begins
        sys.stdin.read()  # an orphan, as a worker would be for a moment
        os._exit(0)
    sys.stdin.read()
"""


def hold(kind: str, path: Path) -> subprocess.Popen[str]:
    """Another process that has the lock, and a child of it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "tokens"
    holder = hold("locked", output)
    with pytest.raises(DataError, match=rf"tokens' is being written by another process \(pid {holder.pid}\) on .*, si"):
        with locked(output):
            raise AssertionError("two at once")
    holder.kill()
    holder.wait()
    with locked(output):
        pass
    holder.communicate()
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_writer_that_waits_comes_after(tmp_path: Path) -> None:
    output, came = tmp_path / "tokens", threading.Event()

    def write() -> None:
        with locked(output, wait=True):
            came.set()

    second = threading.Thread(target=write)
    with locked(output):
        second.start()
        assert not came.wait(timeout=0.2)
    second.join(timeout=60)
    assert came.is_set() and list(tmp_path.iterdir()) == []


def test_the_holder_of_a_run_is_named_and_a_kill_frees(tmp_path: Path) -> None:
    run = tmp_path / "a/run"
    holder = hold("held", run)
    with pytest.raises(CheckpointError, match=f"is in use by process {holder.pid} on .*, since .*Let it end"):
        with held(run):
            raise AssertionError("two at once")
    (run / LOCK_NAME).write_text("rubbish")
    with pytest.raises(CheckpointError, match="is in use by another process"):
        with held(run):
            raise AssertionError("two at once")
    holder.kill()
    holder.wait()
    with held(run):
        assert f'"pid": {os.getpid()}' in (run / LOCK_NAME).read_text()
    holder.communicate()
    with held(run):  # and once more after the end
        pass


def test_two_of_one_process_and_the_next_after_an_error(tmp_path: Path) -> None:
    output = tmp_path / "tokens"
    with pytest.raises(ValueError, match="inside"):
        with locked(output):
            with pytest.raises(DataError, match="being written"), locked(output):
                pass
            with locked(tmp_path / "other"):
                raise ValueError("inside")
    with locked(output):
        assert (tmp_path / "tokens.lock").is_file()


def test_a_forked_child_that_leaves_the_block_takes_nothing_with_it(tmp_path: Path) -> None:
    script = """
import os
import sys
from pathlib import Path
from xlmega.locking import locked
output = Path(sys.argv[1])
with locked(output):
    if not (child := os.fork()):
        sys.exit(0)
    os.waitpid(child, 0)
    assert output.with_name("tokens.lock").is_file()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "tokens")], check=True)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(DataError, match="file/tokens' cannot be written: .*file' is a file"),
        locked(tmp_path / "file" / "tokens"),
    ):
        pass
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"), held(tmp_path / "file/run"):
        pass


def test_a_file_system_without_locks_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "tokens"), held(tmp_path / "run"):
        pass
    assert not (tmp_path / "tokens.lock").exists()

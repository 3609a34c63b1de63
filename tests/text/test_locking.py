import subprocess
import sys
from pathlib import Path

import pytest

from xlmega.errors import DataError
from xlmega.text.locking import locked

HOLD = """
import os
import sys
from pathlib import Path
from xlmega.text.locking import locked
with locked(Path(sys.argv[1])):
    if not os.fork():
        sys.stdin.read()  # an orphan, as a worker would be for a moment
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "tokens"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(DataError, match=rf"tokens' is being written by another process \(pid {holder.pid}\)"):
        with locked(output):
            raise AssertionError("two at once")
    holder.kill()
    holder.wait()
    with locked(output):
        pass
    holder.communicate()
    assert list((tmp_path / "deep").iterdir()) == []


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


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file/tokens' cannot be written"), locked(tmp_path / "file" / "tokens"):
        pass

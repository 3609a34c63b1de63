"""Worlds bring back what ranks return, and say which rank failed and how."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import worlds

pytestmark = pytest.mark.multiprocess


def double(rank: int, folder: Path, number: int) -> int:
    if number == rank:
        raise ValueError(f"rank {rank} had enough of {number}")
    if number < 0:
        time.sleep(600)
    return 2 * rank + number


def test_results_come_in_rank_order_from_worlds_in_turn(tmp_path: Path) -> None:
    found = worlds.run_in_turn((3, double, [10], tmp_path / "a"), (2, double, [20], tmp_path / "b"))
    assert found == [[10, 12, 14], [20, 22]]
    assert worlds.run(1, double, 5, folder=tmp_path / "c") == [5]


def test_a_failed_rank_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank1 failed.*rank 1 had enough of 1"):
        worlds.run(2, double, 1, folder=tmp_path / "failing")
    with pytest.raises(AssertionError, match="not done in time"):
        worlds.run(2, double, -1, folder=tmp_path / "slow", timeout=2)
    deadline = time.monotonic() + 60  # they were killed, and are gone when the kernel gets to it
    while left := [path for path in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in command_line(path)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""

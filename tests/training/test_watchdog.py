"""The watchdog by itself: two to four of them in one process, around a store in memory."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from xlmega.errors import HangError, LostRankError, NumericsError
from xlmega.training.watchdog import STEP, Watchdog

pytestmark = pytest.mark.torch


class Ranks:
    """Watchdogs of several ranks; the codes with which they would have ended their processes."""

    def __init__(self, folder: Path, count: int, **limits: float) -> None:
        self.store = dist.HashStore()
        self.ended: dict[int, int] = {}
        self.all_ended = threading.Event()
        limits = {"interval_seconds": 0.05, "silent_seconds": 3600.0, "timeout_seconds": 3600.0, **limits}
        self.dogs = [
            Watchdog(self.store, rank, count, folder=folder, host=f"n{rank // 2}", end=self._end(rank, count), **limits)
            for rank in range(count)
        ]

    def _end(self, rank: int, count: int) -> Any:
        def end(code: int) -> None:
            self.ended[rank] = code
            if len(self.ended) == count:
                self.all_ended.set()

        return end

    def verdict(self) -> dict[str, Any]:
        return dict(json.loads(self.store.get("verdict")))


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xlmega.training.watchdog._GRACE_SECONDS", 0.05)


def test_a_hang_names_the_rank_that_is_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(tmp_path, 3, timeout_seconds=4.0)
    for dog in ranks.dogs:
        dog.__enter__()
        dog.beat(7, STEP)
    ranks.dogs[1].beat(7, "data")
    assert ranks.all_ended.wait(60)
    assert ranks.ended == dict.fromkeys(range(3), HangError.exit_code)
    assert ranks.verdict()["ranks"] == [1]
    told = capsys.readouterr().err
    assert "rank 1" in told and "n0 at step 7 (data)" in told and "limit 4 s" in told and "--resume" in told
    assert told.count("HangError") == 2  # one rank of each host speaks
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rank-0000{rank}.txt" for rank in range(3)]
    assert (
        "test_watchdog" in (tmp_path / "rank-00000.txt").read_text()
        or "Thread" in (tmp_path / "rank-00000.txt").read_text()
    )


def test_a_disk_that_takes_no_stacks_does_not_keep_ranks_from_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server that goes down is what hangs a run, and what its stacks would be written to."""
    (tmp_path / "run").write_text("a file where the folder of stacks should be")
    ranks = Ranks(tmp_path / "run", 2, timeout_seconds=1.0)
    for dog in ranks.dogs:
        dog.__enter__()
    assert ranks.all_ended.wait(60)
    assert ranks.ended == dict.fromkeys(range(2), HangError.exit_code)
    assert "cannot be written (File exists)" in capsys.readouterr().err
    never = threading.Event()
    monkeypatch.setattr(Watchdog, "_write_stacks", lambda self: never.wait())
    ranks = Ranks(tmp_path / "run", 2, timeout_seconds=1.0)
    for dog in ranks.dogs:
        dog.__enter__()
    assert ranks.all_ended.wait(60)
    never.set()
    assert "(its disk does not answer)" in capsys.readouterr().err


def test_a_silent_rank_is_named_by_its_neighbour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(tmp_path, 3, silent_seconds=1.0)
    ranks.dogs[1]._publish()  # it beats once and never again, as a stopped process
    ranks.dogs[0].__enter__()
    ranks.dogs[2].__enter__()
    deadline = time.monotonic() + 60
    while len(ranks.ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ranks.ended == {0: LostRankError.exit_code, 2: LostRankError.exit_code}
    assert ranks.verdict()["ranks"] == [1]
    assert "rank 1: has been silent" in capsys.readouterr().err


def test_an_error_of_one_rank_ends_the_others_and_one_of_all_does_not(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.dogs[0].__enter__()
    with pytest.raises(ZeroDivisionError), ranks.dogs[1]:
        _ = 1 / 0
    deadline = time.monotonic() + 60
    while not ranks.ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ranks.ended == {0: LostRankError.exit_code}
    assert "ZeroDivisionError" in ranks.verdict()["words"]
    others = Ranks(tmp_path, 2)
    for dog in others.dogs:
        with pytest.raises(NumericsError), dog:
            raise NumericsError("the loss is nan")
    assert not others.store.check(["verdict"])


def test_a_broken_connection_becomes_an_error_that_names_who_left(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3, interval_seconds=0.3)
    ranks.dogs[2]._publish()
    with pytest.raises(LostRankError, match="rank 2: left the run without a word"):
        with ranks.dogs[1]:
            with ranks.dogs[0]:
                time.sleep(1.0)
                raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:22")


def test_limits_follow_the_median_step(tmp_path: Path) -> None:
    dog = Watchdog(dist.HashStore(), 0, 1, folder=tmp_path, timeout_seconds=900.0, step_factor=20, least_step_seconds=1)
    assert dog.limit() == 900.0
    dog._seconds.extend([0.1, 0.2, 5.0])
    dog.beat(3, STEP)
    assert dog.limit() == pytest.approx(4.0)
    dog.beat(3, "save")
    assert dog.limit() == 900.0
    dog._seconds.extend([1000.0] * 9)
    dog.beat(4, STEP)
    assert dog.limit() == 900.0


def test_a_single_process_is_watched_too(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 1, timeout_seconds=0.5)
    ranks.dogs[0].__enter__()
    assert ranks.all_ended.wait(60) and ranks.ended == {0: HangError.exit_code}

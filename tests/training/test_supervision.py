"""Runs that are asked to stop, killed or frozen: what each rank says, its exit code, and what is saved."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from launched import Ranks, losses
from torch.distributed import HashStore

from xlmega.errors import CheckpointError, ConfigError
from xlmega.parallel.groups import Process
from xlmega.training.checkpoint import list_checkpoints
from xlmega.training.supervision import SupervisionSettings, Supervisor, prometheus

pytestmark = pytest.mark.multiprocess

LONG = ("training.total_steps=100000", "training.keep_checkpoints=0")


def test_a_signal_to_one_rank_saves_at_the_same_step_on_all_and_resuming_goes_on(
    made_tokens: Path, tmp_path: Path
) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    with Ranks(tmp_path / "first", 2, made_tokens, run, "--tp", "2", "--prometheus", sets=LONG) as ranks:
        ranks.await_step(3)
        ranks.send(signal.SIGTERM, 1)
        assert ranks.codes() == [75, 75], ranks.told(0) + ranks.told(1)
        assert "StoppedError: stopped by another rank" in ranks.told(0) and "--resume" in ranks.told(0)
    (stopped,) = list_checkpoints(run)
    assert max(losses(run)) == stopped
    assert json.loads((run / "heartbeat.json").read_text())["step"] >= 1
    assert 'xlmega_loss{run="run"}' in (run / "metrics.prom").read_text()
    with Ranks(tmp_path / "second", 2, made_tokens, run, "--tp", "2", "--resume", sets=LONG) as ranks:
        ranks.await_step(stopped + 2)
        (run / "stop").touch()  # the way for launchers that pass no signals on
        assert ranks.codes() == [75, 75]
        assert not (run / "stop").exists() and "the file" in ranks.told(0)
    last = list_checkpoints(run)[-1]
    with Ranks(tmp_path / "third", 1, made_tokens, alone, "--stop_at", str(last), sets=LONG) as ranks:
        assert ranks.codes() == [0]
    found, expected = losses(run), losses(alone)
    assert set(found) == set(expected) == set(range(1, last + 1))
    for step, figures in expected.items():
        assert found[step] == pytest.approx(figures, rel=1e-5), step


def test_ctrl_c_saves_and_a_second_one_ends_at_once(made_tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Ranks(tmp_path, 1, made_tokens, run, sets=LONG) as ranks:
        ranks.await_step(2)
        ranks.send(signal.SIGINT, 0)
        assert ranks.codes() == [130] and "stopped by SIGINT" in ranks.told(0)
    assert list_checkpoints(run) == [max(losses(run))]


def test_a_killed_rank_is_named_by_the_others_and_none_is_left(made_tokens: Path, tmp_path: Path) -> None:
    with Ranks(tmp_path, 3, made_tokens, tmp_path / "run", sets=(*LONG, "training.batch_windows=6")) as ranks:
        ranks.await_step(2)
        ranks.send(signal.SIGKILL, 1)
        assert ranks.codes() == [5, -signal.SIGKILL, 5], ranks.told(0) + ranks.told(2)
        assert "LostRankError: rank 1: left the run without a word" in ranks.told(0), ranks.told(0)


def test_a_frozen_rank_is_named_and_the_others_end(made_tokens: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Ranks(tmp_path, 2, made_tokens, run, "--tp", "2", "--silent_seconds", "10", sets=LONG) as ranks:
        ranks.await_step(2)
        ranks.send(signal.SIGSTOP, 1)
        assert ranks.ranks[0].wait(200) == 5, ranks.told(0)
        assert "rank 1: has been silent" in ranks.told(0) and "at step" in ranks.told(0)
        assert (run / "hang" / "rank-00000.txt").read_text().count("File") > 3


def test_elastic_ranks_that_cannot_share_the_batch_end_and_the_others_train(made_tokens: Path, tmp_path: Path) -> None:
    """Eight windows in micro-batches of two: one, two or four data-parallel ranks, but not three."""
    run, sets = tmp_path / "run", ("training.total_steps=2",)
    with Ranks(tmp_path, 3, made_tokens, run, "--elastic", sets=sets) as ranks:
        assert ranks.codes() == [0, 0, 0], ranks.told(0)
        assert "note: --elastic: 2 of 3 ranks train (dp=2); the others end now" in ranks.told(0)
        assert "done: step 2 of 2" in ranks.told(0)


def test_settings_that_cannot_be_kept_are_refused() -> None:
    for settings in ({"hang_timeout_seconds": -1.0}, {"silent_seconds": 0.0}, {"check_replicas_every_steps": -1}):
        with pytest.raises(ConfigError, match="--"):
            SupervisionSettings(**settings)  # type: ignore[arg-type]
    for hang_seconds in (30.0, 900.0, 1e7):
        assert SupervisionSettings(hang_seconds).longest_silence_seconds > hang_seconds + 60
    assert SupervisionSettings(0.0).longest_silence_seconds > 3600


def alone(run: Path, **settings: Any) -> Supervisor:
    process = Process(0, 1, 0, "127.0.0.1", 1, "test")
    return Supervisor(SupervisionSettings(hang_timeout_seconds=0.0, **settings), HashStore(), run, process)


def test_a_start_leaves_the_stop_file_until_the_run_directory_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    with alone(tmp_path) as watch:
        assert (tmp_path / "stop").exists()  # meant for the run that lives there; this start may be refused
        watch.stop.begin()
        assert not (tmp_path / "stop").exists() and not watch.stop.pending()
    with alone(tmp_path) as watch:
        (tmp_path / "stop").touch()  # while the ranks meet: meant for this run
        watch.stop.begin()
        assert watch.stop.pending()
        (tmp_path / "stop").unlink()
    (tmp_path / "stop").mkdir()
    with alone(tmp_path) as watch, pytest.raises(CheckpointError, match="is a folder, but a file of that name asks"):
        watch.stop.begin()


def test_files_of_a_monitor_that_cannot_be_kept_are_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xlmega.training.supervision.HEARTBEAT_SECONDS", 0.0)
    (tmp_path / "heartbeat.json").mkdir()
    engine: Any = None
    with alone(tmp_path, prometheus=True) as watch:
        told = [watch.done(step, engine, {"loss": 1.0}) for step in (1, 2)]
        (tmp_path / "heartbeat.json").rmdir()
        told += [watch.done(step, engine, {"loss": 1.0}) for step in (3, 4)]
    assert "heartbeat.json' cannot be written: Is a directory" in told[0] and told[1:] == ["", "", ""]
    assert "xlmega_loss" in (tmp_path / "metrics.prom").read_text()
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 4


def test_prometheus_text_has_a_gauge_for_each_figure_and_language() -> None:
    text = prometheus('a"b', 3, {"loss": 1.5, "loss_by_language": {"en": 1.0, "sw": 2.0}, "note": "x"})
    assert 'xlmega_step{run="a\\"b"} 3\n' in text and 'xlmega_loss{run="a\\"b"} 1.5\n' in text
    assert 'xlmega_loss_by_language{run="a\\"b",language="sw"} 2\n' in text and "note" not in text

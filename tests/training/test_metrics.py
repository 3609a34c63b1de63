"""What a run tells, line by line, and what it takes back when it goes on from an earlier step."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from xlmega.errors import CheckpointError, ConfigError, StoppedError
from xlmega.training import metrics
from xlmega.training.metrics import Metrics, check_trackers, peak_flops
from xlmega.training.saving import Outcome
from xlmega.training.validation import Score, total

pytestmark = pytest.mark.torch
RECORD = {
    "loss": 2.123456789012345,
    "loss_by_language": {"fr": 2.5, "en": 1.5},
    "tokens_by_language": {"fr": 10.0, "en": 30.0},
    "learning_rate": 1e-3,
    "gradient_norm": 0.7,
    "tokens": 40,
    "tokens_per_second": 12345.6,
    "seconds": 0.1,
}
SCORES = {"en": Score(nats=20.0, tokens=10.0, bytes=30.0), "fr": Score(30.0, 10.0, 20.0)}


def opened(run: Path, **changes: Any) -> Metrics:
    keys = {"first_step": 0, "total_steps": 4, "log_every_steps": 2, "flops_per_token": 1e6, "peak": None}
    return Metrics(run, **{**keys, **changes})


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def told(run: Path) -> list[tuple[int, str]]:
    return [(line["step"], line.get("validation", "")) for line in lines(run)]


def write(run: Path, first: int, last: int) -> None:
    """A run that validates at 0 (when it begins there), 2 and 4."""
    with opened(run, first_step=first) as writer:
        if first == 0:
            writer.validation(0, "valid", SCORES, 0.5)
        for step in range(first + 1, last + 1):
            writer.step(step, RECORD)
            if step % 2 == 0:
                writer.validation(step, "valid", SCORES, 0.5)


def test_one_object_a_line_at_full_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, 4)
    assert told(tmp_path) == [(0, "valid"), (1, ""), (2, ""), (2, "valid"), (3, ""), (4, ""), (4, "valid")]
    assert lines(tmp_path)[1] == {"step": 1, **RECORD}
    found = lines(tmp_path)[0]
    assert found["nats_per_token"] == 2.5 and found["by_language"]["en"]["nats_per_token"] == 2.0
    assert found["bits_per_byte"] == pytest.approx(50 / math.log(2) / 50)
    printed = capsys.readouterr().out.splitlines()
    # The first step, every second one, and the last; not the third.
    assert [line.split(" |")[0] for line in printed if line.startswith("step")] == ["step 1/4", "step 2/4", "step 4/4"]
    assert "loss 2.1235 | en 1.50 fr 2.50 | lr 1.00e-03 | grad 0.700 | 12,346 tok/s" in printed[1]
    assert printed[0].startswith("validation 'valid' at step 0, nats/token and bits/byte: all 2.5000/1.4427")


def test_share_of_peak_where_it_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path, peak=12345.6e6 * 4) as writer:
        writer.step(1, RECORD)
    assert "25.0 % of peak" in capsys.readouterr().out
    assert peak_flops("NVIDIA H100 80GB HBM3", 2) == 2 * 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", 1) == 312e12
    assert peak_flops("NVIDIA GH200 480GB", 1) == 989e12
    assert peak_flops("CPU", 8) is None


def test_going_on_drops_the_steps_that_will_run_again(tmp_path: Path) -> None:
    write(tmp_path, 0, 4)
    with opened(tmp_path, first_step=2):
        pass
    assert told(tmp_path) == [(0, "valid"), (1, ""), (2, ""), (2, "valid")]
    write(tmp_path, 2, 4)
    assert told(tmp_path) == [(0, "valid"), (1, ""), (2, ""), (2, "valid"), (3, ""), (4, ""), (4, "valid")]


def test_going_on_from_nothing_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 1)
    assert told(tmp_path) == [(0, "valid"), (1, "")]


@pytest.mark.parametrize("rubbish", [b'{"step": 3, "lo', b"\xff\xfe\n", b"null\n", b"[3]\n", b'{"loss": 1}\n', b"7"])
def test_a_half_written_or_damaged_line_goes(tmp_path: Path, rubbish: bytes) -> None:
    write(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(rubbish)
    write(tmp_path, 2, 3)
    assert told(tmp_path) == [(0, "valid"), (1, ""), (2, ""), (2, "valid"), (3, "")]
    assert not (tmp_path / "metrics.jsonl.part").exists()


def test_what_json_cannot_say_is_null(tmp_path: Path) -> None:
    with opened(tmp_path) as writer:
        writer.step(1, {**RECORD, "gradient_norm": math.inf, "loss_by_language": {"fr": math.nan}})
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path)[0]["gradient_norm"] is None and lines(tmp_path)[0]["loss_by_language"] == {"fr": None}


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = opened(tmp_path)
    writer.step(1, RECORD)
    assert told(tmp_path) == [(1, "")]
    writer.__exit__(None, None, None)


def test_flat_names_for_trackers() -> None:
    flat = metrics._flat({"step": 3, **RECORD, "skipped": False})
    assert flat["train/loss"] == RECORD["loss"] and flat["train/loss/fr"] == 2.5 and flat["train/tokens/en"] == 30.0
    assert "train/step" not in flat
    table = {name: score.table() for name, score in SCORES.items()}
    found = metrics._flat({"step": 3, "validation": "valid", **total(SCORES).table(), "by_language": table})
    assert found["validation/valid/nats_per_token"] == 2.5
    assert found["validation/valid/fr/nats_per_token"] == 3.0
    assert len(found) == 4 + 2 * 4


def test_scores() -> None:
    assert total(SCORES) == Score(50.0, 20.0, 50.0)
    assert Score(0.0, 0.0, 0.0).nats_per_token == Score(0.0, 0.0, 0.0).bits_per_byte == 0.0


def test_durations() -> None:
    assert [metrics._duration(seconds) for seconds in (0, 59.6, 3599, 3600, 90061)] == [
        "0:00", "1:00", "59:59", "1:00:00", "25:01:01",
    ]  # fmt: skip


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(wandb=False, tensorboard=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for asked in ({"wandb": True, "tensorboard": False}, {"wandb": False, "tensorboard": True}):
        with pytest.raises(ConfigError, match=r"needs the package .*pip install -e \.\[track\]"):
            check_trackers(**asked)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with opened(tmp_path, tensorboard=True) as writer:
        writer.step(1, RECORD)
        writer.validation(1, "valid", SCORES, 0.5)
        writer.step(2, RECORD)
        writer.step(3, RECORD)
    with opened(tmp_path, tensorboard=True, first_step=1) as writer:  # steps 2 and 3 run again
        writer.step(2, RECORD)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/loss/fr", "validation/valid/fr/bits_per_byte"} <= set(events.Tags()["scalars"])
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == [1, 2]
    assert points[0].value == pytest.approx(RECORD["loss"])


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with opened(tmp_path, wandb_project="tests", settings={"recipe": {"seed": 1}}) as writer:
        writer.step(1, RECORD)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


class FullDisk:
    """The `os` of metrics, whose writes fail while it is full."""

    def __init__(self) -> None:
        self.full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, descriptor: int, data: bytes) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(descriptor, data[:100])  # and a little at a time


def test_a_full_disk_loses_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk()
    monkeypatch.setattr(metrics, "os", disk)
    with opened(tmp_path) as writer:
        writer.step(1, RECORD)
        disk.full = True
        writer.step(2, RECORD)
        writer.step(3, RECORD)
        disk.full = False
        writer.step(4, RECORD)
    assert told(tmp_path) == [(1, ""), (2, ""), (3, ""), (4, "")]
    assert capsys.readouterr().out.count("cannot be written: No space left on device. Its lines are kept") == 1
    with pytest.raises(CheckpointError, match=r"1 lines of '.*metrics.jsonl' could not be written"):
        with opened(tmp_path, first_step=4) as writer:
            disk.full = True
            writer.step(5, RECORD)
    disk.full = False
    with pytest.raises(StoppedError, match="step 5 is saved"):  # what ends the run is what it ends with
        with opened(tmp_path, first_step=4) as writer:
            disk.full = True
            writer.step(5, RECORD)
            raise StoppedError("step 5 is saved")
    assert "1 lines of" in capsys.readouterr().out


def test_saves_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path) as writer:
        writer.step(1, RECORD)
        writer.saved(Outcome(1, tmp_path / "step-1", "", "", 2.0, 2.0))
        writer.saved(Outcome(2, tmp_path / "step-2", "", "", 2.0, 0.25))
        writer.saved(Outcome(3, tmp_path / "step-3", "rank 1: No space left on device"))
        writer.saved(Outcome(4, tmp_path / "step-4", "", "saved, but afterwards: x"))
    assert [line for line in lines(tmp_path) if "loss" not in line] == [
        {"step": 3, "save_failed": "rank 1: No space left on device"},
        {"step": 4, "save_note": "saved, but afterwards: x"},
    ]
    said = capsys.readouterr().out
    assert f"saved {tmp_path}/step-1 in 2.0 s\n" in said
    assert "step-2 in 2.0 s, 0.25 s of them in the way of training" in said
    assert "NOT SAVED: the checkpoint of step 3: rank 1: No space left on device. The ones before it" in said

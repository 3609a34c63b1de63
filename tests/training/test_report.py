"""Reports on a run directory whose records a reader can check by eye."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xlmega.errors import CheckpointError
from xlmega.training.report import before_and_after, describe, plot, read_history, report

pytestmark = pytest.mark.torch


def validation(step: int, **nats: float) -> dict[str, Any]:
    scores = {
        name: {"nats_per_token": value, "bits_per_byte": value / 2, "tokens": 100.0, "bytes": 300.0}
        for name, value in nats.items()
    }
    mean = sum(nats.values()) / len(nats)
    return {
        "step": step, "validation": "valid", "by_language": scores,
        "nats_per_token": mean, "bits_per_byte": mean / 2, "tokens": 100.0 * len(nats),
    }  # fmt: skip


def trained(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step, "loss": loss, "loss_by_language": {"en": loss, "sw": loss + 1},
        "tokens": 64 * step, "tokens_per_second": 1000.0 * step,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = {"model": {"preset": "xglm_tiny"}, "training": {"total_steps": 4, "seed": 7}, "data": {"root": "gone"}}
    (folder / "run.json").write_text(
        json.dumps({"recipe": recipe, "layout": "tp2 pp1 dp1", "versions": {"torch": "2"}})
    )
    records = [validation(0, en=8, sw=9), trained(1, 7.5), trained(2, 6.5), trained(2, 6.0), validation(2, en=5, sw=7)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"step": 3, "los')  # a run that goes on
    return folder


def test_history_takes_the_later_of_two_records_and_leaves_out_half_a_line(run: Path) -> None:
    history = read_history(run)
    assert [(record["step"], record["loss"]) for record in history.steps] == [(1, 7.5), (2, 6.0)]
    assert [record["step"] for record in history.validations["valid"]] == [0, 2]
    assert history.languages == ["en", "sw"]
    assert list(before_and_after(history, "valid")) == [
        "validation 'valid': step 0 -> step 2",
        "  language  nats/token         bits/byte         tokens",
        "  en          8.000 ->  5.000   4.000 ->  2.500     100",
        "  sw          9.000 ->  7.000   4.500 ->  3.500     100",
        "  all         8.500 ->  6.000   4.250 ->  3.000     200",
    ]
    records = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    records.append(json.dumps(validation(3, sw=6)))  # another mix: its mean is of other languages
    (run / "metrics.jsonl").write_text("\n".join(records))
    history = read_history(run)
    assert list(before_and_after(history, "valid"))[-1].split() == ["all", "-", "6.000", "-", "3.000", "100"]


def test_a_damaged_line_in_the_middle_is_named(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(CheckpointError, match=r"metrics.jsonl', line 1, is no record of a run: 'nonsense'"):
        read_history(run)


def test_a_run_is_described_and_what_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    lines = list(describe(run))
    assert lines[0] == f"{run}: xglm_tiny, tp2 pp1 dp1, seed 7"
    assert "steps: 2 of 4, loss 7.5000 -> 6.0000, 128 tokens, 2,000 tokens/s (median)" in lines
    assert lines[-1] == "checkpoints: none"
    with pytest.raises(CheckpointError, match=r"is not a run directory: it has no run.json"):
        list(describe(tmp_path))


def test_a_report_is_written_once(run: Path, tmp_path: Path) -> None:
    lines = list(report(run, tmp_path / "report"))
    assert (tmp_path / "report" / "report.txt").read_text().splitlines() == lines
    assert (tmp_path / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any(line.split() == ["plot", str(tmp_path / "report" / "loss.png")] for line in lines)
    with pytest.raises(CheckpointError, match="is not empty"):
        list(report(run, tmp_path / "report"))
    list(report(run, tmp_path / "report", overwrite=True))


def test_a_run_without_a_step_has_no_report(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="has trained no step yet"):
        list(report(run, tmp_path / "report"))


def test_twelve_languages_fit_in_a_plot(run: Path, tmp_path: Path) -> None:
    record = validation(0, **{f"l{k:02}": 5.0 + k for k in range(12)})
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    plot(read_history(run), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000

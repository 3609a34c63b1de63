"""Steps that would do harm: the rule by itself, steps that are discarded in every kind of layout, and resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trained
import worlds
from launched import Ranks

from xlmega.errors import NumericsError
from xlmega.training.engine import MOMENTS
from xlmega.training.recipe import TrainingSettings
from xlmega.training.spikes import FEWEST, Guard

STEPS: dict[str, Any] = {"total_steps": 100, "batch_windows": 8}
SMALL: dict[str, Any] = {"model": {"num_layers": 2}}
LAYOUTS: list[dict[str, Any]] = [
    {"name": "zero0", "zero": 0, **SMALL},
    {"name": "dp2_zero1_bf16", "dp": 2, "zero": 1, "precision": "bf16", **SMALL},
    {"name": "dp2_zero2", "dp": 2, "zero": 2, **SMALL},
    {
        "name": "dp2_zero2_offload",
        "dp": 2,
        "zero": 2,
        "zero_settings": {"offload_optimizer": {"device": "cpu"}},
        **SMALL,
    },
    {"name": "dp2_zero3", "dp": 2, "zero": 3, **SMALL},
    {"name": "dp2_fp16", "dp": 2, "zero": 1, "precision": "fp16", **SMALL},
    {"name": "tp2", "tp": 2, **SMALL},
    {"name": "pp2_zero0", "pp": 2, "zero": 0, **SMALL},
]


def test_only_what_is_not_finite_is_bad_by_default() -> None:
    guard = Guard(TrainingSettings(**STEPS))
    for step in range(40):
        assert guard.judge(step, 2.0, 1.0, False, "") == ""
    assert guard.limit(2.0) == math.inf and guard.limit(math.nan) < 0
    with pytest.raises(NumericsError, match=r"step 40: its loss is nan. Its windows are 1 to 8. No weight changed."):
        guard.judge(40, math.nan, math.inf, True, "Its windows are 1 to 8.")


def test_a_spike_is_a_multiple_of_the_median_once_enough_steps_are_known() -> None:
    guard = Guard(TrainingSettings(on_bad_step="skip", spike_factor=4.0, **STEPS))
    for step in range(FEWEST):
        assert guard.limit(2.0) == math.inf
        guard.judge(step, 2.0, 0.5, False, "")
    assert guard.limit(2.0) == 2.0
    assert "2.5, is above 4 times the median 0.5 of the last 16 steps" in guard.judge(16, 2.0, 2.5, True, "")
    assert guard.limit(2.0) == 2.0  # what was left out is not usual
    again = Guard(
        TrainingSettings(on_bad_step="skip", spike_factor=4.0, **STEPS), json.loads(json.dumps(guard.table()))
    )
    assert again.limit(2.0) == 2.0 and again.table() == guard.table()
    assert [one["step"] for one in again.table()["skipped"]] == [16]


def test_too_many_in_a_row_end_the_run_and_the_scale_of_fp16_does_not_count() -> None:
    guard = Guard(TrainingSettings(on_bad_step="skip", max_bad_steps=2, **STEPS))
    assert guard.judge(0, 2.0, math.inf, True, "", scaled=True) == ""
    assert guard.judge(1, math.nan, math.inf, True, "") and guard.judge(2, math.inf, math.inf, True, "")
    with pytest.raises(NumericsError, match="3 bad steps in a row, and training.max_bad_steps is 2"):
        guard.judge(3, 2.0, math.inf, True, "")


def discard(rank: int, folder: Path, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps 0, 2 and 3, with bad ones among them or without; and whether the bad ones left everything as it was."""
    told: dict[str, Any] = {}
    for case in cases:
        if rank >= trained.world_size(case):
            continue
        for bad in (True, False):
            with trained.engine_of({**case, "name": f"{case['name']}_{bad}"}, rank, folder) as engine:

                def state() -> dict[str, Any]:
                    return {k: trained.pieces(engine, k) for k in ("weight", *MOMENTS)}

                figures, before = trained.train(engine, range(1), rank), state()
                found: list[Any] = []
                for limit in (1e-6, -1.0) if bad else ():
                    scale = engine.loss_scale
                    engine.forward_backward(trained.batch_of(engine, 1, rank), step=1)
                    norm, skipped = engine.apply(1e-3, step=1, limit=limit)
                    after = state()
                    same = all(np.array_equal(before[k][n], after[k][n]) for k in before for n in before[k])
                    found.append([math.isfinite(norm) and norm > 0.0, skipped, same, engine.loss_scale == scale])
                figures += trained.train(engine, range(2, 4), rank)
                weights = {
                    name: value.tobytes().hex()[:256] for name, value in trained.pieces(engine, "weight").items()
                }
                told[f"{case['name']}_{bad}"] = [figures, weights, found]
    return told


@pytest.mark.multiprocess
def test_a_discarded_step_changes_nothing_in_any_layout(tmp_path: Path) -> None:
    told = worlds.run(2, discard, LAYOUTS, folder=tmp_path)
    for rank, results in enumerate(told):
        for case in LAYOUTS:
            if rank >= trained.world_size(case):
                continue
            with_bad, without = results[f"{case['name']}_True"], results[f"{case['name']}_False"]
            assert with_bad[2] == [[True, True, True, True]] * 2, (case, with_bad[2])
            assert with_bad[:2] == without[:2], case


@pytest.mark.multiprocess
def test_a_resumed_run_leaves_out_the_same_steps(made_tokens: Path, tmp_path: Path) -> None:
    sets = ("training.total_steps=30", "training.on_bad_step=skip", "training.spike_factor=1.01")
    sets += ("training.max_bad_steps=100", "optimizer.learning_rate=1e-5", "optimizer.min_learning_rate=0")
    for run, lives in (("alone", ((),)), ("resumed", (("--stop_at", "21"), ("--resume",)))):
        for number, options in enumerate(lives):
            with Ranks(tmp_path / f"{run}{number}", 1, made_tokens, tmp_path / run, *options, sets=sets) as ranks:
                assert ranks.codes() == [0], ranks.told(0)[-3000:]
            assert "LEFT OUT: step" in ranks.told(0) or number == 0
    alone, resumed = (
        [
            (one["step"], one["loss"], one["gradient_norm"], one.get("left_out"))
            for one in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
            if "loss" in one
        ]
        for run in ("alone", "resumed")
    )
    assert alone == resumed
    left_out = [step for step, *_, why in alone if why]
    assert min(left_out) < 21 < max(left_out) and all("times the median" in why for *_, why in alone if why)
    manifest = json.loads((tmp_path / "resumed/checkpoints/step-00000030/manifest.json").read_text())
    assert [one["step"] + 1 for one in manifest["facts"]["guard"]["skipped"]] == left_out

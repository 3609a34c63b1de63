"""The audit of runs whose mix changed: it holds where the arithmetic was kept, and finds each way of breaking it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written import publish

import xlmega.data.blend
from xlmega.data.batches import Batches
from xlmega.data.blend import Blend
from xlmega.data.plan import Plan
from xlmega.errors import DataError
from xlmega.parallel.layout import choose
from xlmega.training import checkpoint
from xlmega.training.audit import audit, audited
from xlmega.training.loop import _facts
from xlmega.training.recipe import read_recipe
from xlmega.training.run import Run, check_output, continued, create_output, resolve
from xlmega.training.runtime import runtime

pytestmark = pytest.mark.torch
SMALL = (
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.ffn_hidden_size=64",
    "data.sequence_length=512", "model.max_positions=512",
    "training.total_steps=60", "training.batch_windows=8", "data.temperature=1",
)  # fmt: skip
FIRST = ("data.languages={qla = 3.0, qlb = 1.0}",)
SECOND = ("data.languages={qlb = 2.0, qgr = 1.0, qla = 0.5}", "training.batch_windows=16")


def resolved(tokens: Path, output: Path, *overrides: str) -> Run:
    recipe = read_recipe("xglm_tiny", [*SMALL, f'data.root="{tokens}"', *overrides])
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    return resolve(recipe, runtime(settings), choose(2), output)


def start(tokens: Path, output: Path, *overrides: str, at_step: int = 0) -> Run:
    """The run as pretrain.py has it once it knows the step it goes on from; run.json is written."""
    run = resolved(tokens, output, *overrides)
    recorded = check_output(run, resume=output.exists())
    if recorded:
        run = continued(run, recorded, at_step)
    create_output(run)
    return run


def serve(run: Run, first: int, last: int, plan: Plan | None = None, steps: Callable[[int], int] = int) -> None:
    """What training writes down of the steps from `first` to `last`, if its batches are those of `plan`."""
    parts = [
        Batches(run.data, plan or run.plan, run.reading, micro_batch_windows=2, dp_rank=rank, dp_size=2)
        for rank in range(2)
    ]
    with (run.output / "metrics.jsonl").open("a") as file:
        for step in range(first, last):
            batches = [part.at(steps(step)) for part in parts]
            tokens = np.zeros(len(run.languages))
            for batch in batches:
                np.add.at(tokens, batch.languages.ravel(), batch.weights.sum(-1).ravel())
            by_language = {name: float(count) for name, count in zip(run.languages, tokens) if count}
            served = sum(batch.served for batch in batches)
            record = {"step": step + 1, "loss": 1.0, "tokens_by_language": by_language, "served": served}
            file.write(json.dumps(record) + "\n")
    save(run, last)


def save(run: Run, step: int) -> None:
    folder = checkpoint.folder_of(run.output, step)
    folder.mkdir(parents=True)
    about = {"format_version": checkpoint.FORMAT_VERSION, "step": step, "files": [], "facts": _facts(run, step, {})}
    publish(folder, about)


@pytest.fixture
def changed(made_tokens: Path, tmp_path: Path) -> Path:
    """A run of 60 steps whose mix and batch size changed at step 25: several epochs of each language."""
    run = start(made_tokens, tmp_path / "run", *FIRST)
    serve(run, 0, 25)
    run = start(made_tokens, tmp_path / "run", *SECOND, at_step=25)
    serve(run, 25, 60)
    return run.output


def test_a_run_with_a_change_holds(changed: Path, made_tokens: Path) -> None:
    lines = "\n".join(audit(changed))
    assert "from step 0, 'start': qla 0.7500, qlb 0.2500" in lines
    assert "from step 25, 'start from 25': qgr 0.2857, qla 0.1429, qlb 0.5714" in lines
    assert "changed on the resume at step 25: data.languages, training.batch_windows" in lines
    assert "60 of 60 steps: the windows that were read are those of the plan" in lines
    assert "2 checkpoints stand where the plan says" in lines
    assert "epochs of" in lines and "each once" in lines
    run = resolved(made_tokens, changed, *SECOND)
    recorded = check_output(run, resume=True)
    assert recorded
    epochs = recorded.plan.epochs(60)
    assert max(epochs.values()) > 2, "the test must cross epochs"


def test_the_same_change_declared_as_a_stage_serves_the_same(changed: Path, made_tokens: Path, tmp_path: Path) -> None:
    stage = 'data.stages=[{name = "b", from_step = 25, languages = {qlb = 2.0, qgr = 1.0, qla = 0.5}}]'
    run = start(made_tokens, tmp_path / "declared", *FIRST, stage, "training.batch_windows=[[0, 8], [25, 16]]")
    serve(run, 0, 60)
    list(audit(run.output))
    told = [[json.loads(line)["served"] for line in (path / "metrics.jsonl").open()] for path in (changed, run.output)]
    assert told[0] == told[1]


def test_going_on_from_before_the_change_serves_the_same_again(changed: Path, made_tokens: Path) -> None:
    """The checkpoint of step 25 is lost: with the recipe of the second start the run goes on as it did."""
    before = (changed / "metrics.jsonl").read_text().splitlines()
    run = start(made_tokens, changed, *SECOND, at_step=10)
    assert set(run.data) == {"qla", "qlb", "qgr"} and run.plan.mixes[1].from_step == 25
    (changed / "metrics.jsonl").write_text("\n".join(before[:10]) + "\n")
    for step in (25, 60):
        (checkpoint.folder_of(changed, step) / "manifest.json").unlink()
        checkpoint.folder_of(changed, step).rmdir()
    serve(run, 10, 60)
    assert (changed / "metrics.jsonl").read_text().splitlines() == before
    list(audit(changed))


def test_another_change_from_before_the_first_replaces_it(changed: Path, made_tokens: Path) -> None:
    run = start(made_tokens, changed, "data.languages={qla = 1.0}", at_step=10)
    assert [mix.from_step for mix in run.plan.mixes] == [0, 10]
    assert [change["at_step"] for change in run.changes] == [10]


def without_starts(plan: Plan, lost: Callable[[dict[str, int]], dict[str, int]]) -> Plan:
    """A plan whose second mix begins at other ranks than where the first has left its languages."""
    first, blend, places = plan._blends[1]
    starts = lost(blend.start_ranks)
    plan._blends[1] = (first, Blend(plan.mixes[1].weights, plan.windows, plan.seed, starts), places)
    return plan


FAULTS: dict[str, Callable[[Run], Any]] = {
    "lost start ranks": lambda run: serve(run, 25, 60, without_starts(replace(run.plan), lambda starts: {})),
    "a skipped rank": lambda run: serve(
        run, 25, 60, without_starts(replace(run.plan), lambda starts: {**starts, "qla": starts["qla"] + 1})
    ),
    "another seed": lambda run: serve(run, 25, 60, replace(run.plan, seed=99)),
    "a step twice": lambda run: serve(run, 25, 60, steps=lambda step: min(step, 40)),
    "a step left out": lambda run: serve(run, 25, 60, steps=lambda step: step + (step > 40)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_training_that_served_something_else(made_tokens: Path, tmp_path: Path, name: str) -> None:
    serve(start(made_tokens, tmp_path / "run", *FIRST), 0, 25)
    FAULTS[name](start(made_tokens, tmp_path / "run", *SECOND, at_step=25))
    with pytest.raises(DataError, match="was trained on other windows than the plan's, slots"):
        list(audit(tmp_path / "run"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    table = json.loads(path.read_text())
    change(table)
    if path.name == "manifest.json":
        publish(path.parent, table)
    else:
        path.write_text(json.dumps(table))


def relate(run: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    change(lines)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def mix(number: int) -> Callable[[Any], Any]:
    return lambda table: table["plan"]["mixes"][number]


RECORDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "seed": (lambda run: edit(run / "run.json", lambda t: t["plan"].update(seed=3)), "other windows"),
    "start ranks": (
        lambda run: edit(run / "run.json", lambda t: mix(1)(t)["start_ranks"].update(qla=0)), "does not add up"
    ),
    "weights": (
        lambda run: edit(run / "run.json", lambda t: mix(1)(t).update(weights={"qla": 1 << 30})), "other windows"
    ),
    "step of the change": (lambda run: edit(run / "run.json", lambda t: mix(1)(t).update(from_step=26)), "add up"),
    "windows": (lambda run: edit(run / "run.json", lambda t: t["plan"]["windows"].update(qla=40)), "other windows"),
    "a step missing": (lambda run: relate(run, lambda lines: lines.pop(30)), "lacks step 31 and 0 more"),
    "the last steps": (
        lambda run: relate(run, lambda lines: lines.__delitem__(slice(40, None))),
        "ends at step 40, but there is a whole checkpoint of step 60",
    ),
    "hash": (lambda run: relate(run, lambda lines: lines[7].update(served=1)), "step 8 was trained on other"),
    "tokens": (
        lambda run: relate(run, lambda lines: lines[7]["tokens_by_language"].update(qlb=5.0)),
        "step 8 tells of 5 tokens of 'qlb', but the plan of",
    ),
    "ranks of a checkpoint": (
        lambda run: edit(
            checkpoint.folder_of(run, 60) / "manifest.json", lambda t: t["facts"]["ranks"].update(qla=7)
        ),
        "checkpoint of step 60 says that 'qla' stands at window 7",
    ),
    "plan of a checkpoint": (
        lambda run: edit(
            checkpoint.folder_of(run, 60) / "manifest.json", lambda t: t["facts"]["plan"]["mixes"].pop()
        ),
        "checkpoint of step 60 was trained by another plan",
    ),
    "data of a checkpoint": (
        lambda run: edit(checkpoint.folder_of(run, 25) / "manifest.json", lambda t: t["facts"]["data"].update(qla="x")),
        "checkpoint of step 25 was trained on other tokens of qla",
    ),
    "checkpoint": (
        lambda run: (checkpoint.folder_of(run, 25) / "manifest.json").write_text("{}"), "is not a checkpoint's manifest"
    ),
    "run.json": (lambda run: (run / "run.json").write_text("{"), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_were_changed(changed: Path, name: str) -> None:
    damage, words = RECORDS[name]
    damage(changed)
    assert any(words in fault for fault in audited(changed).faults), audited(changed).faults[:3]
    with pytest.raises(DataError, match="the audit of .* fails"):
        list(audit(changed))


def test_arithmetic_that_repeats_windows_is_found_window_by_window(changed: Path, monkeypatch: Any) -> None:
    """Even where all records agree with the code: the code itself is what is tried."""
    relate(changed, lambda lines: [line.pop("served") for line in lines])
    list(audit(changed))
    monkeypatch.setattr(xlmega.data.blend, "permute", lambda index, size, key: index - index % 2)
    assert any("repeats a window in epoch 0" in fault for fault in audited(changed).faults)

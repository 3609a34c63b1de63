"""Proof of what a run was trained on: its recorded arithmetic replayed, window by window, against what it wrote down.

In: a run directory (run.json with the plan and its changes, metrics.jsonl, the checkpoints' manifests). Out: what was
proved, in lines, and every fault found. Nothing of training is imported and no token is read: whether the files are the
same is for their checksums.

Proved, for the steps that metrics.jsonl tells of: the plan's start ranks and slots follow from one another; every step
is there once, and the windows that its ranks read (their summed hashes) are those of the plan; each language's
windows, in the order of the slots, are whole epochs in which none is missing or there twice, and a part of one in
which none is there twice; each checkpoint's ranks are the plan's, and what it knows of the plan is its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlmega.data.plan import Plan
from xlmega.errors import CheckpointError, DataError
from xlmega.training.checkpoint import damage, folder_of, list_checkpoints, read_manifest
from xlmega.training.history import read_recorded
from xlmega.training.report import read_facts, read_history

BLOCK_SLOTS = 1 << 20
"""Slots replayed at once."""
MOST_FAULTS = 20


@dataclass
class Audit:
    """What an audit found."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def fault(self, words: str) -> None:
        self.faults.append(words)


def audit(run: Path) -> Iterator[str]:
    """What was proved of a run directory, line by line; a DataError with every fault where something is not so."""
    found = audited(run)
    yield from found.lines
    if found.faults:
        more = f"\n  and {len(found.faults) - MOST_FAULTS} more" if len(found.faults) > MOST_FAULTS else ""
        raise DataError(
            f"the audit of '{run}' fails:\n  " + "\n  ".join(found.faults[:MOST_FAULTS]) + more + "\n  "
            "What was trained on is not what the run's plan says, or one of its records was changed."
        )


def audited(run: Path) -> Audit:
    """The whole audit."""
    result = Audit()
    try:
        recorded = read_recorded(run)
    except CheckpointError as error:
        result.fault(str(error))
        return result
    plan = recorded.plan
    published = list_checkpoints(run)  # before the steps: a run that goes on meanwhile tells of a step, then saves it
    history = read_history(run)
    steps = max((record["step"] for record in history.steps), default=0)
    _describe(result, plan, recorded.changes, steps)
    _check_steps(result, plan, history.steps, read_facts(run)["recipe"])
    _check_windows(result, plan, steps)
    _check_checkpoints(result, run, plan, recorded.data, [one for one in published if one <= steps])
    _check_end(result, run, [one for one in published if one > steps], steps)
    return result


def _describe(result: Audit, plan: Plan, changes: tuple[dict[str, Any], ...], steps: int) -> None:
    result.lines.append(
        f"seed {plan.seed}, {len(plan.languages)} languages, {len(plan.mixes)} stages, {steps} steps told"
    )
    for mix in plan.mixes:
        served = ", ".join(f"{name} {weight / (1 << 30):.4f}" for name, weight in sorted(mix.weights.items())[:8])
        more = f" and {len(mix.weights) - 8} more" if len(mix.weights) > 8 else ""
        result.lines.append(f"  from step {mix.from_step}, '{mix.name}': {served}{more}")
    for change in changes:
        keys = ", ".join(change.get("keys", {})) or "none"
        result.lines.append(f"  changed on the resume at step {change.get('at_step')}: {keys}")


def _check_steps(result: Audit, plan: Plan, records: tuple[dict[str, Any], ...], recipe: dict[str, Any]) -> None:
    """Compare each step's record with the plan."""
    told = [record["step"] for record in records]
    due = list(range(1, len(told) + 1))
    if told != due:
        missing = sorted(set(range(1, max(told) + 1)) - set(told))
        result.fault(f"metrics.jsonl lacks step {missing[0]} and {len(missing) - 1} more of {max(told)}")
    packed = recipe["data"].get("windows", "packed") == "packed"
    length = int(recipe["data"]["sequence_length"])
    hashed = 0
    for record in records:
        step = record["step"] - 1
        slots = np.arange(plan.first_slot(step), plan.first_slot(step + 1))
        languages, windows = plan.slots(slots)
        if "served" in record:
            same = int(plan.hashes(slots, languages, windows).sum()) == record["served"]
            hashed += same
            if not same:
                result.fault(
                    f"step {step + 1} was trained on other windows than the plan's, slots {slots[0]} to {slots[-1]}"
                )
        if packed:
            _check_counts(result, plan, step, languages, record.get("tokens_by_language", {}), length)
    result.lines.append(f"{hashed} of {len(records)} steps: the windows that were read are those of the plan")


def _check_counts(
    result: Audit, plan: Plan, step: int, languages: NDArray[np.int32], told: dict[str, float], length: int
) -> None:
    counts = np.bincount(languages, minlength=len(plan.languages))
    due = {name: int(count) * length for name, count in zip(plan.languages, counts, strict=True) if count}
    found = {name: round(tokens) for name, tokens in told.items() if tokens}
    if found != due:
        names = sorted(name for name in {*due, *found} if due.get(name) != found.get(name))
        result.fault(
            f"step {step + 1} tells of {found.get(names[0], 0)} tokens of '{names[0]}', but the plan of "
            f"{due.get(names[0], 0)}"
        )


def _check_windows(result: Audit, plan: Plan, steps: int) -> None:
    """Every language's windows in the order in which they came, epoch by epoch."""
    seen = [np.zeros(plan.windows[name], dtype=np.bool_) for name in plan.languages]
    filled = [0] * len(seen)
    epochs = [0] * len(seen)
    end = plan.first_slot(steps)
    for first in range(0, end, BLOCK_SLOTS):
        slots = np.arange(first, min(end, first + BLOCK_SLOTS))
        languages, windows = plan.slots(slots)
        order = np.argsort(languages, kind="stable")
        starts = np.searchsorted(languages[order], np.arange(len(seen) + 1))
        for index in np.flatnonzero(np.diff(starts)).tolist():
            mine = windows[order[starts[index] : starts[index + 1]]]
            while mine.size:
                size = len(seen[index])
                part, mine = mine[: size - filled[index]], mine[size - filled[index] :]
                repeated = seen[index][part].any() or len(np.unique(part)) < len(part)
                seen[index][part] = True
                if repeated:
                    result.fault(
                        f"language '{plan.languages[index]}' repeats a window in epoch {epochs[index]}, "
                        f"within slots {slots[0]} to {slots[-1]}"
                    )
                filled[index] += len(part)
                if filled[index] == size:
                    seen[index][:] = False
                    filled[index] = 0
                    epochs[index] += 1
    for index, name in enumerate(plan.languages):
        if filled[index] or epochs[index]:
            result.lines.append(
                f"  {name}: {epochs[index]} epochs of {len(seen[index]):,} windows, each once, and {filled[index]:,} "
                "windows of the next, none twice"
            )


def _check_end(result: Audit, run: Path, beyond: list[int], steps: int) -> None:
    """A checkpoint of a later step than any told of was passed over by a resume, so it is a damaged one."""
    whole = [step for step in beyond if not any(damage(folder_of(run, step)))]
    if whole:
        result.fault(f"metrics.jsonl ends at step {steps}, but there is a whole checkpoint of step {whole[-1]}")


def _check_checkpoints(result: Audit, run: Path, plan: Plan, data: dict[str, str], steps: list[int]) -> None:
    checked = 0
    for step in steps:
        try:
            facts = read_manifest(folder_of(run, step))["facts"]
        except CheckpointError as error:
            result.fault(str(error))
            continue
        if "ranks" not in facts:
            continue
        checked += 1
        due = plan.ranks(step)
        wrong = sorted(name for name in {*facts["ranks"], *due} if facts["ranks"].get(name, 0) != due.get(name, 0))
        if wrong:
            name = wrong[0]
            result.fault(
                f"the checkpoint of step {step} says that '{name}' stands at window {facts['ranks'].get(name, 0)} of "
                f"its stream, but the plan at {due.get(name, 0)}"
            )
        told = [(mix["from_step"], mix["weights"], mix["block"]) for mix in facts["plan"]["mixes"]]
        mixes = [(mix.from_step, mix.weights, mix.block) for mix in plan.mixes]
        if [mix for mix in told if mix[0] < step] != [mix for mix in mixes if mix[0] < step]:
            result.fault(f"the checkpoint of step {step} was trained by another plan than run.json tells of")
        hashes = facts.get("data", {})
        other = sorted(name for name in hashes if data.get(name, hashes[name]) != hashes[name])
        if other:
            result.fault(f"the checkpoint of step {step} was trained on other tokens of {', '.join(other[:5])}")
    result.lines.append(f"{checked} checkpoints stand where the plan says")

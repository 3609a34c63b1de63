"""What lies in a run directory and how two of them differ, in lines for people.

In comes a run, a checkpoint or any directory of logical tensors; out go lines of text: each checkpoint's layout, size
and state, or two models tensor by tensor. Nothing is changed, and no more than a few megabytes are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlmega.errors import CheckpointError
from xlmega.training.checkpoint import (
    MOMENTS,
    Checkpoint,
    damage,
    folder_of,
    latest,
    list_checkpoints,
    open_source,
    read_manifest,
)
from xlmega.weights.comparison import Difference, differences, tensor_hash


def checkpoint_lines(run: Path, *, verify: bool = False) -> Iterator[str]:
    """Each checkpoint of a run: step, what wrote it, size and, with `verify`, whether its checksums hold."""
    found, pointed = list_checkpoints(run), latest(run)
    yield f"checkpoints: {len(found) or 'none'}"
    for step in found:
        folder = folder_of(run, step)
        size = sum(path.stat().st_size for path in folder.iterdir())
        problems = list(damage(folder)) if verify else []
        try:
            written = _written_by(folder)
        except CheckpointError as error:
            written, problems = "of an unknown run", problems or [str(error)]
        state = f", DAMAGED: {' '.join(problems)}" if problems else ", whole" if verify else ""
        mark = ", latest" if step == pointed else ""
        yield f"  {folder} {size / 1e6:.1f} MB, {written}{mark}{state}"
    if pointed is not None and pointed not in found:
        yield f"  {folder_of(run, pointed)} was published last and IS GONE"
    parts = sorted(path.name for path in (run / "checkpoints").glob("*.part"))
    if parts:
        yield f"  unfinished, never read, and removed when the run goes on: {', '.join(parts)}"


def _written_by(folder: Path) -> str:
    manifest = read_manifest(folder)
    validation = manifest["facts"].get("validation", {})
    scores = "".join(f", {name} {scores['nats_per_token']:.4f} nats/token" for name, scores in validation.items())
    return f"{manifest['layout']} ZeRO-{manifest['zero_stage']} {manifest['precision']}{scores}"


def comparison_lines(first: Path, second: Path, *, hashes: bool = False) -> Iterator[str]:
    """Two models tensor by tensor, weights and, where both are checkpoints, moments; the last line sums up."""
    ours, theirs = open_source(first), open_source(second)
    pairs: list[tuple[str, Any, Any]] = [("weight", ours, theirs)]
    for side, source in (("A", ours), ("B", theirs)):
        where = f"step {source.step} of {source.folder}" if isinstance(source, Checkpoint) else str(source.folder)
        yield f"{side}: {where}"
    if isinstance(ours, Checkpoint) and isinstance(theirs, Checkpoint):
        pairs += [(kind, ours.moment(kind), theirs.moment(kind)) for kind in MOMENTS]
    tensors = equal = values = same_values = 0
    for kind, a, b in pairs:
        mine, other = {name: a.shape(name) for name in a.names()}, {name: b.shape(name) for name in b.names()}
        both = [name for name in mine if tuple(mine[name]) == tuple(other.get(name, ()))]
        for name in mine:
            if name not in other:
                yield f"  {kind} {name}: only A has it"
            elif name not in both:
                yield f"  {kind} {name}: {tuple(mine[name])} in A, {tuple(other[name])} in B"
        for name in other:
            if name not in mine:
                yield f"  {kind} {name}: only B has it"
        tensors += len({*mine, *other})
        for one in differences(a, b, both):
            values, same_values = values + one.size, same_values + one.equal
            equal += one.equal == one.size
            yield f"  {kind} {_difference(one)}" + (f" {tensor_hash(a, one.name)[:12]}" if hashes else "")
    state = "equal bit for bit" if equal == tensors else "DIFFERENT"
    yield f"{state}: {equal} of {tensors} tensors, {same_values:,} of {values:,} values are equal"


def _difference(one: Difference) -> str:
    if one.equal == one.size:
        return f"{one.name}: equal"
    relative = one.largest / one.scale if one.scale else math.inf
    return (
        f"{one.name}: {one.equal:,} of {one.size:,} values equal, largest difference {one.largest:.3g} "
        f"({relative:.1e} of its largest value)"
    )

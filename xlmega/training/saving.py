"""Checkpoints written by all ranks, published whole, thrown away by rule; while training waits, or while it goes on.

In comes an Engine at a step and what the run knows of itself; out goes a checkpoint as `training.checkpoint` reads it.
Each rank writes its pieces to `step-N.part/`, brings them to the disk, reads them back and compares the checksum taken
as they were written; then rank 0 adds the manifest, renames the folder and moves `latest`. A save that fails anywhere
is told as an `Outcome` with a problem on every rank; nothing of it is left, and what was published before stays.
Asynchronously, a save first copies this rank's pieces to a buffer of their size; a thread then writes it. All
collectives stay on the calling thread: while a save is under way, `poll` asks after every step whether all are done.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xlmega import config as tables
from xlmega.errors import CheckpointError
from xlmega.parallel.groups import words_of_all
from xlmega.training.checkpoint import (
    FORMAT_VERSION,
    KINDS,
    LATEST,
    figure_of,
    folder_of,
    list_checkpoints,
    manifest_digest,
    piece_name,
    read_manifest,
)
from xlmega.training.engine import Engine
from xlmega.weights import storage
from xlmega.weights.shards import Shard


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: those that any of the three rules names."""

    newest: int = 0
    """So many; 0: all."""
    every_steps: int = 0
    """Those of steps that this divides; 0: none."""
    best: str = ""
    """The one with the lowest 'SET/FIGURE' of validation; empty: none."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended; the same on every rank but for the seconds."""

    step: int
    folder: Path
    problem: str
    """Empty where the checkpoint was published."""
    note: str = ""
    """What went wrong after that: a pointer not moved, an old checkpoint not removed."""
    seconds: float = 0.0
    """From the call to the end."""
    blocking_seconds: float = 0.0
    """Of these, how long the caller waited."""


class Saver:
    """Saves one engine into one run directory; every rank has one and calls the same methods in the same order."""

    def __init__(self, engine: Engine, run: Path, retention: Retention, *, asynchronous: bool = False):
        self._engine, self._run, self._retention = engine, run, retention
        self._owned = _owned(engine)
        self._buffer: torch.Tensor | None = None
        if asynchronous:
            size = sum(math.prod(shape) for shape in _shapes(self._owned).values())
            # Touched now, so that the first save is no slower than the others; pinned where a GPU copies into it.
            self._buffer = torch.zeros(size, pin_memory=engine.device.type == "cuda")
        if dist.get_rank() == 0:  # what killed runs left
            for path in (run / "checkpoints").glob("step-*.part"):
                shutil.rmtree(path, ignore_errors=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: _Flight | None = None

    def save(self, step: int, facts: Mapping[str, Any], *, wait: bool = False) -> Iterator[Outcome]:
        """Save the engine after `step` updates; `facts` goes into the manifest. Gives how this and earlier saves ended.

        Synchronous, or with `wait`: when all is given, it is on the disk. Else it is under way, and `poll` tells. The
        one before is waited for: there is at most one under way.
        """
        started = time.monotonic()
        yield from self.finish()
        flight = _Flight(step, folder_of(self._run, step), started)
        manifest = self._manifest(step, facts)
        make = functools.partial(storage.make_folder, flight.part)
        if problem := _first(_attempt(make) if dist.get_rank() == 0 else ""):
            yield self._ended(flight, problem)
            return
        publish = functools.partial(_publish, flight.part, flight.final, manifest, self._retention)
        if self._buffer is not None and not wait:
            pieces = self._snapshot(self._buffer)
            write = functools.partial(_write_rank, flight.part, _shapes(self._owned), lambda: iter(pieces))
            flight.job = self._thread.submit(_attempt, write)
            flight.publish = publish
            flight.blocking_seconds = time.monotonic() - started
            self._flight = flight
            return
        problem, note = _first(self._stream(flight.part)), ""
        if not problem:
            problem, note = _told(_attempt(publish) if dist.get_rank() == 0 else "")
        yield self._ended(flight, problem, note)

    def poll(self) -> Iterator[Outcome]:
        """How the save under way ended, if it has; every rank calls it between steps."""
        flight = self._flight
        if flight is None:
            return
        started = time.monotonic()
        done = torch.tensor([flight.job.done()], dtype=torch.int32)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        if done.item():
            yield from self._advance(flight)
        flight.blocking_seconds += time.monotonic() - started

    def finish(self) -> Iterator[Outcome]:
        """Wait for the save under way, if there is one; every rank calls it."""
        while flight := self._flight:
            started = time.monotonic()
            flight.job.result()
            flight.blocking_seconds += time.monotonic() - started
            yield from self._advance(flight)

    def _advance(self, flight: _Flight) -> Iterator[Outcome]:
        """All ranks' jobs are done: from writing to publishing, or from publishing to the end."""
        if flight.publish is not None:
            problem = _first(flight.job.result())
            if not problem:
                publish, flight.publish = flight.publish, None
                if dist.get_rank() == 0:
                    flight.job = self._thread.submit(_attempt, publish)
                return
            note = ""
        else:
            problem, note = _told(flight.job.result())
        self._flight = None
        yield self._ended(flight, problem, note)

    def _ended(self, flight: _Flight, problem: str, note: str = "") -> Outcome:
        if problem and dist.get_rank() == 0:  # every rank has stopped writing: make room for the next try
            shutil.rmtree(flight.part, ignore_errors=True)
        seconds = time.monotonic() - flight.started
        return Outcome(flight.step, flight.final, problem, note, seconds, flight.blocking_seconds or seconds)

    def _stream(self, part: Path) -> str:
        """Write while reading, one tensor in memory at a time; what is wrong, in words."""
        pieces = (value.cpu().contiguous() for value in self._pieces())
        problem = _attempt(functools.partial(_write_rank, part, _shapes(self._owned), lambda: pieces))
        for _ in pieces:  # the other ranks read together with this one, whatever became of its file
            pass
        return problem

    def _pieces(self) -> Iterator[torch.Tensor]:
        """This rank's pieces in their order; reading is collective over the data-parallel group."""
        for kind in KINDS:
            for shard, parameter, mine in self._owned:
                value = self._engine.gather_state(shard, parameter, kind)
                if mine:
                    yield value

    def _snapshot(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        pieces, end = [], 0
        for value in self._pieces():
            start, end = end, end + value.numel()
            pieces.append(buffer[start:end])
            pieces[-1].view(value.shape).copy_(value, non_blocking=True)
        if buffer.is_pinned():
            torch.cuda.synchronize()
        return pieces

    def _manifest(self, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        engine = self._engine
        return {
            "format_version": FORMAT_VERSION,
            "step": step,
            "layout": engine.layout.describe(),
            "precision": engine.runtime.precision,
            "zero_stage": engine.runtime.zero_stage,
            "optimizer_steps": engine.optimizer_steps,
            "loss_scaler": engine.loss_scaler,
            "model": tables.to_table(engine.model),
            "facts": dict(facts),
        }


class _Flight:
    """A save under way."""

    def __init__(self, step: int, final: Path, started: float):
        self.step, self.final, self.started = step, final, started
        self.part = final.with_name(final.name + ".part")
        self.job: Future[str] = Future()
        self.publish: Callable[[], None] | None = None
        """What comes after writing; None once that has begun."""
        self.blocking_seconds = 0.0


class _Published(Exception):
    """Something went wrong when the checkpoint was already in place."""


def _owned(engine: Engine) -> list[tuple[Shard, torch.nn.Parameter, bool]]:
    """Every shard, and whether this rank is the one that stores it: replicas take turns."""
    layout = engine.layout
    tp_rank, dp_rank, _ = layout.coordinates(dist.get_rank())
    return [
        (
            shard,
            parameter,
            not shard.is_copy and index % layout.dp == dp_rank and (shard.axis is not None or tp_rank == 0),
        )
        for index, (shard, parameter) in enumerate(engine.shards)
    ]


def _shapes(owned: list[tuple[Shard, torch.nn.Parameter, bool]]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each of this rank's pieces, in the order in which they are written."""
    return {
        piece_name(kind, shard.name, shard.shape, shard.slices): tuple(
            s.indices(n)[1] - s.indices(n)[0] for s, n in zip(shard.slices, shard.shape, strict=True)
        )
        for kind in KINDS
        for shard, _, mine in owned
        if mine
    }


def _write_rank(
    part: Path, shapes: Mapping[str, tuple[int, ...]], pieces: Callable[[], Iterator[torch.Tensor]]
) -> None:
    rank = dist.get_rank()
    path = part / f"rank-{rank:05d}.safetensors"
    file = storage.TensorFile(path, shapes)
    with contextlib.closing(file):
        for piece in pieces():
            file.write(piece)
        entry = file.finish()
    storage.write_json(path.with_suffix(".json"), {**entry, "pieces": list(shapes)})


def _publish(part: Path, final: Path, manifest: dict[str, Any], retention: Retention) -> None:
    entries = sorted(part.glob("rank-*.json"))
    manifest["files"] = [json.loads(path.read_text(encoding="utf-8")) for path in entries]
    manifest = json.loads(json.dumps(manifest))  # as it will be read: keys are text, tuples are lists
    manifest["sha256"] = manifest_digest(manifest)
    storage.write_json(part / "manifest.json", manifest)
    read_manifest(part)
    for path in entries:
        storage.remove_file(path)
    storage.move_folder(part, final)
    pointer = {"step": manifest["step"], "sha256": manifest["sha256"]}
    notes = [
        _attempt(functools.partial(storage.write_json, final.with_name(LATEST), pointer)),
        _attempt(functools.partial(prune, final.parents[1], retention, manifest["step"])),
    ]
    if any(notes):
        raise _Published(f"saved, but afterwards: {'; '.join(filter(None, notes))}")


def prune(run: Path, retention: Retention, step: int) -> None:
    """Remove what no rule of `retention` keeps, of the checkpoints up to `step`, just saved; one process calls it.

    Later ones are damaged: the run was resumed before them and will write them again. They are not counted, or a
    damaged one would be kept in place of the good one.
    """
    found = [one for one in list_checkpoints(run) if one <= step]
    kept = set(found[-retention.newest :])  # all of them where it is 0
    kept |= {one for one in found if retention.every_steps and one % retention.every_steps == 0}
    if retention.best:
        figures = ((figure_of(folder_of(run, one), retention.best), one) for one in found)
        scored = [(figure, -one) for figure, one in figures if figure is not None]
        kept |= {-one for _, one in sorted(scored)[:1]}
    for one in found:
        if one not in kept:
            storage.remove_folder(folder_of(run, one))


# -------------------------------------------------------------------- words


_NOTE = "note: "


def _attempt(action: Callable[[], None]) -> str:
    """What is wrong, in words, after `action` ('' if nothing): only what files do is expected to go wrong."""
    try:
        action()
    except (OSError, CheckpointError) as error:
        return str(error)
    except _Published as error:
        return f"{_NOTE}{error}"
    return ""


def _first(problem: str) -> str:
    """The first ranks' problems ('' if none has any), told everywhere; every rank calls it."""
    found = [f"rank {rank}: {one}" for rank, one in enumerate(words_of_all(problem)) if one]
    return "; ".join(found[:4])


def _told(problem: str) -> tuple[str, str]:
    """(problem, note) of rank 0, told everywhere; every rank calls it."""
    words = words_of_all(problem)[0]
    return ("", words[len(_NOTE) :]) if words.startswith(_NOTE) else (words and f"rank 0: {words}", "")

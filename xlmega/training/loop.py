"""The loop: batch, gradients, update, log, and now and then a validation or a checkpoint.

In come a resolved Run and an Engine with its weights set; out go a trained engine, metrics and checkpoints. Everything
that changes is asked for by step, so the loop has no state but the step, and resuming is starting it at another one.
All ranks run it together.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from xlmega.data.batches import Batch, Prefetched, validation_batches, validation_sets
from xlmega.errors import DataError
from xlmega.training import checkpoint
from xlmega.training.engine import Engine, Report
from xlmega.training.metrics import Metrics
from xlmega.training.optimizer import learning_rate
from xlmega.training.run import Run
from xlmega.training.validation import ValidationSet


def train(run: Run, engine: Engine, metrics: Metrics | None, first_step: int = 0) -> None:
    """Train from `first_step` updates done to `run.stop_at`; `metrics` is rank 0's."""
    plan = run.recipe.training
    rate = learning_rate(run.recipe.optimizer, plan.total_steps)
    _, dp_rank, _ = run.layout.coordinates(dist.get_rank())
    batches = Prefetched(run.batches(dp_rank), first_step)
    sets = _validation_sets(run, dp_rank)
    if first_step == 0:
        _validate(sets, engine, metrics, 0)
    for step in range(first_step, run.stop_at):
        started = time.monotonic()
        try:
            batch = batches.at(step)
        except DataError as error:
            error.of_one_rank = True  # of this rank's windows
            raise
        report = engine.forward_backward(batch, step=step)
        norm, skipped = engine.apply(rate.at(step), step=step, batch=batch)
        done = step + 1
        if metrics:
            metrics.step(done, _record(run, engine, batch, report, norm, skipped, rate.at(step), started, done))
        last = done == run.stop_at
        if last or (plan.validate_every_steps and done % plan.validate_every_steps == 0):
            _validate(sets, engine, metrics, done)
        if last or (plan.save_every_steps and done % plan.save_every_steps == 0):
            _save(run, engine, metrics, done)
    batches.close()


def _validation_sets(run: Run, dp_rank: int) -> list[ValidationSet]:
    data = run.recipe.data
    windows = validation_sets(Path(data.root), data, run.recipe.training.validation_windows)
    # As many micro-batches as the pipeline has stages keep it busy, and suit the interleaved schedule.
    sets = validation_batches(windows, run.runtime.micro_batch_windows, dp_rank, run.layout.dp, run.layout.pp)
    return [ValidationSet(name, batches, run.vocabulary.piece_bytes) for name, batches in sets.items()]


def _validate(sets: list[ValidationSet], engine: Engine, metrics: Metrics | None, step: int) -> None:
    for one in sets:
        started = time.monotonic()
        scores = one.score(engine)
        if metrics:
            metrics.validation(step, one.name, scores, time.monotonic() - started)


def _save(run: Run, engine: Engine, metrics: Metrics | None, step: int) -> None:
    started = time.monotonic()
    tokens = step * run.recipe.training.batch_windows * run.recipe.data.sequence_length
    languages = {name: count * run.recipe.data.sequence_length for name, count in run.batches(0).counts(step).items()}
    folder = checkpoint.save(engine, run.output, step, {"tokens": tokens, "tokens_by_language": languages})
    if metrics:
        checkpoint.prune(run.output, run.recipe.training.keep_checkpoints, step)
        metrics.say(f"saved {folder} in {time.monotonic() - started:.1f} s")


def _record(
    run: Run,
    engine: Engine,
    batch: Batch,
    report: Report,
    norm: float,
    skipped: bool,
    rate: float,
    started: float,
    done: int,
) -> dict[str, Any]:
    names = run.languages
    present = [k for k, count in enumerate(report.targets) if count]
    seconds = time.monotonic() - started
    record: dict[str, Any] = {
        "loss": report.loss,
        "loss_by_language": {names[k]: report.nll[k] / report.targets[k] for k in present},
        "tokens_by_language": {names[k]: report.targets[k] for k in present},
        "learning_rate": rate,
        "gradient_norm": norm,
        "tokens": done * run.recipe.training.batch_windows * run.recipe.data.sequence_length,
        "tokens_per_second": sum(report.targets) / seconds,
        "seconds": seconds,
    }
    if run.runtime.precision == "fp16":
        record |= {"loss_scale": engine.loss_scale, "skipped": skipped}
    return record

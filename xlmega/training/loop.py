"""The loop: batch, gradients, update, log, and now and then a validation or a checkpoint.

In come a resolved Run and an Engine with its weights set; out go a trained engine, metrics and checkpoints. Everything
that changes is asked for by step, so the loop has no state but the step, and resuming is starting it at another one.
All ranks run it together.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from xlmega import config
from xlmega.data.batches import Batch, Prefetched, validation_batches
from xlmega.data.languages import validation_sets
from xlmega.errors import CheckpointError, DataError, NumericsError
from xlmega.training.engine import Engine, Report
from xlmega.training.history import data_hashes
from xlmega.training.metrics import Metrics
from xlmega.training.optimizer import learning_rate
from xlmega.training.run import Run
from xlmega.training.saving import Outcome, Retention, Saver
from xlmega.training.spikes import Guard
from xlmega.training.supervision import Supervisor
from xlmega.training.validation import ValidationSet, total


def train(run: Run, engine: Engine, metrics: Metrics | None, first_step: int, watch: Supervisor, guard: Guard) -> None:
    """Train from `first_step` steps done to `run.stop_at`; `metrics` is rank 0's.

    Asked to stop before, it saves at the next step and raises the StoppedError that says so.
    """
    plan = run.recipe.training
    rate = learning_rate(run.recipe.optimizer, plan.total_steps)
    _, dp_rank, _ = run.layout.coordinates(dist.get_rank())
    batches = Prefetched(run.batches(dp_rank), first_step)
    sets = _validation_sets(run, dp_rank)
    retention = Retention(plan.keep_checkpoints, plan.keep_every_steps, plan.keep_best)
    saver = Saver(engine, run.output, retention, asynchronous=run.save_asynchronously)
    if first_step == 0:
        _validate(sets, engine, metrics, 0, watch)
    for step in range(first_step, run.stop_at):
        started = time.monotonic()
        watch.begins(step, "data")
        try:
            batch = batches.at(step)
        except (DataError, OSError) as error:
            found = error if isinstance(error, DataError) else DataError(f"step {step} cannot be read: {error}.")
            found.of_one_rank = True  # of this rank's windows
            raise found from None
        watch.step(step)
        try:
            report = engine.forward_backward(batch, step=step, wish=watch.stop.pending(), strict=not guard.skips)
            limit = guard.limit(report.loss)
            norm, skipped = engine.apply(rate.at(step), step=step, batch=batch, limit=limit, strict=not guard.skips)
            where, scaled = engine.name(batch, report), run.runtime.precision == "fp16"
            bad = guard.judge(step, report.loss, norm, skipped, where, scaled=scaled)
        except NumericsError:  # on every rank: a save under way is still good
            _tell(saver.finish(), metrics)
            raise
        done = step + 1
        record = _record(run, engine, batch, report, norm, skipped, rate.at(step), started, done) if metrics else None
        if metrics and record:
            metrics.step(done, record, bad)
        slow = watch.done(done, engine, record)
        if slow and metrics:
            metrics.say(slow)
        last, stopping = done == run.stop_at, report.wishes > 0
        figures = {}
        if last or (plan.validate_every_steps and done % plan.validate_every_steps == 0):
            figures = _validate(sets, engine, metrics, done, watch)
        _tell(saver.poll(), metrics)
        if last or stopping or (plan.save_every_steps and done % plan.save_every_steps == 0):
            watch.begins(done, "save")
            facts = {**_facts(run, done, figures), "guard": guard.table()}
            outcomes = _tell(saver.save(done, facts, wait=last or stopping), metrics)
            if (last or stopping) and outcomes[-1].problem:
                raise CheckpointError(
                    f"the last checkpoint, of step {done}, could not be saved: {outcomes[-1].problem}. "
                    "Make room and go on with --resume: what was saved before is untouched."
                )
        if stopping and not last:
            batches.close()
            watch.stop.saved = True
            raise watch.stop.error(done)
    batches.close()


def _validation_sets(run: Run, dp_rank: int) -> list[ValidationSet]:
    languages = validation_sets(run.recipe.data, run.recipe.training.validation_windows)
    # As many micro-batches as the pipeline has stages keep it busy, and suit the interleaved schedule.
    micro, dp_size, pp = run.runtime.micro_batch_windows, run.layout.dp, run.layout.pp
    sets = validation_batches(languages, run.reading, micro, dp_rank, dp_size, pp)
    return [ValidationSet(name, batches, run.piece_bytes) for name, batches in sets.items()]


def _validate(
    sets: list[ValidationSet], engine: Engine, metrics: Metrics | None, step: int, watch: Supervisor
) -> dict[str, dict[str, float]]:
    figures = {}
    for one in sets:
        started = time.monotonic()
        scores = one.score(engine, lambda: watch.begins(step, "validation"))
        figures[one.name] = total(scores).table()
        if metrics:
            metrics.validation(step, one.name, scores, time.monotonic() - started)
    return figures


def _facts(run: Run, step: int, figures: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What a checkpoint says of its run: enough to know what was learnt from what, and to go on without the run."""
    length, ranks = run.recipe.data.sequence_length, run.plan.ranks(step)
    return {
        "recipe": config.to_table(run.recipe),
        "vocabulary": run.vocabulary_hash,
        "learning_rate": learning_rate(run.recipe.optimizer, run.recipe.training.total_steps).at(step),
        "windows": run.plan.first_slot(step),
        "tokens": run.tokens(step),
        "tokens_by_language": {name: rank * length for name, rank in ranks.items()},
        "ranks": ranks,
        "plan": run.plan.to_table(),
        "data": data_hashes(run),
        "validation": figures,
    }


def _tell(outcomes: Iterable[Outcome], metrics: Metrics | None) -> list[Outcome]:
    """Say how saves ended; a failed one is not the end of the run."""
    told = list(outcomes)
    if metrics:
        for one in told:
            metrics.saved(one)
    return told


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
        "tokens": run.tokens(done),
        "served": int(report.extra[0]),
        "tokens_per_second": sum(report.targets) / seconds,
        "seconds": seconds,
    }
    if run.runtime.precision == "fp16":
        record |= {"loss_scale": engine.loss_scale, "skipped": skipped}
    return record

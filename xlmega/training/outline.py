"""What a run will be, in lines: recipe, layout, memory of the fullest rank, and every language's windows and epochs.

In comes a resolved Run; out go lines for `--dry_run` and the start of a log. Arithmetic on shapes and on the plan:
nothing is allocated and nothing is read but the headers of validation files.
"""

from __future__ import annotations

from collections.abc import Iterator

from xlmega import config
from xlmega.data.languages import validation_sets
from xlmega.data.planning import beyond_cap
from xlmega.training.run import Run


def summary(run: Run) -> str:
    """The resolved recipe, layout, memory and data of a run, for `--dry_run` and the start of a log."""
    return "\n".join(_lines(run))


def _lines(run: Run) -> Iterator[str]:
    recipe, model = run.recipe, run.recipe.model
    yield "recipe"
    for name, table in config.to_table(recipe).items():
        yield f"  [{name}] " + ", ".join(f"{key}={value}" for key, value in table.items())
    how = f"{run.layout.describe()}, {run.layout.world_size} ranks, {run.runtime.describe()}"
    step = f"{run.micro_batches} micro-batches of {run.runtime.micro_batch_windows} windows"
    yield f"layout: {how}, {step}, recompute {run.recompute}"
    yield f"model: {model.num_parameters():,} parameters ({model.preset or model.family}, {model.vocab_size:,} ids)"
    yield "memory of the fullest rank, estimated:"
    parts = memory(run)
    by_part = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in parts.items())
    yield f"  {by_part}; together {sum(parts.values()) / 2**20:,.0f} MiB, without what Python and its libraries take"
    yield from _data_lines(run)


def _data_lines(run: Run) -> Iterator[str]:
    plan, length, steps = run.plan, run.recipe.data.sequence_length, run.recipe.training.total_steps
    ends = [*(mix.from_step for mix in plan.mixes[1:]), steps]
    windows = plan.first_slot(steps)
    yield f"data: {windows:,} windows of {length} tokens, {run.tokens(steps):,} tokens in {len(ends)} stage" + (
        "s" if len(ends) > 1 else ""
    )
    for mix, end in zip(plan.mixes, ends, strict=True):
        served, counts = plan.first_slot(end) - plan.first_slot(mix.from_step), plan.counts(mix.from_step, end)
        sizes = sorted(
            {plan.batch.at(step) for step in (mix.from_step, *plan.batch.starts) if mix.from_step <= step < end}
        )
        batch = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        unit = " of one language" if mix.block > 1 else ""
        yield f"  stage '{mix.name}', steps {mix.from_step} to {end}, {batch} windows a step{unit}: {served:,} windows"
        if len(plan.mixes) > 1:
            for name in sorted(mix.weights):
                yield f"    {name}: {counts[name]:,} windows ({100 * counts[name] / max(1, served):.2f} %)"
    counts, epochs = plan.ranks(steps), plan.epochs(steps)
    for name in plan.languages:
        repeated = "  REPEATS" if epochs[name] > 1 else ""
        whose = f", the windows of {run.data[name].original}" if name in run.data and run.data[name].original else ""
        yield (
            f"  {name}: {counts[name]:,} windows, {counts[name] * length:,} tokens "
            f"({100 * counts[name] / windows:.2f} %), {epochs[name]:.3f} epochs of {plan.windows[name]:,} windows"
            f"{whose}{repeated}"
        )
    sets = validation_sets(run.recipe.data, run.recipe.training.validation_windows)
    for name, languages in sets.items():
        words = ", ".join(f"{code} {one.windows.count}" for code, one in languages.items())
        yield f"validation '{name}', windows: {words}"
    for warning in warnings(run):
        yield f"note: {warning}"


def warnings(run: Run) -> Iterator[str]:
    """What should be known of a run's data before its first step, though nothing is wrong with it."""
    yield from beyond_cap(run.recipe.data, run.plan, run.recipe.training.total_steps)


def memory(run: Run) -> dict[str, float]:
    """Bytes of the rank that holds most, by part: arithmetic on shapes, not a measurement."""
    import torch

    from xlmega.training import planning

    windows = run.micro_batches * run.layout.dp * run.runtime.micro_batch_windows
    length = run.recipe.data.sequence_length
    model, on_gpu = run.recipe.model, torch.cuda.is_available()
    return planning.memory(planning.Job(model, run.layout, run.runtime, windows, length, run.recompute, on_gpu))

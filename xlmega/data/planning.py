"""From a recipe to a plan: stages at their steps, exact integer weights, and what is to be said before step 0.

In: the [data] table, the sizes of the languages, batch sizes by step, the run's length and seed; on a resume the
recorded plan and the step it goes on from. Out: a Plan, or one error; and, for a plan, the languages that it takes
beyond the cap on epochs. A function of its arguments: every rank makes the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from xlmega.data.blend import quantise
from xlmega.data.plan import Mix, Plan, extended, first_slot, first_step_from
from xlmega.data.settings import DataSettings, schedule_shares
from xlmega.data.shares import Size, weights
from xlmega.errors import ConfigError, DataError
from xlmega.schedules import Stages

FIRST = "start"
"""Name of what holds from step 0 where the recipe names no stage there."""


@dataclass(frozen=True)
class Stage:
    """The [data] table as it holds from a step on."""

    name: str
    from_step: int
    settings: DataSettings


def stages_of(settings: DataSettings, batch: Stages[int], total_steps: int) -> list[Stage]:
    """The stages that a recipe says, by ascending step, the first at step 0."""
    alone = replace(settings, stages=(), language_schedule="")
    if settings.language_schedule:
        shares = schedule_shares(settings.language_schedule)
        assert shares is not None, settings.language_schedule
        length = total_steps // len(shares)
        if not length:
            raise ConfigError(
                f"data.language_schedule='{settings.language_schedule}' has {len(shares)} stages, but the run has "
                f"{total_steps} steps. A stage has at least one."
            )
        key = "p_l2" if settings.data_root_2 else "p_clone"
        return [
            Stage(f"{number + 1} of {len(shares)}", number * length, replace(alone, **{key: share}))  # type: ignore[arg-type]
            for number, share in enumerate(shares)
        ]
    found = [Stage(FIRST, 0, alone)]
    for stage in settings.stages:
        step = stage.from_step
        if step is None:
            assert stage.from_tokens is not None, stage
            step = first_step_from(batch, math.ceil(stage.from_tokens / settings.sequence_length))
        if step >= total_steps:
            raise ConfigError(f"data.stages, '{stage.name}' begins at step {step}, but the run ends at {total_steps}.")
        if step == found[-1].from_step == 0 and len(found) == 1:
            found.pop()  # the recipe names its beginning
        elif step <= found[-1].from_step:
            raise ConfigError(
                f"data.stages, '{stage.name}' begins at step {step}, but '{found[-1].name}' before it at step "
                f"{found[-1].from_step}. Stages stand in the order of their steps."
            )
        found.append(Stage(stage.name, step, settings.during(stage)))
    return found


def plan_of(
    settings: DataSettings,
    sizes: Mapping[str, Size],
    batch: Stages[int],
    *,
    total_steps: int,
    seed: int,
    before: Plan | None = None,
    at_step: int = 0,
) -> Plan:
    """The plan of a recipe; with `before`, that plan up to `at_step` and the recipe's from there on."""
    mirrors = {name: size.original for name, size in sizes.items() if is_first_clone(name, size)}
    windows = {name: size.windows for name, size in sizes.items()}
    if before:
        _check_same(before, windows, mirrors)
    stages = stages_of(settings, batch, total_steps)
    mixes: list[Mix] = []
    made: Plan | None = None
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        end = following.from_step if following else total_steps
        start = min(max(stage.from_step, at_step), end)
        served = _served(made, before, start, at_step)
        count = first_slot(batch, end) - first_slot(batch, start)
        shares = quantise(weights(stage.settings, sizes, stage_windows=count, served=served))
        cuts = [stage.from_step, *(step for step in batch.starts if stage.from_step < step < end)]
        for step in cuts if stage.settings.unit == "batch" else cuts[:1]:
            block = batch.at(step) if stage.settings.unit == "batch" else 1
            mixes.append(Mix(stage.name, step, shares, block))
        made = Plan(seed, windows, mirrors, batch, tuple(mixes))
    assert made is not None
    _check_all_served(settings, sizes, made)
    _check_budgets(settings, made, total_steps)
    return extended(before, at_step, made) if before else made


def _served(made: Plan | None, before: Plan | None, start: int, at_step: int) -> dict[str, int]:
    """Windows of each language before `start`, in the plan as far as it is made."""
    if before and made:
        return extended(before, at_step, made).ranks(start)
    one = made or before
    return one.ranks(start) if one else {}


def is_first_clone(name: str, size: Size) -> bool:
    """The first clone of a language goes through its windows from the other end, so that the two share none."""
    return bool(size.original) and name == clone_name(size.original, 1)


def clone_name(language: str, clone: int) -> str:
    """What clone number `clone` of a language is called."""
    return f"{language}-clone{clone}"


def _check_same(before: Plan, windows: Mapping[str, int], mirrors: Mapping[str, str]) -> None:
    for name in sorted(set(before.windows) & set(windows)):
        if before.windows[name] != windows[name] or before.mirrors.get(name) != mirrors.get(name):
            raise DataError(
                f"language '{name}' had {before.windows[name]} windows to train on when the run began and has "
                f"{windows[name]} now, so its place in them is lost. Point data.root at the tokens of the first."
            )


def _check_all_served(settings: DataSettings, sizes: Mapping[str, Size], plan: Plan) -> None:
    """A setting that would be ignored is an error: clones or a second root that no stage serves."""
    served = {name for mix in plan.mixes for name in mix.weights}
    if settings.num_cloned_languages and not any(sizes[name].original for name in served):
        raise ConfigError(
            f"num_cloned_languages={settings.num_cloned_languages}, but no stage serves a clone. Set p_clone or a "
            "language_schedule, or give clones a weight in data.languages."
        )
    if settings.data_root_2 and not any(sizes[name].root == 2 for name in served):
        raise ConfigError(
            "data_root_2 is given, but no stage serves its languages. Set p_l2 or a language_schedule, or give them "
            "weights in data.languages."
        )


def _check_budgets(settings: DataSettings, plan: Plan, total_steps: int) -> None:
    if not settings.token_budgets:
        return
    due = math.fsum(settings.token_budgets.values()) / settings.sequence_length
    serves = plan.first_slot(total_steps)
    if abs(due - serves) > plan.batch.at(max(0, total_steps - 1)):
        raise ConfigError(
            f"data.token_budgets add up to {due:,.0f} windows of {settings.sequence_length} tokens, but the run serves "
            f"{serves:,}. Set training.total_steps={first_step_from(plan.batch, round(due))}, or change a budget."
        )


def beyond_cap(settings: DataSettings, plan: Plan, total_steps: int) -> Iterator[str]:
    """In words, the languages that the run takes beyond `max_epochs`, or, without a cap, more than once."""
    cap = settings.max_epochs or 1.0
    ranks = plan.ranks(total_steps)
    for name in plan.languages:
        if ranks[name] > math.floor(cap * plan.windows[name]):
            when = _first_step_beyond(plan, name, math.floor(cap * plan.windows[name]), total_steps)
            yield (
                f"language '{name}' is served {ranks[name] / plan.windows[name]:.3f} times over "
                f"({ranks[name]:,} windows, it has {plan.windows[name]:,}), beyond {cap:g} from step {when} on"
            )


def check_cap(settings: DataSettings, plan: Plan, total_steps: int) -> None:
    """Refuse a plan beyond the recipe's cap, where it says so."""
    if not settings.max_epochs or settings.beyond_cap == "warn":
        return
    found = list(beyond_cap(settings, plan, total_steps))
    if found:
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        raise ConfigError(
            f"data.max_epochs={settings.max_epochs:g} is passed by {len(found)} languages:\n  "
            + "\n  ".join(found[:10])
            + f"{more}\n  Give them smaller shares, shorten the run, or set data.beyond_cap=warn."
        )


def _first_step_beyond(plan: Plan, name: str, rank: int, total_steps: int) -> int:
    low, high = 0, total_steps  # ranks(low) <= rank < ranks(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if plan.ranks(middle)[name] > rank else (middle, high)
    return low

"""A run's data from its first step to its last: which slots a step serves, and what each slot is.

In: batch sizes by step, and mixes, each with the step it holds from and its languages' integer weights. Out: for any
step its slots, for any slot its language and window, for any length exact counts. All of it is arithmetic; what is
stored of a run is this plan, a few numbers for each change.

Steps serve consecutive slots, batch after batch. A mix is a Blend over the slots from its first on, and every language
goes on at the rank where the mixes before have left it, so no change repeats or skips a window. A mix that changes
nothing goes on in the blend before it, so that naming a stage, or resuming, changes nothing either.
`extended` continues a recorded plan from a step on with another recipe's: the same change made by a stage declared
ahead of time gives the same plan, and so the same stream.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xlmega.data.blend import SHARE_BITS, Blend
from xlmega.data.windows import served_hash, stream_key
from xlmega.errors import CheckpointError, XlmegaError
from xlmega.schedules import Stages


@dataclass(frozen=True)
class Mix:
    """What is served from `from_step` until the next mix."""

    name: str
    from_step: int
    weights: dict[str, int]
    """Of each language that it serves; they sum to 2^SHARE_BITS."""
    block: int = 1
    """Slots that stay together in one language: 1, or a step's windows where a step has one language."""

    def goes_on(self, before: Mix) -> bool:
        """Whether it changes nothing."""
        return self.weights == before.weights and self.block == before.block


@dataclass(frozen=True)
class Plan:
    """All that fixes which window is served when."""

    seed: int
    windows: dict[str, int]
    """An epoch of each language that the run serves or has served."""
    mirrors: dict[str, str]
    """Languages that go through another's orders backwards."""
    batch: Stages[int]
    """Windows of a step."""
    mixes: tuple[Mix, ...]

    def __post_init__(self) -> None:
        starts = [mix.from_step for mix in self.mixes]
        assert starts and starts[0] == 0 and starts == sorted(set(starts)), starts
        for mix in self.mixes:
            assert sum(mix.weights.values()) == 1 << SHARE_BITS and set(mix.weights) <= set(self.windows), mix

    @cached_property
    def languages(self) -> tuple[str, ...]:
        """The languages that indices point into."""
        return tuple(sorted(self.windows))

    # ---------------------------------------------------------------- steps to slots

    def first_slot(self, step: int) -> int:
        """The first slot of a step: how many windows the steps before it serve."""
        return first_slot(self.batch, step)

    def step_of(self, slot: int) -> int:
        """The step that serves a slot."""
        starts = self.batch.starts
        stage = bisect_right([self.first_slot(start) for start in starts], slot) - 1
        return starts[stage] + (slot - self.first_slot(starts[stage])) // self.batch.values[stage]

    # ---------------------------------------------------------------- slots to windows

    @cached_property
    def _blends(self) -> list[tuple[int, Blend, NDArray[np.int32]]]:
        """Of each mix: its first slot, its blend, and the places of the blend's languages among the plan's."""
        result: list[tuple[int, Blend, NDArray[np.int32]]] = []
        ranks = dict.fromkeys(self.languages, 0)
        place_of = {name: place for place, name in enumerate(self.languages)}
        for index, mix in enumerate(self.mixes):
            if index and mix.goes_on(self.mixes[index - 1]):
                result.append(result[-1])
                continue
            first = self.first_slot(mix.from_step)
            if result:
                start, blend, _ = result[-1]
                for name, count in blend.counts(first - start).items():
                    ranks[name] += count
            blend = Blend(mix.weights, self.windows, self.seed, ranks, mirrors=self.mirrors, block=mix.block)
            places = np.array([place_of[name] for name in blend.languages], dtype=np.int32)
            result.append((first, blend, places))
        return result

    @cached_property
    def _first_slots(self) -> NDArray[np.int64]:
        return np.array([self.first_slot(mix.from_step) for mix in self.mixes], dtype=np.int64)

    def slots(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(language indices [n], windows [n]) of slots [n], in any order."""
        which = np.searchsorted(self._first_slots, slots, side="right") - 1
        if slots.size and which[0] == which[-1] and (which == which[0]).all():
            first, blend, places = self._blends[int(which[0])]
            languages, windows = blend.slots(slots - first)
            return places[languages], windows
        all_languages, all_windows = np.empty(slots.shape, np.int32), np.empty(slots.shape, np.int64)
        for index in np.unique(which):
            mine = which == index
            all_languages[mine], all_windows[mine] = self.slots(slots[mine])
        return all_languages, all_windows

    def at(self, slot: int) -> tuple[int, int]:
        """(language index, window) of one slot."""
        first, blend, places = self._blends[bisect_right(self._first_slots.tolist(), slot) - 1]
        language, window = blend.at(slot - first)
        return int(places[language]), window

    @cached_property
    def _names(self) -> NDArray[np.uint64]:
        return np.array([stream_key(0, name) for name in self.languages], dtype=np.uint64)

    def hashes(
        self, slots: NDArray[np.int64], languages: NDArray[np.int32], windows: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """[n]: a 32-bit hash of each window as it was served. Their sum over a step is what metrics.jsonl records.

        A sum, so that ranks add theirs up in any order; below 2^53, so that it is exact in a double.
        """
        return served_hash(self._names[languages], slots, windows).astype(np.int64)

    # ---------------------------------------------------------------- counts

    def ranks(self, step: int) -> dict[str, int]:
        """How many windows of each language the steps before `step` serve: every language's place in its stream."""
        mix = bisect_right([mix.from_step for mix in self.mixes], max(0, step - 1)) - 1
        first, blend, _ = self._blends[mix]
        counts = blend.counts(self.first_slot(step) - first)
        return {name: blend.start_ranks.get(name, 0) + counts.get(name, 0) for name in self.languages}

    def counts(self, from_step: int, to_step: int) -> dict[str, int]:
        """Windows of each language in the steps from `from_step` up to before `to_step`."""
        before, after = self.ranks(from_step), self.ranks(to_step)
        return {name: after[name] - before[name] for name in self.languages}

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each language in the steps before `step`; above 1, windows repeat."""
        return {name: rank / self.windows[name] for name, rank in self.ranks(step).items()}

    # ---------------------------------------------------------------- what is stored

    def to_table(self) -> dict[str, Any]:
        """The plan as JSON-able tables; with each mix stand the ranks that its languages begin at, for an audit."""
        return {
            "seed": self.seed,
            "windows": self.windows,
            "mirrors": self.mirrors,
            "batch_windows": [[start, size] for start, size in zip(self.batch.starts, self.batch.values, strict=True)],
            "mixes": [
                {
                    "name": mix.name,
                    "from_step": mix.from_step,
                    "first_slot": self.first_slot(mix.from_step),
                    "weights": mix.weights,
                    "block": mix.block,
                    "start_ranks": self.ranks(mix.from_step),
                }
                for mix in self.mixes
            ],
        }


def first_slot(batch: Stages[int], step: int) -> int:
    """How many windows the steps before `step` serve."""
    ends = [*batch.starts[1:], step]
    return sum(
        size * (min(end, step) - start)
        for start, end, size in zip(batch.starts, ends, batch.values, strict=True)
        if start < step
    )


def first_step_from(batch: Stages[int], slots: int) -> int:
    """The first step before which at least so many slots were served."""
    step = 0
    for start, size, end in zip(batch.starts, batch.values, [*batch.starts[1:], None], strict=True):
        step = start + max(0, -(-(slots - first_slot(batch, start)) // size))
        if end is None or step <= end:
            break
    return step


def plan_from_table(table: Mapping[str, Any]) -> Plan:
    """The plan that `to_table` wrote; a CheckpointError where the table does not add up."""
    try:
        starts, sizes = zip(*table["batch_windows"], strict=True)
        plan = Plan(
            seed=int(table["seed"]),
            windows={str(name): int(count) for name, count in table["windows"].items()},
            mirrors={str(name): str(other) for name, other in table["mirrors"].items()},
            batch=Stages(tuple(map(int, starts)), tuple(map(int, sizes))),
            mixes=tuple(
                Mix(str(one["name"]), int(one["from_step"]), dict(one["weights"]), int(one["block"]))
                for one in table["mixes"]
            ),
        )
        if plan.to_table() != dict(table):
            raise CheckpointError("the recorded data plan does not add up: ranks or slots are not those of its mixes.")
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, IndexError, XlmegaError) as error:
        raise CheckpointError(f"the recorded data plan is damaged ({type(error).__name__}: {error}).") from None
    return plan


def extended(before: Plan, step: int, after: Plan) -> Plan:
    """`before` up to `step`, then `after` as it holds from `step` on; both know a common language's windows alike."""
    if step == 0:
        return after
    both = {name for name in after.windows if before.windows.get(name, after.windows[name]) != after.windows[name]}
    assert not both and before.seed == after.seed, both
    kept = [mix for mix in before.mixes if mix.from_step < step]
    later = [mix for mix in after.mixes if mix.from_step > step]
    (now,) = [mix for mix in after.mixes if mix.from_step <= step][-1:]
    return Plan(
        before.seed,
        {**before.windows, **after.windows},
        {**before.mirrors, **after.mirrors},
        batch_extended(before.batch, step, after.batch),
        (*kept, now if now.from_step == step else replace(now, name=f"{now.name} from {step}", from_step=step), *later),
    )


def batch_extended(before: Stages[int], step: int, after: Stages[int]) -> Stages[int]:
    """`before` up to `step`, then `after`."""
    pairs = [pair for pair in zip(before.starts, before.values, strict=True) if pair[0] < step]
    pairs.append((step, after.at(step)))
    pairs += [pair for pair in zip(after.starts, after.values, strict=True) if pair[0] > step]
    changes = [pair for k, pair in enumerate(pairs) if k == 0 or pair[1] != pairs[k - 1][1]]
    return Stages(tuple(start for start, _ in changes), tuple(size for _, size in changes))

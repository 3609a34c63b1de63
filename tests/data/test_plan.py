"""A run's data by arithmetic against a walk slot by slot: random recipes, changes of mix, batch stages, resumes."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import batches_of, in_memory, languages_of, plan_for, settings_of

from xlmega.data.blend import SHARE_BITS, Blend
from xlmega.data.plan import Mix, Plan, batch_extended, extended, first_slot, first_step_from, plan_from_table
from xlmega.data.planning import beyond_cap, check_cap, plan_of, stages_of
from xlmega.data.settings import DataSettings, StageSettings
from xlmega.data.shares import Size
from xlmega.data.windows import epoch_key, permute, stream_key
from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.schedules import Stages, constant


class Walk:
    """The same run as a person would do it: step by step, slot by slot, with counters and no formula."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.served: list[tuple[int, int, str, int]] = []
        """(step, slot, language, window) in order."""
        self.ranks: dict[str, int] = defaultdict(int)
        self._within: dict[str, int] = {}

    def run(self, steps: int) -> Walk:
        slot = 0
        owed: list[Fork] = []
        for step in range(steps):
            mix = [mix for mix in self.plan.mixes if mix.from_step <= step][-1]
            index = self.plan.mixes.index(mix)
            if mix.from_step == step and not (index and mix.goes_on(self.plan.mixes[index - 1])):
                owed = [Fork(mix.weights)]
            size = [size for start, size in zip(self.plan.batch.starts, self.plan.batch.values) if start <= step][-1]
            for number in range(size):
                if number % mix.block == 0:
                    language = owed[0].next()
                self._serve(step, slot, language)
                slot += 1
        return self

    def _serve(self, step: int, slot: int, language: str) -> None:
        size, rank = self.plan.windows[language], self.ranks[language]
        order = self.plan.mirrors.get(language, language)
        place = rank % size
        if language in self.plan.mirrors:
            place = size - 1 - place
        key = epoch_key(stream_key(self.plan.seed, order), rank // size)
        self.served.append((step, slot, language, permute(place, size, key)))
        self.ranks[language] += 1


class Fork:
    """One after the other, the languages of a mix: each inner node of the tree counts what it has sent left."""

    def __init__(self, weights: dict[str, int]) -> None:
        self.names = sorted(weights)
        depth = (len(self.names) - 1).bit_length()
        self.weights = [weights[name] for name in self.names] + [0] * ((1 << depth) - len(self.names))
        self.seen: dict[tuple[int, int], int] = defaultdict(int)
        self.sent: dict[tuple[int, int], int] = defaultdict(int)

    def next(self) -> str:
        low, high = 0, len(self.weights)
        while high - low > 1:
            middle = (low + high) // 2
            left, total = sum(self.weights[low:middle]), sum(self.weights[low:high])
            self.seen[low, high] += 1
            due = (2 * self.seen[low, high] * left + total) // (2 * total)  # rounded, halves up
            if due > self.sent[low, high]:
                self.sent[low, high] += 1
                high = middle
            else:
                low = middle
        return self.names[low]


NAMES = ["ar", "bg", "de", "en", "fr", "sw", "zh"]


@st.composite
def recipes(draw: st.DrawFn) -> tuple[DataSettings, dict[str, Any], Stages[int], int]:
    """[data], corpus, batch sizes and length of a small run of whatever kind."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
    corpus = {name: in_memory(draw(st.integers(17, 400)), 3 + 50 * i) for i, name in enumerate(names)}
    steps = draw(st.integers(2, 30))
    clones = draw(st.integers(0, 2))
    unit = draw(st.sampled_from(["window", "window", "batch", "document"]))
    table: dict[str, Any] = {"unit": unit, "frac_validation": draw(st.sampled_from([0.0, 0.1]))}

    def mix() -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if draw(st.booleans()):
            some = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            chosen["languages"] = {name: draw(st.floats(0.01, 10.0)) for name in some}
        return chosen | ({"p_clone": draw(st.sampled_from([0.1, 0.5, 1.0]))} if clones else {})

    table |= {"num_cloned_languages": clones, **mix()}
    if not table.get("languages"):
        table["temperature"] = draw(st.sampled_from([1.0, 3.0]))
    stages: list[dict[str, Any]] = []
    for number, step in enumerate(sorted(draw(st.sets(st.integers(0, steps - 1), max_size=3)))):
        stages.append({"name": f"s{number}", "from_step": step, "temperature": 1.0, **mix()})
    batches = Stages((0,), (draw(st.sampled_from([1, 3, 8, 24])),))
    if draw(st.booleans()):
        batches = Stages((0, draw(st.integers(1, steps))), (batches.values[0], draw(st.sampled_from([2, 5, 24]))))
    made = settings_of({**table, "stages": tuple(StageSettings(**stage) for stage in stages)})
    return made, corpus, batches, steps


@settings(max_examples=80, deadline=None)
@given(recipe=recipes(), data=st.data())
def test_a_plan_is_a_walk_slot_by_slot(recipe: Any, data: st.DataObject) -> None:
    made, corpus, batch, steps = recipe
    languages = languages_of(made, corpus)
    plan = plan_for(made, languages, batch=batch, total_steps=steps, seed=data.draw(st.integers(0, 2**40)))
    walk = Walk(plan).run(steps)
    slots = plan.first_slot(steps)
    assert [slot for _, slot, _, _ in walk.served] == list(range(slots))
    # Slots in order, in another order, and one by one.
    indices, windows = plan.slots(np.arange(slots))
    expected = [(plan.languages.index(name), window) for _, _, name, window in walk.served]
    assert list(zip(indices.tolist(), windows.tolist())) == expected
    order = np.random.default_rng((0, slots)).permutation(slots)
    mixed, places = plan.slots(order)
    assert (mixed == indices[order]).all() and (places == windows[order]).all()
    some = order[:20].tolist()
    assert [plan.at(slot) for slot in some] == [expected[slot] for slot in some]
    assert [plan.step_of(slot) for slot in some] == [walk.served[slot][0] for slot in some]
    # Counts, to the window, of the run and of every part of it.
    assert plan.ranks(steps) == {name: walk.ranks[name] for name in plan.languages}
    middle = data.draw(st.integers(0, steps))
    parts = plan.counts(0, middle), plan.counts(middle, steps)
    assert all(parts[0][name] + parts[1][name] == walk.ranks[name] for name in plan.languages)
    assert sum(parts[0].values()) == plan.first_slot(middle)
    # Every epoch of every language is each of its windows once; a part of one repeats none.
    by_language: dict[str, list[int]] = defaultdict(list)
    for _, _, name, window in walk.served:
        by_language[name].append(window)
    for name, mine in by_language.items():
        size = plan.windows[name]
        for first in range(0, len(mine), size):
            epoch = mine[first : first + size]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < size or sorted(epoch) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(recipe=recipes(), dp_size=st.sampled_from([1, 2, 3, 4, 8]), micro=st.integers(1, 3), data=st.data())
def test_ranks_and_micro_batches_serve_the_walk(recipe: Any, dp_size: int, micro: int, data: st.DataObject) -> None:
    made, corpus, batch, steps = recipe
    batch = Stages(batch.starts, tuple(size * dp_size * micro for size in batch.values))
    place: dict[str, Any] = {"batch": batch, "total_steps": steps, "seed": 5}
    parts = [
        batches_of(corpus, vars(made), micro=micro, dp_rank=rank, dp_size=dp_size, **place) for rank in range(dp_size)
    ]
    walk = Walk(parts[0].plan).run(steps)
    for step in {0, steps - 1, data.draw(st.integers(0, steps - 1))}:
        served = [part.at(step) for part in parts]
        found = sorted(
            (int(one.slots[at]), parts[0].languages[one.languages[at]], int(one.windows[at]))
            for one in served
            for at in np.ndindex(one.slots.shape)
        )
        assert found == [(slot, name, window) for at, slot, name, window in walk.served if at == step]
        assert all(one.tokens.shape == (len(found) // dp_size // micro, micro, 9) for one in served)


@settings(max_examples=30, deadline=None)
@given(recipe=recipes(), other=recipes(), data=st.data())
def test_a_change_on_resume_is_the_same_as_one_declared(recipe: Any, other: Any, data: st.DataObject) -> None:
    """Any recipe, changed to any other at any step: bitwise the plan of the walk, and nothing lost on the way."""
    made, corpus, batch, steps = recipe
    changed, more, later_batch, _ = other
    changed = replace(changed, num_cloned_languages=made.num_cloned_languages, frac_validation=made.frac_validation)
    changed = replace(changed, p_clone=made.p_clone, stages=())
    corpus = {**more, **corpus}
    step = data.draw(st.integers(0, steps - 1))
    first, second = languages_of(made, corpus), languages_of(changed, corpus)
    before = plan_for(made, first, batch=batch, total_steps=steps)
    plan = plan_for(changed, second, batch=later_batch, total_steps=steps, before=before, at_step=step)
    old, new = Walk(before).run(step).served, Walk(plan).run(steps).served
    assert new[: len(old)] == old
    ranks = before.ranks(step)
    assert all(plan.ranks(step).get(name, 0) == ranks[name] for name in ranks)
    # A second resume from before the first, with the plan as recorded, changes nothing.
    recorded = plan_from_table(json.loads(json.dumps(plan.to_table())))
    assert recorded == plan
    slots = np.arange(plan.first_slot(steps))
    assert all((a == b).all() for a, b in zip(recorded.slots(slots), plan.slots(slots)))


def equal_streams(a: Plan, b: Plan, steps: int) -> bool:
    slots = np.arange(a.first_slot(steps))
    names = [[plan.languages[index] for index in plan.slots(slots)[0].tolist()] for plan in (a, b)]
    return names[0] == names[1] and (a.slots(slots)[1] == b.slots(slots)[1]).all()


FOUR = {"en": in_memory(2000), "fr": in_memory(900), "sw": in_memory(400), "yo": in_memory(200)}


@pytest.mark.parametrize("sampling", [{}, {"sampling": "unimax", "max_epochs": 5.0}, {"unit": "batch"}])
def test_declared_as_a_stage_or_changed_on_resume(sampling: dict[str, Any]) -> None:
    second = {"languages": {"fr": 1.0, "sw": 2.0, "yo": 0.5}} if not sampling.get("sampling") else {}
    base = settings_of({"languages": {"en": 2.0, "fr": 1.0}, "unit": sampling.get("unit", "window")})
    stage = StageSettings("later", from_step=7, sampling=sampling.get("sampling"), **second)  # type: ignore[arg-type]
    if sampling.get("sampling"):
        stage = replace(stage, languages={"fr": 0.0, "sw": 0.0, "yo": 0.0})
    cap = sampling.get("max_epochs", 0.0)
    declared_settings = replace(base, stages=(stage,), max_epochs=cap)
    declared = plan_for(declared_settings, languages_of(declared_settings, FOUR), batch=8, total_steps=40)
    before = plan_for(base, languages_of(base, FOUR), batch=8, total_steps=40)
    changed = replace(base, **{"languages": stage.languages, **sampling})
    resumed = plan_for(changed, languages_of(changed, FOUR), batch=8, total_steps=40, before=before, at_step=7)
    assert declared.mixes[1].weights == resumed.mixes[1].weights != before.mixes[0].weights
    assert equal_streams(declared, resumed, 40)
    assert declared.ranks(40) == resumed.ranks(40)


def test_a_resume_or_a_stage_that_changes_nothing_changes_nothing() -> None:
    base = settings_of({"languages": {"en": 2.0, "fr": 1.0, "sw": 0.7}})
    languages = languages_of(base, FOUR)
    plan = plan_for(base, languages, batch=8, total_steps=40)
    named = replace(base, stages=(StageSettings("same", from_step=5), StageSettings("again", from_tokens=8.0 * 8 * 21)))
    staged = plan_for(named, languages, batch=8, total_steps=40)
    assert [mix.from_step for mix in staged.mixes] == [0, 5, 21]
    assert equal_streams(plan, staged, 40)
    resumed = plan_for(base, languages, batch=8, total_steps=40, before=plan, at_step=13)
    assert equal_streams(plan, resumed, 40) and [mix.name for mix in resumed.mixes] == ["start", "start from 13"]


def test_a_change_and_back_goes_on_where_each_language_stood() -> None:
    a, b = settings_of({"languages": {"en": 1.0, "fr": 1.0}}), settings_of({"languages": {"sw": 1.0, "fr": 3.0}})
    languages = languages_of(settings_of(), FOUR)
    plan = plan_for(a, languages, batch=8, total_steps=30)
    plan = plan_for(b, languages, batch=8, total_steps=30, before=plan, at_step=10)
    plan = plan_for(a, languages, batch=8, total_steps=30, before=plan, at_step=20)
    assert plan.ranks(30) == {"en": 80, "fr": 140, "sw": 20, "yo": 0}
    alone = Blend({"fr": 1.0}, {"fr": plan.windows["fr"]}, plan.seed)
    indices, windows = plan.slots(np.arange(240))
    mine = windows[indices == plan.languages.index("fr")].tolist()
    assert mine == alone.slots(np.arange(140))[1].tolist()


# Schedules and stages.


def cloned_settings(**table: Any) -> DataSettings:
    return settings_of({"num_cloned_languages": 1, **table})


def test_a_schedule_switches_at_the_published_steps() -> None:
    made = cloned_settings(p_clone=0.05, language_schedule="0.05_0.65_0.65_0.65")
    stages = stages_of(made, constant(128), 18265)
    assert [stage.from_step for stage in stages] == [0, 4566, 9132, 13698]
    assert [stage.settings.p_clone for stage in stages] == [0.05, 0.65, 0.65, 0.65]
    sizes = {"en": Size(10**9, 1, 10**8), "en-clone1": Size(10**9, 1, 10**8, original="en")}
    plan = plan_of(made, sizes, constant(128), total_steps=18265, seed=0)
    assert [mix.from_step for mix in plan.mixes] == [0, 4566, 9132, 13698]
    assert [mix.name for mix in plan.mixes] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    for step, share in ((0, 0.05), (4565, 0.05), (4566, 0.65), (9132, 0.65), (13698, 0.65), (18264, 0.65)):
        assert plan.counts(step, step + 1)["en-clone1"] == pytest.approx(128 * share, abs=1)
    # The mean of the published schedule is a half; the last stage has the step that 18265 / 4 leaves over.
    assert plan.counts(13698, 18265)["en-clone1"] == pytest.approx(0.65 * 128 * 4567, abs=1)
    assert plan.epochs(18265)["en-clone1"] == pytest.approx(0.5 * 128 * 18265 / 10**8, rel=1e-3)


def test_a_schedule_of_a_second_root_and_its_bounds() -> None:
    made = settings_of({"root": "a", "data_root_2": "b", "language_schedule": "0.0_1.0"})
    sizes = {"en": Size(10**6, 1, 10**5), "fr": Size(10**6, 1, 10**5, root=2)}
    plan = plan_of(made, sizes, constant(4), total_steps=9, seed=0)
    assert [set(mix.weights) for mix in plan.mixes] == [{"en"}, {"fr"}]
    assert plan.ranks(9) == {"en": 16, "fr": 20}
    with pytest.raises(ConfigError, match="has 2 stages, but the run has 1 steps"):
        plan_of(made, sizes, constant(4), total_steps=1, seed=0)


def test_the_first_clone_shares_no_window_until_both_have_used_the_file_up() -> None:
    made = cloned_settings(p_clone=0.3, frac_validation=0.0)
    languages = languages_of(made, {"en": in_memory(801)})
    plan = plan_for(made, languages, batch=10, total_steps=20)
    indices, windows = plan.slots(np.arange(100))
    seen = [set(windows[indices == language].tolist()) for language in (0, 1)]
    assert not seen[0] & seen[1] and seen[0] | seen[1] == set(range(100)) and len(seen[1]) == 30
    indices, windows = plan.slots(np.arange(0, 200))
    again = [windows[indices == language].tolist() for language in (0, 1)]
    assert len(set(again[0][:100])) == 100, "each goes on through its own epoch"


def test_a_unit_of_a_batch_gives_each_step_one_language() -> None:
    made = settings_of({"unit": "batch", "languages": {"en": 3.0, "fr": 1.0}})
    languages = languages_of(made, FOUR)
    plan = plan_for(made, languages, batch=Stages((0, 8), (6, 10)), total_steps=16)
    steps = [set(plan.slots(np.arange(plan.first_slot(k), plan.first_slot(k + 1)))[0].tolist()) for k in range(16)]
    assert [min(one) for one in steps] == [0, 0, 1, 0] * 4 and all(len(one) == 1 for one in steps)
    assert plan.ranks(16) == {"en": 6 * 6 + 6 * 10, "fr": 2 * 6 + 2 * 10}


def test_a_unit_of_a_document_counts_documents() -> None:
    """Both have 20 documents; those of b are three times as long, and are served as often as those of a."""
    corpus = {"a": in_memory(161, documents=[8] * 19 + [9]), "b": in_memory(481, documents=[24] * 19 + [25])}
    made = settings_of({"unit": "document", "frac_validation": 0.0, "languages": {"a": 1.0, "b": 1.0}})
    plan = plan_for(made, languages_of(made, corpus), batch=8, total_steps=10)
    assert plan.ranks(10) == {"a": 20, "b": 60} and plan.epochs(10) == {"a": 1.0, "b": 1.0}


def test_stages_by_steps_and_by_tokens() -> None:
    stages = (StageSettings("b", from_step=10), StageSettings("c", from_tokens=8 * (10 * 4 + 15 * 10 - 1.0)))
    made = settings_of({"stages": stages})
    batch = Stages((0, 10), (4, 10))
    assert [(stage.name, stage.from_step) for stage in stages_of(made, batch, 100)] == [
        ("start", 0), ("b", 10), ("c", 25)
    ]  # fmt: skip
    named = settings_of({"stages": (StageSettings("warm", from_step=0, temperature=2.0), *stages)})
    assert [stage.name for stage in stages_of(named, batch, 100)] == ["warm", "b", "c"]
    with pytest.raises(ConfigError, match="'c' begins at step 25, but the run ends at 25"):
        stages_of(made, batch, 25)
    with pytest.raises(ConfigError, match="'b' begins at step 10, but 'c' before it at step 25"):
        stages_of(settings_of({"stages": stages[::-1]}), batch, 100)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    slots=st.integers(0, 300),
)
def test_steps_and_slots(sizes: list[int], gaps: list[int], slots: int) -> None:
    batch = Stages(tuple(np.cumsum([0, *gaps])[: len(sizes)].tolist()), tuple(sizes))
    served = [0]
    for step in range(310):
        served.append(served[-1] + batch.at(step))
    assert [first_slot(batch, step) for step in range(311)] == served
    assert first_step_from(batch, slots) == next(step for step in range(311) if served[step] >= slots)


def test_batch_sizes_before_and_after_a_resume() -> None:
    assert batch_extended(constant(4), 10, constant(4)) == constant(4)
    assert batch_extended(constant(4), 10, constant(8)) == Stages((0, 10), (4, 8))
    assert batch_extended(Stages((0, 5, 20), (1, 2, 3)), 10, Stages((0, 15), (2, 7))) == Stages((0, 5, 15), (1, 2, 7))
    assert batch_extended(Stages((0, 5), (1, 2)), 0, constant(3)) == constant(3)


# What is said before step 0.


def test_a_cap_on_epochs() -> None:
    made = settings_of({"languages": {"en": 1.0, "yo": 1.0}, "max_epochs": 2.0})
    plan = plan_for(made, languages_of(made, FOUR), batch=8, total_steps=20)
    assert plan.windows["yo"] == 23 and plan.ranks(20)["yo"] == 80
    with pytest.raises(ConfigError) as error:
        check_cap(made, plan, 20)
    assert str(error.value) == (
        "data.max_epochs=2 is passed by 1 languages:\n"
        "  language 'yo' is served 3.478 times over (80 windows, it has 23), beyond 2 from step 11 on\n"
        "  Give them smaller shares, shorten the run, or set data.beyond_cap=warn."
    )
    assert plan.ranks(11)["yo"] == 44 and plan.ranks(12)["yo"] == 48
    check_cap(made, plan, 11)
    check_cap(replace(made, beyond_cap="warn"), plan, 20)
    check_cap(replace(made, max_epochs=0.0), plan, 20)
    assert len(list(beyond_cap(replace(made, max_epochs=0.0), plan, 20))) == 1, "without a cap, repeats are told"


def test_budgets_add_up_to_the_run() -> None:
    made = settings_of({"token_budgets": {"en": 8.0 * 120, "fr": 8.0 * 40}})
    plan = plan_for(made, languages_of(made, FOUR), batch=8, total_steps=20)
    assert plan.ranks(20) == {"en": 120, "fr": 40}
    with pytest.raises(ConfigError, match="add up to 160 windows of 8 tokens, but the run serves 240.*total_steps=20"):
        plan_for(made, languages_of(made, FOUR), batch=8, total_steps=30)


def test_clones_and_roots_that_nothing_serves() -> None:
    with pytest.raises(ConfigError, match="num_cloned_languages=1, but no stage serves a clone. Set p_clone"):
        made = cloned_settings()
        plan_for(made, languages_of(made, FOUR))
    made = settings_of({"root": "a", "data_root_2": "b", "frac_validation": 0.0})
    with pytest.raises(ConfigError, match="data_root_2 is given, but no stage serves its languages. Set p_l2"):
        plan_for(made, languages_of(made, FOUR, {"cy": in_memory(300)}))


def test_tokens_that_are_not_those_of_the_plan() -> None:
    made = settings_of({"languages": {"en": 1.0, "fr": 1.0}})
    plan = plan_for(made, languages_of(made, FOUR))
    shrunk = languages_of(made, {**FOUR, "fr": in_memory(800)})
    with pytest.raises(DataError, match="'fr' had 111 windows to train on when the run began and has 98 now"):
        plan_for(made, shrunk, before=plan, at_step=3)


# Records.


def recorded() -> dict[str, Any]:
    made = settings_of({"languages": {"en": 1.0, "fr": 1.0}})
    languages = languages_of(made, FOUR)
    plan = plan_for(made, languages, batch=8, total_steps=40)
    changed = replace(made, languages={"en": 1.0, "fr": 5.0})
    plan = plan_for(changed, languages, batch=Stages((0, 20), (8, 16)), total_steps=40, before=plan, at_step=11)
    table: dict[str, Any] = json.loads(json.dumps(plan.to_table()))
    return table


def test_a_record_by_eye() -> None:
    table = recorded()
    assert table["windows"] == {"en": 247, "fr": 111} and table["batch_windows"] == [[0, 8], [20, 16]]
    assert [mix["name"] for mix in table["mixes"]] == ["start", "start from 11"]
    assert table["mixes"][1]["start_ranks"] == {"en": 44, "fr": 44} and table["mixes"][1]["first_slot"] == 88
    assert sum(table["mixes"][1]["weights"].values()) == 1 << SHARE_BITS


DAMAGE: list[Any] = [
    lambda table: table.pop("seed"),
    lambda table: table["mixes"].clear(),
    lambda table: table["mixes"][1].update(start_ranks={"en": 0, "fr": 0}),
    lambda table: table["mixes"][1]["start_ranks"].update(en=45),
    lambda table: table["mixes"][1].update(first_slot=80),
    lambda table: table["mixes"][1].update(from_step=12),
    lambda table: table["mixes"][1]["weights"].update(en=5),
    lambda table: table["mixes"][1].update(block=0),
    lambda table: table.update(windows={"en": 246}),
    lambda table: table.update(windows={"en": 246, "fr": 0}),
    lambda table: table.update(batch_windows=[]),
    lambda table: table.update(batch_windows=[[1, 8]]),
    lambda table: table.update(mixes="x"),
    lambda table: table.update(mirrors=[]),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_that_does_not_add_up(damage: Any) -> None:
    table = recorded()
    plan_from_table(table)
    damage(table)
    with pytest.raises(CheckpointError, match="recorded data plan"):
        plan_from_table(table)


def test_plans_of_two_seeds_are_not_one() -> None:
    plan = plan_from_table(recorded())
    with pytest.raises(AssertionError):
        extended(plan, 5, replace(plan, seed=99))
    assert Mix("x", 0, {"a": 1}).goes_on(Mix("y", 5, {"a": 1}))

"""A step holds the same windows for every layout; validation too; what cannot be served is refused by name."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import VOCABULARY, batches_of, in_memory, languages_of, plan_for, three_languages

from xlmega.data import languages as module
from xlmega.data.batches import (
    Batch,
    Batches,
    Prefetched,
    Reading,
    ValidationBatches,
    num_micro_batches,
    validation_batches,
)
from xlmega.data.indexed import IndexedWriter, open_corpus
from xlmega.data.languages import HELD_OUT, validation_sets
from xlmega.data.settings import DataSettings
from xlmega.errors import ConfigError, DataError, LayoutError
from xlmega.text.remapping import plain

READING = Reading(plain(VOCABULARY))


def windows_of(batches: list[Batch], names: tuple[str, ...]) -> Counter[tuple[Any, ...]]:
    """Every window that counts: (slot, language, ids, weights)."""
    found: Counter[tuple[Any, ...]] = Counter()
    for batch in batches:
        for at in np.ndindex(batch.slots.shape):
            if batch.slots[at] >= 0:
                ids, weights = tuple(batch.tokens[at].tolist()), tuple(batch.weights[at].tolist())
                found[(int(batch.slots[at]), names[batch.languages[at]], ids, weights)] += 1
    return found


def test_shapes_and_contents() -> None:
    batches = batches_of()
    batch = batches.at(2)
    assert batches.languages == ("en", "fr", "sw") and batches.at(0).tokens.shape[0] == 8
    assert batch.tokens.shape == (8, 3, 9) and batch.tokens.dtype.name == "int64"
    assert batch.weights.shape == (8, 3, 8) and batch.weights.dtype.name == "float32"
    assert (batch.languages.dtype.name, batch.slots.dtype.name) == ("int32", "int64")
    assert batch.slots.ravel().tolist() == list(range(48, 72)) and (batch.weights == 1.0).all()
    for at in np.ndindex(batch.slots.shape):
        language, window = batches.plan.at(int(batch.slots[at]))
        first = [3, 10_003, 20_003][language] + 8 * window
        assert batch.languages[at] == language
        assert batch.tokens[at].tolist() == list(range(first, first + 9))


def test_the_slots_of_a_rank_by_eye() -> None:
    batch = batches_of(batch=8, micro=2, dp_rank=1, dp_size=2).at(1)
    assert batch.slots.tolist() == [[10, 11], [14, 15]]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch_windows", [1, 3])
def test_every_layout_serves_the_same_windows(dp_size: int, micro_batch_windows: int) -> None:
    whole = batches_of(batch=72)
    place: dict[str, Any] = {"batch": 72, "micro": micro_batch_windows, "dp_size": dp_size}
    parts = [batches_of(**place, dp_rank=rank) for rank in range(dp_size)]
    for step in (0, 1, 1000):
        expected = windows_of([whole.at(step)], whole.languages)
        assert windows_of([part.at(step) for part in parts], whole.languages) == expected
        assert len(expected) == 72


@settings(max_examples=30, deadline=None)
@given(
    dp_size=st.integers(1, 8),
    size=st.integers(1, 6),
    micro=st.integers(1, 4),
    step=st.integers(0, 10**6),
    data=st.data(),
)
def test_ranks_share_a_step_out(dp_size: int, size: int, micro: int, step: int, data: st.DataObject) -> None:
    total = dp_size * size * micro
    parts = [batches_of(batch=total, micro=size, dp_rank=rank, dp_size=dp_size).at(step) for rank in range(dp_size)]
    # Micro-batch m of all ranks together is consecutive, which pipelines and logs may rely on.
    slots = np.concatenate([part.slots for part in parts], axis=1)
    assert slots.ravel().tolist() == list(range(step * total, (step + 1) * total))


def test_steps_in_any_order_and_counts() -> None:
    batches = batches_of()
    later = batches.at(7)
    assert [batches.at(step).slots.min() for step in (3, 0, 7)] == [72, 0, 168]
    assert (batches.at(7).tokens == later.tokens).all()
    seen = Counter(batches.languages[i] for step in range(20) for i in batches.at(step).languages.ravel())
    assert batches.plan.ranks(20) == seen
    assert batches.plan.epochs(20) == {name: seen[name] / batches.plan.windows[name] for name in seen}


def test_one_epoch_of_one_language_is_all_of_its_training_windows() -> None:
    batches = batches_of({"en": in_memory(8 * 48 + 1 + 5)}, {"frac_validation": 0.0})
    tokens = np.concatenate([batches.at(step).tokens.reshape(-1, 9) for step in range(2)])
    assert sorted(tokens[:, 1:].ravel().tolist()) == list(range(4, 4 + 8 * 48))
    assert batches.plan.epochs(3) == {"en": 1.5}


def test_settings_choose_the_languages() -> None:
    batches = batches_of(table={"languages": {"sw": 1.0, "en": 1.0}})
    assert batches.languages == ("en", "sw") and batches.plan.ranks(10) == {"en": 120, "sw": 120}
    with pytest.raises(ConfigError, match=r"names 'enn', which the corpus does not have. Did you mean 'en'\?"):
        batches_of(table={"languages": {"enn": 1.0}})


@pytest.mark.parametrize(
    ("batch_windows", "micro", "dp_size", "remedy"),
    [
        (24, 5, 1, "Try micro_batch_windows=4 or 6"),
        (24, 5, 4, "Try micro_batch_windows=3 or 6"),
        (7, 3, 1, "Try micro_batch_windows=1 or 7"),
        (24, 0, 24, "Try micro_batch_windows=1"),
        (24, 1, 5, "no micro-batch divides it.\n  Try batch_windows=20 or 25"),
        (3, 1, 8, "Try batch_windows=8 or 16"),
        (0, 1, 2, "Try batch_windows=2 or 4"),
    ],
)
def test_micro_batches_that_do_not_fit(batch_windows: int, micro: int, dp_size: int, remedy: str) -> None:
    with pytest.raises(LayoutError) as error:
        num_micro_batches(batch_windows, micro, dp_size)
    assert remedy in str(error.value)
    assert f"batch_windows={batch_windows} with micro_batch_windows={micro} on dp={dp_size}:" in str(error.value)


@given(batch_windows=st.integers(1, 200), micro=st.integers(0, 50), dp_size=st.integers(1, 16))
def test_what_a_refusal_proposes_works(batch_windows: int, micro: int, dp_size: int) -> None:
    try:
        assert num_micro_batches(batch_windows, micro, dp_size) * micro * dp_size == batch_windows
    except LayoutError as error:
        name, numbers = str(error).split("Try ")[1].rstrip(".").split("=")
        for number in map(int, numbers.split(" or ")):
            if name == "micro_batch_windows":
                num_micro_batches(batch_windows, number, dp_size)
            else:
                num_micro_batches(number, 1, dp_size)


def test_a_language_too_small_for_a_window() -> None:
    corpus = {"en": in_memory(400), "tiny": in_memory(9), "sw": in_memory(14)}
    with pytest.raises(DataError) as error:
        batches_of(corpus)
    assert str(error.value) == (
        "with sequence_length=8 a language needs 17 tokens for a window to train on and one to hold out. Too small:\n"
        "  'sw' has 14 tokens: sequence_length=6 would work\n"
        "  'tiny' has 9 tokens: sequence_length=4 would work\n"
        "  Lower data.sequence_length, or leave them out of data.languages."
    )
    batches_of(corpus, {"sequence_length": 4})
    batches_of(corpus, {"frac_validation": 0.0})
    with pytest.raises(DataError, match="'tiny' has 9 tokens: sequence_length=8 would work"):
        batches_of(corpus, {"sequence_length": 9, "frac_validation": 0.0})
    with pytest.raises(DataError, match="'one' has 1 tokens: no sequence_length works"):
        batches_of({"one": in_memory(1)})


def test_a_language_without_tokens() -> None:
    with pytest.raises(DataError, match="'none' has 0 tokens"):
        batches_of({"en": in_memory(400), "none": in_memory(0)})


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_an_id_that_the_vocabulary_does_not_have(bad: int) -> None:
    corpus = {"en": in_memory(8 * 24 + 1), "fr": in_memory(8 * 24 + 1, path="tokens/train/fr")}
    corpus["fr"].tokens[8 * 5 + 3] = bad
    batches = batches_of(corpus, {"frac_validation": 0.0})
    with pytest.raises(DataError) as error:
        [batches.at(step) for step in range(2)]
    assert str(error.value).startswith(
        f"language 'fr', window 5, position 3 of 'tokens/train/fr' has id {bad}, but the vocabulary has {VOCABULARY} "
        "ids."
    )


# Validation.


@pytest.fixture
def roots(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, dict[str, Any]]]:
    """Root -> split -> language -> tokens, in place of folders."""
    folders: dict[str, dict[str, dict[str, Any]]] = {}
    monkeypatch.setattr(module, "splits", lambda root: sorted(folders[root.name]))
    monkeypatch.setattr(module, "open_corpus", lambda root, split: folders[root.name][split])
    return folders


def test_every_other_split_is_a_set(roots: dict[str, Any]) -> None:
    train, valid = three_languages(), {"en": in_memory(29, 3), "sw": in_memory(5, 100)}
    roots["both"] = {"train": train, "valid": valid, "test": {"yo": in_memory(100)}}
    choice = DataSettings(root="both", sequence_length=8)
    sets = validation_sets(choice, max_windows=100)
    assert {name: list(languages) for name, languages in sets.items()} == {"test": ["yo"], "valid": ["en", "sw"]}
    en, sw = sets["valid"]["en"].windows, sets["valid"]["sw"].windows
    assert [en.ids(w).tolist() for w in range(en.count)][-2:] == [list(range(19, 28)), [27, 28, 29, 30, 31]]
    assert sw.count == 1 and sw.ids(0).tolist() == [100, 101, 102, 103, 104]
    assert validation_sets(choice, max_windows=2)["valid"]["en"].windows.count == 2
    # Nothing is held out of the training text when there is text to validate on.
    assert languages_of(choice, train)["en"].windows.count == 3999 // 8
    only = DataSettings(root="both", sequence_length=8, languages={"en": 1.0})
    assert {n: list(s) for n, s in validation_sets(only, 100).items()} == {"valid": ["en"]}
    everything = dataclasses.replace(only, validated_languages="all")
    assert {n: list(s) for n, s in validation_sets(everything, 100).items()} == {"test": ["yo"], "valid": ["en", "sw"]}


def test_without_another_split_the_last_windows_are_held_out(roots: dict[str, Any]) -> None:
    train = three_languages()
    roots["one"] = {"train": train}
    choice = DataSettings(root="one", sequence_length=8, frac_validation=0.1)
    sets = validation_sets(choice, max_windows=10**6)
    assert list(sets) == [HELD_OUT]
    for name, language in languages_of(choice, train).items():
        total = (train[name].num_tokens - 1) // 8
        training, held_out = language.windows, sets[HELD_OUT][name].windows
        assert held_out.count == round(0.1 * total) and training.count + held_out.count == total
        assert (training.first, held_out.first) == (0, training.count)
    batches = batches_of(train, {"root": "one", "frac_validation": 0.1})
    trained = {t for step in range(100) for t in batches.at(step).tokens[..., 1:].ravel().tolist()}
    kept = {t for w in sets[HELD_OUT].values() for i in range(w.windows.count) for t in w.windows.ids(i)[1:].tolist()}
    assert kept and not trained & kept
    one = validation_sets(choice, max_windows=1)[HELD_OUT]["en"].windows
    assert one.first == sets[HELD_OUT]["en"].windows.first
    assert validation_sets(DataSettings(root="one", frac_validation=0.0), 5) == {}


def test_validation_that_cannot_be_had(roots: dict[str, Any]) -> None:
    roots["both"] = {"train": three_languages(), "valid": {"en": in_memory(1)}}
    with pytest.raises(DataError, match="'en' has 1 tokens in split 'valid' of 'both'"):
        validation_sets(DataSettings(root="both"), 5)
    roots["mixed"] = {"train": three_languages(), "valid": {"en": in_memory(99, vocabulary="w")}}
    with pytest.raises(DataError, match="split 'valid' of 'mixed' is of vocabulary w, the others of v"):
        validation_sets(DataSettings(root="mixed"), 5)
    with pytest.raises(ConfigError, match="max_windows=0"):
        validation_sets(DataSettings(root="both"), 0)


@pytest.fixture
def one_set(roots: dict[str, Any]) -> dict[str, Any]:
    valid = {"en": in_memory(8 * 7 + 4, 3), "fr": in_memory(8 * 5 + 1, 100), "sw": in_memory(5, 200)}
    roots["both"] = {"valid": valid}
    return validation_sets(DataSettings(root="both", sequence_length=8), 100)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("size", "micro"), [(1, 1), (4, 1), (3, 2), (50, 1)])
def test_every_layout_validates_on_the_same_windows(one_set: Any, dp_size: int, size: int, micro: int) -> None:
    expected = windows_of(list(validation_batches(one_set, READING, 1, 0, 1)["valid"]), ("en", "fr", "sw"))
    assert len(expected) == 8 + 5 + 1
    parts = [validation_batches(one_set, READING, size, rank, dp_size, micro)["valid"] for rank in range(dp_size)]
    served = [list(part) for part in parts]
    assert len({len(part) for part in served}) == 1 and len(served[0]) == -(-14 // (size * micro * dp_size))
    assert windows_of([batch for part in served for batch in part], parts[0].languages) == expected
    for batch in (batch for part in served for batch in part):
        assert batch.tokens.shape == (micro, size, 9) and batch.tokens.min() >= 0
        assert (batch.weights[batch.slots < 0] == 0.0).all() and (batch.languages >= 0).all()
    # Every target of the three files counts once, whatever the layout.
    assert sum(float(batch.weights.sum()) for part in served for batch in part) == (8 * 7 + 3) + 8 * 5 + 4


def test_a_short_last_window_is_padded_and_weighs_nothing_there(one_set: Any) -> None:
    batches = ValidationBatches(one_set["valid"], READING, micro_batch_windows=15, dp_rank=0, dp_size=1)
    batch = batches.at(0)
    assert len(batches) == 1 and batch.slots.tolist() == [[*range(14), -1]]
    assert batch.languages.tolist() == [[0] * 8 + [1] * 5 + [2, 0]]
    assert batch.tokens[0, 7].tolist() == [59, 60, 61, 62, 0, 0, 0, 0, 0]
    assert batch.weights[0, 7].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch.tokens[0, 14].tolist() == [0] * 9


def write(root: Path, split: str, language: str, ids: Any, vocabulary_size: int) -> None:
    writer = IndexedWriter(root / split / language, "uint16")
    for document in np.array_split(ids, 5):
        writer.add_document(document)
    writer.finish(
        language=language,
        split=split,
        vocabulary_hash="v",
        vocabulary_size=vocabulary_size,
        eod_id=2,
        utf8_bytes=len(ids),
    )


def test_through_real_files(tmp_path: Path) -> None:
    ids = {name: np.random.default_rng((1, i)).integers(3, 500, 700) for i, name in enumerate(("en", "zh.Hant"))}
    for name, tokens in ids.items():
        write(tmp_path, "train", name, tokens, 500)
    choice = DataSettings(root=str(tmp_path), sequence_length=16)
    languages = languages_of(choice, open_corpus(tmp_path, "train"))
    plan = plan_for(choice, languages, batch=4, seed=0)
    reading = Reading(plain(500))
    batches = Batches(languages, plan, reading, micro_batch_windows=2, dp_rank=1, dp_size=2)
    assert batches.plan.windows == {"en": 42, "zh.Hant": 42}
    batch = batches.at(3)
    for at in np.ndindex(batch.slots.shape):
        language, window = batches.plan.at(int(batch.slots[at]))
        tokens = ids[batches.languages[language]]
        assert batch.tokens[at].tolist() == tokens[16 * window : 16 * window + 17].tolist()
    held_out = validation_sets(choice, 8)
    assert list(held_out) == [HELD_OUT] and held_out[HELD_OUT]["en"].windows.first == 42
    write(tmp_path, "valid", "en", ids["en"][:40], 500)
    (one,) = validation_batches(validation_sets(choice, 8), reading, 3, 0, 1)["valid"]
    assert one.tokens[0, 2, :8].tolist() == ids["en"][32:40].tolist() and one.weights[0].sum() == 39.0


# Reading ahead.


class Recorded:
    """Serves the step's number; step 13 is damaged; remembers what was read and by whom."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.threads: set[int] = set()

    def at(self, step: int) -> Any:
        self.read.append(step)
        self.threads.add(threading.get_ident())
        if step == 13:
            raise DataError("step 13 is damaged.")
        return step


@pytest.fixture
def recorded() -> Iterator[tuple[Recorded, Prefetched]]:
    source = Recorded()
    prefetched = Prefetched(source, start_step=5)
    yield source, prefetched
    prefetched.close()


def test_steps_in_order_are_read_once_and_ahead(recorded: tuple[Recorded, Prefetched]) -> None:
    source, prefetched = recorded
    steps: list[Any] = [prefetched.at(step) for step in range(5, 10)]
    assert steps == list(range(5, 10))
    deadline = time.monotonic() + 10
    while len(source.read) < 7 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert source.read == [5, 6, 7, 8, 9, 10, 11], "two steps ahead, none twice"
    assert threading.get_ident() not in source.threads


@settings(max_examples=20, deadline=None)
@given(order=st.lists(st.integers(0, 12), max_size=20))
def test_steps_in_any_order_are_right(order: list[int]) -> None:
    prefetched = Prefetched(Recorded(), start_step=3, ahead=1 + len(order) % 2)
    served: list[Any] = [prefetched.at(step) for step in order]
    prefetched.close()
    assert served == order


def test_an_error_is_raised_for_its_own_step(recorded: tuple[Recorded, Prefetched]) -> None:
    _, prefetched = recorded
    served: list[Any] = [prefetched.at(step) for step in (11, 12)]
    assert served == [11, 12]
    for _ in range(2):
        with pytest.raises(DataError, match="step 13 is damaged"):
            prefetched.at(13)
    served = [prefetched.at(14)]
    assert served == [14]


def test_prefetched_batches_are_the_batches() -> None:
    batches = batches_of()
    prefetched = Prefetched(batches, start_step=0)
    for step in (0, 1, 2, 9, 3):
        assert (prefetched.at(step).tokens == batches.at(step).tokens).all()
    prefetched.close()


def test_where_no_thread_can_be_had_the_caller_reads(recorded: tuple[Recorded, Prefetched[Any]]) -> None:
    """Out of threads, or the thread's pool was shut down under it: training goes on, only slower."""
    source, prefetched = recorded
    assert prefetched.at(5) == 5
    prefetched._reader.shutdown(wait=True)
    assert [prefetched.at(step) for step in (6, 7, 8, 12)] == [6, 7, 8, 12]
    assert threading.get_ident() in source.threads
    with pytest.raises(DataError, match="step 13 is damaged"):
        prefetched.at(13)


def test_a_source_that_dies_in_every_way_is_told_to_whoever_asks() -> None:
    class Dies:
        def at(self, step: int) -> Any:
            raise [SystemExit(3), KeyboardInterrupt(), MemoryError("no memory")][step]

    prefetched: Prefetched[Any] = Prefetched(Dies(), 0, ahead=1)
    for step, kind in enumerate((SystemExit, KeyboardInterrupt, MemoryError)):
        with pytest.raises(kind):
            prefetched.at(step)
    prefetched.close()

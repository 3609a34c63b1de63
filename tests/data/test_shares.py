"""Weights of a stage by explicit numbers, temperature, UniMax and budgets; clones and a second root among them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlmega import config
from xlmega.data.blend import Blend
from xlmega.data.settings import DataSettings
from xlmega.data.shares import Size, unimax, weights
from xlmega.errors import ConfigError, DataError


def weights_of(settings: DataSettings, tokens: dict[str, int]) -> dict[str, float]:
    return weights(settings, {name: Size(count, count // 100, count // 10) for name, count in tokens.items()})


TOKENS = {"en": 8000, "fr": 1000, "sw": 1000}


def test_shares_in_proportion_to_tokens() -> None:
    assert weights_of(DataSettings(), TOKENS) == pytest.approx({"en": 0.8, "fr": 0.1, "sw": 0.1}, rel=1e-12)


def test_shares_by_temperature() -> None:
    # Cube roots of 8, 1 and 1.
    result = weights_of(DataSettings(temperature=3.0), TOKENS)
    assert result == pytest.approx({"en": 0.5, "fr": 0.25, "sw": 0.25}, rel=1e-12)
    assert weights_of(DataSettings(temperature=1e9), TOKENS) == pytest.approx(dict.fromkeys(TOKENS, 1 / 3), rel=1e-6)


def test_explicit_weights_are_relative_and_select() -> None:
    result = weights_of(DataSettings(languages={"sw": 3.0, "en": 1.0}), TOKENS)
    assert result == {"en": 0.25, "sw": 0.75} and list(result) == ["en", "sw"]


def test_weights_of_zero_select_and_leave_the_rest_to_the_temperature() -> None:
    result = weights_of(DataSettings(languages={"sw": 0.0, "en": 0.0}, temperature=3.0), TOKENS)
    assert result == pytest.approx({"en": 2 / 3, "sw": 1 / 3}, rel=1e-12)
    assert math.fsum(result.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"languages": {"en": 1.0, "fr": -1.0}}, "languages.fr must be positive, but is -1.0"),
        ({"languages": {"en": 1.0, "fr": 0.0}}, "languages.fr is 0 while other weights are not"),
        ({"languages": {"en": 1.0}, "temperature": 3.0}, "temperature=3.0 would be ignored"),
        ({"temperature": 0.0}, "temperature must be positive, but is 0.0"),
        ({"frac_validation": 1.0}, r"frac_validation must be in \[0, 1\), but is 1.0"),
        ({"sequence_length": 0}, "sequence_length must be at least 1, but is 0"),
    ],
)
def test_settings_that_cannot_be_obeyed(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(DataSettings, table)


def test_a_language_that_the_corpus_does_not_have() -> None:
    with pytest.raises(ConfigError, match=r"names 'enn', which the corpus does not have. Did you mean 'en'\?"):
        weights_of(DataSettings(languages={"enn": 1.0}), TOKENS)
    with pytest.raises(DataError, match="'xx' has 0 tokens"):
        weights_of(DataSettings(), {**TOKENS, "xx": 0})


# Clones and a second root.

CLONED = {
    "en": Size(900, 9, 90),
    "en-clone1": Size(900, 9, 90, original="en"),
    "en-clone2": Size(900, 9, 90, original="en"),
    "fr": Size(100, 1, 10),
    "fr-clone1": Size(100, 1, 10, original="fr"),
    "fr-clone2": Size(100, 1, 10, original="fr"),
}


def test_clones_share_p_clone_out_of_their_originals() -> None:
    found = weights(DataSettings(num_cloned_languages=2, p_clone=0.5), CLONED)
    assert found == pytest.approx(
        {"en": 0.45, "en-clone1": 0.225, "en-clone2": 0.225, "fr": 0.05, "fr-clone1": 0.025, "fr-clone2": 0.025}
    )
    only = weights(DataSettings(num_cloned_languages=2, p_clone=1.0, languages={"fr": 1.0}), CLONED)
    assert only == pytest.approx({"fr-clone1": 0.5, "fr-clone2": 0.5})
    none = weights(DataSettings(num_cloned_languages=2), CLONED)
    assert none == pytest.approx({"en": 0.9, "fr": 0.1})


def test_a_clone_may_have_a_weight_of_its_own() -> None:
    given_ = DataSettings(num_cloned_languages=2, languages={"en": 9.0, "en-clone2": 1.0})
    assert weights(given_, CLONED) == {"en": 0.9, "en-clone2": 0.1}
    with pytest.raises(ConfigError, match="'en-clone2' a weight of its own, and p_clone=0.5 gives"):
        weights(DataSettings(num_cloned_languages=2, p_clone=0.5, languages={"en": 9.0, "en-clone2": 1.0}), CLONED)


TWO_ROOTS = {"en": Size(600, 1, 60), "cy": Size(200, 1, 20), "fr": Size(100, 1, 10, root=2)}


def test_a_second_root_has_p_l2_together() -> None:
    found = weights(DataSettings(root="a", data_root_2="b", p_l2=0.4), TWO_ROOTS)
    assert found == pytest.approx({"en": 0.45, "cy": 0.15, "fr": 0.4})
    assert weights(DataSettings(root="a", data_root_2="b", p_l2=1.0), TWO_ROOTS) == {"fr": 1.0}
    assert "fr" not in weights(DataSettings(root="a", data_root_2="b"), TWO_ROOTS)
    named = DataSettings(root="a", data_root_2="b", p_l2=0.4, languages={"cy": 1.0})
    assert weights(named, TWO_ROOTS) == pytest.approx({"cy": 0.6, "fr": 0.4})
    both = DataSettings(root="a", data_root_2="b", languages={"cy": 1.0, "fr": 3.0})
    assert weights(both, TWO_ROOTS) == {"cy": 0.25, "fr": 0.75}


def test_shares_of_documents_become_shares_of_windows() -> None:
    # Ten documents each; those of b are three times as long. Equal shares of documents.
    sizes = {"a": Size(1000, 10, 100, windows_per_document=10.0), "b": Size(3000, 10, 300, windows_per_document=30.0)}
    assert weights(DataSettings(unit="document", languages={"a": 1.0, "b": 1.0}), sizes) == {"a": 0.25, "b": 0.75}
    assert weights(DataSettings(unit="document", temperature=2.0), sizes) == {"a": 0.25, "b": 0.75}


# UniMax.


def test_unimax_by_eye() -> None:
    """Budget 100, capacities 10, 20 and 1000: the small ones are used up, the large has the rest."""
    assert unimax({"big": 1000.0, "small": 10.0, "mid": 20.0}, 100.0) == {"small": 10.0, "mid": 20.0, "big": 70.0}
    assert unimax({"a": 50.0, "b": 60.0}, 90.0) == {"a": 45.0, "b": 45.0}
    assert unimax({"a": 5.0, "b": 6.0}, 90.0) == {"a": 5.0, "b": 6.0}


@given(capacities=st.lists(st.integers(1, 10**6), min_size=1, max_size=30), budget=st.integers(1, 10**7))
def test_unimax_is_the_fairest_that_fits(capacities: list[int], budget: int) -> None:
    found = unimax({f"l{i:02d}": float(size) for i, size in enumerate(capacities)}, float(budget))
    assert sum(found.values()) == pytest.approx(min(budget, sum(capacities)))
    level = max(found.values())
    for i, size in enumerate(capacities):
        value = found[f"l{i:02d}"]
        assert value <= size + 1e-6
        assert value == pytest.approx(min(size, level)), "whoever has less than another has all it can"


@given(windows=st.lists(st.integers(1, 500), min_size=1, max_size=20), cap=st.sampled_from([1.0, 2.5]), data=st.data())
def test_unimax_never_takes_a_language_beyond_its_cap(windows: list[int], cap: float, data: st.DataObject) -> None:
    sizes = {f"l{i:02d}": Size(count * 10, 1, count) for i, count in enumerate(windows)}
    room = sum(int(cap * count) for count in windows)
    stage = data.draw(st.integers(1, max(1, room - len(windows) * 3)))
    found = weights(DataSettings(sampling="unimax", max_epochs=cap), sizes, stage_windows=stage)
    counts = Blend(found, dict.fromkeys(found, 1), 0).counts(stage)
    assert all(counts[name] <= cap * sizes[name].windows for name in counts) or stage > room - len(windows) * 3


def test_unimax_knows_what_was_served_before() -> None:
    sizes = {"a": Size(1000, 1, 100), "b": Size(1000, 1, 100)}
    settings = DataSettings(sampling="unimax", max_epochs=1.0)
    found = weights(settings, sizes, stage_windows=60, served={"a": 90, "b": 0})
    assert found == pytest.approx({"a": 10 / 60, "b": 50 / 60}, abs=0.02)
    assert weights(settings, sizes, stage_windows=60, served={"a": 100}) == {"b": 1.0}


def test_budgets_are_weights() -> None:
    assert weights_of(DataSettings(token_budgets={"en": 3e6, "sw": 1e6}), TOKENS) == {"en": 0.75, "sw": 0.25}


SETTINGS: list[tuple[dict[str, object], str]] = [
    ({"p_clone": 0.5}, "p_clone=0.5 would be ignored: set num_cloned_languages, too"),
    ({"p_clone": 1.5, "num_cloned_languages": 1}, "p_clone must be from 0 to 1, but is 1.5"),
    ({"num_cloned_languages": -1}, "num_cloned_languages must not be negative"),
    ({"num_cloned_languages": 2, "frac_clone": 0.5}, "frac_clone=0.5 needs num_cloned_languages=1"),
    ({"frac_clone": 0.0}, r"frac_clone must be in \(0, 1\], but is 0.0"),
    ({"p_l2": 0.5}, "p_l2 and merge_vocab would be ignored: set data_root_2"),
    ({"merge_vocab": True}, "p_l2 and merge_vocab would be ignored: set data_root_2"),
    ({"num_cloned_languages": 1, "data_root_2": "b"}, "exclude each other: clones are of one root's"),
    ({"language_schedule": "0.1_0.9"}, "neither a clone nor a second root"),
    (
        {"language_schedule": "0.1_0.9", "num_cloned_languages": 1, "p_clone": 0.5},
        "begins with 0.1, but p_clone is 0.5. The first stage must be the configured share: set p_clone=0.1",
    ),
    ({"language_schedule": "0.1_0.9", "data_root_2": "b"}, "but p_l2 is 0.0. .*set p_l2=0.1"),
    ({"language_schedule": "0.5", "num_cloned_languages": 1}, "must be two or more shares from 0 to 1 joined by '_'"),
    ({"language_schedule": "0.5_x", "num_cloned_languages": 1}, "must be two or more shares"),
    ({"language_schedule": "0.5_nan", "num_cloned_languages": 1}, "must be two or more shares"),
    ({"sampling": "unimax"}, "needs a cap: set max_epochs"),
    ({"sampling": "unimax", "max_epochs": 1.0, "temperature": 2.0}, "sampling='unimax' would be ignored"),
    ({"sampling": "unimax", "max_epochs": 1.0, "unit": "batch"}, "unit='batch' would mean two things"),
    ({"max_epochs": -1.0}, "max_epochs must not be negative"),
    ({"budget_tokens": 5.0}, "budget_tokens=5 would be ignored"),
    ({"token_budgets": {"en": 0.0}}, "token_budgets.en must be positive"),
    ({"token_budgets": {"en": 1.0}, "languages": {"en": 1.0}}, "so languages would be ignored"),
    ({"windows": "documents", "reset_attention": True}, "reset_attention would be ignored"),
    ({"long_documents": "cut"}, "long_documents='cut' would be ignored"),
    ({"windows": "lines"}, "'windows' must be one of 'packed', 'documents'"),
    ({"stages": [{"name": "a"}]}, "stage 'a' needs one of them"),
    ({"stages": [{"name": "a", "from_step": 1, "from_tokens": 1.0}]}, "stage 'a' needs one of them"),
    ({"stages": [{"name": "a", "from_step": -1}]}, r"stages\[0\].from_step must not be negative"),
    (
        {"stages": [{"name": "a", "from_stop": 1}]},
        r"no key 'stages\[0\].from_stop'. Did you mean 'stages\[0\].from_step'",
    ),
    ({"stages": [{"name": "a", "from_step": 1}, {"name": "a", "from_step": 2}]}, "stages have names of their own"),
    ({"stages": [{"name": "a", "from_step": 1, "p_clone": 0.5}]}, "stages, 'a': p_clone=0.5 would be ignored"),
    (
        {"stages": [{"name": "a", "from_step": 1, "temperature": 2.0}], "languages": {"en": 1.0}},
        "stages, 'a': temperature=2.0 would be ignored",
    ),
    ({"stages": 3}, "'stages' must be a list, each a table"),
    ({"stages": [3]}, r"'stages\[0\]' is a table of keys, but 3"),
]


@pytest.mark.parametrize(("table", "message"), SETTINGS)
def test_keys_that_do_not_go_together(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(DataSettings, table)

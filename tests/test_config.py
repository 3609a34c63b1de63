"""TOML to dataclass: the order of precedence, and every problem told at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from xlmega.config import build, parse_value, read_toml, to_table, with_overrides
from xlmega.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    on: bool = False
    name: str = ""
    shares: dict[str, float] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    limit: int | None = None

    def problems(self) -> Iterator[str]:
        if self.size < 1:
            yield f"size must be at least 1, but is {self.size}."


@dataclass(frozen=True)
class Outer:
    inner: Inner
    seed: int = 0

    def problems(self) -> Iterator[str]:
        if self.seed < 0:
            yield "seed must not be negative."


def problem(table: dict[str, object], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Outer, with_overrides(table, overrides))
    return str(caught.value)


def test_default_then_recipe_then_override() -> None:
    table = {"inner": {"size": 3, "rate": 0.1}}
    assert build(Outer, with_overrides(table, [])) == Outer(Inner(3, 0.1))
    overrides = ["inner.rate=0.2", "seed=4", "inner.rate=0.3", "inner.shares.fr=2"]
    assert build(Outer, with_overrides(table, overrides)) == Outer(Inner(3, 0.3, shares={"fr": 2.0}), 4)
    assert table == {"inner": {"size": 3, "rate": 0.1}}  # the recipe itself is left alone


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ('["en", "fr"]', ["en", "fr"]),
        ("{en = 1}", {"en": 1}),
        ("xglm_tiny", "xglm_tiny"),
        ("runs/first", "runs/first"),
        ('"3"', "3"),
        ("", ""),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_command_line_values(text: str, value: object) -> None:
    assert parse_value(text) == value


def test_value_may_hold_an_equals_sign() -> None:
    assert with_overrides({}, ["a.b=x=y"]) == {"a": {"b": "x=y"}}


@pytest.mark.parametrize("override", ["seed", "=3", " = 3"])
def test_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set takes key=value"):
        with_overrides({}, [override])


def test_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'seed' is a value, not a table"):
        with_overrides({"seed": 1}, ["seed.x=1"])


def test_all_problems_of_all_kinds_are_told_together() -> None:
    text = problem({"inner": {"size": 0, "rat": 1.0}, "seed": -1, "sed": 2})
    assert text.splitlines() == [
        "4 problems:",
        "  recipe has no key 'sed'. Did you mean 'seed'?",
        "  recipe has no key 'inner.rat'. Did you mean 'inner.rate'?",
        "  recipe: inner.size must be at least 1, but is 0.",
        "  recipe: seed must not be negative.",
    ]


def test_one_problem_is_one_line_and_far_keys_get_the_list() -> None:
    assert problem({"inner": {"size": 1}, "zzz": 1}) == "recipe has no key 'zzz'. Known: inner, seed."


def test_missing_values_and_tables() -> None:
    assert problem({}) == "recipe must set 'inner'."
    assert problem({"inner": {}}) == "recipe must set 'inner.size'."
    assert problem({"inner": 3}) == "recipe: 'inner' is a table of keys, but 3 was given."


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("size", True, "a whole number"),
        ("size", 1.0, "a whole number"),
        ("size", "1", "a whole number"),
        ("rate", True, "a number"),
        ("rate", float("nan"), "a number"),
        ("rate", float("inf"), "a number"),
        ("rate", 10**400, "a number"),
        ("kind", "c", "one of 'a', 'b'"),
        ("kind", ["a"], "one of 'a', 'b'"),
        ("on", 1, "true or false"),
        ("on", "true", "true or false"),
        ("name", 2024, "a string"),
        ("shares", ["fr"], "a table, each value a number"),
        ("shares", {"fr": "x"}, "a table, each value a number"),
        ("sizes", 3, "a list, each a whole number"),
        ("sizes", [1, 2.5], "a list, each a whole number"),
        ("limit", "x", "a whole number"),
    ],
)
def test_wrong_types(key: str, value: object, rule: str) -> None:
    text = problem({"inner": {"size": 1, key: value}})
    assert f"'inner.{key}' must be {rule}, but " in text
    assert len(text) < 200


def test_right_types() -> None:
    table = {"size": 1, "rate": 2, "sizes": [1, 2], "limit": 3, "kind": "b", "on": True}
    built = build(Outer, {"inner": table}).inner
    assert built == Inner(1, 2.0, "b", True, sizes=(1, 2), limit=3)
    assert type(built.rate) is float
    assert build(Outer, {"inner": {"size": 1, "limit": None}}).inner.limit is None


def test_round_trip() -> None:
    value = Outer(Inner(2, 0.25, "b", True, "x", {"fr": 1.5}, (1, 2), 7), 9)
    table = to_table(value)
    assert table["inner"]["sizes"] == [1, 2]
    assert build(Outer, table) == value
    assert build(Outer, to_table(dataclasses.replace(value, inner=Inner(1)))) == Outer(Inner(1), 9)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    good, bad, binary = tmp_path / "good.toml", tmp_path / "bad.toml", tmp_path / "binary.toml"
    good.write_text('name = "é"\n[inner]\nsize = 1\n', encoding="utf-8")
    bad.write_text("a = 1\nb = = 2\n")
    binary.write_bytes(b"\xff\xfe")
    assert read_toml(good) == {"name": "é", "inner": {"size": 1}}
    with pytest.raises(ConfigError, match=r"bad\.toml' is not valid TOML: .*line 2"):
        read_toml(bad)
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_toml(binary)
    with pytest.raises(ConfigError, match="there is no file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read as a TOML file"):
        read_toml(tmp_path)


def test_a_date_in_a_recipe_is_a_wrong_type_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "dates.toml"
    path.write_text("seed = 2020-01-01\n[inner]\nsize = 1\n")
    assert "'seed' must be a whole number" in problem(read_toml(path), "inner.size=2")

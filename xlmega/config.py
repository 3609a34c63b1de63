"""TOML text and `--set a.b=v` overrides in, one frozen dataclass out, all problems reported together.

The order is default < recipe < `--set`. What the recipe may say is exactly what the dataclass declares: a nested
dataclass is a TOML table, a field's annotation is its type, and an unknown key is answered with the nearest one.
A dataclass may define `problems() -> Iterator[str]` to state rules between its own fields; a message names fields
without the table's path, which is put in front here.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from xlmega.errors import ConfigError, nearest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

T = TypeVar("T")
_BAD = object()
"""Stands for a value that could not be read; what is wrong with it has been noted."""


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; a ConfigError that names the file and line when it does not parse."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file '{path}'.") from None
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read as a TOML file: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}.") from None


def with_overrides(table: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`table` with each 'a.b=value' put in; the value is read as TOML and, failing that, as a plain string."""
    result: dict[str, Any] = copy.deepcopy(dict(table))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set takes key=value, for example --set training.total_steps=100; got '{override}'.")
        *parents, leaf = key.strip().split(".")
        inner = result
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {override}: '{parent}' is a value, not a table.")
        inner[leaf] = parse_value(text.strip())
    return result


def parse_value(text: str) -> Any:
    """A command line's value: TOML where it parses ('3', '1e-3', 'true', '["en", "fr"]'), else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:  # TOMLDecodeError is one; a number of 5000 digits is another
        return text


def build(cls: type[T], table: Mapping[str, Any], *, what: str = "recipe") -> T:
    """The frozen dataclass `cls` from a table; one ConfigError that lists every problem when there are any."""
    found: list[str] = []
    value = _dataclass(cls, table, "", found, what)
    if found:
        raise ConfigError(found[0] if len(found) == 1 else "\n  ".join([f"{len(found)} problems:", *found]))
    return typing.cast(T, value)


def to_table(value: Any) -> dict[str, Any]:
    """The dataclass as plain JSON-able tables (tuples become lists): `build(cls, to_table(x)) == x`."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(value))))


def _dataclass(cls: type, table: Any, path: str, found: list[str], what: str) -> Any:
    if not isinstance(table, Mapping):
        found.append(f"{what}: '{path.rstrip('.')}' is a table of keys, but {table!r} was given.")
        return _BAD
    hints = _hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in table:
        if key not in names:
            hint = nearest(path + key, [path + name for name in names])
            found.append(f"{what} has no key '{path}{key}'.{hint}")
    values = {name: _value(hints[name], table[name], f"{path}{name}", found, what) for name in names if name in table}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    found.extend(f"{what} must set '{path}{name}'." for name in missing)
    if missing or any(value is _BAD for value in values.values()):
        return _BAD
    result = cls(**values)
    check = getattr(result, "problems", None)
    if check is not None:  # rules between the fields of a table whose values are all of their types
        found.extend(f"{what}: {path}{line}" for line in check())
    return result


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass; evaluated once, for a corpus has thousands of manifests."""
    return typing.get_type_hints(cls)


def _value(hint: Any, value: Any, path: str, found: list[str], what: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, f"{path}.", found, what)
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(inner[0]) and isinstance(value, (list, tuple)):
        items = [_dataclass(typing.cast(type, inner[0]), v, f"{path}[{k}].", found, what) for k, v in enumerate(value)]
        return _BAD if any(item is _BAD for item in items) else tuple(items)
    try:
        return _convert(hint, value)
    except (TypeError, ValueError, OverflowError):
        found.append(f"{what}: '{path}' must be {_spell(hint)}, but {_shown(value)} was given.")
        return _BAD


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _convert(hint: Any, value: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in inner:
            try:
                return _convert(option, value)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is typing.Literal:
        if value not in inner:
            raise ValueError
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        return tuple(_convert(inner[0], item) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise TypeError
        return {str(key): _convert(inner[1], item) for key, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError
        return float(value)
    if hint is type(None):
        if value is not None:
            raise TypeError
        return None
    if type(value) is not hint:  # bool is an int to isinstance, and 'true' steps are a mistake
        raise TypeError
    return value


def _spell(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(option) for option in inner if option is not type(None))
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(option) for option in inner)
    if origin is tuple:
        return f"a list, each {_spell(inner[0])}"
    if dataclasses.is_dataclass(hint):
        return "a table"
    if origin is dict:
        return f"a table, each value {_spell(inner[1])}"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(hint, str(hint))

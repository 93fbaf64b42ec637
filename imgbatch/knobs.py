"""Knobs: frozen dataclasses whose fields have help texts, filled from a TOML file, from `--set section.key=value` and flags."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any

from imgbatch.errors import ConfigError

_SHORT = {"model": "model.name", "output": "output.uri"}
Kind = typing.TypeVar("Kind")


def knob(default: Any, help: str) -> Any:
    """Return a dataclass field whose help text stands beside it; what is made by a factory may be secret."""
    if callable(default):
        return field(default_factory=default, metadata={"help": help}, repr=False)
    return field(default=default, metadata={"help": help})


def load_as(kind: type[Kind], path: str | None, settings: Sequence[str] = (), **flags: Any) -> Kind:
    """Build a config: defaults, then the TOML file, then `--set` pairs, then flags that were given.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    sections = {name for name, hint in typing.get_type_hints(kind).items() if is_dataclass(hint)}
    tree: dict[str, Any] = {}
    for key, value in (_read_toml(path) if path else {}).items():
        _assign(tree, key, value, sections)
    for setting in settings:
        _assign(tree, *_parsed(setting), sections)
    for key, value in flags.items():
        if value is not None:
            _assign(tree, key, value, sections)
    return typing.cast(Kind, _build(kind, tree, "", [name for name, _, _ in described(kind)]))


def described(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) of every knob, sections in the order of a run."""
    hints = typing.get_type_hints(kind)
    for entry in fields(kind):
        if is_dataclass(hints[entry.name]):
            yield from described(typing.cast(type, hints[entry.name]), f"{prefix}{entry.name}.")
        else:
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            shown = (
                "" if default in (None, (), "") else str(default).lower() if default in (True, False) else str(default)
            )
            yield f"{prefix}{entry.name}", shown, entry.metadata["help"]


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error


def _parsed(setting: str) -> tuple[str, Any]:
    """Return key and value of a `--set`."""
    key, separator, text = setting.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {setting!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip(), value


def _assign(tree: dict[str, Any], key: str, value: Any, known: Collection[str]) -> None:
    """Set a key in a tree of sections; a plain value for `model` or `output` is its name or URI."""
    if key in _SHORT and key in known and not isinstance(value, dict):
        key = _SHORT[key]
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}={value!r}: {section!r} is a value, not a section")
    tree[name] = value


def _build(kind: type, tree: Mapping[str, Any], prefix: str, known: Sequence[str]) -> Any:
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in hints:
            close = difflib.get_close_matches(prefix + key, known, n=1) or difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(hints))}"
            raise ConfigError(f"unknown config key {prefix + key!r}{hint}")
    values = {key: _convert(prefix + key, hints[key], value, known) for key, value in tree.items()}
    return kind(**values)


def _convert(key: str, hint: Any, value: Any, known: Sequence[str]) -> Any:
    """Return `value` as the type that the field is declared with."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a section, not a value: write {key}.NAME=…")
        return _build(typing.cast(type, hint), value, f"{key}.", known)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        if any(float in typing.get_args(kind) for kind in kinds):
            return _numbers(key, value)
        value = (value,) if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    for kind in kinds:
        kind = typing.get_origin(kind) or kind
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return value
    wanted = " or ".join("nothing" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ConfigError(f"{key}={value!r}: expected {wanted}")


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    """Return numbers, given as a list or as a text with commas.

    >>> _numbers("model.mean", "0.5, 0.5, 0.5")
    (0.5, 0.5, 0.5)
    """
    items = value.strip("[] ").split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        if not any(isinstance(item, bool) for item in items):
            return tuple(float(item) for item in items)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{key}={value!r}: expected numbers, such as [0.5, 0.5, 0.5]")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of those allowed."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{key}={value!r}: one of {', '.join(allowed)}{hint}")


def positive(key: str, value: float) -> None:
    """Refuse a number that is not above zero."""
    if not value > 0:
        raise ConfigError(f"{key}={value}: must be more than 0")


def at_least(key: str, value: float, least: int) -> None:
    """Refuse a number that is too small."""
    if value < least:
        raise ConfigError(f"{key}={value}: must be {least} or more")


def share(key: str, value: float) -> None:
    """Refuse a number that is not between 0 and 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{key}={value}: must lie between 0 and 1")

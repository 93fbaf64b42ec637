"""Effects: options read from a TOML file, from `--set section.key=value` and from flags."""

from __future__ import annotations

import logging
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from datetime import UTC, datetime
from typing import Any

from imgbatch.config.options import described, fields_of, hints_of
from imgbatch.config.sections import Config
from imgbatch.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)


_SHORT = {"model": "model.name", "output": "output.uri"}


Kind = typing.TypeVar("Kind")


def load_as(kind: type[Kind], path: str | None, settings: Sequence[str] = (), **flags: Any) -> Kind:
    """Build a config: defaults, then the TOML file, then `--set` pairs, then flags that were given.

    Raises:
        ConfigError: the file cannot be read, a key or value is wrong, or a key is set by its old and its new name.
    """
    sections = {name for name, hint in hints_of(typing.cast(Any, kind)).items() if is_dataclass(hint)}
    former = dict(_former_keys(kind))
    tree: dict[str, Any] = {}
    given: list[tuple[str, Any]] = list((_read_toml(path) if path else {}).items())
    given += [_parsed(setting) for setting in settings]
    given += [(key, value) for key, value in flags.items() if value is not None]
    for key, value in given:
        _assign(tree, key, value, sections)
    _rename(tree, former)
    return typing.cast(Kind, _build(kind, tree, "", [name for name, _, _ in described(kind)]))


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


def _assign(tree: dict[str, Any], key: str, value: Any, sections: Collection[str]) -> None:
    """Set a key in a tree of sections; a plain value for `model` or `output` is its name or URI."""
    if key in _SHORT and key in sections and not isinstance(value, dict):
        key = _SHORT[key]
    *path, name = key.split(".")
    for section in path:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}={value!r}: {section!r} is a value, not a section")
    tree[name] = value


def _former_keys(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (old key, new key) of every option that was renamed."""
    for entry in fields_of(kind):
        hint = hints_of(kind)[entry.name]
        if is_dataclass(hint):
            yield from _former_keys(typing.cast(type, hint), f"{prefix}{entry.name}.")
        elif old := entry.metadata["formerly"]:
            yield f"{prefix}{old}", f"{prefix}{entry.name}"


def _rename(tree: dict[str, Any], former: Mapping[str, str]) -> None:
    """Move values from the old names of keys to the new ones, with one warning for each."""
    for old, new in former.items():
        section, _, old_name = old.rpartition(".")
        values = tree.get(section)
        if not isinstance(values, dict) or old_name not in values:
            continue
        value, new_name = values.pop(old_name), new.rpartition(".")[2]
        if new_name in values and values[new_name] != value:
            raise ConfigError(
                f"{old}={value!r} and {new}={values[new_name]!r}: {old} is the old name of {new}; set one"
            )
        log.warning("the config key %s is now called %s", old, new)
        values[new_name] = value


def _build(kind: type, tree: Mapping[str, Any], prefix: str, known: Sequence[str]) -> Any:
    hints, entries = hints_of(kind), {entry.name: entry for entry in fields_of(kind)}
    for key in tree:
        if key not in hints:
            hint = (
                did_you_mean(prefix + key, known)
                or did_you_mean(key, hints)
                or f"; there are: {', '.join(sorted(hints))}"
            )
            raise ConfigError(f"unknown config key {prefix + key!r}{hint}")
    values = {}
    for key, value in tree.items():
        former = entries[key].metadata.get("former_values", {})
        if isinstance(value, str) and value in former:
            log.warning("%s=%s is now written %s=%s", prefix + key, value, prefix + key, former[value])
            value = former[value]
        values[key] = _convert(prefix + key, hints[key], value, known)
    return kind(**values)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the plain types that a hint allows, without bounds."""
    if typing.get_origin(hint) is typing.Annotated:
        return _kinds(hint.__origin__)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    return (str,) if typing.get_origin(hint) is typing.Literal else (hint,)


def _convert(key: str, hint: Any, value: Any, known: Sequence[str]) -> Any:
    """Return `value` as the type that the field is declared with."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a section, not a value: write {key}.NAME=…")
        return _build(typing.cast(type, hint), value, f"{key}.", known)
    kinds = _kinds(hint)
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


def load(path: str | None, settings: Sequence[str] = (), **flags: Any) -> Config:
    """Build the config: defaults, then the TOML file, then `--set` pairs, then flags that were given.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.

    >>> load(None, ["top_k=3", "cluster.device=cpu"]).top_k
    3
    """
    return load_as(Config, path, settings, **flags)


def with_output(config: Config, *, model: str, date: str = "") -> Config:
    """Fill `{model}` and `{date}` in the output; without a date, with that of today (UTC).

    Raises:
        ConfigError: another name stands in braces.
    """
    date = date or datetime.now(UTC).strftime("%Y-%m-%d")
    try:
        return replace(config, output=replace(config.output, uri=config.output.uri.format(model=model, date=date)))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--output {config.output.uri!r}: only {{model}} and {{date}} may stand in braces") from error

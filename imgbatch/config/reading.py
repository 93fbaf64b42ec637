"""Effects: options read from a TOML file, from `--set section.key=value` and from flags."""

from __future__ import annotations

import logging
import os
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from datetime import UTC, date, datetime
from typing import Any

from imgbatch.config import deadline
from imgbatch.config.options import fields_of, hints_of, iter_options
from imgbatch.config.sections import Config
from imgbatch.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

_DATE, _DATE_FIELD = "%Y-%m-%d", "{date}"
_SHORTHANDS = {"model": "model.name", "output": "output.uri"}
Options = typing.TypeVar("Options")


def load_as(kind: type[Options], path: str | None, settings: Sequence[str] = (), **flags: Any) -> Options:
    """Build a config of a kind from defaults, the TOML file, `--set` pairs and flags; later ones override earlier ones.

    Args:
        kind: the dataclass of the config.
        path: the TOML file.
        settings: pairs as `--set` takes them.
        flags: values by key; None: the flag was not set.

    Raises:
        ConfigError: the file cannot be read, a key or value is wrong, or the old and the new name of a key are both set.
    """
    sections = {name for name, hint in hints_of(typing.cast(Any, kind)).items() if is_dataclass(hint)}
    tree: dict[str, Any] = {}
    pairs: list[tuple[str, Any]] = list((_read_toml(path) if path else {}).items())
    pairs += [_parse_setting(setting) for setting in settings]
    pairs += [(key, value) for key, value in flags.items() if value is not None]
    for key, value in pairs:
        _assign(tree, key, value, sections)
    _rename_old_keys(tree, dict(_old_keys(kind)))
    config = _build(kind, tree, "", [name for name, _, _ in iter_options(kind)])
    return typing.cast(Options, _fill_dates(config) if hasattr(config, "date") else config)


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error


def _parse_setting(setting: str) -> tuple[str, Any]:
    """Return the key and the value of a `--set`: TOML, or else plain text."""
    key, separator, text = setting.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {setting!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip(), value


def _assign(tree: dict[str, Any], key: str, value: Any, sections: Collection[str]) -> None:
    """Set a key in a tree of sections. A plain value for `model` or `output` is its name or URI."""
    if key in _SHORTHANDS and key in sections and not isinstance(value, dict):
        key = _SHORTHANDS[key]
    *path, name = key.split(".")
    for section in path:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}={value!r}: {section!r} is a value, not a section")
    tree[name] = value


def _old_keys(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (old key, new key) of every renamed option."""
    for entry in fields_of(kind):
        hint = hints_of(kind)[entry.name]
        if is_dataclass(hint):
            yield from _old_keys(typing.cast(type, hint), f"{prefix}{entry.name}.")
        elif old_name := entry.metadata["formerly"]:
            yield f"{prefix}{old_name}", f"{prefix}{entry.name}"


def _rename_old_keys(tree: dict[str, Any], new_keys: Mapping[str, str]) -> None:
    """Move values from old keys to new ones, with a warning for each."""
    for old_key, new_key in new_keys.items():
        section, _, old_field = old_key.rpartition(".")
        values = tree.get(section)
        if not isinstance(values, dict) or old_field not in values:
            continue
        value, new_field = values.pop(old_field), new_key.rpartition(".")[2]
        if new_field in values and values[new_field] != value:
            raise ConfigError(
                f"{old_key}={value!r} and {new_key}={values[new_field]!r}: {old_key} is the old name of {new_key}; set only "
                f"{new_key}"
            )
        log.warning("the config key %s is now called %s", old_key, new_key)
        values[new_field] = value


def _build(kind: type, tree: Mapping[str, Any], prefix: str, keys: Sequence[str]) -> Any:
    """Return a dataclass made from a tree of values.

    Args:
        prefix: of its keys in messages.
        keys: all keys of the config, for suggestions.
    """
    hints, entries = hints_of(kind), {entry.name: entry for entry in fields_of(kind)}
    for key in tree:
        if key not in hints:
            hint = (
                did_you_mean(prefix + key, keys)
                or did_you_mean(key, hints)
                or f"; the keys are: {', '.join(sorted(hints))}"
            )
            raise ConfigError(f"unknown config key {prefix + key!r}{hint}")
    values = {}
    for key, value in tree.items():
        new_values = entries[key].metadata.get("former_values", {})
        if isinstance(value, str) and value in new_values:
            log.warning("%s=%s is now written %s=%s", prefix + key, value, prefix + key, new_values[value])
            value = new_values[value]
        values[key] = _convert(prefix + key, hints[key], value, keys)
    return kind(**values)


def _plain_types(hint: Any) -> tuple[Any, ...]:
    """Return the types that a hint allows, without bounds."""
    if typing.get_origin(hint) is typing.Annotated:
        return _plain_types(hint.__origin__)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(kind for alternative in typing.get_args(hint) for kind in _plain_types(alternative))
    return (str,) if typing.get_origin(hint) is typing.Literal else (hint,)


def _convert(key: str, hint: Any, value: Any, keys: Sequence[str]) -> Any:
    """Return `value` converted to the declared type of its field."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is a section, not a value: write {key}.NAME=…")
        return _build(typing.cast(type, hint), value, f"{key}.", keys)
    kinds = _plain_types(hint)
    if type(value) is date:  # TOML has dates, and what looks like one may be any text
        value = value.isoformat()
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        if any(float in typing.get_args(kind) for kind in kinds):
            return _parse_numbers(key, value)
        value = (value,) if isinstance(value, str) else value
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    for kind in kinds:
        kind = typing.get_origin(kind) or kind
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return value
    expected = " or ".join("nothing" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ConfigError(f"{key}={value!r}: expected {expected}")


def _parse_numbers(key: str, value: Any) -> tuple[float, ...]:
    """Return numbers from a list, or from a text with commas.

    >>> _parse_numbers("model.mean", "0.5, 0.5, 0.5")
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
    """Build the config of a classification, like `load_as`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.

    >>> load(None, ["top_k=3", "cluster.device=cpu"]).top_k
    3
    """
    return load_as(Config, path, settings, **flags)


def fill_output_template(config: Config, *, model: str) -> Config:
    """Return the config with `{model}` of its output filled in. `{date}` is filled in when a config is read.

    Raises:
        ConfigError: the output has another name in braces.
    """
    try:
        return replace(config, output=replace(config.output, uri=config.output.uri.format(model=model)))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--output {config.output.uri!r}: only {{model}} and {{date}} can be filled in") from error


def resolve_date(flag: str | None) -> str:
    """Return the date of a run: that of the flag or key, or else that of the variable IMGBATCH_DATE, or else today (UTC).

    Raises:
        ConfigError: it is not a date of the form YYYY-MM-DD.
    """
    name, text = ("--date", flag) if flag is not None else ("IMGBATCH_DATE", os.environ.get("IMGBATCH_DATE") or None)
    if text is None:
        return datetime.now(UTC).strftime(_DATE)
    try:
        valid = datetime.strptime(text, _DATE).strftime(_DATE) == text
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{name} {text!r}: not a date of the form YYYY-MM-DD, such as 2026-11-29")
    return text


def fill_date(uri: str, day: str) -> str:
    """Return a URI with `{date}` filled in.

    >>> fill_date("s3://out/{model}/{date}", "2026-11-29")
    's3://out/{model}/2026-11-29'
    """
    return uri.replace(_DATE_FIELD, day)


def _fill_dates(config: Any) -> Any:
    """Return a config with `{date}` of its inputs and its output filled in. `date` is None if none of them has it."""
    day = resolve_date(config.date)
    if config.date is not None or os.environ.get("IMGBATCH_DATE"):
        config = _tie_deadline(config, day)
    output = config.output if isinstance(config.output, str) else config.output.uri
    if not any(_DATE_FIELD in uri for uri in (*config.input, output)):
        return replace(config, date=None)  # it changes nothing: two runs of different days have equal configs
    filled = fill_date(output, day)
    return replace(
        config,
        date=day,
        input=tuple(fill_date(uri, day) for uri in config.input),
        output=filled if isinstance(config.output, str) else replace(config.output, uri=filled),
    )


def _tie_deadline(config: Any, day: str) -> Any:
    """Return a config whose time of day in `run.finish_by` is that of a date: a run that is repeated later is late then."""
    text = getattr(config.run, "finish_by", None)
    if text is None:
        return config
    moment = deadline.parse(text, "run.finish_by").at(datetime.now(UTC), day)
    return replace(config, run=replace(config.run, finish_by=moment.isoformat()))

"""Values: options as fields of frozen dataclasses: defaults, help texts and checks.

The type of a field is its check: `Literal` lists the choices, `Annotated` adds bounds from `annotated_types`. Help, errors and
documentation are derived from it:

    retries: Annotated[int, Ge(0)] = option(10, "attempts after a transient failure")
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from annotated_types import Ge, Gt, Interval

from imgbatch.errors import ConfigError, did_you_mean

Positive = Gt(0)
Fraction = Interval(ge=0, le=1)


def option(default: Any, help: str, *, formerly: str = "", former_values: Mapping[str, Any] | None = None) -> Any:
    """Return a dataclass field with its help text. The repr omits a field with a factory, since its value may be secret.

    Args:
        default: the default value, or a function that returns it.
        formerly: the old name of the key, which is still read, with a warning.
        former_values: old values and their new names; the old ones are still read, with a warning.
    """
    metadata = {"help": help, "formerly": formerly, "former_values": former_values or {}}
    if callable(default):
        return field(default_factory=default, metadata=metadata, repr=False)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A group of options. Creating it checks each field by its type, then `validate` checks combinations."""

    SECTION: ClassVar[str | None] = None
    """The name of the section in messages; None: the name of the class, without `Config`."""

    def __post_init__(self) -> None:
        prefix = type(self).__name__.removesuffix("Config").lower() if self.SECTION is None else self.SECTION
        kind: Any = type(self)
        for name, hint in hints_of(kind).items():
            _require(f"{prefix}.{name}" if prefix else name, hint, getattr(self, name))
        self.validate()

    def validate(self) -> None:
        """Check combinations of fields, and values that a type cannot describe.

        Raises:
            ConfigError: options contradict each other.
        """


def iter_options(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) of every option, with sections in the order of a run."""
    for entry in fields_of(kind):
        hint = hints_of(kind)[entry.name]
        if is_dataclass(hint):
            yield from iter_options(typing.cast(type, hint), f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", _default_text(entry), entry.metadata["help"]


def _default_text(entry: Field[Any]) -> str:
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if default in (None, (), ""):
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def fields_of(kind: type) -> tuple[Field[Any], ...]:
    """Return the fields of a dataclass."""
    return fields(typing.cast(Any, kind))


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the type of each field, bounds included."""
    return typing.get_type_hints(kind, include_extras=True)


def _require(key: str, hint: Any, value: Any) -> None:
    """Raise if a value is not one of the choices of its field, or is out of bounds."""
    if value is None:
        return
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        for alternative in typing.get_args(hint):
            _require(key, alternative, value)
    elif typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(
                f"{key}={value!r}: must be one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
            )
    elif typing.get_origin(hint) is typing.Annotated:
        for bound in hint.__metadata__:
            _require_bound(key, bound, value)
        _require(key, hint.__origin__, value)


def _require_bound(key: str, bound: Any, value: float) -> None:
    """Raise if a number is out of bounds. The negated comparisons refuse NaN as well."""
    match bound:
        case Ge(ge=minimum) if not value >= minimum:  # type: ignore[operator]
            raise ConfigError(f"{key}={value}: must be {minimum} or more")
        case Gt(gt=minimum) if not value > minimum:  # type: ignore[operator]
            raise ConfigError(f"{key}={value}: must be more than {minimum}")
        case Interval(gt=None, ge=minimum, le=maximum) if not minimum <= value <= maximum:  # type: ignore[operator]
            raise ConfigError(f"{key}={value}: must be between {minimum} and {maximum}")
        case Interval(gt=minimum, ge=None, le=maximum) if not minimum < value <= maximum:  # type: ignore[operator]
            raise ConfigError(f"{key}={value}: must be more than {minimum} and at most {maximum}")
        case _:
            pass

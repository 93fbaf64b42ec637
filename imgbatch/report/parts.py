"""Values: the parts of a page, which the macros of `parts.html` show: tables, figures, cards, thumbnails and others."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

_WIDTH = 90  # characters
_TAIL = 24
MAX_ROWS = 1_000
"""Maximum number of rows of a table: a page stays below 1 MB."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    title: str
    is_number: bool = False
    """The values are right-aligned, and sorted by the number that they begin with."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts and numbers. A reader can sort it, and filter it if it is long."""

    name: str
    """What it contains, for screen readers and for the label of its filter."""
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    total: int
    """Number of rows, with those that are omitted."""

    @classmethod
    def of(cls, name: str, head: Sequence[str], rows: Iterable[Sequence[str | int]], total: int | None = None) -> Table:
        """Return a table. A column is of numbers if its head begins with #.

        Args:
            total: number of rows if `rows` has only the first ones.

        >>> Table.of("classes", ["class", "#images"], [("Apple", 1200)]).rows
        (('Apple', '1,200'),)
        """
        texts = [tuple(f"{cell:,}" if isinstance(cell, int) else short(cell) for cell in row) for row in rows]
        columns = tuple(Column(title.lstrip("#"), title.startswith("#")) for title in head)
        return cls(name, columns, tuple(texts[:MAX_ROWS]), len(texts) if total is None else total)


@dataclass(frozen=True, slots=True)
class Series:
    """An entry of a figure's legend. Its style is that of the curve of this number."""

    name: str
    number: int


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure as SVG, with what it shows in words and in numbers."""

    title: str
    conclusion: str
    """What a reader should conclude."""
    svg: str
    """Drawn by `svg.Drawing`, which escapes texts."""
    table: Table | None = None
    """The numbers that are drawn."""
    legend: tuple[Series, ...] = ()
    is_wide: bool = False
    """It needs the width of a page; on a small screen it is scrolled."""


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One number with its name, such as an accuracy."""

    name: str
    value: str
    note: str = ""
    """The interval, for example."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small picture of an image, with lines of text; a placeholder with the reason if the image cannot be shown."""

    title: str
    lines: tuple[str, ...]
    source: str
    """A data URI; empty without a picture."""
    reason: str
    """What the placeholder says where there is no picture; empty: there is no placeholder."""
    uri: str
    command: str = ""
    """A command that tells more of the image."""

    @classmethod
    def of(cls, title: str, lines: Iterable[str], uri: str, picture: Picture | None) -> Thumbnail:
        """Return a thumbnail.

        Args:
            picture: None: pictures are not shown on the page, by `report.thumbnails`.
        """
        reason = "" if picture is None or picture.webp or not picture.reason else f"not shown: {picture.reason}"
        source = picture.data_uri() if picture is not None else ""
        return cls(short(title), tuple(short(line) for line in lines), source, reason, uri)


@dataclass(frozen=True, slots=True)
class Picture:
    """The bytes of a small picture, or the reason why there are none."""

    webp: bytes = b""
    reason: str = ""

    def data_uri(self) -> str:
        """Return the picture as the source of an `img`; empty without a picture."""
        return f"data:image/webp;base64,{base64.b64encode(self.webp).decode()}" if self.webp else ""


def short(text: str, width: int = _WIDTH) -> str:
    """Return a text that is at most `width` characters long; the middle of a longer one is omitted.

    >>> short("a" * 300, 60) == "a" * 39 + "…" + "a" * 20
    True
    """
    if len(text) <= width:
        return text
    tail = min(_TAIL, width // 3)
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def percent(value: float, digits: int = 1) -> str:
    """Return a proportion as a percentage; a dash for NaN.

    >>> percent(0.8756), percent(float("nan"))
    ('87.6%', '–')
    """
    return "–" if math.isnan(value) else f"{value:.{digits}%}"


def interval(low: float, high: float, digits: int = 1) -> str:
    """Return the interval of a proportion; empty for NaN.

    >>> interval(0.8, 0.9)
    '80.0% to 90.0%'
    """
    return "" if math.isnan(low) else f"{low:.{digits}%} to {high:.{digits}%}"


def percent_with_interval(value: float, low: float, high: float) -> str:
    """Return a proportion with its interval.

    >>> percent_with_interval(0.5, 0.4, 0.6)
    '50.0% (40.0% to 60.0%)'
    """
    return percent(value) if math.isnan(low) else f"{percent(value)} ({interval(low, high)})"


@dataclass(frozen=True, slots=True)
class Shown:
    """An image of which a page shows a thumbnail."""

    uri: str
    picture: Picture | None
    """None: pictures are not shown on the page, by `report.thumbnails`."""

    def thumbnail(self, title: str, *lines: str, command: str = "") -> Thumbnail:
        """Return its thumbnail."""
        return replace(Thumbnail.of(title, lines, self.uri, self.picture), command=command)


def shown(numbers: Iterable[int], uris: Iterable[str], pictures: Mapping[str, Picture] | None) -> dict[int, Shown]:
    """Return images by their numbers.

    Args:
        pictures: by URI; None: pictures are not shown.
    """
    return {
        number: Shown(uri, None if pictures is None else pictures[uri])
        for number, uri in zip(numbers, uris, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Card:
    """A box with a title, a sentence and pictures side by side."""

    title: str
    text: str
    thumbnails: tuple[Thumbnail, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """A command line to copy, and what it does."""

    purpose: str
    line: str


State = Literal["plain", "good", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The conclusion of a page: what a reader knows after one sentence, and what is to be done."""

    text: str
    state: State = "plain"
    word: str = ""
    """The state in a word, such as "succeeded"; a colour alone says nothing to some readers and on paper."""
    to_do: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Notice:
    """A paragraph that is set off: a note, or a warning."""

    title: str
    text: str
    is_warning: bool = False

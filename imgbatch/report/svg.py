"""Values: drawings as SVG: a plot with axes, and marks in its coordinates.

Colours are classes of the page's style sheet, so that a drawing is legible in dark mode and on paper. The unit is a CSS pixel
on a screen 390 pixels wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 10, 42

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its name, the values at its ends, and its ticks."""

    name: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    @classmethod
    def of_proportions(cls, name: str, low: float = 0.0, high: float = 1.0) -> Axis:
        """Return an axis from `low`, rounded down to a tick, to `high`, rounded up.

        >>> [text for _, text in Axis.of_proportions("accuracy", 0.83).ticks]
        ['80%', '85%', '90%', '95%', '100%']
        """
        step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / step <= 6)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple((number * step, f"{number * step:.0%}") for number in range(first, last + 1))
        return cls(name, first * step, last * step, ticks)

    @classmethod
    def of_counts(cls, name: str, highest: float) -> Axis:
        """Return an axis from 0 to a round number that is not below the highest value.

        >>> [text for _, text in Axis.of_counts("images", 230).ticks]
        ['0', '100', '200', '300']
        """
        raw = max(highest, 1) / 3
        scale = 10 ** math.floor(math.log10(raw))
        step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= raw)
        step = max(step, 1)
        count = math.ceil(max(highest, 1) / step)
        return cls(
            name, 0, step * count, tuple((number * step, f"{number * step:,.0f}") for number in range(count + 1))
        )

    @classmethod
    def of_values(cls, name: str, values: Sequence[float]) -> Axis:
        """Return an axis that includes all values; it begins at 0 unless they are close to each other.

        >>> [text for _, text in Axis.of_values("loss", [0.4, 1.3]).ticks]
        ['0', '0.5', '1', '1.5']
        >>> [text for _, text in Axis.of_values("loss", [0.93, 0.94]).ticks]
        ['0.8', '0.85', '0.9', '0.95', '1']
        """
        lowest, highest = min(values), max(*values, 1e-6)
        close = lowest > 0.6 * highest
        low, high = (lowest - 0.1 * highest, highest + 0.02 * highest) if close else (0.0, highest)
        raw = (high - low) / 4
        scale = 10 ** math.floor(math.log10(raw))
        step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= raw)
        numbers = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
        ticks = tuple((number * step, f"{number * step:g}") for number in numbers)
        return cls(name, ticks[0][0], ticks[-1][0], ticks)

    @classmethod
    def of_numbers(cls, name: str, count: int) -> Axis:
        """Return an axis of the numbers 1 to `count`, with at most ten ticks."""
        step = max(1, math.ceil(count / 10))
        ticks = tuple((number, str(number)) for number in range(1, count + 1, step))
        return cls(name, 1 - 0.03 * count, count + 0.03 * count, ticks)

    @classmethod
    def logarithmic(cls, name: str, values: Sequence[float]) -> Axis:
        """Return an axis with a tick at each value."""
        return cls(name, min(values) / 1.3, max(values) * 1.3, tuple((v, f"{v:g}") for v in values), is_log=True)

    def fraction(self, value: float) -> float:
        """Return where a value is: 0 at the lower end, 1 at the upper end; values outside are at an end."""
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low)))


@dataclass(slots=True)
class Drawing:
    """A drawing of a fixed size, to which marks are added."""

    description: str
    """The text for screen readers."""
    width: float = WIDTH
    height: float = HEIGHT
    marks: list[str] = field(default_factory=list)

    def line(self, points: Iterable[Point], style: str) -> None:
        """Add a line through points."""
        self.marks.append(f'<polyline class="{style}" points="{_joined(points)}"/>')

    def area(self, points: Iterable[Point], style: str) -> None:
        """Add a filled area."""
        self.marks.append(f'<polygon class="{style}" points="{_joined(points)}"/>')

    def rectangle(self, x: float, y: float, width: float, height: float, style: str, *, opacity: float = 1.0) -> None:
        """Add a rectangle from its upper left corner."""
        transparency = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
        place = f'x="{_text(x)}" y="{_text(y)}" width="{_text(width)}" height="{_text(height)}"'
        self.marks.append(f'<rect class="{style}" {place}{transparency}/>')

    def dot(self, at: Point, style: str, radius: float = 3.5) -> None:
        """Add a dot."""
        self.marks.append(f'<circle class="{style}" cx="{_text(at[0])}" cy="{_text(at[1])}" r="{_text(radius)}"/>')

    def text(self, at: Point, text: str, *, anchor: str = "start", style: str = "t", turned: float = 0) -> None:
        """Add a text, which is escaped here."""
        x, y = _text(at[0]), _text(at[1])
        turn = f' transform="rotate({_text(turned)} {x} {y})"' if turned else ""
        self.marks.append(f'<text class="{style}" x="{x}" y="{y}" text-anchor="{anchor}"{turn}>{escape(text)}</text>')

    def svg(self) -> str:
        """Return the drawing."""
        return (
            f'<svg viewBox="0 0 {_text(self.width)} {_text(self.height)}" role="img" '
            f'aria-label="{escape(self.description)}">{"".join(self.marks)}</svg>'
        )


@dataclass(frozen=True, slots=True)
class Plot:
    """A rectangle of a drawing with two axes."""

    drawing: Drawing
    x: Axis
    y: Axis
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    left: float = _LEFT
    right: float = WIDTH - _RIGHT

    def at(self, x: float, y: float) -> Point:
        """Return the place of a pair of values."""
        return (
            self.left + self.x.fraction(x) * (self.right - self.left),
            self.bottom - self.y.fraction(y) * (self.bottom - self.top),
        )

    def axes(self, *, x_texts: bool = True) -> None:
        """Draw the grid, the ticks and the names of both axes."""
        for value, text in self.y.ticks:
            y = self.at(self.x.low, value)[1]
            self.drawing.line([(self.left, y), (self.right, y)], "rule")
            self.drawing.text((self.left - 6, y + 4), text, anchor="end")
        if self.y.name:
            self.drawing.text(
                (11, (self.top + self.bottom) / 2), self.y.name, anchor="middle", style="t name", turned=-90
            )
        self.drawing.line([(self.left, self.bottom), (self.right, self.bottom)], "axis")
        if x_texts:
            for value, text in self.x.ticks:
                x = self.at(value, self.y.low)[0]
                self.drawing.line([(x, self.bottom), (x, self.bottom + 4)], "axis")
                self.drawing.text((x, self.bottom + 17), text, anchor="middle")
            self.drawing.text(
                ((self.left + self.right) / 2, self.bottom + 35), self.x.name, anchor="middle", style="t name"
            )

    def curve(self, values: Iterable[Point], number: int, *, dots: bool = False) -> None:
        """Draw a curve in the style of its number; the second one is dashed."""
        points = [self.at(*value) for value in values]
        self.drawing.line(points, f"curve c{number}")
        for point in points if dots else ():
            self.drawing.dot(point, f"dot c{number}")

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], number: int) -> None:
        """Fill the area between two curves."""
        upper = [self.at(*value) for value in zip(x, high, strict=True)]
        lower = [self.at(*value) for value in zip(x, low, strict=True)]
        self.drawing.area([*upper, *reversed(lower)], f"band c{number}")

    def bar(self, x: float, low: float, high: float, number: int) -> None:
        """Draw the interval of a value as a vertical line."""
        self.drawing.line([self.at(x, low), self.at(x, high)], f"bar c{number}")

    def column(self, low: float, high: float, base: float, top: float, style: str) -> None:
        """Draw a column of a histogram between two values of x."""
        (left, y_top), (right, y_base) = self.at(low, top), self.at(high, base)
        if y_base > y_top:
            self.drawing.rectangle(left + 0.5, y_top, max(right - left - 1, 0.5), y_base - y_top, style)


def _text(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _joined(points: Iterable[Point]) -> str:
    return " ".join(f"{_text(x)},{_text(y)}" for x, y in points)

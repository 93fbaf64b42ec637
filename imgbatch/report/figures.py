"""Values: figures as SVG text, drawn by matplotlib without a screen."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from imgbatch.evaluation.metrics import Calibration, Coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#1f6f8b", "#d1603d")
_SIDE = 4.2  # inches


def reliability(curves: Mapping[str, Calibration]) -> str:
    """Draw the accuracy of each bin of scores; calibrated scores are on the diagonal."""
    figure, axes = _axes("score", "proportion right")
    axes.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="--")
    for colour, (name, curve) in zip(_COLOURS, curves.items(), strict=False):
        area = 10 + 250 * curve.count / curve.count.sum()
        axes.plot(curve.score, curve.accuracy, color=colour, linewidth=1.2, label=f"{name}: ECE {curve.ece.value:.3f}")
        axes.scatter(curve.score, curve.accuracy, s=area, color=colour, alpha=0.5, linewidths=0)
    axes.set_ylim(-0.03, 1.05)
    axes.legend(loc="lower right", frameon=False)
    return _svg(figure)


def coverage(curves: Mapping[str, Coverage]) -> str:
    """Draw accuracy, with its 95 % interval, over the proportion of images that reach a minimum score, as that rises."""
    figure, axes = _axes("proportion of images that reach the minimum score", "proportion of these that are right")
    for colour, (name, curve) in zip(_COLOURS, curves.items(), strict=False):
        axes.plot(curve.coverage, curve.accuracy, color=colour, linewidth=1.5, label=name)
        axes.fill_between(curve.coverage, *curve.interval.T, color=colour, alpha=0.15, linewidth=0)
        half = int(np.searchsorted(curve.score, 0.5))
        axes.plot(curve.coverage[half], curve.accuracy[half], "o", color=colour)
        axes.annotate(
            "score ≥ 0.5",
            (curve.coverage[half], curve.accuracy[half]),
            xytext=(-4, -14), textcoords="offset points", ha="right", fontsize=8, color=colour,
        )  # fmt: skip
    # The intervals of few images, at the left, may go below the figure.
    lowest = min(float(np.nanmin([*curve.accuracy, curve.interval[0, 0]])) for curve in curves.values())
    axes.set_ylim(max(0.0, lowest - 0.05), 1.005)
    axes.legend(loc="lower left", frameon=False)
    return _svg(figure)


def learning(curve: Sequence[Mapping[str, Any]]) -> str:
    """Draw the loss and the accuracy of each point of a training run: epochs, or strengths of L2."""
    x = "L2" if "l2" in curve[0] else "epoch"
    positions = [point["l2"] for point in curve] if x == "L2" else list(range(1, len(curve) + 1))
    drawn = []
    for figure_of in ("loss", "accuracy"):
        figure, axes = _axes(x, figure_of)
        for colour, (name, key) in zip(
            _COLOURS, (("held out", f"held_out_{figure_of}"), ("training images", figure_of)), strict=True
        ):
            points = [
                (position, point[key])
                for position, point in zip(positions, curve, strict=True)
                if point.get(key) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=1.5, markersize=4, label=name)
        if x == "L2":
            axes.set_xscale("log")
        axes.legend(frameon=False)
        drawn.append(_svg(figure))
    return f'<div class="side">{"".join(drawn)}</div>'


def confusion(matrix: npt.NDArray[np.integer[Any]], names: Sequence[str]) -> str:
    """Draw the proportions of each true class that were predicted as each class; the diagonal is right."""
    side = min(3 + 0.16 * len(names), 16)
    figure, axes = _axes("predicted", "true", side)
    proportions = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(proportions, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    size = 9 if len(names) <= 30 else 6
    axes.set_xticks(range(len(names)), [_escaped(name) for name in names], rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), [_escaped(name) for name in names], fontsize=size)
    axes.grid(visible=False)
    return _svg(figure)


def _escaped(name: str) -> str:
    return name.replace("$", r"\$")  # matplotlib takes text between two of them as a formula


def _axes(x: str, y: str, side: float = _SIDE) -> tuple[Any, Axes]:
    from matplotlib.figure import Figure  # imported here, since it takes a second and is needed at the end only

    figure = Figure((side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#eee")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "imgbatch"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]

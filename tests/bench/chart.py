"""Draw bench.json as two panels: the speed of each program, and where the time of an image is spent.

python tests/bench/chart.py bench.json docs/bench.png
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.table import median, names

# The palette of Okabe and Ito, which is safe for colour-blind readers.
BLUE, SKY, ORANGE, GREY, PALE, INK = "#0072B2", "#56B4E9", "#E69F00", "#777777", "#BBBBBB", "#222222"
STAGES = {"fetch": SKY, "S3 server": GREY, "decode + resize": ORANGE, "forward": BLUE}
NAMES = {"ours": "imgbatch", "daft": "Daft", "ray": "Ray Data", "loader": "DataLoader", "timm": "timm"}
KINDS = {"workers": "workers", "driver": "driver", "ray": "Ray itself", "S3 server": "S3 server", "other": "others"}
_HEIGHT = 0.66
_WIDE = 0.3  # proportion of the axis that a bar needs for a name inside it
_SMALL = 8.5
_GAP = 0.45
"""Rows between the stages and the processes, for the line of text that separates them."""

_TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "pad": 24}
Bar = tuple[str, float, str]
"""Name, value and colour."""


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the figures of bench.json into a PNG 1,800 pixels wide, which is shown at half its size."""
    pyplot.rcParams |= {"font.size": 10, "text.color": INK, "ytick.labelcolor": INK, "axes.edgecolor": GREY}
    speeds, costs = _speeds(results), _costs(results)
    rows = max(len(speeds), 1 + _GAP + len(costs))
    layout = ConstrainedLayoutEngine(wspace=0.06, w_pad=0.1, h_pad=0.08)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 1.3 + 0.36 * rows), layout=layout)
    _draw_speeds(left, speeds, results["limit_per_s"], rows)
    _draw_costs(right, results["stages_ms"], costs, rows)
    machine = results["machine"]
    note = (
        f"{results['objects']:,} photos in an S3 server on the same {machine['cores']} cores ({machine['processor']})"
    )
    figure.supxlabel(note, fontsize=_SMALL, x=0.99, ha="right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    pyplot.close(figure)


def _speeds(results: dict[str, Any]) -> list[Bar]:
    """Return images per second of each program from start to end, and of imgbatch also after its first row."""
    bars: list[Bar] = []
    for name in names(results):
        seconds = median(results["runs"], name, "total_s")
        steady = median(results["runs"], name, "steady_per_s") if name == "ours" else None
        if seconds:
            bars.append((NAMES.get(name, name), results["objects"] / seconds, BLUE if name == "ours" else PALE))
        if steady:
            bars.append((f"{NAMES.get(name, name)}, steady", steady, SKY))
    return bars


def _costs(results: dict[str, Any]) -> list[Bar]:
    """Return the CPU milliseconds per image of each kind of process of imgbatch, as medians of its runs."""
    ours = [run["processes"] for run in results["runs"] if run["name"] == "ours"]
    bars: list[Bar] = []
    for kind, name in KINDS.items():
        seconds = [run[kind]["cpu_s"] for run in ours if kind in run]
        if any(seconds):
            bars.append((name, 1000 * statistics.median(seconds) / results["objects"], PALE))
    return bars


def _draw_speeds(axes: Axes, bars: list[Bar], limit: float, rows: float) -> None:
    longest = max([limit, *(value for _, value, _ in bars)])
    _draw_bars(axes, bars, longest, rows, "{:.0f}")
    axes.plot([limit, limit], [-0.5, len(bars) - 0.5], color=INK, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.annotate(f"limit {limit:.0f}", (limit, -0.5), (0, 4), textcoords="offset points", ha="center", fontsize=_SMALL)
    axes.set_title("Images per second, from start to end", **_TITLE)


def _draw_costs(axes: Axes, stages: dict[str, float], costs: list[Bar], rows: float) -> None:
    """Draw the stages in one bar. Stages too narrow for their names are named above it, in their order."""
    total = sum(stages.values())
    longest = max([total, *(value for _, value, _ in costs)])
    _draw_bars(axes, [("bare stages", total, PALE), *costs], longest, rows, "{:.1f}", _GAP)
    axes.text(0.01 * longest, 0.5 + _GAP - 0.08, "a whole run, its start included", fontsize=_SMALL, va="bottom")
    start, named = 0.0, []
    for stage, cost in stages.items():
        colour = STAGES.get(stage, PALE)
        bar = axes.barh(0, cost, _HEIGHT, left=start, color=colour, edgecolor="white", linewidth=0.8).patches[0]
        label = f"{stage} {cost:.1f}"
        if cost >= _WIDE * longest:
            ink = "white" if colour in (BLUE, GREY) else INK
            axes.text(start + cost / 2, 0, label, ha="center", va="center", fontsize=_SMALL, color=ink)
        else:
            bar.set_label(label)
            named.append(bar)
        start += cost
    fits = len(named) < 4  # four would extend beyond the left edge
    axes.legend(handles=named, loc="lower left" if fits else "lower right", bbox_to_anchor=(0 if fits else 1, 1),
                ncols=max(1, len(named)), fontsize=_SMALL, frameon=False, borderpad=0, borderaxespad=0.2,
                handlelength=0.8, handleheight=0.8, handletextpad=0.4, columnspacing=1)  # fmt: skip
    axes.set_title("CPU milliseconds per image", **_TITLE)


def _draw_bars(axes: Axes, bars: list[Bar], longest: float, rows: float, form: str, gap: float = 0.0) -> None:
    """Draw bars from the top, each with its value next to it, with a gap below the first, in a panel of `rows` rows."""
    places = [place + (gap if place else 0.0) for place in range(len(bars))]
    axes.barh(places, [value for _, value, _ in bars], _HEIGHT, color=[colour for *_, colour in bars])
    for place, (_, value, _) in zip(places, bars, strict=True):
        axes.annotate(form.format(value), (value, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [name for name, *_ in bars])
    axes.set_xlim(0, 1.16 * longest)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.tick_params(left=False, bottom=False, labelbottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_bounds(-0.5, places[-1] + 0.5)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

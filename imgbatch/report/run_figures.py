"""Values: the figures of a run's report: its rate over time, its stages, the mix of labels, and the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imgbatch.quality.row_counts import SCORE_BINS, RowCounts
from imgbatch.report.parts import Figure, Series, Table, percent, short
from imgbatch.report.svg import WIDTH, Axis, Drawing, Plot
from imgbatch.terminal.plurals import clock, counted, number

_COLUMNS = 60
_BINS = 20
_LEFT, _ROW = 128, 22
_QUANTILE = 2.97
"""Of the normal distribution: 0.3 % of the values are further away, as in `quality.drift`."""
_WORK = {"fetch": "fetching", "decode": "decoding", "classify": "the network (classify)", "commit": "writing the rows"}
_STAGES = {
    "listing": "listing",
    "starting": "starting workers",
    "labelling": "labelling",
    "auditing": "checking the tables",
}


def arrivals(series: Mapping[str, Any]) -> Figure | None:
    """Draw how many images a second arrived over the run; None if nothing arrived."""
    images, interval_s = np.array(series.get("images") or [0]), float(series.get("interval_s") or 1)
    if not images.any():
        return None
    merged = -(-len(images) // _COLUMNS)
    padded = np.pad(images, (0, -len(images) % merged)).reshape(-1, merged).sum(axis=1)
    width_s = interval_s * merged
    rates = padded / width_s
    total_s, first = len(rates) * width_s, int(np.flatnonzero(padded)[0])
    active = rates[first:]
    idle = int(np.count_nonzero(active == 0))
    conclusion = (
        f"The first images arrived after {clock(first * width_s)}; after that {number(float(active.mean()))} images a second "
        f"were labelled on average, {number(float(active.max()))} at most."
    )
    if idle and width_s >= 5:
        conclusion += f" In {clock(idle * width_s)} of this time none arrived."
    drawing = Drawing(f"Images a second over the time of the run. {conclusion}", height=230)
    plot = Plot(drawing, _time_axis(total_s), Axis.of_counts("images a second", float(rates.max())), bottom=188)
    plot.axes()
    for at, rate in enumerate(rates.tolist()):
        plot.column(at * width_s, (at + 1) * width_s, 0, rate, "column c0")
    rows = [
        (f"{clock(at * width_s)} to {clock((at + 1) * width_s)}", int(count), number(float(rate)))
        for at, (count, rate) in enumerate(zip(padded, rates, strict=True))
    ]
    return Figure("Rate", conclusion, drawing.svg(), Table.of("rate over time", ["time", "#images", "#images/s"], rows))


def _time_axis(seconds: float) -> Axis:
    steps = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
    step = next((step for step in steps if seconds / step <= 5), math.ceil(seconds / 5 / 86400) * 86400)
    ticks = tuple((float(at), clock(at)) for at in range(0, int(seconds) + 1, step))
    return Axis("time since the workers were requested", 0, seconds, ticks)


def stages(run: Mapping[str, float], work: Mapping[str, float], bottleneck: str | None) -> Figure | None:
    """Draw the seconds of the run by stage, and the seconds of its workers by kind of work."""
    rows = [(_STAGES.get(name, name), seconds) for name, seconds in run.items() if seconds]
    works = [(name, seconds) for name, seconds in work.items() if seconds]
    if not rows:
        return None
    longest = max(rows, key=lambda row: row[1])
    total = sum(seconds for _, seconds in rows)
    conclusion = f"The longest stage is {longest[0]}, {longest[1] / max(total, 1e-9):.0%} of the time."
    if bottleneck:
        conclusion += f" While images are labelled, the rate is limited by {_WORK.get(bottleneck, bottleneck)}."
    height = 24 * (len(rows) + len(works)) + 62
    drawing = Drawing(f"Seconds by stage. {conclusion}", height=height)
    at = _bars(drawing, 16, "time of the run", rows, "column c0")
    if works:
        _bars(drawing, at + 14, "work, summed over all workers", works, "column c1")
    kinds = (("run", rows), ("workers", works))
    table = [(kind, name, f"{seconds:,.1f}") for kind, part in kinds for name, seconds in part]
    return Figure(
        "Where the time went",
        conclusion,
        drawing.svg(),
        Table.of("seconds by stage", ["of", "stage", "#seconds"], table),
    )


def _bars(drawing: Drawing, top: float, title: str, rows: Sequence[tuple[str, float]], style: str) -> float:
    """Draw a bar for each row below a title; return the lower end."""
    drawing.text((0, top), title, style="t name")
    highest, width = max(value for _, value in rows), WIDTH - _LEFT - 66
    for number_, (name, value) in enumerate(rows):
        y = top + 10 + 24 * number_
        drawing.text((_LEFT - 8, y + 12), short(name, 22), anchor="end")
        drawing.rectangle(_LEFT, y, max(1.5, value / highest * width), 16, style)
        drawing.text((_LEFT + value / highest * width + 6, y + 12), _seconds(value))
    return top + 10 + 24 * len(rows)


def _seconds(value: float) -> str:
    return clock(value) if value >= 60 else f"{value:.1f} s"


def changed_labels(drift: Mapping[str, Any], before: int, now: int) -> Figure | None:
    """Draw the proportions of the labels that changed most, with the range that chance explains.

    Args:
        drift: `labels` of the facts about drift.
        before: the number of labelled images that were compared with.
        now: the number of new ones.
    """
    changes = drift.get("changed") or ()
    if not changes or not before or not now:
        return None
    bands = [chance_range(change["before"], change["now"], before, now) for change in changes]
    outside = sum(not low <= change["now"] <= high for change, (low, high) in zip(changes, bands, strict=True))
    conclusion = _shift_in_words(drift, outside, len(changes))
    highest = max(max(change["now"], change["before"], high) for change, (_, high) in zip(changes, bands, strict=True))
    drawing = Drawing(f"Proportions of labels before and now. {conclusion}", height=_ROW * len(changes) + 52)
    axis = Axis.of_proportions("proportion of the labelled images", 0, highest)
    plot = Plot(drawing, axis, Axis("", 0, 1, ()), left=_LEFT, top=6, bottom=_ROW * len(changes) + 10)
    plot.axes()
    for at, (change, (low, high)) in enumerate(zip(changes, bands, strict=True)):
        y = 10 + _ROW * at
        ends = [plot.at(value, 0)[0] for value in (low, high, change["before"], change["now"])]
        drawing.text((_LEFT - 8, y + 13), short(change["label"], 18), anchor="end")
        drawing.rectangle(ends[0], y + 2, max(ends[1] - ends[0], 2), _ROW - 5, "noise")
        drawing.line([(ends[2], y + 1), (ends[2], y + _ROW - 2)], "earlier")
        drawing.dot((ends[3], y + _ROW / 2 - 0.5), "dot c0", 4.5)
    rows = [
        (change["label"], percent(change["before"]), percent(change["now"]), f"{100 * (change['now'] - change['before']):+.1f}",
         f"{low:.1%} to {high:.1%}")
        for change, (low, high) in zip(changes, bands, strict=True)
    ]  # fmt: skip
    table = Table.of("labels that changed most", ["label", "#before", "#now", "#points", "by chance"], rows)
    legend = (Series("now", 5), Series("last run", 6), Series("explained by chance", 7))
    return Figure(f"Labels that changed most, level {drift['level']}", conclusion, drawing.svg(), table, legend)


def chance_range(before: float, now: float, n_before: int, n_now: int) -> tuple[float, float]:
    """Return the range of the new proportion that chance explains, in 99.7 % of runs, for one label."""
    pooled = (before * n_before + now * n_now) / (n_before + n_now)
    half = _QUANTILE * math.sqrt(pooled * (1 - pooled) * (1 / n_before + 1 / n_now))
    return max(0.0, before - half), min(1.0, before + half)


def _shift_in_words(drift: Mapping[str, Any], outside: int, shown: int) -> str:
    size, noise = drift["size"], drift["noise"]
    what = f"The distance between both mixes, without the part of chance, is {size:.3f}; up to {noise:.3f} is noise"
    if not drift["beyond_noise"]:
        return f"{what}: the mix has not changed."
    return f"{what}: the mix has changed. {outside} of the {counted(shown, 'label')} shown are outside of their range."


def frequent_labels(now: RowCounts, count: int = 12) -> Figure | None:
    """Draw the most frequent labels."""
    if not now.labels:
        return None
    total, found = sum(now.labels.values()), now.labels.most_common(count)
    part = sum(number for _, number in found) / total
    conclusion = (
        f"The {len(found)} most frequent of {counted(len(now.labels), 'label')} are {percent(part)} of the images."
    )
    drawing = Drawing(f"The most frequent labels. {conclusion}", height=_ROW * len(found) + 12)
    width = WIDTH - _LEFT - 60
    for at, (label, images) in enumerate(found):
        y, length = 4 + _ROW * at, images / found[0][1] * width
        drawing.text((_LEFT - 8, y + 13), short(label, 18), anchor="end")
        drawing.rectangle(_LEFT, y + 2, max(length, 1.5), _ROW - 6, "column c0")
        drawing.text((_LEFT + length + 6, y + 13), percent(images / total))
    rows = [(label, images, percent(images / total)) for label, images in found]
    return Figure(
        "Most frequent labels",
        conclusion,
        drawing.svg(),
        Table.of("most frequent labels", ["label", "#images", "#part"], rows),
    )


def scores(now: RowCounts, before: RowCounts | None, drift: Mapping[str, Any]) -> Figure | None:
    """Draw the distribution of the scores now and before."""
    if not now.scores.any():
        return None
    shares = _shares(now)
    earlier = _shares(before) if before is not None and before.scores.any() else None
    low = float(shares[: _BINS // 2].sum())
    conclusion = f"The mean score is {now.mean_score:.3f}; {percent(low)} of the images have a score below 0.5."
    if "before" in drift:
        what = "it has not fallen" if drift["size"] <= 0 else f"a drop of {drift['size']:.3f}, which is within noise"
        if drift.get("beyond_noise"):
            what = f"a drop of {drift['size']:.3f}, more than noise ({drift['noise']:.3f})"
        conclusion += f" The last run had {drift['before']:.3f}: {what}."
    drawing = Drawing(f"Distribution of the scores. {conclusion}", height=230)
    highest = max(float(shares.max()), float(earlier.max()) if earlier is not None else 0.0)
    plot = Plot(
        drawing, Axis.of_proportions("score"), Axis.of_proportions("part of the images", 0, highest), bottom=188
    )
    plot.axes()
    for at, part in enumerate(shares.tolist()):
        plot.column(at / _BINS, (at + 1) / _BINS, 0, part, "column c0")
    legend: tuple[Series, ...] = ()
    if earlier is not None:
        steps = [(edge / _BINS, part) for at, part in enumerate(earlier.tolist()) for edge in (at, at + 1)]
        plot.curve(steps, 1)
        legend = (Series("now", 8), Series("last run", 1))
    head = ["#score", "#now", *(["#last run"] if earlier is not None else [])]
    rows = [
        (f"{at / _BINS:.2f} to {(at + 1) / _BINS:.2f}", percent(float(shares[at])),
         *([percent(float(earlier[at]))] if earlier is not None else []))
        for at in range(_BINS)
    ]  # fmt: skip
    return Figure("Scores", conclusion, drawing.svg(), Table.of("scores", head, rows), legend)


def _shares(counts: RowCounts) -> np.ndarray[Any, np.dtype[np.float64]]:
    merged = counts.scores.reshape(_BINS, SCORE_BINS // _BINS).sum(axis=1)
    return np.asarray(merged / max(1, int(merged.sum())), np.float64)

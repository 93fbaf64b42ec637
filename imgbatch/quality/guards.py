"""Values: the guards: what has changed since the last success, and whether a guard holds the run back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imgbatch.config.results import GuardConfig
from imgbatch.quality.drift import Change, Comparison, Shift, compare, label_shift, mean_drop, widest
from imgbatch.quality.row_counts import LABEL, SCORE, RowCounts, bin_centres

RUNS_OF_SPREAD = 7
"""The number of earlier runs whose differences are the least width of the noise."""
_SHOWN = 3  # labels in a message

Levels = Sequence[tuple[str, Mapping[str, str]]]
"""Name of each level above the labels, coarse to fine, and the node of each label."""
Entry = Mapping[str, Any]
"""The measurements of an earlier run; see `Drift.entry`."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One difference between a run and its reference."""

    size: float
    """Without the part that is expected by chance. A guard limits it."""
    noise: float
    """The largest size that is no change: that of chance, or that of the differences between the last runs."""
    before: float = 0.0
    now: float = 0.0

    @property
    def beyond_noise(self) -> bool:
        """Whether something has changed."""
        return self.size > self.noise

    def public(self) -> dict[str, Any]:
        """Return the difference as plain values."""
        return {"size": round(self.size, 6), "noise": round(self.noise, 6), "beyond_noise": self.beyond_noise}


@dataclass(frozen=True, slots=True)
class Drift:
    """What has changed between the reference and the rows that are judged. A measurement is None where it has no meaning."""

    images: int
    """The number of rows that are judged."""
    smaller: int
    """The number of labelled images in the smaller of the two samples."""
    shift: Shift | None = None
    labels: Measure | None = None
    """Of the label mix: its size is a Jensen-Shannon distance."""
    score: Measure | None = None
    """Of the mean score: its size is the drop."""
    rejects: Measure | None = None
    """Of the proportion of rejects: its size is the rise."""
    notes: tuple[str, ...] = ()
    """What could not be compared, and why."""

    def entry(self, run_id: str) -> dict[str, Any]:
        """Return what later runs need of this one, to know how much runs differ."""
        entry: dict[str, Any] = {"run_id": run_id, "images": self.smaller}
        if self.shift is not None and self.labels is not None:
            entry |= {"level": self.shift.level, "labels": round(self.labels.size, 6)}
        entry |= {"score": round(self.score.size, 6)} if self.score else {}
        return entry | ({"rejects": round(self.rejects.size, 6)} if self.rejects else {})

    def public(self) -> dict[str, Any]:
        """Return the facts for run.json."""
        facts: dict[str, Any] = {"images": self.images}
        if self.shift is not None and self.labels is not None:
            changes = [
                {"label": change.label, "before": round(change.before, 6), "now": round(change.now, 6)}
                for change in self.shift.changes
            ]
            level = {"level": self.shift.level, "labels_seen": self.shift.labels}
            comparison = self.shift.comparison
            squared = {
                "squared_distance": round(comparison.value, 6),
                "expected_by_chance": round(comparison.expected, 6),
            }
            facts["labels"] = {**level, **self.labels.public(), **squared, "changed": changes}
        for name, measured in (("score", self.score), ("rejects", self.rejects)):
            if measured is not None:
                values = {"before": round(measured.before, 6), "now": round(measured.now, 6)}
                facts[name] = {**values, **measured.public()}
        return facts | ({"notes": list(self.notes)} if self.notes else {})


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows that are judged, and those of the reference."""

    reference: RowCounts
    judged: RowCounts
    reference_rejects: int
    judged_rejects: int
    """The rejects of both, without those of images that had been rejected before."""
    levels: Levels = ()
    history: Sequence[Entry] = ()
    other_model: str = ""
    same_labels: bool = True
    known_labels: frozenset[str] = field(default_factory=frozenset)

    @property
    def smaller(self) -> int:
        """The number of labelled images in the smaller sample."""
        return min(self.reference.labelled, self.judged.labelled)

    def spread(self, name: str, level: str | None = None) -> list[float]:
        """Return a measurement of the last runs. Those with less than half as many images are omitted: they vary more."""
        return [
            float(entry[name])
            for entry in self.history[-RUNS_OF_SPREAD:]
            if name in entry
            and 2 * int(entry.get("images", 0)) >= self.smaller
            and (level is None or entry.get("level") == level)
        ]


def measure(samples: Samples) -> Drift:
    """Measure what has changed."""
    reference, judged = samples.reference, samples.judged
    notes: list[str] = []
    if samples.other_model:
        notes.append(f"the reference was labelled by another model, {samples.other_model}: scores are not compared")
    shift = labels = score = None
    if samples.smaller and LABEL in reference.columns & judged.columns:
        shift = _shift(samples, notes)
    elif samples.smaller:
        notes.append("labels are not compared: labels/ has no column label")
    if shift is not None:
        noise = widest(samples.spread("labels", shift.level), float(np.sqrt(shift.comparison.noise)))
        labels = Measure(shift.size, noise)
    if samples.smaller and not samples.other_model and SCORE in reference.columns & judged.columns:
        comparison = compare(reference.scores, judged.scores, mean_drop(bin_centres()))
        score = _measure(reference.mean_score, judged.mean_score, -1, comparison, samples.spread("score"))
    return Drift(judged.rows, samples.smaller, shift, labels, score, _rejects(samples), tuple(notes))


def _shift(samples: Samples, notes: list[str]) -> Shift | None:
    reference, judged = dict(samples.reference.labels), dict(samples.judged.labels)
    if not samples.same_labels:
        common = reference.keys() & judged.keys() & samples.known_labels
        left = 1 - sum(judged[label] for label in common) / max(1, samples.judged.labelled)
        notes.append(
            f"that model has other classes: the {len(common):,} labels that occur in both are compared; "
            f"{left:.1%} of the images have another label"
        )
        reference, judged = ({label: mix[label] for label in common} for mix in (reference, judged))
        if not common:
            return None
    levels = [
        (name, _at_level(reference, node_of), _at_level(judged, node_of))
        for name, node_of in (samples.levels if samples.same_labels else ())
    ]
    return label_shift([*levels, (LABEL, reference, judged)])


def _at_level(mix: Mapping[str, int], node_of: Mapping[str, str]) -> dict[str, int]:
    nodes: dict[str, int] = {}
    for label, number in mix.items():
        node = node_of.get(label, label)
        nodes[node] = nodes.get(node, 0) + number
    return nodes


def _rejects(samples: Samples) -> Measure | None:
    before, now = (
        np.array([counts.labelled, rejects], np.int64)
        for counts, rejects in (
            (samples.reference, samples.reference_rejects),
            (samples.judged, samples.judged_rejects),
        )
    )
    if not before.sum() or not now.sum():
        return None
    # The drop of the mean of "has a label" is the rise of the proportion of rejects.
    comparison = compare(before, now, mean_drop(np.array([1.0, 0.0])))
    shares = before[1] / before.sum(), now[1] / now.sum()
    return _measure(float(shares[0]), float(shares[1]), 1, comparison, samples.spread("rejects"))


def _measure(before: float, now: float, sign: int, comparison: Comparison, spread: Sequence[float]) -> Measure:
    """Return a difference whose size is `now - before`, times `sign`."""
    return Measure(sign * (now - before), widest(spread, comparison.noise), before, now)


@dataclass(frozen=True, slots=True)
class Violation:
    """A guard that holds the run back."""

    guard: str
    value: float
    limit: float
    text: str

    def public(self) -> dict[str, Any]:
        """Return the violation as plain values."""
        return {"guard": self.guard, "value": round(self.value, 6), "limit": self.limit, "text": self.text}


def violations(drift: Drift | None, images: int, config: GuardConfig) -> list[Violation]:
    """Return the guards that hold a run back.

    Args:
        drift: None: there was nothing to compare with.
        images: the number of rows that are judged.
        config: the guards.
    """
    found = list(_violated_by(drift, config)) if drift is not None else []
    if config.min_images is not None and images < config.min_images:
        text = f"{images:,} images are new, fewer than {config.min_images:,}"
        found.insert(0, Violation("guard.min_images", images, config.min_images, text))
    return found


def _violated_by(drift: Drift, config: GuardConfig) -> Iterator[Violation]:
    limits = (
        ("guard.max_label_shift", config.max_label_shift, drift.labels),
        ("guard.max_score_drop", config.max_score_drop, drift.score),
        ("guard.max_reject_rise", config.max_reject_rise, drift.rejects),
    )
    for name, limit, measured in limits:
        if limit is not None and measured is not None and measured.beyond_noise and measured.size > limit:
            yield Violation(name, measured.size, limit, _text(name, measured, drift.shift))


def _text(name: str, measured: Measure, shift: Shift | None) -> str:
    if name == "guard.max_score_drop":
        return f"the mean score fell from {measured.before:.3f} to {measured.now:.3f}"
    if name == "guard.max_reject_rise":
        return f"the proportion of rejects rose from {measured.before:.2%} to {measured.now:.2%}"
    assert shift is not None
    changes = ", ".join(map(shown, shift.changes[:_SHOWN]))
    return f"the mix of the labels (level {shift.level}) shifted by {measured.size:.3f}: {changes}"


def shown(change: Change) -> str:
    """Return a change as a text.

    >>> shown(Change("cat", 0.1, 0.25))
    "'cat' 10.0 % to 25.0 %"
    """
    return f"{change.label[:60]!r} {100 * change.before:.1f} % to {100 * change.now:.1f} %"

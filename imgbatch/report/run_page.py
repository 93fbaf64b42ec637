"""Effects: the report of a run: one HTML file of at most 1 MB, with its figures and small pictures in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from imgbatch.config.secrets import masked
from imgbatch.report import run_figures, run_tables
from imgbatch.report.page import render
from imgbatch.report.parts import Card, Notice, Picture, Shown, Thumbnail, percent, short
from imgbatch.report.row_samples import SampledRow
from imgbatch.report.run_verdict import verdict_of
from imgbatch.report.run_view import LABELS_SHOWN, Moved, RunView
from imgbatch.terminal.plurals import counted

MAX_BYTES = 1_000_000
_FEWER = (1.0, 0.5, 0.2, 0.0)
"""The parts of the pictures that are kept if the page is too large."""


def page(view: RunView) -> str:
    """Return the report. If it is larger than 1 MB, pictures are left out."""
    text = ""
    for part in _FEWER:
        text = _render(view if part == 1 else _with_fewer_pictures(view, part))
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def _with_fewer_pictures(view: RunView, part: float) -> RunView:
    """Return a view with the most important part of the pictures."""
    pictures = view.pictures or {}
    uris = list(dict.fromkeys(row.uri for row in view.wanted()))
    kept = set(uris[: int(len(uris) * part)])
    left_out = Picture(reason="the page would be too large")
    return replace(view, pictures={uri: picture if uri in kept else left_out for uri, picture in pictures.items()})


def _render(view: RunView) -> str:
    facts, drift = view.facts, view.drift
    reference = drift.get("reference") or {}
    moved = view.moved()
    started, _ = view.times()
    shift = drift.get("labels") or {}
    figure = run_figures.changed_labels(shift, int(reference.get("labelled", 0)), view.now.labelled)
    return render(
        "report.html",
        title=f"Report of run {facts.get('run_id')}",
        kind="Report of a run",
        heading=f"{_name(view)}, {started:%d %B %Y, %H:%M} UTC" if started else _name(view),
        verdict=verdict_of(view),
        notices=list(_notices(view)),
        key_figures=list(run_tables.key_figures(view)),
        reconciliation=run_tables.reconciliation(view),
        counts=run_tables.counts(view),
        last_run=_last_run(view),
        plan=run_tables.plan_in_words(view),
        cluster=run_tables.cluster_in_words(view),
        rate=run_figures.arrivals(facts.get("arrivals") or {}),
        stages=run_figures.stages(facts.get("stages") or {}, facts.get("seconds") or {}, facts.get("bottleneck")),
        label_mix=figure or run_figures.frequent_labels(view.now),
        is_compared=figure is not None,
        mix_lead=_mix_lead(view),
        levels=list(run_tables.level_tables(view)),
        moved_title="What moved" if shift else "Most frequent labels",
        moved=[_card(view, each) for each in moved[:LABELS_SHOWN]],
        more_moved=[_card(view, each) for each in moved[LABELS_SHOWN:]],
        scores=run_figures.scores(view.now, view.before, drift.get("score") or {}),
        canary=run_tables.canary(view),
        uncertain=[_labelled(view, row) for row in view.uncertain()],
        rejects=list(_rejects(view)),
        rejects_in_words=_rejects_in_words(view),
        random=[_labelled(view, row) for row in view.at_random()],
        random_of=f"{len(view.at_random()):,} of {counted(view.now.labelled, 'new image')}, drawn at random.",
        provenance=run_tables.provenance(view),
        commands=list(run_tables.commands(view)),
    )


def _name(view: RunView) -> str:
    return short(view.output.rstrip("/").rpartition("/")[2], 60)


def _last_run(view: RunView) -> str:
    if not view.last:
        return "No run of this output has succeeded before, so there is nothing to compare with."
    other = (view.drift.get("reference") or {}).get("output")
    run = masked(str(view.last.get("run_id", "")))
    if other:
        return f"The last run is that of guard.reference: {run} of {masked(str(other))}."
    return f"The last run is the last success before this one, {run}."


def _notices(view: RunView) -> Iterator[Notice]:
    if view.facts.get("fingerprint") and view.last.get("fingerprint"):
        changed = [
            name
            for name in ("weights", "labels", "preprocess", "taxonomy")
            if view.facts["fingerprint"].get(name) != view.last["fingerprint"].get(name)
        ]
        if changed:
            yield Notice("Another model.", f"The last run had other {', '.join(changed)}.", is_warning=True)
    notes = [str(note) for note in view.drift.get("notes") or ()]
    if notes and view.drift.get("reference"):
        yield Notice("The comparison is limited.", masked("; ".join(notes)))
    if not view.new_rows and view.now.rows:
        yield Notice("This run added no row.", "Pictures and labels are those of the runs since the last success.")


def _mix_lead(view: RunView) -> str:
    reference = view.drift.get("reference")
    if not reference or view.before is None:
        notes = view.drift.get("notes") or ()
        reason = f": {masked(str(notes[0]))}" if notes else ", since the run has not got so far"
        return (
            f"The labels of {counted(view.now.labelled, 'new image')}. They are not compared with earlier ones{reason}."
        )
    return (
        f"{counted(view.now.labelled, 'new image')} compared with {counted(reference['labelled'], 'image')} of run "
        f"{reference['through']}. A label moved if its dot is outside of the grey range."
    )


def _card(view: RunView, moved: Moved) -> Card:
    if moved.before is None:
        text = f"{percent(moved.now)} of the new images."
    else:
        text = f"{percent(moved.before)} before, {percent(moved.now)} now ({100 * (moved.now - moved.before):+.1f} points)."
        reference = view.drift.get("reference") or {}
        if reference.get("labelled") and view.now.labelled:
            low, high = run_figures.chance_range(moved.before, moved.now, int(reference["labelled"]), view.now.labelled)
            text += " Chance alone may explain this." if low <= moved.now <= high else ""
    shown = [_labelled(view, row, "last run: " if is_earlier else "") for row, is_earlier in moved.shown()]
    if not shown:
        text += " No image of it was kept for this report."
    return Card(moved.label[:200] or "(no label)", text, tuple(shown))


def _labelled(view: RunView, row: SampledRow, prefix: str = "") -> Thumbnail:
    lines = []
    if row.second and row.second_score is not None:
        lines.append(f"next: {short(row.second, 60)} {row.second_score:.2f}")
    score = f" {row.score:.2f}" if row.score is not None else ""
    return _thumbnail(view, row, f"{prefix}{short(row.label or 'no label', 60)}{score}", lines)


def _rejects(view: RunView) -> Iterator[tuple[str, list[Thumbnail]]]:
    for reason, rows in view.rejects().items():
        title = f"{reason}: {counted(view.now.rejects[reason], 'image')}"
        yield title, [_thumbnail(view, row, row.reason, [masked(row.message)]) for row in rows]


def _rejects_in_words(view: RunView) -> str:
    rejected = view.now.rejected
    if not rejected:
        return "No image was rejected."
    text = f"{counted(rejected, 'image')} rejected, {percent(rejected / max(1, view.now.rows), 2)} of the new images."
    found: Mapping[str, float] = view.drift.get("rejects") or {}
    if "before" in found:
        noise = "more than noise" if found.get("beyond_noise") else "no change beyond noise"
        text += f" Without retried ones: {percent(found['before'], 2)} before, {percent(found['now'], 2)} now, {noise}."
    return text


def _thumbnail(view: RunView, row: SampledRow, title: str, lines: list[str]) -> Thumbnail:
    picture = None
    if view.pictures is not None:
        reason = row.reason or "it was not read"
        picture = view.pictures.get(row.uri, Picture(reason=reason))
    shown = Shown(masked(row.uri), picture)
    return shown.thumbnail(title, *lines, command=run_tables.explain_command(view, row.uri))

"""Values: the verdict on a run in a sentence, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from imgbatch.config.secrets import masked
from imgbatch.errors import EXIT_CODES
from imgbatch.quality.drift import Change
from imgbatch.quality.guards import shown
from imgbatch.report.parts import Verdict
from imgbatch.report.run_view import RunView
from imgbatch.terminal.plurals import counted, plural

_HELD_BACK, _INPUT = 8, 2
_SHOWN = 3  # labels in a sentence


def verdict_of(view: RunView) -> Verdict:
    """Return the verdict on a run."""
    if view.state == "running":
        return Verdict(_so_far(view), "plain", "running", ("Write this report again when the run has ended.",))
    if view.state == "lost":
        text = f"{_so_far(view)} Its heartbeat has stopped, and no end is recorded: its process was killed."
        return Verdict(
            text, "bad", "lost", ("Run the same command again. It continues with the images that have no row.",)
        )
    if view.state == "succeeded":
        return _of_success(view)
    if view.facts.get("exit_code") == _HELD_BACK:
        return _of_guard(view)
    stopped = view.state == "interrupted"
    error = masked(str(view.facts.get("error") or "no error is recorded"))
    text = f"{_so_far(view)} {'It was stopped' if stopped else 'It ended with an error'}: {error}"
    return Verdict(text, "warning" if stopped else "bad", view.state, tuple(_after_failure(view)))


def _so_far(view: RunView) -> str:
    listed, done = view.counts.get("listed", 0), view.counts.get("already_done", 0)
    if not listed:
        return "No image was listed yet." if view.state == "running" else "No image was listed."
    rest = max(0, listed - done - view.new_rows)
    earlier = f", {done:,} had a row before" if done else ""
    return (
        f"Of {counted(listed, 'listed image')}, this run labelled {view.this_run.get('labelled', 0):,} and rejected "
        f"{view.this_run.get('rejected', 0):,}{earlier}; {rest:,} {plural(rest, 'has', 'have')} no row."
    )


def _of_success(view: RunView) -> Verdict:
    rejected = int(view.this_run.get("rejected", 0))
    text = f"{counted(int(view.this_run.get('labelled', 0)), 'image')} labelled, {rejected:,} rejected; all counts reconcile."
    findings = [*changes(view)]
    accepted = view.drift.get("accepted") or {}
    if accepted:
        text += f" The rows of run {accepted.get('run_id')} were accepted by {accepted.get('by')}."
    to_do = [*_checks(view)]
    if findings:
        return Verdict(f"{text} {' '.join(findings)}", "warning", "succeeded, with changes", tuple(to_do))
    if view.before is not None:
        text += " Labels, scores and rejects have not changed beyond noise."
    elif notes := view.drift.get("notes"):
        text += f" Nothing was compared with earlier labels: {masked(str(notes[0]))}."
    return Verdict(text, "good", "succeeded", tuple(to_do) or ("Nothing needs your attention.",))


def _of_guard(view: RunView) -> Verdict:
    failed = [score for score in view.facts.get("canary") or () if not score.get("passed", True)]
    if not view.held_back:
        score: Mapping[str, Any] = failed[0] if failed else {}
        text = (
            f"The canary was labelled wrongly: {score.get('right', 0):,} of {score.get('images', 0):,} images are right, "
            f"{100 * score.get('required', 0):g} % are required. No row of that node was committed."
        )
        return Verdict(text, "bad", "held back", (
            "Compare the model's weights, preprocessing and labels with those that were evaluated.",
            "Correct the model, and run the same command again. The canary cannot be accepted.",
        ))  # fmt: skip
    texts = [f"{masked(str(each['text']))} ({each['guard']}={each['limit']:g})" for each in view.held_back]
    rows, are = counted(view.new_rows, "new row"), plural(view.new_rows, "is", "are")
    text = (
        f"{sentence('; '.join(texts))}. All {rows} {are} kept, and _SUCCESS is not written, so readers that wait for it do not "
        "use them."
    )
    return Verdict(text, "bad", "held back", (
        "Look at “What moved” below: are these labels right?",
        f"If they are, run the same command with --set guard.accept={view.facts.get('run_id')}.",
        "If they are not, correct the model and use a new output, or correct the images.",
    ))  # fmt: skip


def changes(view: RunView) -> Iterator[str]:
    """Yield a sentence about each measurement that has changed beyond noise."""
    labels, score, rejects = (view.drift.get(name) or {} for name in ("labels", "score", "rejects"))
    if labels.get("beyond_noise"):
        moved = [Change(change["label"], change["before"], change["now"]) for change in labels["changed"][:_SHOWN]]
        yield f"The mix of the labels has changed: {', '.join(map(shown, moved))}."
    if score.get("beyond_noise"):
        yield f"The mean score fell from {score['before']:.3f} to {score['now']:.3f}."
    if rejects.get("beyond_noise"):
        yield f"The proportion of rejects rose from {rejects['before']:.2%} to {rejects['now']:.2%}."


def _checks(view: RunView) -> Iterator[str]:
    if view.drift.get("labels", {}).get("beyond_noise"):
        yield "Look at “What moved”: are these labels right?"
    if view.drift.get("score", {}).get("beyond_noise"):
        yield "Look at “Least certain”: are these images of a new kind?"
    if view.drift.get("rejects", {}).get("beyond_noise"):
        yield "Look at “Rejects”: who wrote these files?"
    left_out = view.facts.get("left_out") or view.facts.get("node_faults") or {}
    if left_out:
        yield f"Check {counted(len(left_out), 'node')}: {', '.join(map(str, left_out))}. See “Provenance”."


def _after_failure(view: RunView) -> Iterator[str]:
    code = view.facts.get("exit_code")
    entry = next((entry for entry in EXIT_CODES if entry.code == code), None)
    if entry is None:
        yield "Run the same command again. It continues with the images that have no row."
        return
    yield f"Exit code {code}: {entry.meaning.replace('`', '')}."
    if entry.action:
        yield f"{sentence(entry.action.replace('`', ''))}."


def sentence(text: str) -> str:
    """Return a text with a capital letter at its beginning."""
    return f"{text[:1].upper()}{text[1:]}"

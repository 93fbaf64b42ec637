"""Values: the state of a run as text for people, and as an object for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from imgbatch.config.secrets import masked
from imgbatch.errors import EXIT_CODES, retry_helps
from imgbatch.terminal.plurals import clock, counted, number

_LEFT = 12  # columns of the names
_FACTS = ("stage", "stages", "step", "progress", "bottleneck", "counts", "rejects", "seconds", "images_per_second")
_TIMES = ("started", "written", "finished")


def as_object(facts: Mapping[str, Any], state: str, exit_code: int, output: str, age_s: float | None) -> dict[str, Any]:
    """Return the state of a run for `--json`. Facts that the record lacks are null."""
    return {
        "run_id": facts.get("run_id"),
        "output": masked(output),
        "state": state,
        "exit_code": None if state == "running" else exit_code,
        "retry": None if state == "running" else retry_helps(exit_code),
        **{name: facts.get(name) for name in (*_FACTS, *_TIMES)},
        "model": (facts.get("model") or {}).get("reference"),
        "heartbeat": {"count": facts.get("heartbeat"), "age_s": None if age_s is None else round(age_s, 1)},
        "error": facts.get("error"),
    }


def as_lines(
    facts: Mapping[str, Any], state: str, exit_code: int, output: str, age_s: float | None, age_of: str
) -> Iterator[str]:
    """Yield the lines of `imgbatch status`."""
    rows = [("run", _headline(facts, state, exit_code, age_s)), ("output", masked(output))]
    if state == "running":
        rows += [("step", _step(facts)), ("images", images(facts)), ("rejects", rejects(facts.get("rejects")))]
    else:
        rows += [("images", _totals(facts)), ("rejects", rejects(facts.get("rejects")))]
    rows += [("work", work(facts)), ("time", stages(facts)), ("commits", _commits(facts))]
    if state in ("running", "lost") and age_s is not None:
        rows.append(("heartbeat", f"{_duration(age_s)} ago" + (f" ({age_of})" if age_of else "")))
    rows += [("error", masked(str(facts.get("error") or ""))), ("to do", _to_do(state, exit_code))]
    for name, text in rows:
        if text:
            yield f"{name:<{_LEFT}}{text}"


def as_line(facts: Mapping[str, Any], age_s: float | None) -> str:
    """Return the state of a running run as one line, without what changes all the time.

    >>> as_line({"stage": "labelling", "progress": {"done": 5, "total": 10}, "rejects": {"empty": 1}}, 1.0)
    'labelling: 5 of 10 (50 %), 1 reject'
    """
    found, step = facts.get("rejects") or {}, facts.get("step") or {}
    shown = [images(facts) or step.get("text")]
    if isinstance(found, Mapping) and found:
        shown.append(counted(sum(found.values()), "reject"))
    head = facts.get("stage") or step.get("name") or "running"
    text = f"{head}: {', '.join(filter(None, shown))}".rstrip(": ")
    return text if age_s is None or age_s < 30 else f"{text}; no heartbeat for {clock(age_s)}"


def images(facts: Mapping[str, Any]) -> str:
    """Return how far a running run is; empty while it has no images to label.

    >>> images({"progress": {"done": 1508, "total": 3000, "rate": 96.2, "seconds_left": 15.5}, "counts": {"already_done": 20}})
    '1,508 of 3,000 (50 %), 96/s, about 0:15 left; 20 more were done before'
    """
    progress = facts.get("progress") or {}
    if progress.get("done") is None:
        return ""
    done, total = progress["done"], progress.get("total")
    shown = [
        f"{done:,}" if total is None else f"{done:,} of {total:,}" + (f" ({100 * done // total} %)" if total else "")
    ]
    shown += [f"{number(progress['rate'])}/s"] if progress.get("rate") else []
    shown += [f"about {clock(progress['seconds_left'])} left"] if progress.get("seconds_left") is not None else []
    before = (facts.get("counts") or {}).get("already_done")
    return ", ".join(shown) + (f"; {before:,} more were done before" if before else "")


def rejects(found: Any) -> str:
    """Return the rejects by reason.

    >>> rejects({"truncated": 1, "empty": 3})
    '4: 3 empty, 1 truncated'
    """
    if not isinstance(found, Mapping) or not found:
        return ""
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return f"{sum(found.values()):,}: {', '.join(f'{count:,} {reason}' for reason, count in ordered)}"


def work(facts: Mapping[str, Any]) -> str:
    """Return the share of each stage in the time of the workers, and which stage is the bottleneck.

    >>> work({"seconds": {"fetch": 1.0, "decode": 3.0, "classify": 6.0, "commit": 0.5}, "bottleneck": "classify"})
    'fetch 10 %, decode 30 %, classify 60 % of 0:10 of work; commits 0.5 s; bottleneck: classify'
    """
    seconds = facts.get("seconds")
    if not isinstance(seconds, Mapping):  # in the record of a training it is a number
        return ""
    workers = {stage: value for stage, value in seconds.items() if stage != "commit"}
    total = sum(workers.values())
    shown = []
    if total:
        shares = ", ".join(f"{stage} {100 * value / total:.0f} %" for stage, value in workers.items())
        shown.append(f"{shares} of {clock(total)} of work")
    shown += [f"commits {seconds['commit']:.1f} s"] if "commit" in seconds else []
    shown += [f"bottleneck: {facts['bottleneck']}"] if facts.get("bottleneck") else []
    return "; ".join(shown)


def stages(facts: Mapping[str, Any]) -> str:
    """Return the duration of each stage of the run so far.

    >>> stages({"stages": {"listing": 3.2, "starting": 27.0}})
    'listing 0:03, starting 0:27'
    """
    return ", ".join(f"{stage} {clock(seconds)}" for stage, seconds in (facts.get("stages") or {}).items())


def _headline(facts: Mapping[str, Any], state: str, exit_code: int, age_s: float | None) -> str:
    """Return the first line: which run, and its state."""
    run_id, stage = facts.get("run_id", "?"), facts.get("stage")
    if state == "running":
        lasted = _seconds_between(facts.get("started"), facts.get("written"))
        return f"{run_id} is running" + (f", {stage}" if stage else "") + _since(lasted, " since its start", age_s)
    if state == "lost":
        return (
            f"{run_id} is lost"
            + (f" while {stage}" if stage else "")
            + ": its heartbeat stopped, and no end is recorded"
        )
    lasted = _seconds_between(facts.get("started"), facts.get("finished"))
    text = f"{run_id} {state}"
    if exit_code:
        text += (f" while {stage}" if stage else "") + f", exit code {exit_code}"
    return text + _since(lasted, "")


def _step(facts: Mapping[str, Any]) -> str:
    """Return what the run does now, unless that is said by its stage and its images."""
    step = facts.get("step") or {}
    if not step.get("name") or (step["name"] == facts.get("stage") and (facts.get("progress") or {}).get("done")):
        return ""
    return (
        f"{step['name']}: {step['text']}"
        if step.get("text")
        else f"{step['name']} ({clock(step.get('seconds') or 0.0)})"
    )


def _since(lasted: float | None, of: str, age_s: float | None = None) -> str:
    return "" if lasted is None else f", {clock(lasted + (age_s or 0.0))}{of}"


def _totals(facts: Mapping[str, Any]) -> str:
    """Return the counts of a run that has ended."""
    counts = facts.get("counts") or {}
    names = ("listed", "labelled", "rejected", "already_done", "kept")
    shown = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in names if counts.get(name) is not None)
    rate = facts.get("images_per_second")
    return f"{shown}; {number(rate)}/s" if shown and rate else shown


def _commits(facts: Mapping[str, Any]) -> str:
    """Return how many rows are safe, and since when. Both times are those of the run's own clock."""
    progress = facts.get("progress") or {}
    if not progress.get("last_commit"):
        return ""
    before = _seconds_between(progress["last_commit"], facts.get("written"))
    ago = f", the last of them {_duration(before)} before the last heartbeat" if before is not None else ""
    return f"{counted(progress.get('committed') or 0, 'row')} of this run in the tables{ago}"


def _to_do(state: str, exit_code: int) -> str:
    if state in ("running", "succeeded"):
        return ""
    if state == "lost":
        return "look for its process and its log; run the same command again to resume"
    return next((entry.action.replace("`", "") for entry in EXIT_CODES if entry.code == exit_code), "")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else clock(seconds)


def _seconds_between(start: Any, end: Any) -> float | None:
    if not isinstance(start, str) or not isinstance(end, str):
        return None
    return max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())

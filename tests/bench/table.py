"""What was measured, as Markdown."""

from __future__ import annotations

import statistics
from typing import Any

_HEAD = (
    "pipeline", "total s", "first row s", "steady images/s", "steady / limit", "requests an image", "total / ours"
)  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """Return the figures of bench.json: the stages, each run, medians where there are several, and remarks."""
    machine = found["machine"]
    lines = [
        f"{found['date']}, {machine['cores']} cores of {machine['processor']}, {found['objects']} objects",
        "",
        "| stage | core-ms an image |",
        "| --- | --- |",
        *(f"| {stage} | {cost:.2f} |" for stage, cost in found["stages_ms"].items()),
        f"| **limit** | {found['limit_per_s']:.0f} images/s |",
        "",
        _row(*_HEAD),
        _row(*["---"] * len(_HEAD)),
    ]
    own = median(found["runs"], "ours", "total_s")
    lines += [_run(run, found, own) for run in found["runs"]]
    for name in names(found):
        runs = [run for run in found["runs"] if run["name"] == name]
        if len(runs) > 1:
            middle = {key: median(runs, name, key) for key in ("total_s", "first_row_s", "steady_per_s")}
            requests = {"all": statistics.median(sum(run["requests"].values()) for run in runs)}
            label = f"**{name}, median of {len(runs)}**"
            lines.append(_run({**middle, "name": label, "requests": requests}, found, own))
    return "\n".join([*lines, "", *_remarks(found)])


def names(found: dict[str, Any]) -> list[str]:
    """Return the pipelines that were run, in their order."""
    return list(dict.fromkeys(run["name"] for run in found["runs"]))


def median(runs: list[dict[str, Any]], name: str, key: str) -> float | None:
    """Return the median of what a pipeline's runs say under a key, None if they say nothing."""
    values = [run[key] for run in runs if run["name"] == name and run.get(key) is not None]
    return statistics.median(values) if values else None


def _run(run: dict[str, Any], found: dict[str, Any], own: float | None) -> str:
    first, steady = run.get("first_row_s"), run.get("steady_per_s")
    return _row(
        run["name"],
        f"{run['total_s']:.1f}",
        f"{first:.1f}" if first else "",
        f"{steady:.0f}" if steady else "",
        f"{steady / found['limit_per_s']:.2f}" if steady else "",
        f"{sum(run['requests'].values()) / found['objects']:.2f}",
        f"{run['total_s'] / own:.1f}" if own else "",
    )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _remarks(found: dict[str, Any]) -> list[str]:
    """Return a line each for the very first start, requests, processes, and the parity of the answers."""
    ours = [run for run in found["runs"] if run["name"] == "ours"]
    requests = ", ".join(f"{count:,} {kind}" for kind, count in sorted(ours[-1]["requests"].items()))
    processes = ", ".join(
        f"{kind} {use['cpu_s']:.1f} s and {use['peak_mb']:,.0f} MB"
        for kind, use in sorted(ours[-1]["processes"].items())
    )
    parity = found["parity"]
    lines = [
        f"First row of the very first run, before any model was converted: {found['first_row_very_first_s']:.1f} s.",
        f"Requests of a run of ours: {requests}; a HEAD counts as a GET.",
        f"Its processes, CPU seconds of all and peak RSS of the largest: {processes}.",
        f"Same class as Pillow, the model card's transform and torch in 32 bits: {parity['agreement']:.1%} of "
        f"{parity['images']} images.",
    ]
    if parity["right_fast"] is not None:
        lines.append(f"Right: {parity['right_fast']} of ours, {parity['right_reference']} of theirs.")
    return [f"- {line}" for line in lines]

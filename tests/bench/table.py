"""The results of the benchmark as Markdown."""

from __future__ import annotations

import statistics
from typing import Any

_HEAD = (
    "pipeline", "total s", "first row s", "steady images/s", "steady / limit", "requests per image", "total / ours"
)  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Return the figures of bench.json: the stages, each run, medians of several runs, and remarks."""
    machine = results["machine"]
    lines = [
        f"{results['date']}, {machine['cores']} cores of {machine['processor']}, {results['objects']} objects",
        "",
        "| stage | core-ms per image |",
        "| --- | --- |",
        *(f"| {stage} | {cost:.2f} |" for stage, cost in results["stages_ms"].items()),
        f"| **limit** | {results['limit_per_s']:.0f} images/s |",
        "",
        _row(*_HEAD),
        _row(*["---"] * len(_HEAD)),
    ]
    own = median(results["runs"], "ours", "total_s")
    lines += [_run(run, results, own) for run in results["runs"]]
    for name in names(results):
        runs = [run for run in results["runs"] if run["name"] == name]
        if len(runs) > 1:
            middle = {key: median(runs, name, key) for key in ("total_s", "first_row_s", "steady_per_s")}
            requests = {"all": statistics.median(sum(run["requests"].values()) for run in runs)}
            label = f"**{name}, median of {len(runs)}**"
            lines.append(_run({**middle, "name": label, "requests": requests}, results, own))
    return "\n".join([*lines, "", *_remarks(results)])


def names(results: dict[str, Any]) -> list[str]:
    """Return the programs that were run, in their order."""
    return list(dict.fromkeys(run["name"] for run in results["runs"]))


def median(runs: list[dict[str, Any]], name: str, key: str) -> float | None:
    """Return the median of a program's runs under a key, None if no run has it."""
    values = [run[key] for run in runs if run["name"] == name and run.get(key) is not None]
    return statistics.median(values) if values else None


def _run(run: dict[str, Any], results: dict[str, Any], own: float | None) -> str:
    first, steady = run.get("first_row_s"), run.get("steady_per_s")
    return _row(
        run["name"],
        f"{run['total_s']:.1f}",
        f"{first:.1f}" if first else "",
        f"{steady:.0f}" if steady else "",
        f"{steady / results['limit_per_s']:.2f}" if steady else "",
        f"{sum(run['requests'].values()) / results['objects']:.2f}",
        f"{run['total_s'] / own:.1f}" if own else "",
    )


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _remarks(results: dict[str, Any]) -> list[str]:
    """Return lines about the very first run, requests, processes, and the agreement of the labels."""
    ours = [run for run in results["runs"] if run["name"] == "ours"]
    requests = ", ".join(f"{count:,} {kind}" for kind, count in sorted(ours[-1]["requests"].items()))
    processes = ", ".join(
        f"{kind} {use['cpu_s']:.1f} s and {use['peak_mb']:,.0f} MB"
        for kind, use in sorted(ours[-1]["processes"].items())
    )
    parity = results["parity"]
    lines = [
        f"First row of the very first run, before any model was converted: {results['first_row_very_first_s']:.1f} s.",
        f"Requests of a run of imgbatch: {requests}; a HEAD counts as a GET.",
        f"Its processes, with the CPU seconds of all and the peak RSS of the largest: {processes}.",
        f"Same class as Pillow, the model card's transform and torch in 32 bits: {parity['agreement']:.1%} of "
        f"{parity['images']} images.",
    ]
    if parity["right_fast"] is not None:
        lines.append(f"Correct: {parity['right_fast']} by imgbatch, {parity['right_reference']} by the others.")
    return [f"- {line}" for line in lines]

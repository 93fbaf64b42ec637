"""Values: the numbers of a run's report: counts, time and cost, the mix of labels by level, provenance, commands."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from imgbatch.config.secrets import masked
from imgbatch.report.parts import Command, KeyFigure, Table, percent, short
from imgbatch.report.run_view import RunView
from imgbatch.terminal.plurals import clock, counted, number

_MAX_LABELS = 300
"""The maximum number of rows of a table of labels."""

_COUNTS = {
    "listed": "listed images",
    "already_done": "of these, with a row before this run",
    "updated": "of these, with other carried values now",
    "labelled": "labelled, in the tables",
    "rejected": "rejected, in the tables",
    "kept": "kept: rows of images that are not listed any more",
    "ignored": "ignored objects: no image by their names",
    "duplicates": "duplicates in the inputs",
    "unpaired_sidecars": "sidecars without an image",
}


def key_figures(view: RunView) -> Iterator[KeyFigure]:
    """Yield the numbers at the top."""
    run, last = view.this_run, view.last.get("this_run") or {}

    def earlier(text: str) -> str:
        return f"last run: {text}" if text else ""

    def of_last(name: str) -> str:
        return f"{int(last[name]):,}" if last.get(name) is not None else ""

    yield KeyFigure("labelled", f"{int(run.get('labelled', 0)):,}", earlier(of_last("labelled")))
    yield KeyFigure("rejected", f"{int(run.get('rejected', 0)):,}", earlier(of_last("rejected")))
    yield KeyFigure(
        "time", clock(float(run.get("seconds", 0))), earlier(clock(float(last.get("seconds") or 0)) if last else "")
    )
    rate, last_rate = (facts.get("images_per_second") for facts in (view.facts, view.last))
    if rate:
        yield KeyFigure("images a second", number(float(rate)), earlier(number(float(last_rate)) if last_rate else ""))
    if cost := _cost(view):
        yield KeyFigure("cost", f"{cost[0]:,.2f}", cost[1])
    if view.now.labelled and view.now.score_sum:
        mean = view.before.mean_score if view.before is not None and view.before.labelled else None
        yield KeyFigure("mean score", f"{view.now.mean_score:.3f}", earlier(f"{mean:.3f}" if mean is not None else ""))


def counts(view: RunView) -> Table:
    """Return the counts of the output, next to those after the last success."""
    now, last = view.counts, view.last.get("counts") or {}
    rows: list[tuple[str | int, ...]] = []
    for name, title in _COUNTS.items():
        if now.get(name) or last.get(name) or name in ("listed", "labelled", "rejected"):
            rows.append((title, *_compared(now.get(name), last.get(name))))
    run, last_run = view.this_run, view.last.get("this_run") or {}
    for name in ("labelled", "rejected"):
        rows.append((f"{name} by this run alone", *_compared(run.get(name), last_run.get(name))))
    head = ["count", "#now", "#last run", "#change"]
    if not view.last:
        head, rows = head[:2], [row[:2] for row in rows]
    return Table.of("counts", head, rows)


def _compared(now: int | None, last: int | None) -> tuple[str, str, str]:
    both = now is not None and last is not None
    shown = [f"{value:,}" if value is not None else "–" for value in (now, last)]
    return shown[0], shown[1], f"{(now or 0) - (last or 0):+,}" if both else "–"


def reconciliation(view: RunView) -> str:
    """Return how the counts reconcile."""
    found = view.counts
    listed, labelled, rejected = (int(found.get(name, 0)) for name in ("listed", "labelled", "rejected"))
    if "kept" in found:  # the audit has read the tables
        kept = (
            f" Rows of {counted(found['kept'], 'image')} that are not listed any more are kept."
            if found["kept"]
            else ""
        )
        if listed == labelled + rejected:
            return (
                f"{listed:,} listed = {labelled:,} labelled + {rejected:,} rejected: the tables were read back, and each "
                f"listed image is in exactly one row.{kept}"
            )
        return (
            f"{listed:,} listed, but {labelled:,} labelled + {rejected:,} rejected: the counts do not reconcile.{kept}"
        )
    rest = max(0, listed - int(found.get("already_done", 0)) - view.new_rows)
    return (
        f"{listed:,} listed, {found.get('already_done', 0):,} with a row before this run, {view.new_rows:,} with a row of this "
        f"run, {rest:,} without one. The tables were not read back, since the run has not got so far."
    )


def plan_in_words(view: RunView) -> str:
    """Return how the run compares with its plan."""
    plan = view.facts.get("plan")
    if not isinstance(plan, Mapping):
        return "No plan was made for this run. imgbatch plan forecasts the time and the cost of a run."
    low, mid, high = (clock(float(plan["predicted_s"][name])) for name in ("low", "mid", "high"))
    text = f"The plan {plan.get('id')} forecast {mid} ({low} to {high}), the run took {clock(float(plan['actual_s']))}"
    if "not_compared" in plan:
        return f"{text}. They are not compared: {masked(str(plan['not_compared']))}."
    return f"{text}, {plan['deviation']:+.0%}: {'inside' if plan.get('inside') else 'outside of'} the interval."


def _cost(view: RunView) -> tuple[float, str] | None:
    """Return the cost of the run by the price of the plan, and a note; None without a price."""
    prices = view.plan.get("prices") or ()
    price: Mapping[str, Any] = prices[0] if prices else {}
    per_hour = price.get("on_demand_per_hour")
    nodes = (view.facts.get("cluster") or {}).get("nodes")
    if per_hour is None or not nodes:
        return None
    cost = float(view.this_run.get("seconds", 0)) / 3600 * nodes * per_hour
    planned = price.get("on_demand") or {}
    forecast = f", planned {planned['low']:,.2f} to {planned['high']:,.2f}" if "low" in planned else ""
    return cost, f"{counted(nodes, 'node')}, {price.get('machine')}{forecast}"


def cluster_in_words(view: RunView) -> str:
    """Return on what the run worked."""
    cluster = view.facts.get("cluster") or {}
    if not cluster:
        return ""
    gpus = f", {counted(cluster['gpus'], 'GPU')}" if cluster.get("gpus") else ""
    parts = [
        counted(cluster.get("nodes", 0), "node"), f"{counted(cluster.get('cpus', 0), 'core')}{gpus}",
        counted(cluster.get("actors", 0), "actor"),
    ]  # fmt: skip
    runtime = ", ".join(str(view.facts[name]) for name in ("runtime", "device", "dtype") if view.facts.get(name))
    return f"{', '.join(parts)}{f'; {runtime}' if runtime else ''}."


def level_tables(view: RunView) -> Iterator[tuple[str, Table]]:
    """Yield the title and the table of each level, coarse to fine; the last one is that of the labels."""
    levels: list[tuple[str, Mapping[str, str]]] = [*view.levels, ("label", {})]
    for name, node_of in levels:
        now, before = (
            _at_level(counts.labels, node_of) if counts is not None else None for counts in (view.now, view.before)
        )
        if not now:
            continue
        table = _level_table(name, now, before)
        yield (
            f"Level {name}: {counted(table.total, 'label')}" if view.levels else f"All {counted(table.total, 'label')}",
            table,
        )


def _at_level(labels: Mapping[str, int], node_of: Mapping[str, str]) -> Counter[str]:
    nodes: Counter[str] = Counter()
    for label, images in labels.items():
        nodes[node_of.get(label, label)] += images
    return nodes


def _level_table(name: str, now: Counter[str], before: Counter[str] | None) -> Table:
    total = max(1, now.total())
    if before is None:
        rows = [(label, images, percent(images / total, 2)) for label, images in now.most_common(_MAX_LABELS)]
        return Table.of(f"labels of level {name}", ["label", "#images", "#part"], rows, total=len(now))
    earlier = max(1, before.total())
    points = {label: now[label] / total - before[label] / earlier for label in {**now, **before}}
    order = sorted(points, key=lambda label: (-abs(points[label]), label))
    compared = [
        (label, now[label], percent(now[label] / total, 2), before[label], percent(before[label] / earlier, 2),
         f"{100 * points[label]:+.2f}")
        for label in order[:_MAX_LABELS]
    ]  # fmt: skip
    head = ["label", "#images", "#part", "#last run", "#part then", "#points"]
    return Table.of(f"labels of level {name}", head, compared, total=len(points))


def canary(view: RunView) -> Table | None:
    """Return the scores of the canary by node."""
    rows = [
        (str(score.get("host", "")), f"{score.get('runtime', '')}, {score.get('device', '')}",
         f"{score.get('right', 0):,} of {score.get('images', 0):,}", percent(float(score.get("accuracy", 0))),
         percent(float(score.get("required", 0))), "passed" if score.get("passed") else "failed")
        for score in view.facts.get("canary") or ()
    ]  # fmt: skip
    head = ["node", "runtime and device", "#right", "#accuracy", "#required", "result"]
    return Table.of("canary", head, rows) if rows else None


def provenance(view: RunView) -> Table:
    """Return what the labels were made with."""
    facts = view.facts
    config, model = facts.get("config") or {}, facts.get("model") or {}
    started, ended = view.times()
    rows: list[tuple[str, str]] = [
        ("run", str(facts.get("run_id", ""))),
        ("started", started.strftime("%Y-%m-%d %H:%M:%S %Z") if started else ""),
        ("ended" if facts.get("finished") else "last sign of life", ended.strftime("%Y-%m-%d %H:%M:%S %Z") if ended else ""),
        *(("input", masked(str(uri))) for uri in (config.get("input") or ())[:10]),
        ("output", view.output),
        ("model", masked(str(model.get("name", "")))),
        ("digest of the model", str(model.get("digest", ""))),
        ("compared with run", str((view.drift.get("reference") or {}).get("through", ""))),
        *((name, masked(str(value))) for name, value in (facts.get("fingerprint") or {}).items()
          if value not in ([], None, model.get("digest"))),
        ("versions", ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())),
        ("driver", ", ".join(f"{name} {value}" for name, value in (facts.get("hardware") or {}).items())),
        *((f"node {short(str(host), 40)}", masked(str(text))) for host, text in (facts.get("node_faults") or {}).items()),
    ]  # fmt: skip
    return Table.of("provenance", ["fact", "value"], [row for row in rows if row[1]])


def explain_command(view: RunView, uri: str) -> str:
    """Return the command that tells everything of one image; empty if its URI has a secret."""
    return "" if masked(uri) != uri else shlex.join(["imgbatch", "explain", view.output, uri])


def commands(view: RunView) -> Iterator[Command]:
    """Yield what to run next."""
    output, run_id = shlex.quote(view.output), view.facts.get("run_id")
    if view.state == "running":
        yield Command("Follow the run", f"imgbatch status {output} --watch")
    if view.held_back:
        yield Command("If the labels are right: run the same command again, with", f"--set guard.accept={run_id}")
    if view.state == "succeeded":
        yield Command(
            "Check the tables again, and label 100 images again to compare", f"imgbatch verify {output} --sample 100"
        )
    if view.now.labelled:
        yield Command(
            "Have people label the least certain images",
            f"imgbatch export {output} --to tasks.json --uncertain 200 --format label-studio",
        )
    if view.now.rejected:
        yield Command("List all rejects", f"imgbatch export {output} --to rejects.csv --rejects")
    if view.state != "running":
        yield Command("Plan the next run: the flags of this one, with", "imgbatch plan")
    yield Command("Write this report again", f"imgbatch report {output} --run {run_id}")

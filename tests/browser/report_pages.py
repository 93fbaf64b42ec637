"""Reports of generated runs for the tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.config.results import GuardConfig
from imgbatch.quality.guards import Levels, Samples, measure, violations
from imgbatch.quality.row_counts import RowCounts
from imgbatch.report.parts import Picture
from imgbatch.report.row_samples import RowSamples
from imgbatch.report.run_page import page
from imgbatch.report.run_view import RunView
from imgbatch.schema import LABELS, REJECTS
from tests.browser.pages import HOSTILE, MODEL, SCRIPT
from tests.unit.pictures import encode, scene

BEFORE, NOW = "20261128T020004Z-9d31c2", "20261129T020007Z-0c55d1"
SIGNED = "https://user:hunter2@host/a.jpg?X-Amz-Signature=0123456789abcdef"


def label_rows(labels: Sequence[str], n: int, seed: int, *, moved: float = 0.0) -> pa.Table:
    """Return rows of labels/: the first label has this additional part of the images."""
    draw = np.random.default_rng(seed)
    numbers = np.where(draw.random(n) < moved, 0, draw.integers(0, len(labels), n))
    scores = draw.beta(3, 1.2, n)
    rows = [
        {
            "uri": SIGNED if at == 0 else f"s3://bucket/{SCRIPT}/{seed}-{at} 'x'.jpg",
            "label": labels[number],
            "score": score,
            "top_k": [
                {"label": labels[number], "label_id": 0, "score": score},
                {"label": labels[(number + 1) % len(labels)], "label_id": 1, "score": (1 - score) / 2},
            ],
            "levels": [{"level": "kind", "label": f"kind {number % 3}", "score": score}],
            "size": 1000,
            "etag": f"{at}",
            "run_id": NOW,
            "model": MODEL,
        }
        for at, (number, score) in enumerate(zip(numbers.tolist(), scores.tolist(), strict=True))
    ]
    return pa.Table.from_pylist(rows, LABELS)


def reject_rows(n: int) -> pa.Table:
    """Return rows of rejects/ with four reasons."""
    kinds = [
        ("decode", "truncated", "the JPEG of 348x348 pixels ends inside its scan data"),
        ("decode", "not_an_image", f"{SCRIPT} is no image"),
        ("fetch", "timeout", f"GET {SIGNED} gave no answer"),
        ("decode", "empty", "the object has no bytes"),
    ]
    rows = []
    for at in range(n):
        stage, reason, message = kinds[at % 4]
        uri = f"s3://bucket/broken/{at}.jpg"
        refusal = {"stage": stage, "reason": reason, "message": message, "passing": stage == "fetch", "attempts": 1}
        rows.append({"uri": uri, **refusal, "size": 10, "run_id": NOW, "model": MODEL})
    return pa.Table.from_pylist(rows, REJECTS)


def facts(labelled: int, rejected: int, listed: int, **more: Any) -> dict[str, Any]:
    """Return the facts of a run.json."""
    return {
        "run_id": NOW, "status": "succeeded", "exit_code": 0, "started": "2026-11-29T02:00:07+00:00",
        "finished": "2026-11-29T02:03:09+00:00", "written": "2026-11-29T02:03:09+00:00",
        "config": {"input": [SIGNED], "storage": {"options": {"secret": "***"}}},
        "fingerprint": {"weights": "1" * 64, "labels": "2" * 64, "preprocess": SCRIPT, "top_k": 5},
        "model": {"name": MODEL, "digest": "1" * 64, "reference": f"{MODEL}@111111111111"},
        "versions": {"python": "3.11", "imgbatch": "0.2.0"}, "hardware": {"host": SCRIPT},
        "counts": {"listed": listed, "labelled": labelled, "rejected": rejected, "already_done": 0, "updated": 0,
                   "ignored": 3, "duplicates": 0, "kept": 0, "unpaired_sidecars": 0},
        "this_run": {"labelled": labelled, "rejected": rejected, "seconds": 182.4, "images_per_second": 12.0},
        "stages": {"listing": 1.5, "starting": 20.4, "labelling": 150.2, "auditing": 2.3},
        "seconds": {"fetch": 3.1, "decode": 120.2, "classify": 160.9, "commit": 0.4}, "bottleneck": "classify",
        "arrivals": {"interval_s": 2.0, "images": [0] * 10 + [30, 40, 50] * 20 + [0, 0, 0] + [44] * 5},
        "images_per_second": 34.0, "cluster": {"nodes": 2, "cpus": 16, "gpus": 1.0, "actors": 3},
        "runtime": "openvino 2026.4.1", "device": "cpu", "dtype": "bfloat16",
        "plan": {"id": "plan-20261128", "predicted_s": {"low": 150.0, "mid": 170.0, "high": 190.0}, "actual_s": 182.4,
                 "inside": True, "deviation": 0.073},
        **more,
    }  # fmt: skip


def view(labels: Sequence[str], n: int, *, moved: float = 0.0, rejected: int = 20, levels: Levels = ()) -> RunView:
    """Return a run of n images that was compared with an earlier one of as many."""
    before, samples = RowCounts(), RowSamples()
    before.add_labels(label_rows(labels, n, 1))
    before.add_rejects(reject_rows(4))
    rows = label_rows(labels, n, 2, moved=moved)
    for start in range(0, n, 1_000):
        samples.take(rows.slice(start, 1_000))
    if rejected:
        samples.take(reject_rows(rejected))
    drift = measure(Samples(before, samples.counts, 4, rejected, levels))
    found = violations(drift, n, GuardConfig(max_label_shift=0.05))
    reference = {"after": "", "through": BEFORE, "labelled": n, "rejected": 4}
    run = facts(n, rejected, n + rejected, drift={"reference": reference, "images": n + rejected, **drift.public()})
    if found:
        run["drift"]["held_back"] = [each.public() for each in found]
        run |= {"status": "failed", "exit_code": 8, "error": f"held back by {found[0].text}"}
    last = facts(n, 4, n + 4, run_id=BEFORE)
    made = RunView(
        output=f"s3://bucket/{MODEL}", facts=run, state=run["status"], last=last, samples=samples, before=before,
        now=samples.counts, levels=levels,
    )  # fmt: skip
    earlier = RowSamples()
    earlier.take(label_rows(labels, min(n, 2_000), 1))
    made.earlier = {each.label: earlier.of_class(each.label)[:3] for each in made.moved()}
    made.pictures = dict(_pictures(made))
    return made


def _pictures(made: RunView) -> Iterator[tuple[str, Picture]]:
    """Yield a picture of each image; one of seven cannot be shown."""
    shown = [Picture(webp=encode(scene(96, 64, seed=number), "WEBP")) for number in range(6)]
    shown.append(Picture(reason="vanished"))
    for at, row in enumerate(made.wanted()):
        yield row.uri, shown[at % 7]


def held_back() -> str:
    """Return the report of a run with hostile labels that a guard held back."""
    kinds = {label: f"kind {number % 3} {SCRIPT}" for number, label in enumerate(HOSTILE)}
    return page(view(HOSTILE, 1_500, moved=0.4, levels=[("kind", kinds)]))


def first_run() -> str:
    """Return the report of a first run, without pictures."""
    made = view([f"class {number}" for number in range(40)], 600)
    first = {**made.facts, "drift": {"notes": ["no run of this output has succeeded before"], "rows": {}}}
    first.pop("plan")
    return page(replace(made, facts=first, last={}, before=None, earlier={}, pictures=None))


GENERATED = {"report": held_back, "report of a first run": first_run}
"""Functions that return reports, by their names."""

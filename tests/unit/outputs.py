"""Outputs made by the ledger itself, without Ray: what a run would leave, for tests of programs that read it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.config.sections import StorageConfig
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing_pages import page_name
from imgbatch.schema import EMBEDDING, LISTING, RESULTS, TAR, labels_with
from imgbatch.storage.stores import Folder, Stores

STORES = Stores(StorageConfig(), {})
RUN, MODEL = "20260102T030405Z-abcdef", "net@0123456789ab"
FINGERPRINT = {"weights": "0" * 64, "top_k": 5}
THEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NAMES = ("cat", "dog", "cup")

Row = Mapping[str, Any]


def label(uri: str, first: float = 0.5, second: float = 0.25, name: str = "cat", **more: Any) -> Row:
    """Return a row of results with two classes."""
    other = next(other for other in NAMES if other != name)
    top = [
        {"label": name, "label_id": NAMES.index(name), "score": first},
        {"label": other, "label_id": NAMES.index(other), "score": second},
    ]
    answer = {"answer": name, "answer_score": first} if first >= 0.5 else {}
    version = {"size": 5, "etag": f"e-{uri[-8:]}", "last_modified": THEN}
    return {"uri": uri, **top[0], "top_k": top, "width": 4, "height": 3, **version, **answer, **more}


def reject(uri: str, reason: str = "truncated", **more: Any) -> Row:
    """Return a row of results without a label."""
    refusal = {"stage": "decode", "reason": reason, "message": "cut off", "passing": False, "attempts": 1}
    return {"uri": uri, **refusal, "size": 5, **more}


def write(
    place: Path | Folder,
    *commits: Iterable[Row],
    carried: Sequence[pa.Field] = (),
    features: int | None = None,
    success: bool = True,
    run_id: str = RUN,
) -> Folder:
    """Commit rows, a part at a time, seal, and write `_SUCCESS`; return the output."""
    output = place if isinstance(place, Folder) else Folder(STORES, str(place))
    ledger = Ledger(output, FINGERPRINT, label_columns=labels_with((), features)).open()
    fields = [*RESULTS, *carried]
    if features is not None:
        fields.append(pa.field(EMBEDDING, pa.list_(pa.float16(), features)))
    for rows in commits:
        numbered = [{"index": 0, **row} for row in rows]
        for row in numbered:
            if EMBEDDING in row:
                row[EMBEDDING] = np.array(row[EMBEDDING], np.float16)
        table = pa.Table.from_pylist(numbered, schema=pa.schema(fields))
        ledger.commit(table.drop_columns(["index"]), run_id, MODEL)
    ledger.seal(run_id)
    counts = {"listed": sum(len(list(rows)) for rows in commits), "kept": 0}
    if success:
        content = {"run_id": run_id, "counts": counts, "limit": None, "seal": run_id}
        output.put("_SUCCESS", json.dumps(content).encode())
    return output


def write_run(output: Folder, listed: Sequence[str], run_id: str = RUN, **facts: Any) -> None:
    """Write the record and the listing of a run."""
    record = {"run_id": run_id, "status": "succeeded", "config": {"input": ["s3://photos"]}, **facts}
    output.put(f"runs/{run_id}/run.json", json.dumps({"model": {"name": "net"}, **record}).encode())
    container = {uri: TAR for uri in listed if uri.endswith(".tar")}
    rows = [{"uri": uri, "size": 5, "etag": f"e-{uri[-8:]}", "container": container.get(uri)} for uri in listed]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=LISTING), sink)
    output.put(f"runs/{run_id}/listing/{page_name(0)}", sink.getvalue())

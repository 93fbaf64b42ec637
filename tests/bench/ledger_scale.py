"""Measure a large ledger: committing to it, opening it, and listing against it, on disk and on S3.

    python tests/bench/ledger_scale.py ROWS

Each line is measured in a separate process, so that its peak memory is not that of another line.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa

from imgbatch.config.sections import StorageConfig
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing
from imgbatch.schema import CANDIDATE, EMBEDDING, LISTING, RESULTS, labels_with
from imgbatch.sources.base import ListingBatch
from imgbatch.storage.stores import Folder, Stores
from tests.weed import serving

PART_ROWS = 50_000
EMBEDDED_ROWS, EMBEDDED_SHARE, FEATURES = 4096, 50, 1280  # the job commits at 4,096 rows at the latest
FINGERPRINT = {"digest": "0" * 64, "top_k": 5}
CLASSES = pa.array([f"a class with a name of usual length, number {number}" for number in range(1000)])
MOMENT = 1_700_000_000_000_000


def uris(first: int, count: int) -> pa.Array:
    """Return the URIs of `count` images, of typical length."""
    return pa.array([f"s3://photos/2026/{n // 10_000:05d}/image-{n:010d}.jpg" for n in range(first, first + count)])


def versions(first: int, count: int) -> dict[str, pa.Array]:
    """Return the columns of a listing of these images."""
    numbers = np.arange(first, first + count)
    tags = [f"{number * 0x9E3779B97F4A7C15 % (1 << 128):032x}" for number in numbers.tolist()]
    return {
        "uri": uris(first, count),
        "size": pa.array(100_000 + numbers % 50_000, pa.int64()),
        "etag": pa.array(tags),
        "last_modified": pa.array(MOMENT + numbers, pa.int64()).cast(pa.timestamp("us", tz="UTC")),
    }


def results(first: int, count: int, features: int | None = None) -> pa.Table:
    """Return label rows of a network with 1,000 classes, without `index`; with embeddings of `features` numbers, if set."""
    random = np.random.default_rng(first)
    ids = random.integers(0, 1000, count * 5).astype(np.int32)
    scores = np.sort(random.random((count, 5), np.float32))[:, ::-1].ravel()
    candidates = pa.StructArray.from_arrays([CLASSES.take(pa.array(ids)), pa.array(ids), pa.array(scores)],
                                            fields=list(CANDIDATE))  # fmt: skip
    best = {name: candidates.field(at).take(pa.array(np.arange(0, count * 5, 5)))
            for at, name in enumerate(("label", "label_id", "score"))}  # fmt: skip
    known = {
        **versions(first, count),
        **best,
        "top_k": pa.ListArray.from_arrays(pa.array(np.arange(0, count * 5 + 1, 5, np.int32)), candidates),
        "answer": best["label"],
        "answer_score": best["score"],
        "width": pa.array(random.integers(200, 4000, count), pa.int32()),
        "height": pa.array(random.integers(200, 4000, count), pa.int32()),
    }
    columns = {
        entry.name: known.get(entry.name, pa.nulls(count, entry.type)) for entry in RESULTS if entry.name != "index"
    }
    if features is not None:  # half of them zeros, as after a ReLU
        numbers = random.standard_normal(count * features, np.float32).clip(0).astype(np.float16)
        columns[EMBEDDING] = pa.FixedSizeListArray.from_arrays(pa.array(numbers), features)
    return pa.table(columns)


def ledger(output: Folder, features: int | None = None) -> Ledger:
    """Return the ledger of this benchmark."""
    return Ledger(output, FINGERPRINT, label_columns=labels_with((), features))


def commit(output: Folder, rows: int, features: int | None = None) -> dict[str, float]:
    """Commit that many rows. The time to create them is not included."""
    opened, spent, part = ledger(output, features).open(), 0.0, PART_ROWS if features is None else EMBEDDED_ROWS
    for first in range(0, rows, part):
        table = results(first, min(part, rows - first), features)
        started = time.perf_counter()
        opened.commit(table, "20260101T000000Z-bench0", "a-model@0123456789ab")
        spent += time.perf_counter() - started
    return {"seconds": spent}


def embeddings(output: Folder, rows: int) -> dict[str, float]:
    """Commit rows with embeddings, `EMBEDDED_SHARE` times fewer than the others."""
    rows = max(EMBEDDED_ROWS, rows // EMBEDDED_SHARE)
    found = commit(output.folder("embedded"), rows, FEATURES)
    return {**found, "rows": rows}


def resume(output: Folder, rows: int) -> dict[str, float]:
    """Open the ledger."""
    started = time.perf_counter()
    opened = ledger(output).open()
    spent = time.perf_counter() - started
    assert len(opened.index) == rows
    return {"seconds": spent}


def relist(output: Folder, rows: int) -> dict[str, float]:
    """Open the ledger, and list every image again as done. Only the listing is timed."""
    opened, spent = ledger(output).open(), 0.0

    def found() -> Iterator[ListingBatch]:
        nonlocal spent
        for first in range(0, rows, 10_000):
            started = time.perf_counter()
            batch = pa.record_batch(list(versions(first, min(10_000, rows - first)).values()), schema=LISTING)
            spent += time.perf_counter() - started
            yield ListingBatch(batch)

    listing = Listing(opened, output.folder("runs/bench/listing"))
    started = time.perf_counter()
    listing.take(found())
    spent = time.perf_counter() - started - spent
    assert listing.counts.already_done == rows
    return {"seconds": spent}


def alone(work: Callable[[Folder, int], dict[str, float]], output: Folder, rows: int) -> dict[str, float]:
    """Run one measurement in a new process; add its peak memory, and its memory after the imports."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (work, output, rows))


def _measured(work: Callable[[Folder, int], dict[str, float]], output: Folder, rows: int) -> dict[str, float]:
    before = _peak_mb()
    found = work(output, rows)
    return {**found, "peak_mb": _peak_mb(), "start_mb": before}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, metavar="ROWS", help="e.g. 5_000_000")
    rows = parser.parse_args().rows
    print(f"{'store':6} {'what':10} {'rows':>11} {'seconds':>8} {'rows/s':>10} {'peak MB':>8} {'of it at start':>15}")
    with tempfile.TemporaryDirectory() as root, serving(Path(root)) as server:
        for name, output in (
            ("disk", Folder(Stores(StorageConfig(), {}), f"{root}/output")),
            ("s3", Folder(server.stores(), "s3://out/bench")),
        ):
            for work in (commit, resume, relist, embeddings):
                found = alone(work, output, rows)
                done = int(found.get("rows", rows))
                print(
                    f"{name:6} {work.__name__:10} {done:11,} {found['seconds']:8.1f} "
                    f"{done / found['seconds']:10,.0f} {found['peak_mb']:8.0f} {found['start_mb']:15.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

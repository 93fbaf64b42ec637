"""Effects: `explain --again`: what the model of an output says about one image now, and the image as the network sees it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from PIL import Image

from imgbatch.config.sections import Config
from imgbatch.config.worker import WorkerConfig
from imgbatch.labelling.explanation import Now
from imgbatch.labelling.files import write_file
from imgbatch.ledger.tar_progress import members_of
from imgbatch.schema import LABELS, LISTING, REJECTS
from imgbatch.storage.stores import Folder
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console
from imgbatch.verification.comparison import RowComparison, is_changed
from imgbatch.verification.relabel import OF_TAR, Pixels, Task, as_listing, label_one
from imgbatch.verification.sample import load_original_model, original_config, with_recorded_format

_VERSION = ("size", "etag", "last_modified")


def label_again(
    output: Folder,
    config: Config,
    row: Mapping[str, Any],
    tars: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    model: str | None = None,
    image: str | None = None,
) -> Now:
    """Fetch an image and label it in a child process, as the run that is recorded did.

    Args:
        output: of the classification.
        config: the options that the user gave.
        row: of the image: `uri` and its version; of labels/ if it has a label.
        tars: the URIs of tars, one of which may hold the image.
        fingerprint: of the output.
        record: the run.json of the run that wrote the row, or of the newest run.
        model: the current name or URI of the model; None: as recorded.
        image: where to write the image as the network sees it, as a PNG; None: nowhere.

    Raises:
        ModelError: the model cannot be loaded, or is not that of the output.
        ClusterError: the child process died, or gave no result in time.
        UsageError: the file for the image exists.
    """
    original = original_config(config, model, fingerprint, record)
    loaded = load_original_model(output, original.model, fingerprint, is_named=model is not None)
    original, _ = with_recorded_format(original, [record])
    console.step(f"labelling with {loaded.reference}")
    is_table = (record.get("config") or {}).get("source", {}).get("format") == "parquet"
    listed = as_listing(_as_drawn(row, tars), parquet=is_table)
    if listed["container"][0].as_py() is None:  # whatever version is there now
        for name in _VERSION:
            column = pa.nulls(1, LISTING.field(name).type)
            listed = listed.set_column(listed.schema.get_field_index(name), name, column)
    timeout_s = original.cluster.stall_timeout_s
    task = Task(output.stores, output, WorkerConfig.of(original), original.model, loaded.digest, timeout_s)
    result, pixels = label_one(task, listed)
    is_labelled = any(name in row for name in LABELS.names if name not in REJECTS.names)  # any of output.columns
    known = {name: row.get(name) for name in _VERSION}
    changed = result["reason"] is None and is_changed(known, result)
    difference = None
    if is_labelled and not changed:
        difference = RowComparison(loaded.labels, original.answer.min_score).difference(row, result)
    if image is not None and pixels is not None:
        write_png(output, image, pixels)
    written = absolute(image) if image is not None and pixels is not None else None
    return Now(loaded.reference, result, difference, changed, written)


def write_png(output: Folder, uri: str, pixels: Pixels) -> None:
    """Write pixels as a PNG file.

    Raises:
        UsageError: the file exists.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_file(output.stores, absolute(uri), lambda file: file.writelines([buffer.getvalue()]))


def _as_drawn(row: Mapping[str, Any], tars: Mapping[str, Any]) -> pa.Table:
    """Return a row as `as_listing` takes it."""
    fields = [LISTING.field(name) for name in ("uri", *_VERSION)]
    table = pa.Table.from_pylist([{field.name: row.get(field.name) for field in fields}], schema=pa.schema(fields))
    tar = next((tar for tar in tars if members_of(table["uri"], tar)[0].as_py()), None)
    return table.append_column(OF_TAR, pa.array([tar], pa.string()))

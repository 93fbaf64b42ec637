"""The audit: an image that is missing or in two rows is found and named, whatever the tables and the listing hold."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import AuditError, OutputError
from imgbatch.ledger.audit import audit
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.listing import Listing
from imgbatch.schema import LISTING, RESULTS
from imgbatch.sources.base import ListingBatch
from imgbatch.storage.stores import Folder, Stores


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Any) -> Folder:
    if request.param == "disk":
        return Folder(Stores(StorageConfig(retries=0), {}), str(tmp_path / "out"))
    return Folder(request.getfixturevalue("s3").stores(retries=0), f"s3://out/books/{request.node.name}")


def batch(*uris: str) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"uri": uri} for uri in uris], schema=LISTING)


def write(output: Folder, *uris: str, reason: str | None = None) -> None:
    refusal = {"stage": "fetch", "reason": reason, "message": "m", "passing": False, "attempts": 1}
    schema = pa.schema([entry for entry in RESULTS if entry.name != "index"])
    rows = [{"uri": uri, **(refusal if reason else {"label": "cat"})} for uri in uris]
    Ledger(output, {}).open().commit(pa.Table.from_pylist(rows, schema=schema), "r", "m")


def list_images(output: Folder, *uris: str) -> Folder:
    folder = output.folder("listing")
    Listing(Ledger(output.folder("none"), {}).open(), folder).take([ListingBatch(batch(*uris))])
    return folder


def test_reconciled_counts_include_every_sum(output: Folder) -> None:
    write(output, "a", "b", "old")
    write(output, "c", "older", reason="corrupt")
    write(output, "d", reason="timeout")
    Ledger(output, {}).open().seal("r")
    result = audit(output, list_images(output, "a", "b", "c", "d"))
    result.require_reconciled()
    assert (result.listed, result.labelled, result.rejected, result.kept, result.rows) == (4, 2, 2, 2, 6)
    assert result.reasons == {"corrupt": 2, "timeout": 1}
    assert result.examples == {"corrupt": ("c", "m"), "timeout": ("d", "m")}


def test_an_image_without_a_row_is_named(output: Folder) -> None:
    write(output, "a")
    result = audit(output, list_images(output, "a", "lost"))
    assert result.missing == ["lost"]
    with pytest.raises(AuditError, match=r"2 listed \+ 0 kept, 1 rows.*in no row: lost"):
        result.require_reconciled()


def test_a_kept_row_does_not_make_up_for_a_missing_one(output: Folder) -> None:
    write(output, "a", "old")
    with pytest.raises(AuditError, match="in no row: lost"):
        audit(output, list_images(output, "a", "lost")).require_reconciled()


@pytest.mark.parametrize("tables", [("labels", "labels"), ("rejects", "rejects"), ("labels", "rejects")])
def test_an_image_with_two_rows_is_named(output: Folder, tables: tuple[str, str]) -> None:
    write(output, "a", "twice", reason=None if tables[0] == "labels" else "corrupt")
    if tables[0] == tables[1]:
        output.put(f"{tables[0]}/part-00000002.parquet", output.read(f"{tables[0]}/part-00000001.parquet"))
    else:
        other = output.folder("other")
        write(other, "twice", reason="corrupt")
        output.put("rejects/part-00000001.parquet", other.read("rejects/part-00000001.parquet"))
    shown = "a, in .*00000001" if tables[0] == tables[1] else "twice, in .*labels.*and in .*rejects"
    with pytest.raises(AuditError, match=rf"in two rows: {shown}"):
        audit(output, list_images(output, "a", "twice")).require_reconciled()
    with pytest.raises(AuditError, match="in two rows"):
        audit(output, None).require_reconciled()


def test_two_rows_do_not_make_up_for_a_missing_one(output: Folder) -> None:
    write(output, "a")
    output.put("labels/part-00000002.parquet", output.read("labels/part-00000001.parquet"))
    result = audit(output, list_images(output, "a", "lost"))
    assert result.rows == result.listed
    with pytest.raises(AuditError, match="in no row: lost; in two rows: a"):
        result.require_reconciled()


def test_an_image_listed_twice_does_not_reconcile(output: Folder) -> None:
    write(output, "a", "b")
    folder = list_images(output, "a", "b")
    folder.put("page-000001.parquet", folder.read("page-000000.parquet"))
    with pytest.raises(AuditError):
        audit(output, folder).require_reconciled()


def test_without_a_listing_every_row_counts_as_listed(output: Folder) -> None:
    write(output, "a")
    write(output, "b", reason="corrupt")
    result = audit(output, None)
    result.require_reconciled()
    assert (result.listed, result.labelled, result.rejected, result.kept) == (2, 1, 1, 0)


def test_an_empty_output_reconciles(output: Folder) -> None:
    audit(output, None).require_reconciled()
    audit(output, list_images(output)).require_reconciled()


def test_only_the_first_few_of_many_missing_images_are_named(output: Folder) -> None:
    write(output, "a")
    result = audit(output, list_images(output, "a", *(f"lost{number:03d}" for number in range(100))))
    with pytest.raises(AuditError) as caught:
        result.require_reconciled()
    assert 1 <= str(caught.value).count("lost") <= 10


def test_a_truncated_part_is_refused_by_the_audit(output: Folder) -> None:
    write(output, "a")
    output.put("labels/part-00000002.parquet", b"PAR1")
    with pytest.raises(OutputError, match="part-00000002"):
        audit(output, list_images(output, "a"))

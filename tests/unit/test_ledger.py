"""The guarantees of the ledger under killed runs, lost responses, late requests and other writers, on disk and on S3."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import AuditError, OutputError, Unreachable
from imgbatch.ledger import audit, commit_log, part_file
from imgbatch.ledger.ledger import Ledger
from imgbatch.ledger.part_file import Footer
from imgbatch.ledger.rewrite_intents import RewriteIntents
from imgbatch.ledger.status import DONE, DUPLICATE, NEW, STALE
from imgbatch.schema import LABELS, LISTING, REJECTS, RESULTS, labels_with
from imgbatch.storage.stores import Folder, Meta, Stores

FINGERPRINT = {"digest": "abc", "top_k": 5}
THEN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
RUN, MODEL = "20260102T030405Z-abcdef", "net@0123456789ab"

Verb = Callable[..., Any]


class Tampered(Stores):
    """Stores whose verbs go through functions of the test: `verbs[name](real, *arguments)`."""

    verbs: dict[str, Verb]

    def resolve(self, uri: str, *, via_fsspec: bool = False) -> Any:
        store, path = super().resolve(uri, via_fsspec=via_fsspec)
        return _Through(store, self.verbs), path


class _Through:
    def __init__(self, store: Any, verbs: Mapping[str, Verb]) -> None:
        self._store, self._verbs = store, verbs

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)
        return partial(self._verbs[name], real) if name in self._verbs else real


Place = Callable[..., Folder]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Return a function that opens the same output, optionally through verbs of the test."""
    if request.param == "disk":
        uri, environment = str(tmp_path / "output"), {}
    else:
        uri, environment = f"s3://out/ledger/{uuid.uuid4().hex}", request.getfixturevalue("s3").environment

    def at(**verbs: Verb) -> Folder:
        stores = Tampered(StorageConfig(retries=1), environment)
        stores.verbs = verbs
        return Folder(stores, uri)

    return at


def images(
    *uris: str, size: int | None = 5, etag: str | None = "e", moment: datetime | None = THEN, **unused: object
) -> pa.RecordBatch:
    rows = [{"uri": uri, "size": size, "etag": etag, "last_modified": moment} for uri in uris]
    return pa.RecordBatch.from_pylist(rows, schema=LISTING)


def results(*uris: str, reason: str | None = None, passing: bool = False, **version: Any) -> pa.Table:
    """Return result rows: labels, or rejects where there is a reason."""
    best = {"label": "cat", "label_id": 3, "score": 0.75}
    answer = {**best, "top_k": [best], "answer": "cat", "answer_score": 0.75, "width": 64, "height": 48}
    refusal = {"stage": "fetch", "reason": reason, "message": "m", "passing": passing, "attempts": 1}
    schema = pa.schema([entry for entry in RESULTS if entry.name != "index"])
    known = images(*uris, **version).to_pylist()
    return pa.Table.from_pylist([{**row, **(refusal if reason else answer)} for row in known], schema=schema)


def rejects(*uris: str, **options: Any) -> pa.Table:
    return results(*uris, reason="timeout", **options)


def ledger(output: Folder, **options: Any) -> Ledger:
    return Ledger(output, FINGERPRINT, **options).open()


def commit(book: Ledger, *tables: pa.Table, run: str = RUN) -> int:
    return book.commit(pa.concat_tables(tables), run, MODEL)


def finish(book: Ledger, run: str = RUN, carried: pa.Schema | None = None) -> None:
    """End a run as the job does."""
    book.seal(run, carried)
    if len(book.written_by_others):
        book.open()


def rows(output: Folder, table: str = "labels") -> list[dict[str, Any]]:
    log = commit_log.Log(output.folder(table))
    log.scan()
    files = (pa.BufferReader(output.read(f"{table}/{part(number)}")) for number in log.numbers)
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def uris(output: Folder, table: str = "labels") -> list[str]:
    return sorted(row["uri"] for row in rows(output, table))


def part(number: int) -> str:
    return f"part-{number:08d}.parquet"


def states(book: Ledger, *batches: pa.RecordBatch) -> list[list[int]]:
    return [book.index.mark_seen(batch).tolist() for batch in batches]


# One writer


def test_committed_images_are_done_and_no_others(place: Place) -> None:
    book = ledger(place())
    assert commit(book, results("a", "b"), rejects("c")) == 3
    assert commit(book, results("d")) == 1
    again = ledger(place())
    assert states(again, images("a", "b", "c", "d", "e")) == [[DONE, DONE, DONE, DONE, NEW]]
    assert states(again, images("a", "e")) == [[DUPLICATE, NEW]]
    assert (uris(place()), uris(place(), "rejects")) == (["a", "b", "d"], ["c"])
    assert again.unlisted_rows() == 0


def test_an_empty_commit_writes_no_part(place: Place) -> None:
    assert commit(ledger(place()), results()) == 0
    assert place().names() == []


@pytest.mark.parametrize(
    "row, listed, said",
    [
        ({}, {}, DONE),
        ({}, {"size": 6}, STALE),
        ({}, {"etag": "f"}, STALE),
        ({}, {"moment": datetime(2027, 1, 1, tzinfo=UTC)}, DONE),  # copied onto itself: the ETag is the better witness
        ({"etag": None}, {"etag": None}, DONE),
        ({"etag": None}, {"etag": None, "moment": THEN.replace(microsecond=678902)}, STALE),
        ({"etag": None, "moment": datetime(1970, 1, 1, tzinfo=UTC)}, {"etag": None}, STALE),
        ({"etag": None}, {"etag": None, "moment": datetime(1970, 1, 1, tzinfo=UTC)}, STALE),
        ({"etag": None, "moment": datetime(1969, 12, 31, tzinfo=UTC)}, {"etag": None}, STALE),
        # What the one side does not know cannot differ.
        ({}, {"size": None, "etag": None, "moment": None}, DONE),
        ({"size": None, "etag": None, "moment": None}, {}, DONE),
        ({"etag": None}, {}, DONE),
        ({}, {"etag": None}, DONE),
        ({"etag": None}, {"size": 6}, STALE),
    ],
)
def test_a_changed_image_is_stale(tmp_path: Path, row: dict[str, Any], listed: dict[str, Any], said: int) -> None:
    output = Folder(Stores(StorageConfig(), {}), str(tmp_path))
    commit(ledger(output), results("a", **row))
    assert states(ledger(output), images("a", **listed)) == [[said]]


def test_the_old_row_is_removed_before_the_new_one_is_committed(place: Place) -> None:
    commit(ledger(place()), results("a", "b"), rejects("c", "d"))
    seen: list[tuple[list[str], list[str]]] = []

    def create(real: Verb, path: str, data: bytes) -> None:
        if path.endswith(".parquet"):
            seen.append((uris(place()), uris(place(), "rejects")))
        real(path, data)

    book = ledger(place(create=create))
    assert states(book, images("a", "c", etag="new")) == [[STALE, STALE]]
    commit(book, results("c", etag="new"), rejects("a", etag="new"))
    assert seen == [(["b"], ["d"]), (["b"], ["a", "d"])]
    assert (uris(place()), uris(place(), "rejects")) == (["b", "c"], ["a", "d"])
    assert [row["etag"] for row in rows(place()) if row["uri"] == "c"] == ["new"]


def test_only_old_rows_of_the_batch_are_removed(place: Place) -> None:
    commit(ledger(place()), results("a", "b"))
    book = ledger(place())
    book.index.mark_seen(images("a", "b", etag="new"))
    commit(book, results("a", etag="new"))
    assert [(row["uri"], row["etag"]) for row in rows(place())] == [("b", "e"), ("a", "new")]


def test_after_a_kill_between_removal_and_commit_the_next_run_labels_the_image(place: Place) -> None:
    commit(ledger(place()), results("a", "b"))

    def killed(real: Verb, path: str, data: bytes) -> None:
        if path.endswith(".parquet"):
            raise KeyboardInterrupt
        real(path, data)

    book = ledger(place(create=killed))
    book.index.mark_seen(images("a", etag="new"))
    with pytest.raises(KeyboardInterrupt):
        commit(book, results("a", etag="new"))
    assert states(ledger(place()), images("a", "b", etag="new")) == [[NEW, STALE]]


@pytest.mark.parametrize(
    "passing, retry, etag, said",
    [
        (True, "passing", "e", STALE),
        (False, "passing", "e", DONE),
        (False, "passing", "new", STALE),
        (False, "all", "e", STALE),
        (True, "all", "e", STALE),
    ],
)
def test_transient_rejects_are_retried_and_others_only_on_request(
    place: Place, passing: bool, retry: str, etag: str, said: int
) -> None:
    commit(ledger(place()), rejects("a", passing=passing), results("b"))
    book = ledger(place(), retry=retry)
    assert states(book, images("a", etag=etag), images("b")) == [[said], [DONE]]
    assert book.index.stale == (said == STALE)
    if said == STALE:
        commit(book, results("a", etag=etag))
        assert (uris(place()), uris(place(), "rejects")) == (["a", "b"], [])


def test_prune_removes_only_rows_of_unlisted_images(place: Place) -> None:
    book = ledger(place())
    commit(book, results("a", "b"), rejects("c", "d"))
    commit(book, results("x"))
    again = ledger(place())
    again.index.mark_seen(images("a", "c", "new"))
    commit(again, results("new"))
    assert again.unlisted_rows() == 3
    assert again.prune() == 3
    assert (uris(place()), uris(place(), "rejects")) == (["a", "new"], ["c"])


def test_rows_are_cast_to_the_schema(place: Place) -> None:
    narrow = rejects("a")
    wide = narrow.set_column(narrow.schema.get_field_index("attempts"), "attempts", pa.array([3], pa.int64()))
    commit(ledger(place()), wide)
    assert pq.read_schema(pa.BufferReader(place().read(f"rejects/{part(1)}"))).equals(REJECTS)


# Answers that are lost, requests that come late


def test_only_selected_columns_are_written_also_in_seals(place: Place) -> None:
    wanted = labels_with(["label", "input_split"], features=3)
    book = ledger(place(), label_columns=wanted, carried=["label", "input_split"])
    numbers = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype=np.float16)), 3)
    whole = results("a", "b").append_column("input_split", pa.array(["train", "test"]))
    whole = whole.append_column("input_other", pa.array([1, 2])).append_column("embedding", numbers)
    refused = rejects("c").append_column("input_split", pa.array(["val"]))
    assert commit(book, refused) == 1, "of rejects alone, which have no embedding"
    assert commit(book, whole) == 2
    book.seal(RUN)
    assert rows(place()) == [
        {"uri": uri, "label": "cat", "embedding": numbers, "size": 5, "etag": "e", "last_modified": THEN,
         "input_split": split} for uri, numbers, split in (("a", [0, 1, 2], "train"), ("b", [3, 4, 5], "test"))
    ]  # fmt: skip
    assert rows(place(), "rejects")[0]["input_split"] == "val"
    for name in place().names("labels"):
        table, _ = part_file.decode(place().folder("labels").read(name), name)
        assert table.schema.names == [*wanted.names, "input_split"]
        assert table.schema.field("embedding").type == pa.list_(pa.float16(), 3)
    assert states(ledger(place()), images("a", "b", "c")) == [[DONE, DONE, DONE]]


@pytest.mark.parametrize(
    "wanted", [labels_with((), 3), labels_with(hashed=True), labels_with(["label"], 3, hashed=True)]
)
def test_the_end_of_a_tar_is_recorded_without_a_row_for_any_columns(place: Place, wanted: pa.Schema) -> None:
    end = {"version": "e", "through": -1, "group": 0, "images": 0}
    assert ledger(place(), label_columns=wanted).commit(results(), RUN, "m", {"empty.tar": end}) == 0
    table, footer = part_file.decode(place().read(f"labels/{part(1)}"), "labels")
    assert table.schema.names == wanted.names and footer.streams == {"empty.tar": end}


@pytest.mark.parametrize("verb", ["create", "replace"])
def test_a_successful_request_with_a_lost_response_is_not_repeated(place: Place, verb: str) -> None:
    commit(ledger(place()), results("a", "b"))
    lost = []

    def without_answer(real: Verb, *arguments: Any) -> None:
        real(*arguments)
        if not lost:
            lost.append(arguments[0])
            raise Unreachable("the answer was lost")

    book = ledger(place(**{verb: without_answer}))
    book.index.mark_seen(images("a", etag="new"))
    assert commit(book, results("a", etag="new")) == 1
    assert len(lost) == 1
    assert [(row["uri"], row["etag"]) for row in rows(place())] == [("b", "e"), ("a", "new")]
    assert ledger(place()).labels.numbers == [1, 2]


def test_a_failed_request_that_arrives_late_duplicates_no_row(place: Place) -> None:
    late: list[Callable[[], None]] = []

    def delayed(real: Verb, path: str, data: bytes) -> None:
        if not late:
            late.append(partial(real, path, data))
            raise Unreachable("no answer")
        real(path, data)

    assert commit(ledger(place(create=delayed)), results("a")) == 1
    with pytest.raises(Exception, match=r"(?i)exist"):
        late[0]()
    assert uris(place()) == ["a"]


def test_a_number_is_tried_again_if_the_request_that_blocked_it_failed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_log, "_VANISHED_WAIT_S", 0)
    refused = []

    def create(real: Verb, path: str, data: bytes) -> None:
        if len(refused) < 3:
            refused.append(path)
            raise FileExistsError(path)  # as S3 says 409 while another PUT to the name is under way
        real(path, data)

    assert commit(ledger(place(create=create)), results("a")) == 1
    assert ledger(place()).labels.numbers == [1]


def late_put(place: Place, *tables: pa.Table, fingerprint: Mapping[str, Any] = FINGERPRINT) -> Callable[[], None]:
    """Return the PUT of a run that was killed after sending it and before it arrived."""
    caught: list[Callable[[], None]] = []

    def create(real: Verb, path: str, data: bytes) -> None:
        caught.append(partial(real, path, data))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(Ledger(place(create=create), fingerprint).open(), *tables, run="dead")
    return caught[0]


def test_a_late_put_of_a_dead_run_keeps_its_number_and_images(place: Place) -> None:
    commit(ledger(place()), results("a"))
    arrive = late_put(place, results("b", "c"))
    book = ledger(place())
    arrive()
    assert commit(book, results("c", "d")) == 1
    assert uris(place()) == ["a", "b", "c", "d"]
    assert commit(book, results("b")) == 0
    finish(book)
    assert audit.audit(place(), None).duplicated == []


def test_a_late_put_fails_after_a_commit_or_a_seal(place: Place) -> None:
    for ending in (lambda book: commit(book, results("b")), lambda book: book.seal(RUN)):
        arrive = late_put(place, results("z"))
        ending(ledger(place()))
        with pytest.raises(Exception, match=r"(?i)exist"):
            arrive()
    assert uris(place()) == ["b"]


def test_a_late_part_of_another_fingerprint_is_refused(place: Place) -> None:
    arrive = late_put(place, results("a"), fingerprint={"digest": "other", "top_k": 5})
    book = ledger(place())
    arrive()
    with pytest.raises(OutputError, match=r"digest: other there, abc here"):
        commit(book, results("b"))
    with pytest.raises(OutputError, match="fingerprint"):
        ledger(place())


def test_a_late_rewrite_of_a_dead_run_restores_no_removed_row(place: Place) -> None:
    commit(ledger(place()), results("a", "b", "c"))
    late: list[Callable[[], None]] = []

    def replace(real: Verb, path: str, data: bytes, tag: str | None) -> None:
        late.append(partial(real, path, data, tag))
        raise KeyboardInterrupt

    dead = ledger(place(replace=replace))
    dead.index.mark_seen(images("a", etag="new"))
    with pytest.raises(KeyboardInterrupt):
        commit(dead, results("a", etag="new"))
    book = ledger(place())
    book.index.mark_seen(images("b", etag="new"))
    commit(book, results("b", etag="new"))
    with pytest.raises(Exception, match=r"(?i)precondition|replaced"):
        late[0]()
    assert [(row["uri"], row["etag"]) for row in rows(place())] == [("a", "e"), ("c", "e"), ("b", "new")]


def test_two_concurrent_rewrites_of_a_part_restore_no_removed_row(place: Place) -> None:
    names = [f"i{number}" for number in range(24)]
    commit(ledger(place()), results(*names))
    opened = [ledger(place()) for _ in names]
    for name, book in zip(names, opened, strict=True):
        book.index.mark_seen(images(name, etag="new"))
    with ThreadPoolExecutor(8) as pool:
        written = pool.map(lambda pair: commit(pair[1], results(pair[0], etag="new")), zip(names, opened, strict=True))
        assert sum(written) == 24
    assert sorted((row["uri"], row["etag"]) for row in rows(place())) == sorted((name, "new") for name in names)
    assert [name for name in place().names("labels") if not name.endswith(".parquet")] == []


def test_a_late_rewrite_of_a_dead_run_removes_no_valid_row(place: Place) -> None:
    """The image that the dead run considered changed is unchanged again: its row is valid and must stay."""
    commit(ledger(place()), results("a", "b", "c"))
    late: list[Callable[[], None]] = []

    def replace(real: Verb, path: str, data: bytes, tag: str | None) -> None:
        if path.endswith(".parquet"):
            late.append(partial(real, path, data, tag))
            raise KeyboardInterrupt
        real(path, data, tag)

    dead = ledger(place(replace=replace))
    dead.index.mark_seen(images("a", etag="new"))
    with pytest.raises(KeyboardInterrupt):
        commit(dead, results("a", etag="new"))
    before = rows(place())
    ledger(place()).seal("next")
    with pytest.raises(Exception, match=r"(?i)precondition|replaced"):
        late[0]()
    assert rows(place()) == before
    ledger(place())  # once is enough: no part is written again
    assert json.loads(place().read("runs/rewriting-labels.json"))["parts"] == {}


def test_a_run_with_another_fingerprint_rewrites_no_part(place: Place) -> None:
    commit(ledger(place()), results("a"))
    ledger(place()).labels.intents.add([1])
    before = place().read("labels/part-00000001.parquet")
    with pytest.raises(OutputError, match="fingerprint"):
        Ledger(place(), {"top_k": 7}).open()
    assert place().read("labels/part-00000001.parquet") == before


def test_damaged_rewrite_intents_are_named(place: Place) -> None:
    commit(ledger(place()), results("a"))
    place().put("runs/rewriting-labels.json", b"[")
    with pytest.raises(OutputError, match=r"runs/rewriting-labels.json is damaged or was not written by imgbatch"):
        ledger(place())


def test_each_writer_withdraws_only_its_own_rewrite_intents(place: Place) -> None:
    one, two = (RewriteIntents(place().folder("runs"), "rewriting-labels.json") for _ in range(2))
    one.add([1, 2])
    two.add([2, 3])
    one.withdraw()
    assert list(two.pending().values()) == [[2, 3]]
    one.withdraw(two.pending())
    assert two.pending() == {}
    two.invalidate(3)
    two.add([3])
    assert list(one.pending().values()) == [[2, 3]]


# Two writers and more


def test_two_alternating_writers_duplicate_and_lose_no_row(place: Place) -> None:
    one, two = ledger(place()), ledger(place())
    assert commit(one, results("a", "b")) == 2
    assert commit(two, results("b", "c")) == 1
    assert commit(one, results("c", "d")) == 1
    assert commit(two, results("a", "d", "e")) == 1
    finish(one)
    finish(two)
    assert uris(place()) == ["a", "b", "c", "d", "e"]


def test_many_concurrent_writers_duplicate_and_lose_no_row(place: Place) -> None:
    shared = [f"i{number:03d}" for number in range(96)]

    def work(seed: int) -> int:
        order = np.random.default_rng(seed).permutation(shared)
        book = ledger(place())
        todo = order[np.array(states(book, images(*order))[0]) == NEW].tolist()
        return sum(commit(book, results(*todo[start : start + 16])) for start in range(0, len(todo), 16))

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) == 96
    assert uris(place()) == shared
    assert len(ledger(place()).index) == 96


def test_another_writers_row_wins_even_if_ours_was_stale(place: Place) -> None:
    commit(ledger(place()), results("a", "b"))
    one, two = ledger(place()), ledger(place())
    for book in (one, two):
        book.index.mark_seen(images("a", "b", etag="new"))
    assert commit(one, results("a", etag="new"), run="one") == 1
    assert commit(two, results("a", "b", etag="new"), run="two") == 1
    assert sorted((row["uri"], row["etag"], row["run_id"]) for row in rows(place())) == [
        ("a", "new", "one"),
        ("b", "new", "two"),
    ]


@pytest.mark.parametrize("first", ["label", "reject"])
def test_a_label_wins_over_the_reject_of_another_writer(place: Place, first: str) -> None:
    one, two = ledger(place()), ledger(place())
    work = [lambda: commit(one, results("a", "b")), lambda: commit(two, rejects("a", "c", passing=True))]
    for step in work if first == "label" else reversed(work):
        step()
    finish(one)
    assert (uris(place()), uris(place(), "rejects")) == (["a", "b"], ["c"])
    assert states(ledger(place()), images("a", "b")) == [[DONE, DONE]]


def test_a_read_only_ledger_keeps_the_reject_of_a_labelled_image(place: Place) -> None:
    one, two = ledger(place()), ledger(place())
    commit(one, results("a"))
    commit(two, rejects("a"))
    before = place().read(f"rejects/{part(1)}")
    assert states(ledger(place(), read_only=True), images("a")) == [[DONE]]
    assert place().read(f"rejects/{part(1)}") == before


def test_seals_take_the_next_numbers_and_name_their_run(place: Place) -> None:
    book = ledger(place())
    commit(book, results("a"))
    book.seal("one")
    assert (book.labels.numbers, book.rejects.numbers) == ([1, 2], [1])
    again = ledger(place())
    assert again.sealed_by("one")
    assert not again.sealed_by("two")
    assert not again.sealed_by(None)
    commit(again, results("b"))
    assert not ledger(place()).sealed_by("one")
    assert uris(place()) == ["a", "b"]


def test_a_seal_whose_number_is_taken_gets_the_next_number(place: Place) -> None:
    one, two = ledger(place()), ledger(place())
    commit(two, results("a"), rejects("b"))
    finish(one, "one")
    assert ledger(place()).sealed_by("one")
    assert len(one.index) == 2  # read anew, since another writer was here


def test_numbers_continue_after_a_gap(place: Place) -> None:
    book = ledger(place())
    for name in "abc":
        commit(book, results(name))
    place().delete(f"labels/{part(2)}")
    again = ledger(place())
    assert states(again, images("a", "b", "c")) == [[DONE, NEW, DONE]]
    commit(again, results("b"))
    assert again.labels.numbers == [1, 3, 4]


# What does not belong there


def test_another_fingerprint_is_refused_naming_differing_keys_and_remedy(place: Place) -> None:
    commit(ledger(place()), results("a"))
    with pytest.raises(OutputError) as caught:
        Ledger(place(), {"digest": "xyz", "top_k": 5, "answer.min_score": 0.5}).open()
    message = str(caught.value)
    assert "digest: abc there, xyz here" in message
    assert "answer.min_score" not in message, "absent is 0.5"
    assert "top_k" not in message
    assert "--output" in message


def test_a_seal_without_other_parts_has_a_fingerprint(place: Place) -> None:
    ledger(place()).seal(RUN)
    with pytest.raises(OutputError, match="digest"):
        Ledger(place(), {"digest": "xyz", "top_k": 5}).open()


def parquet(table: pa.Table, **metadata: str) -> bytes:
    return part_file.encode(table, metadata)


OURS = Footer(RUN, FINGERPRINT).metadata()


def whole() -> bytes:
    return part_file.encode(LABELS.empty_table(), OURS)


@pytest.mark.parametrize(
    "name, data, told",
    [
        (part(1), b"", "not a complete Parquet file"),
        (part(1), b"uri,label\na,cat\n", "not a complete Parquet file"),
        (part(1), whole()[:-20], "not a complete Parquet file"),
        (part(1), whole()[:-8] + b"\xff\xff\xff\x7fPAR1", "not a complete Parquet file"),
        (part(1), parquet(pa.table({"uri": ["a"]})), "not written by imgbatch"),
        (part(1), parquet(pa.table({"uri": ["a"]}), format_version="x"), "not written by imgbatch"),
        (part(1), parquet(pa.table({"uri": ["a"]}), format_version="2"), "format version 2.*newer imgbatch"),
        (part(1), parquet(pa.table({"uri": ["a"]}), **{**OURS, "fingerprint": "[1]"}), "not written by imgbatch"),
        (part(1), parquet(pa.table({"uri": ["a"]}), **OURS), "lacks the columns etag"),
        ("old.parquet", whole(), "not written by imgbatch"),
        ("part-1.parquet", whole(), "not written by imgbatch"),
        ("notes.txt", b"", "not written by imgbatch"),
        (f"below/{part(1)}", whole(), "not written by imgbatch"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_foreign_files_are_refused_by_name(tmp_path: Path, table: str, name: str, data: bytes, told: str) -> None:
    output = Folder(Stores(StorageConfig(), {}), str(tmp_path))
    output.put(f"{table}/{name}", data)
    with pytest.raises(OutputError, match=told) as caught:
        ledger(output)
    assert f"{tmp_path}/{table}/{name}" in str(caught.value)


def test_a_foreign_part_with_our_number_is_refused(place: Place) -> None:
    book = ledger(place())
    place().put(f"labels/{part(1)}", b"PAR1")
    with pytest.raises(OutputError, match="not a complete Parquet file"):
        commit(book, results("a"))


@pytest.mark.parametrize("name", [".part-00000001.parquet.0123.tmp", "_temporary", ".DS_Store"])
def test_hidden_files_among_the_parts_are_ignored(place: Place, name: str) -> None:
    place().put(f"labels/{name}", b"")
    commit(ledger(place()), results("a"))
    assert uris(place()) == ["a"]


@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_an_image_with_two_rows_is_reported_by_name(place: Place, table: str) -> None:
    row = results("a", "b") if table == "labels" else rejects("a", "b")
    commit(ledger(place()), row)
    place().put(f"{table}/{part(2)}", place().read(f"{table}/{part(1)}"))
    with pytest.raises(AuditError, match=part(2)):
        ledger(place())


# What a reader sees

DESIGNED = {
    "labels": {
        "uri": "VARCHAR", "label": "VARCHAR", "label_id": "INTEGER", "score": "FLOAT",
        "top_k": "STRUCT(label VARCHAR, label_id INTEGER, score FLOAT)[]",
        "levels": "STRUCT(level VARCHAR, label VARCHAR, score FLOAT)[]",
        "answer": "VARCHAR", "answer_level": "VARCHAR", "answer_score": "FLOAT", "width": "INTEGER", "height": "INTEGER",
        "size": "BIGINT", "etag": "VARCHAR", "last_modified": "TIMESTAMP WITH TIME ZONE",
        "run_id": "VARCHAR", "model": "VARCHAR",
    },
    "rejects": {
        "uri": "VARCHAR", "stage": "VARCHAR", "reason": "VARCHAR", "message": "VARCHAR", "passing": "BOOLEAN",
        "attempts": "INTEGER", "size": "BIGINT", "etag": "VARCHAR", "last_modified": "TIMESTAMP WITH TIME ZONE",
        "run_id": "VARCHAR", "model": "VARCHAR",
    },
}  # fmt: skip


def local_copy(output: Folder, table: str, folder: Path) -> str:
    for name in output.names(table):
        (folder / f"copy-{name}").write_bytes(output.read(f"{table}/{name}"))
    return f"{folder}/copy-*.parquet"


@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_duckdb_reads_the_columns_and_types_of_the_design(place: Place, tmp_path: Path, table: str) -> None:
    book = ledger(place())
    commit(book, results("ü/a b#%.jpg"), rejects("c"))
    finish(book)
    found = duckdb.sql(f"DESCRIBE SELECT * FROM '{local_copy(place(), table, tmp_path)}'").fetchall()
    assert {name: kind.replace('"', "") for name, kind, *_ in found} == DESIGNED[table]


def test_duckdb_reads_the_values_that_were_committed(place: Place, tmp_path: Path) -> None:
    commit(ledger(place()), results("ü/a b#%.jpg"))
    query = f"""SELECT uri, label, label_id, score, top_k[1].label, levels, answer_level, size, etag,
        epoch_us(last_modified), run_id, model FROM '{local_copy(place(), "labels", tmp_path)}'"""
    moment = 1767323045678901
    assert duckdb.sql(query).fetchall() == [
        ("ü/a b#%.jpg", "cat", 3, 0.75, "cat", None, None, 5, "e", moment, RUN, MODEL)
    ]


def test_a_sealed_table_with_carried_columns_is_read_without_options(place: Place, tmp_path: Path) -> None:
    book = ledger(place())
    for name in "ab":
        carried = results(name).append_column("input_split", pa.array([f"split {name}"]))
        commit(book, carried.append_column("input_n", pa.array([7], pa.int16())))
    finish(book, "one")
    finish(ledger(place()), "two")
    table = f"'{local_copy(place(), 'labels', tmp_path)}'"
    assert len(place().names("labels")) == 4
    query = f"SELECT uri, input_split, input_n FROM {table} ORDER BY uri"
    assert duckdb.sql(query).fetchall() == [("a", "split a", 7), ("b", "split b", 7)]


def test_a_table_that_begins_with_a_seal_has_the_carried_columns_in_every_part(place: Place) -> None:
    """Polars and `datasets` take the columns of all parts from the first one."""
    listed = pa.schema([("input_split", pa.string())])
    book = ledger(place())
    commit(book, results("a").append_column("input_split", pa.array(["x"])))
    finish(book, "one", listed)
    again = ledger(place())
    commit(again, rejects("b").append_column("input_split", pa.array(["x"])))
    finish(again, "two", listed)
    for table in ("labels", "rejects"):
        written = [place().read(f"{table}/{name}") for name in sorted(place().names(table))]
        schemas = [pq.read_schema(pa.BufferReader(each)).remove_metadata() for each in written]
        assert len(schemas) == 3 and schemas[0] == schemas[1] == schemas[2] and "input_split" in schemas[0].names


def test_footers_record_version_run_and_fingerprint(place: Place) -> None:
    commit(ledger(place()), results("a"))
    metadata = pq.read_metadata(pa.BufferReader(place().read(f"labels/{part(1)}"))).metadata
    assert metadata[b"format_version"] == b"1"
    assert metadata[b"run_id"] == RUN.encode()
    assert b'"digest": "abc"' in metadata[b"fingerprint"]


def test_parts_keep_schema_and_footer_when_rows_are_removed(place: Place) -> None:
    table = results("a", "b").append_column("input_x", pa.array(["1", "2"]))
    commit(ledger(place()), table)
    before = pq.read_schema(pa.BufferReader(place().read(f"labels/{part(1)}")))
    book = ledger(place())
    book.index.mark_seen(images("a"))
    assert book.prune() == 1
    after = pq.read_schema(pa.BufferReader(place().read(f"labels/{part(1)}")))
    assert after.equals(before)
    nonces = after.metadata.pop(b"nonce"), before.metadata.pop(b"nonce")
    assert {**after.metadata, b"nonce": b""} == {**before.metadata, b"nonce": b""} and nonces[0] != nonces[1]
    assert rows(place())[0]["input_x"] == "1"


def test_labels_always_hold_complete_files_with_each_image_once(tmp_path: Path) -> None:
    output = Folder(Stores(StorageConfig(), {}), str(tmp_path))
    names = [f"i{number}" for number in range(40)]
    commit(ledger(output), results(*names))

    def write() -> None:
        book = ledger(output)
        book.index.mark_seen(images(*names, etag="new"))
        for name in names:
            commit(book, results(name, etag="new"))

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        looked = 0
        while not writing.done():
            paths = sorted(tmp_path.glob("labels/*.parquet"), reverse=True)
            files = (pa.BufferReader(path.read_bytes()) for path in paths)
            found = [uri for file in files for uri in pq.read_table(file)["uri"].to_pylist()]
            # Newest first: a row that moves on while we look is missed, never seen twice.
            assert len(found) == len(set(found))
            looked += 1
        writing.result()
    assert looked > 1
    assert uris(output) == sorted(names)


@pytest.mark.parametrize("step", ["fsync", "link", "unlink"])
def test_a_writer_killed_at_any_step_leaves_no_truncated_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    output = Folder(Stores(StorageConfig(), {}), str(tmp_path))
    book = ledger(output)

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, step, killed)
        patched.setattr(os, "unlink", killed)  # a process that is gone cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            commit(book, results("a"))
    left = list(tmp_path.glob("labels/*.parquet"))
    assert len(left) == (1 if step == "unlink" else 0)
    assert any(name.endswith(".tmp") for name in os.listdir(tmp_path / "labels"))
    again = ledger(output)
    commit(again, results("b") if left else results("a", "b"))
    assert uris(output) == ["a", "b"]


def _commit_for_ever(uri: str, environment: dict[str, str]) -> None:
    book = ledger(Folder(Stores(StorageConfig(), environment), uri))
    number = len(book.index)
    while True:
        commit(book, results(*(f"i{number + each}" for each in range(50))))
        number += 50


def test_writers_killed_by_sigkill_leave_complete_parts_and_each_image_once(place: Place) -> None:
    output = place()
    environment = dict(output.stores._environment)

    def parts_there() -> int:
        """Count the parts; on disks a killed writer also leaves a hidden file behind."""
        return sum(name.startswith("part-") for name in output.names("labels"))

    for _ in range(2):
        before = parts_there()
        process = multiprocessing.get_context("spawn").Process(target=_commit_for_ever, args=(output.uri, environment))
        process.start()
        ends = time.monotonic() + 60
        while parts_there() < before + 3 and time.monotonic() < ends:
            time.sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = uris(output)
        assert len(found) >= 50 * (before + 3)
        assert sorted(found) == sorted(f"i{number}" for number in range(len(found)))
    assert len(ledger(output).index) == len(found)


# Small histories against simple models


class Memory:
    """A store in memory that keeps the contract, with ETags; it can kill its caller at a write."""

    conditional = True

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.kill_in: int | None = None
        self.kill_before = False

    def path(self, uri: str) -> str:
        return uri

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        if path not in self.objects:
            raise FileNotFoundError(path)
        data, etag = self.objects[path]
        return data, Meta(len(data), etag)

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        data, meta = self.read(path)
        return data, meta.etag

    def list_objects(self, path: str) -> Iterable[pa.RecordBatch]:
        names = sorted(name for name in self.objects if name.startswith(f"{path}/"))
        return [pa.record_batch({"path": pa.array(names, pa.string())})]

    def create(self, path: str, data: bytes) -> None:
        self._write(path, data, None)

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        self._write(path, data, tag)

    def _write(self, path: str, data: bytes, tag: str | None) -> None:
        last = self.kill_in == 0
        if self.kill_in is not None:
            self.kill_in -= 1
        if last and self.kill_before:
            raise KeyboardInterrupt
        now = self.objects.get(path, (b"", None))[1]
        if now != tag:
            if tag is None:
                raise FileExistsError(path)
            raise obstore.exceptions.PreconditionError(path)
        self.objects[path] = (data, uuid.uuid4().hex)
        if last:
            raise KeyboardInterrupt


class InMemory(Stores):
    def __init__(self, memory: Memory) -> None:
        super().__init__(StorageConfig(), {})
        self.memory = memory

    def resolve(self, uri: str, *, via_fsspec: bool = False) -> Any:
        return self.memory, uri


IMAGES = "abcdef"
_image = st.sampled_from(IMAGES)
_kind = st.sampled_from(["label", "passing", "permanent"])
_event = st.one_of(
    st.tuples(st.just("put"), _image, _kind),
    st.tuples(st.just("remove"), _image),
    st.tuples(st.just("run"), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("killed run"), st.integers(1, 3), st.integers(0, 6), st.booleans()),
)
_bounded = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def _run(output: Folder, world: Mapping[str, tuple[str, int]], chunk: int, prune: bool) -> list[str]:
    """List, label, and end as the job does; return the labelled images."""
    book = ledger(output)
    status = {name: states(book, images(name, etag=f"v{world[name][1]}"))[0][0] for name in sorted(world)}
    todo = [name for name in status if status[name] != DONE]
    for start in range(0, len(todo), chunk):
        made = []
        for name in todo[start : start + chunk]:
            kind, version = world[name]
            refused = {} if kind == "label" else {"reason": "timeout", "passing": kind == "passing"}
            made.append(results(name, etag=f"v{version}", **refused))
        commit(book, *made)
    if prune:
        book.prune()
    finish(book)
    return todo


@_bounded
@given(st.lists(_event, min_size=1, max_size=8))
def test_any_history_of_changes_runs_and_kills_ends_with_each_image_once(history: list[tuple[Any, ...]]) -> None:
    memory = Memory()
    output = Folder(InMemory(memory), "out")
    world: dict[str, tuple[str, int]] = {}
    for version, event in enumerate([*history, ("run", 2, False), ("run", 2, True)]):
        if event[0] == "put":
            world[event[1]] = (event[2], version)
        elif event[0] == "remove":
            world.pop(event[1], None)
        elif event[0] == "killed run":
            memory.kill_in, memory.kill_before = event[2], event[3]
            with suppress(KeyboardInterrupt):
                _run(output, world, event[1], prune=False)
            memory.kill_in = None
        else:
            _run(output, world, event[1], event[2])
            _agree(output, world, exactly=event[2])
            # At once again: nothing is done but what may pass.
            assert _run(output, world, 1, False) == sorted(n for n in world if world[n][0] == "passing")
        found = uris(output) + uris(output, "rejects")
        assert len(found) == len(set(found))


def _agree(output: Folder, world: Mapping[str, tuple[str, int]], exactly: bool) -> None:
    found = {row["uri"]: ("label", row["etag"]) for row in rows(output)}
    found |= {
        row["uri"]: ("passing" if row["passing"] else "permanent", row["etag"]) for row in rows(output, "rejects")
    }
    wanted = {name: (kind, f"v{version}") for name, (kind, version) in world.items()}
    assert {name: row for name, row in found.items() if name in world} == wanted
    assert not exactly or found.keys() == wanted.keys()


_step = st.tuples(st.integers(0, 2), st.sets(_image, min_size=1, max_size=3), st.booleans())


@_bounded
@given(st.lists(_step, min_size=1, max_size=8))
def test_any_interleaving_of_three_writers_ends_with_each_image_once(steps: list[tuple[int, set[str], bool]]) -> None:
    output = Folder(InMemory(Memory()), "out")
    writers = [ledger(output) for _ in range(3)]
    sent: list[set[str]] = [set(), set(), set()]
    for writer, names, refuse in steps:
        fresh = sorted(names - sent[writer])  # a committer sends each image once
        sent[writer] |= names
        if fresh:
            commit(writers[writer], results(*fresh, **({"reason": "timeout"} if refuse else {})))
        assert len(uris(output)) == len(set(uris(output)))
    for writer in writers:
        finish(writer)
    labels, refused = uris(output), uris(output, "rejects")
    assert sorted(labels + refused) == sorted(set.union(*sent))
    assert audit.audit(output, None).duplicated == []

"""Files of an output are lost, damaged or copied: the program names them, and its advice completes the output.

Each advice in a message about files of an output is followed here to the letter, and the rows are counted again.
"""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.errors import AuditError, ImgbatchError, OutputError
from imgbatch.ledger import audit
from imgbatch.ledger.commit_log import Log
from imgbatch.ledger.part_file import decode, encode
from tests.unit.test_tars import COLOURS, Killed, Run, packed, picture, pictures

MEMBERS = 28


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("imgbatch.inference.worker._AT_ONCE", 4)
    return Run(tmp_path)


def part(run: Run, table: str, number: int) -> Path:
    return Path(run.output.uri) / table / f"part-{number:08d}.parquet"


def parts(run: Run, table: str) -> list[int]:
    log = Log(run.output.folder(table))
    log.scan()
    return log.numbers


def members(name: str = "a.tar") -> dict[str, str]:
    """Return the labels of the members of `fill`: every fifth is not an image."""
    return {f"{name}#{n:04d}.png": COLOURS[n % 3] for n in range(MEMBERS) if n % 5}


def refused(name: str = "a.tar") -> dict[str, str]:
    return {f"{name}#{n:04d}.png": "not_an_image" for n in range(0, MEMBERS, 5)}


def data() -> bytes:
    return packed(*((f"{n:04d}.png", picture(n) if n % 5 else b"no image") for n in range(MEMBERS)))


def require_whole(run: Run, name: str = "a.tar") -> None:
    assert run.rows() == members(name) and run.rows("rejects") == refused(name)
    for table in ("labels", "rejects"):
        numbers = parts(run, table)
        assert numbers == list(range(1, len(numbers) + 1)), "no number is missing"


def move_away(message: str) -> int:
    """Follow a message: move the files that it names away; return how many there were."""
    if ". Move away " in message:
        files = re.findall(r"/\S+?\.parquet", message.rpartition(". Move away ")[2])
    else:  # FILE is damaged: move it away
        assert "move it away" in message
        files = re.findall(r"/\S+?\.parquet", message)[:1]
    assert files, message
    for file in files:
        Path(file).rename(f"{Path(file).parent.parent}/{Path(file).name}.away")
    return len(files)


# A part of a tar is lost


@pytest.mark.parametrize(
    ("name", "table", "sealed"),
    [("a.tar", "labels", True), ("a.tar", "rejects", False), ("a.tgz", "rejects", True), ("a.tgz", "labels", False)],
)
def test_any_part_of_a_tar_may_be_lost(run: Run, name: str, table: str, sealed: bool) -> None:
    run.put(name, gzip.compress(data()) if name == "a.tgz" else data())
    for lost in range(1, 9):
        shutil.rmtree(run.output.uri, ignore_errors=True)
        run.number = 0
        if sealed:
            run()
        else:
            with pytest.raises(Killed):
                run(killed_at_the_end)
        if lost not in parts(run, table):
            break
        part(run, table, lost).unlink()
        run()
        require_whole(run, name)
        assert run.counts.listed == MEMBERS
        run.decoded = 0
        run()
        assert run.decoded == 0, "what was repaired is not read again"
    assert lost > 6 or not sealed


def killed_at_the_end(stream: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield from stream
    raise Killed


@pytest.mark.parametrize("limit", [None, 24, MEMBERS])
@pytest.mark.parametrize("lost", [1, 2, 3, -1])
def test_the_same_command_with_a_limit_restores_the_rows_of_a_lost_part(run: Run, lost: int, limit: int | None) -> None:
    """The rows of a tar are in three parts, by limits; one is damaged, and moved away as the message says."""
    run.put("a.tar", data())
    for upto in (8, 16):
        run(limit=upto)
    run(limit=limit)
    total = limit or MEMBERS
    with_rows = [n for n in parts(run, "labels") if pq.read_metadata(part(run, "labels", n)).num_rows]
    damaged = part(run, "labels", with_rows[lost])
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(OutputError) as caught:
        run(limit=limit)
    assert move_away(str(caught.value)) == 1
    assert not damaged.exists()
    totals = run(limit=limit)
    assert totals.listed == totals.labelled + totals.rejected == total
    assert len(run.rows()) + len(run.rows("rejects")) == total
    run()
    require_whole(run)


@pytest.mark.parametrize("gone", [["labels"], ["rejects"], ["labels", "rejects"], ["rejects", "runs"]])
@pytest.mark.parametrize("torn", [False, True])
def test_a_whole_table_may_be_lost(run: Run, gone: list[str], torn: bool) -> None:
    run.put("a.tar", data()[: len(data()) // 2] if torn else data())
    run()
    labels, rejects = run.rows(), run.rows("rejects")
    assert ("a.tar" in rejects) == torn and labels
    for table in gone:
        shutil.rmtree(f"{run.output.uri}/{table}")
    run()
    assert run.rows() == labels and run.rows("rejects") == rejects


def test_the_lost_reject_of_a_truncated_tar_is_written_again(run: Run) -> None:
    whole = packed(*pictures(0, 10))
    run.put("a.tar", whole[: len(whole) // 2])
    run()
    labels = run.rows()
    assert run.rows("rejects") == {"a.tar": "truncated"} and labels
    part(run, "rejects", 1).unlink()
    with pytest.raises(AuditError, match=r"missing: .*rejects/part-00000001\.parquet; in no row: .*a\.tar#"):
        audit.audit(run.output, run.output.folder("runs/1/listing")).require_reconciled()
    run()
    assert run.rows("rejects") == {"a.tar": "truncated"} and run.rows() == labels


def test_duplicate_members_are_distinguished_from_members_read_again(run: Run) -> None:
    first, other = ("0.png", picture(0)), ("1.png", picture(1))
    entries = [first, first, *pictures(10, 3), other, *pictures(20, 3), first, other, *pictures(30, 3), other]
    run.put("a.tar", packed(*entries))
    run()
    labels, rejects = run.rows(), run.rows("rejects")
    assert len(labels) + len(rejects) == len(entries) and len(rejects) == 4
    for table in ("labels", "rejects"):
        for lost in parts(run, table):
            part(run, table, lost).unlink()
            run()
            assert run.rows() == labels and run.rows("rejects") == rejects


def test_two_lost_parts_with_a_kill_in_between(run: Run) -> None:
    """A run that repairs is killed, and loses a part of its own."""
    run.put("a.tar", data())
    run()
    part(run, "labels", 2).unlink()
    part(run, "rejects", 3).unlink()

    def killed(stream: Iterator[pa.Table]) -> Iterator[pa.Table]:
        yield next(stream)
        yield next(stream)
        raise Killed

    with pytest.raises(Killed):
        run(killed)
    part(run, "labels", parts(run, "labels")[-1]).unlink()
    run()
    require_whole(run)


def test_a_restored_older_version_of_a_tar_is_read_again(run: Run) -> None:
    """Its rows have been replaced or pruned since: what its parts recorded is not valid any more."""
    run.put("a.tar", data())
    old = (run.input / "a.tar").stat()
    run()
    run.put("a.tar", packed(*((f"{n:04d}.png", picture(n + 1)) for n in range(10))))
    run()
    run.put("a.tar", data())
    touch(run.input / "a.tar", old.st_mtime_ns)
    run()
    assert run.rows() == members() and run.rows("rejects") == refused()
    (run.input / "a.tar").unlink()
    run.put("b.tar", packed(*pictures(0, 3)))
    run(prune=True)
    run.put("a.tar", data())
    touch(run.input / "a.tar", old.st_mtime_ns)
    totals = run()
    assert totals.listed == MEMBERS + 3 and run.rows().items() >= members().items()


def touch(path: Path, nanoseconds: int) -> None:
    import os

    os.utime(path, ns=(nanoseconds, nanoseconds))


def test_a_tar_half_read_by_version_0_1_is_read_from_its_beginning(run: Run) -> None:
    """Its footers do not record how many rows a complete reading gives."""
    run.put("a.tar", data())

    def killed(stream: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for _ in range(4):
            yield next(stream)
        raise Killed

    with pytest.raises(Killed):
        run(killed)
    for table in ("labels", "rejects"):
        for number in parts(run, table):
            file = part(run, table, number)
            rows, footer = decode(file.read_bytes(), str(file))
            for entry in footer.streams.values():
                del entry["rows"]  # type: ignore[attr-defined]
            file.write_bytes(encode(rows, footer.metadata()))
    part(run, "labels", 2).unlink()
    run()
    require_whole(run)


# What the audit reports


@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_a_missing_part_is_named_with_its_remedy(run: Run, table: str) -> None:
    run.put("a.tar", data())
    run()
    for lost in parts(run, table)[:-1]:
        kept = part(run, table, lost).read_bytes()
        part(run, table, lost).unlink()
        with pytest.raises(AuditError) as caught:
            audit.audit(run.output, run.output.folder("runs/1/listing")).require_reconciled()
        said = str(caught.value)
        assert f"missing: {part(run, table, lost)}" in said and "run the same classify.py command again" in said
        if len(decode(kept, "a part")[0]):
            assert f"of {MEMBERS} members" in said, "the number of members is known from another part"
        part(run, table, lost).write_bytes(kept)


def test_a_missing_part_is_named_even_if_no_row_is_missing(run: Run) -> None:
    for number in range(3):
        run.put(f"{number}.png", picture(number))
    run()
    run.put("3.png", picture(3))
    run()
    part(run, "labels", 2).unlink()  # a seal
    with pytest.raises(AuditError, match=r"missing: .*labels/part-00000002\.parquet"):
        audit.audit(run.output, run.output.folder("runs/2/listing")).require_reconciled()
    run()
    assert len(run.rows()) == 4 and parts(run, "labels") == [1, 2, 3, 4, 5]
    audit.audit(run.output, run.output.folder("runs/3/listing")).require_reconciled()


# Parts that were copied


@pytest.mark.parametrize("table", ["labels", "rejects"])
@pytest.mark.parametrize("to", ["next", "later", "over a lost one"])
@pytest.mark.parametrize("kind", ["tar", "loose"])
def test_a_copied_part_is_named_and_its_remedy_works(run: Run, table: str, to: str, kind: str) -> None:
    if kind == "tar":
        run.put("a.tar", data())
    else:
        for number in range(MEMBERS):
            run.put(f"{number:04d}.png", picture(number) if number % 5 else b"no image")
            if number % 10 == 9:
                run()
    run()
    labels, rejects = run.rows(), run.rows("rejects")
    log = Log(run.output.folder(table))
    log.scan()
    with_rows = [n for n in log.numbers if len(log.part(n)[0])]
    target = {"next": log.next, "later": log.next + 3, "over a lost one": with_rows[0]}[to]
    shutil.copy(part(run, table, with_rows[1]), part(run, table, target))
    with pytest.raises(AuditError) as caught:
        audit.audit(run.output, run.output.folder(f"runs/{run.number}/listing")).require_reconciled()
    assert all(str(part(run, table, number)) in str(caught.value) for number in (with_rows[1], target))
    with pytest.raises(AuditError) as caught:
        run()
    assert all(str(part(run, table, number)) in str(caught.value) for number in (with_rows[1], target))
    assert move_away(str(caught.value)) == 1
    run()
    assert run.rows() == labels and run.rows("rejects") == rejects
    assert parts(run, table) == list(range(1, len(parts(run, table)) + 1))


def test_copies_of_all_parts_are_moved_away_in_a_few_steps(run: Run) -> None:
    run.put("a.tar", data())
    run()
    log = Log(run.output.folder("labels"))
    log.scan()
    for number in log.numbers:
        shutil.copy(part(run, "labels", number), part(run, "labels", log.next + number - 1))
    for _ in range(3):
        try:
            run()
        except AuditError as error:
            assert move_away(str(error)) <= 5
    run()
    require_whole(run)


def test_the_next_run_removes_the_reject_of_a_labelled_member(run: Run) -> None:
    """Two writers at a time may leave this state."""
    run.put("a.tar", data())
    run()
    file = part(run, "rejects", 1)
    rows, footer = decode(file.read_bytes(), str(file))
    labelled = pa.array([f"{run.input}/a.tar#0001.png"])
    second = rows.slice(0, 1).set_column(0, rows.schema.field("uri"), labelled)
    file.write_bytes(encode(pa.concat_tables([rows, second]), footer.metadata()))
    with pytest.raises(AuditError, match=r"in two rows: .*0001\.png.*run the same classify\.py command again"):
        audit.audit(run.output, run.output.folder("runs/1/listing")).require_reconciled()
    run()
    require_whole(run)


def test_a_part_number_that_no_run_used_is_refused(run: Run) -> None:
    run.put("a.tar", data())
    run()
    part(run, "labels", 2).rename(part(run, "labels", 20_000_002))
    with pytest.raises(OutputError, match=r"part-20000002\.parquet: .* numbers of parts are missing") as caught:
        run()
    move_away(str(caught.value))
    run()
    require_whole(run)


# Files that are damaged or foreign


def _lacks_columns(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["etag"]).replace_schema_metadata(table.schema.metadata), file)


@pytest.mark.parametrize("table", ["labels", "rejects"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"PAR1 torn"),
        lambda file: file.write_bytes(b""),
        lambda file: pq.write_table(pa.table({"uri": ["a.jpg"]}), file),
        _lacks_columns,
        lambda file: file.rename(file.parent / "copy.parquet"),
    ],
    ids=["torn", "empty", "foreign", "lacks columns", "renamed"],
)
def test_rows_of_a_part_moved_away_are_written_again(run: Run, damage: Callable[[Path], Any], table: str) -> None:
    run.put("a.tar", data())
    for number in range(7):
        run.put(f"{number}.png", picture(number))
    run.put("bad.png", b"no image")
    run()
    labels, rejects = run.rows(), run.rows("rejects")
    damage(part(run, table, 2))
    with pytest.raises(ImgbatchError) as caught:
        run()
    assert caught.value.exit_code == 5
    assert move_away(str(caught.value)) == 1
    run()
    assert run.rows() == labels and run.rows("rejects") == rejects


def test_damaged_rewrite_intents_are_removed_as_advised(run: Run) -> None:
    run.put("a.tar", data())
    run()
    run.put("a.tar", packed(*pictures(0, 9)))
    run()
    announced = Path(run.output.uri) / "runs/rewriting-labels.json"
    assert announced.exists()
    announced.write_text("{")
    with pytest.raises(OutputError, match=rf"{announced} is damaged or was not written by imgbatch; remove it"):
        run()
    announced.unlink()
    run()
    assert run.rows().items() >= {f"a.tar#{n:04d}.png": COLOURS[n % 3] for n in range(9)}.items()

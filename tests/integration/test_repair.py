"""The same command completes an output that lost files, for every kind of input; verify names what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Ended, Job
from tests.integration import tables
from tests.unit.pictures import encode, scene
from tests.unit.test_repair import move_away
from tests.unit.test_tars import packed

BAD = (3, 7)
"""The numbers of the files, in each kind of input, that are not images."""
COUNT = 10
KINDS = ("folder", "tar", "parquet", "manifest")


def image(seed: int) -> bytes:
    return b"no image" if seed % COUNT in BAD else encode(scene(seed=seed), "JPEG")


def write_inputs(place: Path) -> list[str]:
    """Write ten images of each kind; return the inputs."""
    for folder in ("folder", "listed"):
        (place / folder).mkdir()
    for number in range(COUNT):
        (place / "folder" / f"{number}.jpg").write_bytes(image(number))
        (place / "listed" / f"{number}.jpg").write_bytes(image(30 + number))
    (place / "a.tar").write_bytes(packed(*((f"{number}.jpg", image(10 + number)) for number in range(COUNT))))
    pq.write_table(pa.table({"image": [image(20 + number) for number in range(COUNT)]}), place / "a.parquet")
    rows = [f"listed/{number}.jpg,{number}" for number in range(COUNT)]
    (place / "list.csv").write_text("\n".join(["uri,note", *rows, ""]))
    return [str(place / name) for name in ("folder", "a.tar", "a.parquet", "list.csv")]


Command = Callable[[Path], Ended]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, warm: Job) -> Command:
    """Run the job over all kinds of input at once; the rows are in several parts."""
    inputs = write_inputs(tmp_path_factory.mktemp("inputs"))

    def run(output: Path) -> Ended:
        given = [argument for uri in inputs for argument in ("--input", uri)]
        options = ["--set", "run.commit_interval_s=0.001", "--set", "rejects.max_share=1"]
        return warm("classify", *given, "--output", output, "--model", tiny_model, *options)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    output = tmp_path_factory.mktemp("finished") / "out"
    ended = command(output)
    assert ended.code == 0, ended.err
    assert len(tables.rows(output)) == len(KINDS) * (COUNT - len(BAD))
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def require_same(output: Path, finished: Path, job: Job) -> None:
    """Require the rows of the finished output, each once, and counts that reconcile."""
    for table in ("labels", "rejects"):
        rows, expected = (
            [{name: value for name, value in row.items() if name not in ("run_id", "attempts")} for row in found]
            for found in (tables.rows(output, table), tables.rows(finished, table))
        )
        for row, other in zip(rows, expected, strict=True):
            assert row["uri"] == other["uri"] and row.get("label") == other.get("label")
    ended = job("verify", output)
    assert ended.code == 0, ended.err


def holding_rows(output: Path, table: str) -> list[Path]:
    return [path for path in sorted(output.glob(f"{table}/part-*")) if pq.read_metadata(path).num_rows]


@pytest.mark.parametrize(
    "gone",
    [["rejects"], ["labels"], ["rejects", "runs", "_SUCCESS"], ["runs"], ["_SUCCESS"]],
    ids=lambda gone: "+".join(gone),
)
def test_the_same_command_completes_an_output_with_a_lost_folder(
    command: Command, job: Job, output: Path, finished: Path, gone: list[str]
) -> None:
    for name in gone:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert job("verify", output).code in (2, 6)
    ended = command(output)
    assert ended.code == 0, ended.err
    require_same(output, finished, job)


@pytest.mark.parametrize("table", ["labels", "rejects"])
@pytest.mark.parametrize("lost", [0, 1, -1])
def test_a_missing_part_is_named_and_its_rows_are_written_again(
    command: Command, job: Job, output: Path, finished: Path, table: str, lost: int
) -> None:
    part = holding_rows(output, table)[lost]
    part.unlink()
    ended = job("verify", output)
    assert ended.code == 6
    assert f"missing: {part}" in ended.err and "run the same classify.py command again" in ended.err
    ended = command(output)
    assert ended.code == 0, ended.err
    assert part.exists(), "its number is taken again"
    require_same(output, finished, job)


@pytest.mark.parametrize("table", ["labels", "rejects"])
def test_a_copy_of_a_part_is_named_and_moved_away(
    command: Command, job: Job, output: Path, finished: Path, table: str
) -> None:
    part = holding_rows(output, table)[-1]
    last = int(sorted(output.glob(f"{table}/part-*"))[-1].stem[-8:])
    copy = part.with_name(f"part-{last + 2:08d}.parquet")
    shutil.copy(part, copy)
    said = [job("verify", output), command(output)]
    for ended in said:
        assert ended.code == 6 and str(part) in ended.err and f"Move away {copy}" in ended.err, ended.err
    assert not (output / "_SUCCESS").exists()
    assert move_away(said[1].err) == 1
    ended = command(output)
    assert ended.code == 0, ended.err
    require_same(output, finished, job)


def test_a_damaged_or_wrong_success_is_written_again_as_advised(
    command: Command, job: Job, output: Path, finished: Path
) -> None:
    wrong = tables.success(output)
    wrong["counts"]["labelled"] += 1
    for content in ("{}", json.dumps(wrong)):
        (output / "_SUCCESS").write_text(content)
        ended = job("verify", output)
        assert ended.code == 6 and "run the same classify.py command again" in ended.err
        assert command(output).code == 0
        require_same(output, finished, job)


def test_a_damaged_listing_is_replaced_as_advised(command: Command, job: Job, output: Path, finished: Path) -> None:
    listing = output / "runs" / tables.success(output)["run_id"] / "listing"
    (page,) = listing.glob("page-*")
    content = page.read_bytes()
    for damage in (b"PAR1", None):  # None: the page is missing, and another one is not
        page.write_bytes(content if damage is None else damage)
        if damage is None:
            page.rename(listing / "page-000007.parquet")
        ended = job("verify", output)
        assert ended.code == 6 and str(listing) in ended.err, ended.err
        assert "run the same classify.py command again" in ended.err and "Traceback" not in ended.err
    assert command(output).code == 0
    require_same(output, finished, job)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_one_of_three_parts_of_a_tar_is_damaged(
    warm: Job, job: Job, tiny_model: Path, tmp_path: Path, damaged: int
) -> None:
    """The message is followed exactly, the same command is run again, and the rows are counted."""
    pictures = [encode(scene(seed=number), "JPEG") for number in range(5)]
    (tmp_path / "a.tar").write_bytes(packed(*((f"{number:03d}.jpg", pictures[number % 5]) for number in range(300))))
    output = tmp_path / "out"
    command = ("classify", "--input", tmp_path / "a.tar", "--output", output, "--model", tiny_model)
    commit = ("--set", "run.commit_interval_s=1000")
    for limit in (100, 200, 300):
        ended = warm(*command, *commit, "--limit", str(limit))
        assert ended.code == 0, ended.err
    part = holding_rows(output, "labels")[damaged]
    part.write_bytes(part.read_bytes()[:-1000])
    ended = warm(*command, *commit, "--limit", "300")
    assert ended.code == 5 and "move it away, then run again" in ended.err
    assert move_away(ended.err) == 1
    for limit in (("--limit", "300"), ()):
        ended = warm(*command, *commit, *limit)
        assert ended.code == 0, ended.err
        uris = [row["uri"] for row in tables.rows(output)]
        assert len(uris) == len(set(uris)) == 300
        ended = job("verify", output)
        assert ended.code == 0 and ended.out.startswith("300 images listed, 300 labelled"), ended.out

"""The main job on each store: the commands of docs/inputs.md, growing and changing inputs, kills, and two writers at once."""

from __future__ import annotations

import re
import shlex
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest

from tests.conftest import ROOT, Job
from tests.integration import faults, tables
from tests.integration.test_containers import parquet_of, tar_of
from tests.integration.test_kills import deadly
from tests.stores.conftest import SERVERS
from tests.unit.pictures import encode, scene

COMMANDS = {
    scheme: arguments
    for arguments, scheme in re.findall(
        r"^    \.venv/bin/python jobs/classify\.py (--input (s3|gs|az)://images/album --output .*)$",
        (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=[name for name in SERVERS if name != "seaweedfs"])
def server(request: pytest.FixtureRequest, start: Callable[[str], Any]) -> Any:
    """Each server in turn, but the one that tests/integration has."""
    return start(request.param)


def upload(server: Any, prefix: str, count: int) -> list[str]:
    """Put pictures below a prefix; return their names."""
    bucket = server.bucket("images")
    names = [f"{number:02d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        obstore.put(bucket, f"{prefix}/{name}", encode(scene(seed=number), "JPEG"))
    return names


def test_there_is_a_command_for_each_store() -> None:
    assert sorted(COMMANDS) == ["az", "gs", "s3"]


def test_the_command_of_the_page_on_an_input_that_grows_and_changes(
    warm: Job, server: Any, tiny_model: Path, tmp_path: Path
) -> None:
    names, images = upload(server, "album", 8), server.bucket("images")
    command = ("classify", *shlex.split(COMMANDS[server.scheme]), "--model", tiny_model)
    name = COMMANDS[server.scheme].rpartition("/")[2]
    ended = warm(*command, env=server.environment)
    assert ended.code == 0, ended.err
    first = tables.download(server.bucket("out"), name, tmp_path / "first")
    tables.require_single(first, names)
    etags = {row["uri"]: row["etag"] for row in tables.rows(first)}
    assert etags[f"{server.scheme}://images/album/03.jpg"] == obstore.head(images, "album/03.jpg")["e_tag"].strip('"')

    obstore.put(images, "album/03.jpg", encode(scene(seed=103), "JPEG"))
    obstore.put(images, "album/new.jpg", encode(scene(seed=9), "JPEG"))
    ended = warm(*command, env=server.environment)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("9 images listed, 9 labelled, 0 rejected (7 already done, 0 kept,")
    second = tables.download(server.bucket("out"), name, tmp_path / "second")
    newest = tables.success(second)["run_id"]
    changed = {row["uri"].rpartition("/")[2] for row in tables.rows(second) if row["run_id"] == newest}
    assert changed == {"03.jpg", "new.jpg"}
    assert warm("verify", f"{server.scheme}://out/{name}", env=server.environment).code == 0
    assert "conditional" not in ended.err


def test_a_model_and_inputs_of_all_kinds_are_read_from_the_store(
    warm: Job, server: Any, tiny_model: Path, tmp_path: Path
) -> None:
    root, bucket = uuid.uuid4().hex, server.bucket("images")
    pictures = {name: encode(scene(seed=number), "JPEG") for number, name in enumerate(("a.jpg", "b.jpg", "c.jpg"))}
    for file in tiny_model.iterdir():
        obstore.put(bucket, f"{root}/model/{file.name}", file.read_bytes())
    obstore.put(bucket, f"{root}/one/a.jpg", pictures["a.jpg"])
    obstore.put(bucket, f"{root}/list.csv", b"uri,shop\none/a.jpg,north\n")
    obstore.put(bucket, f"{root}/train.parquet", parquet_of(pictures, group=2))
    obstore.put(bucket, f"{root}/shard.tar", tar_of(pictures))
    place = f"{server.scheme}://images/{root}"
    inputs = [part for name in ("list.csv", "train.parquet", "shard.tar") for part in ("--input", f"{place}/{name}")]
    output = f"{server.scheme}://out/{root}"
    ended = warm("classify", *inputs, "--model", f"{place}/model", "--output", output, env=server.environment)
    assert ended.code == 0, ended.err
    rows = {row["uri"]: row for row in tables.rows(tables.download(server.bucket("out"), root, tmp_path))}
    assert set(rows) == {
        f"{place}/one/a.jpg",
        *(f"{place}/train.parquet#{row}" for row in range(3)),
        *(f"{place}/shard.tar#{name}" for name in pictures),
    }
    assert rows[f"{place}/one/a.jpg"]["input_shop"] == "north"


@pytest.mark.parametrize("point", ["after the PUT of a part", pytest.param("before _SUCCESS", marks=pytest.mark.long)])
def test_a_killed_run_is_resumed(
    started: Start, warm: Job, server: Any, tiny_model: Path, tmp_path: Path, point: str
) -> None:
    root = uuid.uuid4().hex
    names = upload(server, root, 12)
    output = f"{server.scheme}://out/{root}"
    command = ("classify", "--input", f"{server.scheme}://images/{root}", "--output", output, "--model", tiny_model)
    process = started(*command, env={**server.environment, **deadly(tmp_path / "deadly", point)})
    _, err = process.communicate(timeout=240)
    assert process.returncode == -9, err
    ended = warm(*command, env=server.environment)
    assert ended.code == 0, ended.err
    tables.require_single(tables.download(server.bucket("out"), root, tmp_path / "out"), names)
    assert warm("verify", output, env=server.environment).code == 0


def test_of_two_writers_at_once_one_is_refused(started: Start, server: Any, tiny_model: Path, tmp_path: Path) -> None:
    root = uuid.uuid4().hex
    names = upload(server, root, 6)
    ready, go = tmp_path / "ready", tmp_path / "go"
    ready.mkdir()
    environment = server.environment | faults.waiting_for_claims(tmp_path / "together", ready, go)
    output = f"{server.scheme}://out/{root}"
    command = ("classify", "--input", f"{server.scheme}://images/{root}", "--output", output, "--model", tiny_model)
    both = [started(*command, env=environment) for _ in range(2)]
    while len(list(ready.iterdir())) < 2:
        assert all(process.poll() is None for process in both), [process.communicate() for process in both]
    go.touch()
    ended = [(*process.communicate(timeout=240), process.returncode) for process in both]
    assert sorted(code for _, _, code in ended) == [0, 7], ended
    tables.require_single(tables.download(server.bucket("out"), root, tmp_path / "out"), names)


BAD = {
    "a bucket that is missing": ("gs://no-such-bucket/x", {}, 2, "no-such-bucket"),
    "a container that is missing": ("az://no-such-container/x", {}, 2, "no-such-container"),
    "a container with capitals": ("az://Images/x", {}, 2, "lower-case"),
    "no right to list": ("gs://no-listing", {}, 3, "403"),
    "a wrong key": ("az://images/album", {"AZURE_STORAGE_CONNECTION_STRING": "AccountKey=d3Jvbmc="}, 3, "403"),
    "a scheme of the past": ("wasbs://images@me.blob.core.windows.net/x", {}, 2, "write abfss://CONTAINER@ACCOUNT"),
    "an option of another store": ("gs://images/album --set storage.options.key=x", {}, 2, "storage.options.s3"),
    "no account": ("az://images/album", {"AZURE_STORAGE_CONNECTION_STRING": ""}, 2, "AZURE_STORAGE_ACCOUNT_NAME"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_clear_message(
    warm: Job, gcs: Any, azure: Any, tiny_model: Path, tmp_path: Path, case: str
) -> None:
    command, changed, code, named = BAD[case]
    environment = {**gcs.environment, **azure.environment}
    for name, value in changed.items():
        kept = re.sub(r"AccountKey=[^;]*", value, environment[name]) if value else ""
        environment[name] = kept
    arguments = ("--input", *command.split(), "--output", tmp_path / "out", "--model", tiny_model)
    ended = warm("classify", *arguments, "--set", "storage.retries=0", env=environment)
    assert ended.code == code, ended.err
    assert named in ended.err and "Traceback" not in ended.err


def test_an_output_that_may_not_be_written_is_found_before_the_work(
    warm: Job, gcs: Any, folder: Path, tiny_model: Path
) -> None:
    command = ("classify", "--input", folder, "--output", "gs://no-writing/out", "--model", tiny_model)
    ended = warm(*command, env=gcs.environment)
    assert ended.code == 3 and "gs://no-writing/out" in ended.err and "403" in ended.err, ended.err

"""Real jobs over a real S3 server behind a proxy that fails, delays, truncates and falsifies by a seeded plan."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Job, S3Server
from tests.integration import faults, tables
from tests.integration.test_refusals import require_refusal
from tests.unit.pictures import encode, scene

KINDS = 24
READS = [503, 503, 503, 500, 0, "cut", "short", 0.3]
WRITES = [503, 503, 500, 0, "lost", 0.3]


def fill(s3: S3Server, prefix: str, count: int) -> None:
    """Put `count` pictures of a few kinds below a prefix."""
    kinds = [encode(scene(seed=number), "JPEG") for number in range(KINDS)]
    for number in range(count):
        obstore.put(s3.bucket("images"), f"{prefix}/{number:04d}.jpg", kinds[number % KINDS])


class Chaos:
    """A plan that makes a proportion of all requests fail, the same ones for the same seed."""

    def __init__(self, seed: int, share: float) -> None:
        self._seed, self._share, self.done = seed, share, Counter[str]()

    def __call__(self, method: str, path: str, before: int) -> int | str | float | None:
        chance = random.Random(f"{self._seed} {method} {path} {before}")
        if chance.random() > self._share:
            return None
        image = method == "GET" and path.endswith(".jpg")
        planned = chance.choice(WRITES if method == "PUT" else READS if image else [503, 500, 0])
        self.done[f"{method} {planned}"] += 1
        return planned


def require_labels_by_kind(output: Path, count: int) -> None:
    """Require one label for each picture, and the same one for pictures of a kind."""
    labels = tables.labels(output)
    assert sorted(labels) == [f"{number:04d}.jpg" for number in range(count)] and not tables.reasons(output)
    assert all(label == labels[f"{int(name[:4]) % KINDS:04d}.jpg"] for name, label in labels.items())


@pytest.mark.long
def test_a_store_with_every_fault_and_changing_objects(
    warm: Job, s3: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    fill(s3, "chaos", 60)
    chaos = Chaos(seed=1, share=0.25)
    other = encode(scene(70, 50, seed=3), "JPEG")
    begun: list[str] = []
    unheard: list[str] = []

    def plan(method: str, path: str, before: int) -> int | str | float | None:
        if method == "GET" and path.endswith(".jpg") and not begun:
            begun.append(path)
            obstore.put(s3.bucket("images"), "chaos/0059.jpg", other)
            obstore.delete(s3.bucket("images"), "chaos/0058.jpg")
        if method == "GET" and path.endswith("0057.jpg"):
            return "lying"
        if method == "PUT" and before == 0 and "/part-" in path:
            unheard.append(path)
            return "lost" if "labels" in path else 503
        return chaos(method, path, before)

    command = ("classify", "--input", "s3://images/chaos", "--output", "s3://out/chaos", "--model", tiny_model)
    with faults.proxy(s3.endpoint, plan) as endpoint:
        ended = warm(
            *command, "--set", "run.commit_interval_s=0.2", env={**s3.environment, "AWS_ENDPOINT_URL": endpoint}
        )

    assert ended.code == 0, ended.err
    assert {"GET 503", "GET 500", "GET cut", "GET short", "GET 0", "GET 0.3"} <= chaos.done.keys()
    assert any("labels" in path for path in unheard) and any("rejects" in path for path in unheard)
    output = tables.download(s3.bucket("out"), "chaos", tmp_path / "out")
    tables.require_single(output, [f"{number:04d}.jpg" for number in range(60)])
    assert tables.reasons(output) == {"0058.jpg": "vanished"}
    rows = {row["uri"].rpartition("/")[2]: row for row in tables.rows(output)}
    assert (rows["0059.jpg"]["size"], rows["0059.jpg"]["width"]) == (len(other), 70), "labelled as it was read"
    assert rows["0057.jpg"]["etag"] == "a lie"

    obstore.put(s3.bucket("images"), "chaos/0058.jpg", other)
    ended = warm(*command, env=s3.environment)
    assert ended.code == 0 and "60 labelled, 0 rejected (58 already done" in ended.out, "the lie costs a second reading"
    assert len(tables.labels(tables.download(s3.bucket("out"), "chaos", tmp_path / "again"))) == 60


def test_unreconciled_counts_are_reported_even_without_delete_permission(
    job: Job, warm: Job, s3: S3Server, tiny_model: Path, tmp_path: Path
) -> None:
    fill(s3, "double", 3)
    command = ("classify", "--input", "s3://images/double", "--output", "s3://out/double", "--model", tiny_model)
    assert warm(*command, env=s3.environment).code == 0
    part = tables.download(s3.bucket("out"), "double", tmp_path / "out") / "labels" / "part-00000001.parquet"
    table = pq.read_table(part)
    pq.write_table(pa.concat_tables([table, table]).replace_schema_metadata(table.schema.metadata), part)
    obstore.put(s3.bucket("out"), f"double/labels/{part.name}", part)

    def plan(method: str, path: str, before: int) -> int | str | float | None:
        return 403 if method == "DELETE" or path.endswith("?delete") else None

    with faults.proxy(s3.endpoint, plan) as endpoint:
        ended = job(*command, env={**s3.environment, "AWS_ENDPOINT_URL": endpoint})
    assert "two rows" in require_refusal(ended, 6) and "_SUCCESS could not be removed" in ended.err
    *_, record = tables.runs(tables.download(s3.bucket("out"), "double", tmp_path / "after"))
    assert record["exit_code"] == 6 and "two rows" in record["error"]


@pytest.mark.parametrize(
    ("name", "flags", "runs"),
    [
        ("classify", ["--model"], "."),
        ("train", ["--base"], "_training"),
        ("evaluate", ["--labels", ".", "--model"], ""),
    ],
)
def test_a_signal_while_a_failing_store_is_listed(
    started: Callable[..., subprocess.Popen[str]],
    s3: S3Server,
    tiny_model: Path,
    tmp_path: Path,
    name: str,
    flags: list[str],
    runs: str,
) -> None:
    listed: list[float] = []

    def plan(method: str, path: str, before: int) -> int | str | float | None:
        if "list-type=2" in path and "prefix=silent" in path:
            listed.append(time.monotonic())
            return 30.0
        return None

    with faults.proxy(s3.endpoint, plan) as endpoint:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": endpoint}
        command = ("--input", "s3://images/silent", "--output", tmp_path / "out", *flags, tiny_model)
        process = started(name, *command, env=environment)
        while not listed:
            time.sleep(0.05)
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.5)
        asked = time.monotonic()
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert time.monotonic() - asked < 20, "the answer would have taken 30 s"
    records = tables.runs(tmp_path / "out" / runs) if runs else []
    assert [(record["status"], record["exit_code"]) for record in records] == [("interrupted", 143)] * bool(runs)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_six_hundred_objects_and_a_third_of_all_requests_fail(
    job: Job, warm: Job, s3: S3Server, tiny_model: Path, tmp_path: Path, seed: int
) -> None:
    fill(s3, "third", 600)
    chaos = Chaos(seed, share=0.33)
    command = ("classify", "--input", "s3://images/third", "--output", f"s3://out/third-{seed}", "--model", tiny_model)
    with faults.proxy(s3.endpoint, chaos) as endpoint:
        ended = warm(
            *command, "--set", "run.commit_interval_s=0.2", env={**s3.environment, "AWS_ENDPOINT_URL": endpoint}
        )
    assert ended.code == 0, ended.err
    print(f"seed {seed}: {sum(chaos.done.values())} requests failed: {dict(chaos.done)}")
    require_labels_by_kind(tables.download(s3.bucket("out"), f"third-{seed}", tmp_path / "out"), 600)
    assert job("verify", f"s3://out/third-{seed}", env=s3.environment).code == 0


@pytest.mark.long
@pytest.mark.parametrize(("seconds", "retries", "code"), [(60, 10, 0), (60, 3, 3)])
def test_a_store_that_is_unreachable_for_a_minute(
    job: Job, warm: Job, s3: S3Server, tiny_model: Path, tmp_path: Path, seconds: int, retries: int, code: int
) -> None:
    fill(s3, "minute", 300)
    gone: list[float] = []
    refused = 0

    def plan(method: str, path: str, before: int) -> int | str | float | None:
        nonlocal refused
        if path.endswith("0150.jpg") and not gone:
            gone.append(time.monotonic())
        away = bool(gone) and time.monotonic() - gone[0] < seconds
        refused += away
        return 0 if away else None

    name = f"minute-{retries}"
    command = ("classify", "--input", "s3://images/minute", "--output", f"s3://out/{name}", "--model", tiny_model)
    with faults.proxy(s3.endpoint, plan) as endpoint:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": endpoint}
        # In a process of its own: the record of a run that could not say its last word tells who it was.
        ended = job(
            *command, "--set", f"storage.retries={retries}", "--set", "run.commit_interval_s=0.2", env=environment
        )
    print(f"retries {retries}: exit {ended.code}, {refused} requests hung up on")
    assert ended.code == code, ended.err
    assert code == 0 or "same command" in ended.err or "away" in ended.err or "s3://" in ended.err
    assert warm(*command, env=s3.environment).code == 0
    require_labels_by_kind(tables.download(s3.bucket("out"), name, tmp_path / "out"), 300)


@pytest.mark.long
@pytest.mark.parametrize("where", ["s3://out/expired", "local"])
def test_credentials_that_expire_during_a_run(
    job: Job, warm: Job, s3: S3Server, tiny_model: Path, tmp_path: Path, where: str
) -> None:
    fill(s3, "expired", 300)
    over: list[str] = []

    def plan(method: str, path: str, before: int) -> int | str | float | None:
        over.extend([path] if path.endswith("0150.jpg") else [])
        return "expired" if over else None

    output = tmp_path / "out" if where == "local" else where
    command = ("classify", "--input", "s3://images/expired", "--output", output, "--model", tiny_model)
    with faults.proxy(s3.endpoint, plan) as endpoint:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": endpoint}
        ended = job(*command, "--set", "run.commit_interval_s=0.2", "--set", "fetch.concurrency=8", env=environment)
    said = require_refusal(ended, 3) if where == "local" else ended.err
    assert ended.code == 3, ended.err
    assert "ExpiredToken" in said or "by plan" in said
    ended = warm(*command, env=s3.environment)
    assert ended.code == 0, ended.err
    found = output if where == "local" else tables.download(s3.bucket("out"), "expired", tmp_path / "out")
    require_labels_by_kind(Path(found), 300)

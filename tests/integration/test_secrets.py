"""Secrets are in nothing that a run leaves behind: the test's own are looked for, byte by byte."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore
import pytest

from tests.conftest import SECRET, S3Server
from tests.integration import faults, tables
from tests.integration.test_interrupts import ray_processes_of
from tests.unit.pictures import encode, scene

PASSWORD, SIGNATURE = "hunter2-of-nobody", "0a1b2c3d4e5f-signature"
HOOK = "T0/B0/path-of-a-webhook"


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder for Ray's files, whose sockets have names that may not be long."""
    with tempfile.TemporaryDirectory(prefix="ib-", dir="/tmp") as path:
        yield Path(path)


def titles(session: int) -> set[bytes]:
    """Return the command lines of all processes of a session."""
    found = set()
    for pid in [session, *ray_processes_of(session)]:
        try:
            found.add(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            continue
    return found


def require_absent(secret: str, where: dict[str, bytes]) -> None:
    """Require that no text holds the secret; say which do."""
    assert [name for name, content in where.items() if secret.encode() in content] == []


@pytest.mark.long
def test_secrets_are_in_nothing_that_a_run_leaves_behind(
    started: Callable[..., subprocess.Popen[str]], s3: S3Server, tiny_model: Path, tmp_path: Path, place: Path
) -> None:
    """Keys come by the environment and by the config file; one image is refused, so that an answer of S3 is told."""
    for number in range(30):
        obstore.put(s3.bucket("images"), f"secret/{number}.jpg", encode(scene(seed=number % 9), "JPEG"))
    (tmp_path / "run.toml").write_text(
        f'[storage.options]\nkey = "test-key"\nsecret = "{SECRET}"\n[notify]\nurl = "http://127.0.0.1:9/{HOOK}"\n'
    )
    signed = f"http://me:{PASSWORD}@127.0.0.1:9/x.jpg?X-Amz-Signature={SIGNATURE}&sig={SIGNATURE}"
    command = (
        "--input",
        "s3://images/secret",
        "--input",
        signed,
        "--model",
        tiny_model,
        "--config",
        tmp_path / "run.toml",
    )

    refused = started("classify", *command, "--output", "s3://out/secret", env=s3.environment)
    out, err = refused.communicate(timeout=120)
    assert refused.returncode == 3, err
    require_absent(PASSWORD, {"out": out.encode(), "err": err.encode()})
    require_absent(SIGNATURE, {"out": out.encode(), "err": err.encode()})
    require_absent(HOOK, {"out": out.encode(), "err": err.encode()})
    assert "could not be sent to notify.url" in err

    command = (*command[:2], *command[4:])
    with faults.proxy(s3.endpoint, lambda method, path, before: 403 if path.endswith("/7.jpg") else None) as endpoint:
        environment = {**s3.environment, "AWS_ENDPOINT_URL": endpoint, "RAY_TMPDIR": str(place)}
        process = started("classify", *command, "--output", "s3://out/secret", env=environment)
        seen: set[bytes] = set()
        while process.poll() is None:
            seen |= titles(process.pid)
            time.sleep(0.1)
        out, err = process.communicate()

    assert process.returncode == 0, err
    assert any(b"ray" in title for title in seen), "the workers' titles were seen"
    output = tables.download(s3.bucket("out"), "secret", tmp_path / "out")
    assert tables.reasons(output) == {"7.jpg": "forbidden"}
    files = [f"{folder}/{name}" for top in (output, place) for folder, _, names in os.walk(top) for name in names]
    contents = {path: Path(path).read_bytes() for path in files if Path(path).is_file()}
    assert any("worker" in path for path in contents) and any("run.json" in path for path in contents)
    contents |= {"out": out.encode(), "err": err.encode(), "titles": b"\n".join(seen)}
    for secret in (SECRET, PASSWORD, SIGNATURE, HOOK):
        require_absent(secret, contents)
    print(f"{len(contents)} files of {sum(map(len, contents.values())):,} bytes, {len(seen)} process titles: no secret")

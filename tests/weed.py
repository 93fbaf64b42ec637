"""A real S3 server, SeaweedFS, with keys of its own on ports of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from imgbatch.config.sections import StorageConfig
from imgbatch.storage.stores import Stores
from tests.servers import S3Access, free_ports

_COUNTED = re.compile(r'^SeaweedFS_s3_request_total\{.*type="(\w+)".*\} (\S+)$', re.M)
_STARTS = 3
_ENDS_IN_S = 10  # it takes 2 s, but its volume server sometimes waits for longer than 20

KEY, SECRET = "test-key", "test-secret-that-no-log-may-hold"
READER = ("reader-key", "reader-secret-that-no-log-may-hold")
"""Key and secret of an identity that may read and list only."""
_FOLDERS = [
    Path(sys.executable).parent,
    *(Path(name).parents[2] / "bin" for name in sys.path if "site-packages" in name),
]
WEED = next((folder / "weed" for folder in _FOLDERS if (folder / "weed").exists()), Path("weed"))


@dataclass(frozen=True)
class S3Server(S3Access):
    """A running SeaweedFS with one identity."""

    endpoint: str
    metrics: str
    """Where it tells its counters, in the text format of Prometheus."""
    pid: int
    key: str = KEY
    secret: str = SECRET

    def requests(self) -> Counter[str]:
        """Return how many S3 requests it has answered by type, whatever it answered; a HEAD counts as a GET there."""
        with urllib.request.urlopen(self.metrics, timeout=10) as page:
            found = _COUNTED.findall(page.read().decode())
        counts: Counter[str] = Counter()
        for kind, value in found:  # a line for each bucket and status
            counts[kind] += int(float(value))
        return counts

    def bucket(self, name: str) -> S3Store:
        """Return a client of the tests' own."""
        return S3Store(
            name,
            endpoint=self.endpoint,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def stores(self, **settings: Any) -> Stores:
        """Return the program's view of it."""
        return Stores(StorageConfig(**settings), self.environment)


@contextmanager
def serving(folder: Path) -> Iterator[S3Server]:
    """Run a server with the buckets `images` and `out` that keeps its data in the folder."""
    for _ in range(_STARTS):  # a port that was free a moment ago may be taken by now
        server, running = _start(folder)
        if _answers(running, server):
            break
    else:
        raise RuntimeError(f"the S3 server did not start:\n{(folder / 'log').read_text()[-2000:]}")
    try:
        yield running
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(_ENDS_IN_S)
        server.kill()
        server.wait()


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], S3Server]:
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    key, secret = READER
    reader = {
        "name": "reader",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Read", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity, reader]}))
    names = ("s3", "master", "volume", "filer", "admin", "webdav", "s3.iceberg", "s3.lance")
    *listening, metrics = free_ports(len(names) + 1)
    ports = dict(zip(names, listening, strict=True))
    options = [
        f"-{name}.port={port}" if "." not in name else f"-{name.replace('.', '.port.')}={port}"
        for name, port in ports.items()
    ]
    command = [str(WEED), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-admin.ui=false",
               "-master.telemetry=false", "-bucket=images,out", f"-s3.config={folder}/s3.json",
               f"-metricsPort={metrics}", *options]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    running = S3Server(f"http://127.0.0.1:{ports['s3']}", f"http://127.0.0.1:{metrics}/metrics", server.pid)
    return server, running


def _answers(running: S3Server, server: subprocess.Popen[bytes]) -> bool:
    store = running.bucket("images")
    for _ in range(300):
        if server.poll() is not None:
            return False
        try:
            obstore.put(store, "ready", b"")
            obstore.delete(store, "ready")
            obstore.put(running.bucket("out"), "ready", b"")
            obstore.delete(running.bucket("out"), "ready")
            return True
        except Exception:  # noqa: BLE001 - until it answers, any answer will do
            time.sleep(0.1)
    server.kill()
    server.wait()
    return False

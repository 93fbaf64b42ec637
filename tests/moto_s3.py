"""A second S3 server, moto's, so that the habits of SeaweedFS are not mistaken for those of S3."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obstore.store import S3Store

from imgbatch.config.sections import StorageConfig
from imgbatch.storage.stores import Stores
from tests.servers import PartMissing, S3Access, free_ports, running

KEY, SECRET = "moto-key", "moto-secret-that-no-log-may-hold"
BUCKETS = ("images", "out")


@dataclass(frozen=True)
class MotoServer(S3Access):
    """A running moto; it accepts any credentials."""

    endpoint: str
    pid: int
    key: str = KEY
    secret: str = SECRET

    def bucket(self, name: str) -> S3Store:
        """Return a client of the tests' own."""
        return S3Store(
            name, endpoint=self.endpoint, access_key_id=KEY, secret_access_key=SECRET, region="us-east-1",
            virtual_hosted_style_request=False, client_options={"allow_http": True},
        )  # fmt: skip

    def stores(self, **settings: Any) -> Stores:
        """Return the program's view of it."""
        return Stores(StorageConfig(**settings), self.environment)


@contextmanager
def serving(folder: Path) -> Iterator[MotoServer]:
    """Run a server with the buckets `images` and `out`, in its memory.

    Raises:
        PartMissing: moto is not installed.
    """
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        raise PartMissing("moto[server]")
    (port,) = free_ports(1)
    command = [sys.executable, "-c", "import sys; from moto.server import main; main(sys.argv[1:])",
               "-H", "127.0.0.1", "-p", str(port)]  # fmt: skip
    with running(command, f"http://127.0.0.1:{port}/", folder / "log") as process:
        server = MotoServer(f"http://127.0.0.1:{port}", process.pid)
        for name in BUCKETS:
            server.client().create_bucket(Bucket=name)
        yield server

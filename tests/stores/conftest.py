"""Real servers of each store (`make test-stores`): SeaweedFS and moto for S3, Azurite for Azure, fake-gcs-server for Google."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import azurite, fake_gcs, moto_s3, weed
from tests.servers import PartMissing

SERVERS: dict[str, Any] = {"seaweedfs": weed, "moto": moto_s3, "azurite": azurite, "fake-gcs-server": fake_gcs}


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Return a server by its name, started when first asked for; the test is skipped where a part of it is missing."""
    started: dict[str, Any] = {}
    with ExitStack() as stack:

        def of(name: str) -> Any:
            if name not in started:
                try:
                    started[name] = stack.enter_context(SERVERS[name].serving(tmp_path_factory.mktemp(name)))
                except PartMissing as part:
                    missing(f"{part} for {name}")
            return started[name]

        yield of


def missing(what: str) -> None:
    """Skip a test, naming what this machine lacks; where CI runs nothing may be missing."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(
        f"{what} is missing: see make test-stores in CONTRIBUTING.md"
    )


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, start: Callable[[str], Any]) -> Any:
    """Each server in turn."""
    return start(request.param)


@pytest.fixture
def gcs(start: Callable[[str], Any]) -> fake_gcs.FakeGcs:
    """A server of Google Cloud Storage."""
    return start("fake-gcs-server")  # type: ignore[no-any-return]


@pytest.fixture
def azure(start: Callable[[str], Any]) -> azurite.Azurite:
    """A server of Azure Blob Storage."""
    return start("azurite")  # type: ignore[no-any-return]


@pytest.fixture
def moto(start: Callable[[str], Any]) -> moto_s3.MotoServer:
    """A second server of S3."""
    return start("moto")  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR", "CLOUDSDK_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

"""What all tests share: a real S3 server on ports of its own, pictures, and the job as a command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.store import S3Store

from imgbatch.config import StorageConfig
from imgbatch.storage import Stores
from tests.unit.pictures import encode, scene

ROOT = Path(__file__).parent.parent
KEY, SECRET = "test-key", "test-secret-that-no-log-may-hold"
WEED = Path(sys.executable).parent / "weed"


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on; SeaweedFS uses each port plus 10,000 for gRPC as well."""
    found: list[int] = []
    port = 20_000 + os.getpid() % 5_000
    while len(found) < count:
        port += 1
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
    return found


@dataclass(frozen=True)
class S3Server:
    """A running SeaweedFS with one identity."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

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


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with the buckets `images` and `out`, gone with the tests."""
    folder = tmp_path_factory.mktemp("weed")
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = ("s3", "master", "volume", "filer", "admin", "webdav", "s3.iceberg", "s3.lance")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [
        f"-{name}.port={port}" if "." not in name else f"-{name.replace('.', '.port.')}={port}"
        for name, port in ports.items()
    ]
    command = [str(WEED), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-admin.ui=false",
               "-master.telemetry=false", "-bucket=images,out", f"-s3.config={folder}/s3.json", *options]  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    running = S3Server(f"http://127.0.0.1:{ports['s3']}")
    try:
        _wait_for(running, server, folder / "log")
        yield running
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(running: S3Server, server: subprocess.Popen[bytes], log: Path) -> None:
    store = running.bucket("images")
    for _ in range(300):
        if server.poll() is not None:
            break
        try:
            obstore.put(store, "ready", b"")
            obstore.delete(store, "ready")
            obstore.put(running.bucket("out"), "ready", b"")
            obstore.delete(running.bucket("out"), "ready")
            return
        except Exception:  # noqa: BLE001 - until it answers, any answer will do
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a dozen small pictures, the same in every run."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        (images / f"{number:02d}.jpg").write_bytes(encode(scene(seed=number), "JPEG"))
    return images


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Real photos that ship in packages; a cat and a cup of coffee among them."""
    import skimage
    import sklearn

    shipped = [Path(skimage.__file__).parent / "data" / name for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
    return [*shipped, *sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as timm writes it: a network of 400,000 random weights that tells `scene`s well apart."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


def write_model(path: Path, seed: int, labels: Sequence[str] = tuple("abcdefg")) -> Path:
    """Have timm write a model directory; its head is centred on what it sees, so that all labels occur."""
    import timm
    import torch

    torch.manual_seed(seed)
    net = timm.create_model("test_resnet", num_classes=len(labels)).eval()
    pictures = torch.from_numpy(np.stack([scene(160, 160, seed=number) for number in range(24)]))
    with torch.inference_mode():
        features = net.forward_features(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
        pooled, head = net.forward_head(features, pre_logits=True), net.get_classifier()
        head.weight.mul_(5 / ((pooled - pooled.mean(0)) @ head.weight.T).std())
        head.bias.copy_(-head.weight @ pooled.mean(0))
    timm.models.save_for_hf(net, str(path), model_config={"label_names": list(labels)}, safe_serialization=True)
    return path


@dataclass(frozen=True)
class Ended:
    """What a job that ended left on the screen."""

    code: int
    out: str
    err: str


Job = Callable[..., Ended]


@pytest.fixture
def job() -> Job:
    """Run a job as a user does: `job("classify", "--input", …, env={…})`."""

    def run(name: str, *arguments: object, env: dict[str, str] | None = None, timeout: float = 240) -> Ended:
        process = subprocess.run(
            [sys.executable, f"jobs/{name}.py", *map(str, arguments)],
            cwd=ROOT, capture_output=True, text=True, timeout=timeout, env={**clean_environment(), **(env or {})},
        )  # fmt: skip
        return Ended(process.returncode, process.stdout, process.stderr)

    return run


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a job and return its process, which is gone after the test, and what it started with it."""
    processes: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, f"jobs/{name}.py", *map(str, arguments)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**clean_environment(), **(env or {})},
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        with suppress(ProcessLookupError):  # a killed driver leaves its Ray behind for a while
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


@pytest.fixture(scope="session")
def warm_process() -> Iterator[subprocess.Popen[str]]:
    """A process that starts Ray once and runs job after job; see tests/integration/warm.py."""
    process = subprocess.Popen(
        [sys.executable, "tests/integration/warm.py"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=clean_environment(),
    )  # fmt: skip
    yield process
    process.communicate(timeout=60)


@pytest.fixture(scope="session")
def warm(warm_process: subprocess.Popen[str]) -> Job:
    """Run a job like `job`, on a Ray that is already there."""

    def run(name: str, *arguments: object, env: dict[str, str] | None = None) -> Ended:
        request = {"name": name, "argv": [str(argument) for argument in arguments], "env": env or {}}
        assert warm_process.stdin is not None and warm_process.stdout is not None
        print(json.dumps(request), file=warm_process.stdin, flush=True)
        return Ended(**json.loads(warm_process.stdout.readline()))

    return run


def clean_environment() -> dict[str, str]:
    """Return this process's environment without what would change a job's behaviour."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}

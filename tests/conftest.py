"""What all tests share: a real S3 server on ports of its own, pictures, and the job as a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.unit.pictures import encode, scene
from tests.weed import SECRET, S3Server, free_ports, serving

__all__ = ["SECRET", "S3Server", "free_ports"]

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with the buckets `images` and `out`, gone with the tests."""
    with serving(tmp_path_factory.mktemp("weed")) as server:
        yield server


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

"""Nodes that die, come back, are drained, or are all gone, in mid-run: a cluster of this test's own for each."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import Job, clean_environment, free_ports
from tests.integration import faults, tables
from tests.integration.test_damaged_nodes import BROKEN
from tests.integration.test_interrupts import wait_for
from tests.unit.pictures import encode, scene

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

RAY = Path(sys.executable).parent / "ray"
COUNT, KINDS = 700, 24

Start = Callable[..., "subprocess.Popen[str]"]


class Nodes:
    """A head without CPUs, and nodes of one CPU each, which can be killed one by one."""

    def __init__(self, environment: dict[str, str]) -> None:
        names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        path = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._environment = {**clean_environment(), **environment, **self.token, "PATH": path}
        self._place = Path(tempfile.mkdtemp(prefix="ib-", dir="/tmp"))
        self.address = f"127.0.0.1:{ports['--port']}"
        self.processes: list[subprocess.Popen[bytes]] = []
        options = [
            *(f"{name}={port}" for name, port in ports.items()),
            "--head",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={self._place}",
        ]
        self._start(*options, "--num-cpus=0", "--num-gpus=0")

    def add(
        self, resource: str = "one", *more: str, gpus: int = 0, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a node with an address of its own: a driver may choose to live beside one that shares its, and die with it."""
        where = f"--node-ip-address=127.0.0.{len(self.processes) + 1}"
        own = f'--resources={{"{resource}": 1}}'
        options = (f"--address={self.address}", where, "--num-cpus=1", f"--num-gpus={gpus}", own, *more)
        return self._start(*options, environment=environment)

    def _start(self, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        log = self._place / f"log-{len(self.processes)}"
        command = [str(RAY), "start", "--block", "--disable-usage-stats", *options]
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=self._environment | (environment or {}), start_new_session=True
            )
        self.processes.append(process)
        for _ in range(1200):
            if "Ray runtime started" in log.read_text():
                return process
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        raise AssertionError(log.read_text()[-3000:])

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a node as a power cut does: all of its processes at once."""
        with suppress(psutil.NoSuchProcess):
            whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in whole:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()

    def drain(self) -> None:
        """Tell the cluster that its last node goes away in a few seconds, as a notice from a spot market does."""
        code = (
            "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR');"
            "print([n['NodeID'] for n in ray.nodes() if n['Alive'] and 'last' in n['Resources']][0])"
        )
        named = subprocess.run(
            [sys.executable, "-c", code, self.address],
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=120,
        )
        node = named.stdout.split()[-1]
        command = [str(RAY), "drain-node", f"--address={self.address}", f"--node-id={node}",
                   "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot",
                   "--deadline-remaining-seconds=10"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def close(self) -> None:
        """Kill all nodes."""
        for process in reversed(self.processes):
            self.kill(process)
        shutil.rmtree(self._place, ignore_errors=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """A cluster whose images take a while to decode."""
    running = Nodes(faults.slow_decoding(tmp_path / "slow", 0.05))
    yield running
    running.close()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with pictures of a few kinds."""
    folder = tmp_path / "images"
    folder.mkdir()
    kinds = [encode(scene(seed=number), "JPEG") for number in range(KINDS)]
    for number in range(COUNT):
        (folder / f"{number:04d}.jpg").write_bytes(kinds[number % KINDS])
    return folder


@pytest.fixture
def in_mid_run(
    nodes: Nodes, started: Start, images: Path, tiny_model: Path, tmp_path: Path
) -> Callable[..., subprocess.Popen[str]]:
    """Start the job and wait for its first rows."""

    def run(*settings: str) -> subprocess.Popen[str]:
        given = [argument for setting in ("run.commit_interval_s=0.3", *settings) for argument in ("--set", setting)]
        command = ("--input", images, "--output", tmp_path / "out", "--model", tiny_model, *given)
        environment = {"RAY_ADDRESS": nodes.address, **nodes.token}
        process = started("classify", *command, env=environment)
        wait_for(lambda: list((tmp_path / "out").glob("labels/part-*")), process, 300)
        return process

    return run


def require_whole(process: subprocess.Popen[str], output: Path) -> None:
    """Require that the run ended well, each image has one label, and that of its kind."""
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    labels = tables.labels(output)
    assert len(labels) == COUNT and not tables.reasons(output)
    assert all(label == labels[f"{int(name[:4]) % KINDS:04d}.jpg"] for name, label in labels.items())
    (record,) = tables.runs(output)
    print(f"{len(labels)} labels, 0 rejects; {record['seconds']}")


def test_a_node_is_killed(nodes: Nodes, in_mid_run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    nodes.add()
    node = nodes.add()
    process = in_mid_run()
    nodes.kill(node)
    require_whole(process, tmp_path / "out")


def test_half_of_the_nodes_are_killed_and_one_comes_back(
    nodes: Nodes, in_mid_run: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    doomed = [nodes.add() for _ in range(4)][:2]
    process = in_mid_run()
    for node in doomed:
        nodes.kill(node)
    nodes.add()
    require_whole(process, tmp_path / "out")


def test_a_node_is_drained(nodes: Nodes, in_mid_run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    nodes.add()
    node = nodes.add("last")
    process = in_mid_run()
    nodes.drain()
    time.sleep(10)
    nodes.kill(node)
    require_whole(process, tmp_path / "out")


def test_all_nodes_are_gone_and_a_new_one_comes(
    nodes: Nodes, in_mid_run: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    node = nodes.add()
    process = in_mid_run()
    nodes.kill(node)
    time.sleep(5)
    assert process.poll() is None
    nodes.add()
    require_whole(process, tmp_path / "out")


def test_all_nodes_are_gone_for_good(
    nodes: Nodes,
    in_mid_run: Callable[..., subprocess.Popen[str]],
    job: Job,
    images: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    node = nodes.add()
    process = in_mid_run("cluster.stall_timeout_s=90")
    nodes.kill(node)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 3 and "cluster.stall_timeout_s" in err, err
    output = tmp_path / "out"
    kept = tables.labels(output)
    assert 0 < len(kept) < COUNT and not (output / "_SUCCESS").exists()
    ended = job("classify", "--input", images, "--output", output, "--model", tiny_model)
    assert ended.code == 0, ended.err
    assert tables.success(output)["counts"]["already_done"] == len(kept)
    tables.require_single(output, [path.name for path in images.iterdir()])


def test_the_driver_is_killed_on_a_cluster_that_stays(
    nodes: Nodes,
    in_mid_run: Callable[..., subprocess.Popen[str]],
    job: Job,
    images: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    nodes.add()
    process = in_mid_run()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    output = tmp_path / "out"
    kept = tables.labels(output)
    environment = {"RAY_ADDRESS": nodes.address, **nodes.token}
    command = ("classify", "--input", images, "--output", output, "--model", tiny_model)
    ended = job(*command, env=environment, timeout=600)
    assert ended.code == 0, ended.err
    assert tables.success(output)["counts"]["already_done"] == len(kept) < COUNT
    tables.require_single(output, [path.name for path in images.iterdir()])


def test_pixels_that_do_not_fit_into_the_object_store(nodes: Nodes, job: Job, images: Path, tmp_path: Path) -> None:
    """Two blocks of 256 images are more than its memory: Ray holds the decoders back, or spills to disk."""
    nodes.add("one", "--object-store-memory=78643200", gpus=1)
    environment = {"RAY_ADDRESS": nodes.address, **nodes.token}
    ended = job("classify", "--input", images, "--output", tmp_path / "out", env=environment, timeout=900)
    assert ended.code == 0, ended.err
    tables.require_single(tmp_path / "out", [path.name for path in images.iterdir()])


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_node_that_gives_wrong_answers_is_left_out(
    job: Job, images: Path, tiny_model: Path, tmp_path: Path, gpus: int
) -> None:
    """On one of two nodes half of the weights are lost whenever they are filled into a network; with (logical) GPUs, too."""
    fault = tmp_path / "broken"
    fault.touch()
    broken = Path(tempfile.mkdtemp(prefix="ib-", dir="/tmp"))  # a cache of its own
    hook = faults.patched(tmp_path / "hook", "imgbatch.models.architectures", BROKEN) | {"BROKEN": "/nowhere"}
    nodes = Nodes(hook)
    try:
        nodes.add(gpus=gpus)
        nodes.add(gpus=gpus, environment={"BROKEN": str(fault), "TMPDIR": str(broken)})
        environment = {"RAY_ADDRESS": nodes.address, **nodes.token}
        command = ("--input", images, "--output", tmp_path / "out", "--model", tiny_model)
        more = ("--set", "cluster.min_actors=2", "--set", "classify.runtime=torch") if gpus else ()
        ended = job("classify", *command, *more, env=environment, timeout=600)
    finally:
        nodes.close()
        shutil.rmtree(broken, ignore_errors=True)
    assert ended.code == 0, ended.err
    assert "the node is left out" in ended.err
    labels = tables.labels(tmp_path / "out")
    assert len(labels) == COUNT and not tables.reasons(tmp_path / "out")
    assert all(label == labels[f"{int(name[:4]) % KINDS:04d}.jpg"] for name, label in labels.items())
    (record,) = tables.runs(tmp_path / "out")
    assert [fault.endswith(": the node is left out") for fault in record["node_faults"].values()] == [True]

"""Where the job runs: a laptop, a running cluster of two nodes with (logical) GPUs, and under `ray job submit`."""

from __future__ import annotations

import json
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Job, clean_environment, free_ports
from tests.integration import faults, tables
from tests.integration.test_interrupts import wait_for
from tests.integration.test_refusals import require_refusal
from tests.unit.pictures import encode, scene

RAY = Path(sys.executable).parent / "ray"
KILLER, HANGER = b"this picture kills its decoder", b"this one never comes back"

# Every process notes what it is and what Ray gave it; a marked picture takes its process with it.
HOOK = """
def note(kind):
    import json, ray
    context = ray.get_runtime_context()
    what = {"kind": kind, "node": context.get_node_id(), "resources": context.get_assigned_resources()}
    with open(os.environ["NOTES"] + "/" + kind + "-" + str(os.getpid()), "w") as file:
        json.dump(what, file)

def noting(kind, original):
    def run(self, *arguments, **more):
        note(kind)
        return original(self, *arguments, **more)
    return run

module.Classify.__call__ = noting("classify", module.Classify.__call__)
module.LabelImages.__init__ = noting("all", module.LabelImages.__init__)
decode_block = module.decode_block
def decode_and_note(*arguments, **more):
    note("decode")
    yield from decode_block(*arguments, **more)
decode_and_note.__module__, decode_and_note.__qualname__ = "imgbatch.inference.worker", "decode_block"
module.decode_block = decode_and_note
"""
DEADLY = f"""
decode = module.decode
def deadly(data, **more):
    if data.endswith({KILLER!r}):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith({HANGER!r}):
        time.sleep(1000)
    time.sleep(float(os.environ.get("SLOW_S", "0")))
    return decode(data, **more)
module.decode = deadly
"""


@pytest.fixture(scope="module")
def hook(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose processes leave notes and die of the marked picture."""
    return faults.patched(tmp_path_factory.mktemp("hook"), "imgbatch.inference.worker", HOOK, decode=DEADLY)


@dataclass(frozen=True)
class Running:
    """A cluster of this test's own: a head with one CPU, and a node with one CPU and two GPUs that exist on paper."""

    address: str
    dashboard: str
    token: dict[str, str]
    place: Path
    notes: Path

    def taken_notes(self) -> list[dict[str, Any]]:
        """Return what its processes noted since the last call."""
        found = []
        for path in self.notes.iterdir():
            found.append(json.loads(path.read_text()))
            path.unlink()
        return found


@pytest.fixture(scope="module")
def cluster(hook: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Start two nodes on ports and in a folder of their own, with the dashboard."""
    notes = tmp_path_factory.mktemp("notes")
    names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    path = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**clean_environment(), **hook, **token, "NOTES": str(notes), "PATH": path}
    # Ray puts Unix sockets there, whose names may not be long. A folder for each node: see `submitting.running`.
    place = Path(tempfile.mkdtemp(prefix="ib-"))
    address = f"127.0.0.1:{ports['--port']}"
    head = [*(f"{name}={port}" for name, port in ports.items()), "--head", "--node-ip-address=127.0.0.1",
            f"--temp-dir={place}", "--num-cpus=1", "--num-gpus=0"]  # fmt: skip
    node = [f"--address={address}", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=2",
            f"--temp-dir={place}/2"]  # fmt: skip
    processes = []
    try:
        for options in (head, node):
            log = (notes.parent / "ray.log").open("w")
            command = [str(RAY), "start", "--block", "--disable-usage-stats", *options]
            with log:
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
                )
            _wait_for_node(processes[-1], Path(log.name))
        yield Running(address, f"http://127.0.0.1:{ports['--dashboard-port']}", token, place, notes)
    finally:
        for process in reversed(processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(place)


def _wait_for_node(process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if "Ray runtime started" in log.read_text():
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture
def on_cluster(job: Job, cluster: Running) -> Callable[..., Any]:
    """Run classify against the running cluster."""
    cluster.taken_notes()
    # RAY_AUTH_MODE is left out: that the cluster wants its token is found out.
    environment = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_TOKEN": cluster.token["RAY_AUTH_TOKEN"]}
    return lambda *arguments: job("classify", *arguments, env=environment)


def test_gpus_classify_and_cpus_decode(
    on_cluster: Callable[..., Any], cluster: Running, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for number in range(12, 200):
        (folder / f"{number}.jpg").write_bytes(encode(scene(seed=number % 12), "JPEG"))
    (folder / "0-killer.jpg").write_bytes(encode(scene(), "JPEG") + KILLER)
    command = ("--input", folder, "--model", tiny_model, "--set", "cluster.startup_timeout_s=30")

    ended = on_cluster(*command, "--output", tmp_path / "out", "--set", "cluster.min_actors=2")

    assert ended.code == 0, ended.err
    tables.require_single(tmp_path / "out", [path.name for path in folder.iterdir()])
    assert tables.reasons(tmp_path / "out") == {"0-killer.jpg": "crashed"}
    (record,) = tables.runs(tmp_path / "out")
    assert record["device"] == "cpu", "there is no CUDA here, and auto goes by what is there"
    notes = cluster.taken_notes()
    classify, decode = ([note for note in notes if note["kind"] == kind] for kind in ("classify", "decode"))
    assert len(classify) >= 2 and decode and len(classify) + len(decode) == len(notes)
    assert {note["resources"].get("GPU") for note in classify} == {1.0}
    assert {note["resources"].get("CPU") for note in decode} == {1.0}
    assert not any("GPU" in note["resources"] for note in decode)
    assert len({note["node"] for note in classify}) == 1, "one node has the cards"
    assert "same shared folder on all 2 nodes" in ended.err


@pytest.mark.long  # on a busy machine one node may have labelled all images before the other one starts
def test_each_node_scores_the_canary(
    on_cluster: Callable[..., Any], folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for number in range(12, 600):  # so many that both nodes have work
        (folder / f"{number}.jpg").write_bytes(encode(scene(seed=number % 12), "JPEG"))
    command = ("--input", folder, "--model", tiny_model, "--set", "cluster.device=cpu")
    assert on_cluster(*command, "--output", tmp_path / "first").code == 0
    canary = tmp_path / "canary"
    for name, label in tables.labels(tmp_path / "first").items():
        (canary / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, canary / label)

    guard = ("--set", f"guard.canary={canary}", "--set", "guard.canary_accuracy=1")
    ended = on_cluster(*command, "--output", tmp_path / "out", *guard)

    assert ended.code == 0, ended.err
    (record,) = tables.runs(tmp_path / "out")
    assert len({score["node"] for score in record["canary"]}) == len(record["canary"]) == 2
    assert all(score["passed"] and score["accuracy"] == 1 for score in record["canary"])


def test_a_plan_on_two_nodes_writes_nothing_but_itself(
    job: Job, cluster: Running, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    cluster.taken_notes()
    environment = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_TOKEN": cluster.token["RAY_AUTH_TOKEN"]}
    arguments = ("--input", folder, "--output", tmp_path / "out", "--model", tiny_model, "--json")

    ended = job("plan", *arguments, env=environment)

    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert plan["cluster"] == {"nodes": 2, "cpus": 2, "gpus": 2.0, "actors": 2} and plan["sample"]["images"] > 6
    assert plan["per_image"]["gpu_ms"]["classify"]["mid"] > 0 and plan["bottleneck"]["stage"] in ("decode", "classify")
    assert {note["kind"] for note in cluster.taken_notes()} == {"decode", "classify"}
    # Weights on the disk of the driver reach the nodes through Ray: a copy in the output would be a second object there.
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["plan.json"]


def test_a_card_is_shared_within_bounds(
    on_cluster: Callable[..., Any], cluster: Running, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    half = ("--set", "cluster.gpus_per_actor=0.5", "--set", "cluster.max_actors=3", "--set", "cluster.min_actors=3")
    ended = on_cluster("--input", folder, "--output", tmp_path / "out", "--model", tiny_model, *half)
    assert ended.code == 0, ended.err
    assert len(tables.labels(tmp_path / "out")) == 12
    classify = [note for note in cluster.taken_notes() if note["kind"] == "classify"]
    assert {note["resources"].get("GPU") for note in classify} == {0.5} and len(classify) <= 3


@pytest.mark.long
def test_a_cluster_that_is_too_small(
    on_cluster: Callable[..., Any], folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    command = (
        "--input",
        folder,
        "--output",
        tmp_path / "out",
        "--model",
        tiny_model,
        "--set",
        "cluster.startup_timeout_s=2",
    )
    said = require_refusal(on_cluster(*command, "--set", "cluster.min_actors=3"), 3)
    assert "cluster.min_actors=3" in said and "the cluster has 2" in said and "cluster.startup_timeout_s" in said
    said = require_refusal(on_cluster(*command, "--set", "cluster.min_actors=3", "--set", "cluster.device=cpu"), 3)
    assert "cluster.min_actors=3" in said and "CPUs, the cluster has 2" in said
    said = require_refusal(on_cluster(*command, "--set", "cluster.device=cuda"), 3)
    assert "torch finds no CUDA device" in said
    assert [run["status"] for run in tables.runs(tmp_path / "out")] == ["failed"] * 3


PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def test_a_proxy_for_the_web_is_not_asked_for_the_cluster(
    job: Job, cluster: Running, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """gRPC would go through these, also to an address of this machine."""
    (port,) = free_ports(1)
    environment = dict.fromkeys(PROXIES, f"http://127.0.0.1:{port}")
    environment |= {"RAY_ADDRESS": cluster.address, "RAY_AUTH_TOKEN": cluster.token["RAY_AUTH_TOKEN"]}
    command = ("--input", folder, "--output", tmp_path / "out", "--model", tiny_model)
    ended = job("classify", *command, env=environment)
    assert ended.code == 0, ended.err
    assert len(tables.labels(tmp_path / "out")) == 12

    on_purpose = {**environment, "RAY_grpc_enable_http_proxy": "1"}  # then Ray goes by them, and so do we
    said = require_refusal(job("classify", *command[:2], "--output", tmp_path / "two", *command[4:], env=on_purpose), 3)
    assert "no Ray cluster answers" in said


@pytest.mark.parametrize("home", ["/proc/self/fdinfo", "/dev/null", ""])
def test_a_home_that_cannot_be_written(home: str) -> None:
    """Ray keeps a token there, which a Ray of this machine's own does not need."""
    script = (
        "from imgbatch.engine import session\nwith session.connected(): import ray; assert ray.get(ray.put(7)) == 7"
    )
    environment = {**clean_environment(), "HOME": home, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def submit(cluster: Running, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Submit the job as a user does, from the root of the checkout."""
    command = [str(RAY), "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--",
               "python", "jobs/classify.py", *map(str, arguments)]  # fmt: skip
    environment = {**clean_environment(), **cluster.token}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.long
def test_ray_job_submit(cluster: Running, folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--input", folder, "--output", tmp_path / "out", "--model", tiny_model, "--set", "cluster.device=cpu")
    ended = submit(cluster, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "12 images listed, 12 labelled, 0 rejected" in ended.stdout
    assert len(tables.labels(tmp_path / "out")) == 12
    shipped = list(cluster.place.glob("session_2*/runtime_resources/working_dir_files/*/**/*"))
    names = {str(path.relative_to(cluster.place)).split("/", 4)[4] for path in shipped if path.is_file()}
    assert {"jobs/classify.py", "imgbatch/decode/jpeg.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith((".git/", "tests/", ".venv/", "docs/"))]
    assert sum(path.stat().st_size for path in shipped if path.is_file()) < 2_000_000

    failed = submit(cluster, *arguments, "--set", "top_k=2")
    assert failed.returncode != 0
    assert "was written with another fingerprint" in failed.stdout + failed.stderr


def test_a_cluster_that_is_there_is_not_joined_by_accident(
    job: Job, cluster: Running, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    cluster.taken_notes()
    ended = job("classify", "--input", folder, "--output", tmp_path / "out", "--model", tiny_model)
    assert ended.code == 0, ended.err
    assert cluster.taken_notes() == [] and "1 node" in ended.err


def test_workers_of_a_machine_of_ones_own_have_the_niceness_of_the_command() -> None:
    script = """
import os
from imgbatch.engine import session
with session.connected():
    import ray
    niceness = ray.get(ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0)).remote())
print(niceness)
"""
    command = ["nice", "-n", "3", sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment())
    assert int(ran.stdout) == os.getpriority(os.PRIO_PROCESS, 0) + 3


def test_nothing_scales_a_machine_of_ones_own() -> None:
    script = """
import psutil
from imgbatch.engine import session
with session.connected():
    alive = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    names = [word.rpartition("/")[2] for each in alive for word in each.cmdline()]
print(*names)
"""
    environment = clean_environment()
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert {"raylet", "log_monitor.py"} <= set(ran.stdout.split())  # Ray's helpers do have such names
    assert "monitor.py" not in ran.stdout.split()


def test_an_address_where_nobody_listens(job: Job, folder: Path, tmp_path: Path) -> None:
    command = ("classify", "--input", folder, "--output", tmp_path / "out")
    (port,) = free_ports(1)
    started = time.monotonic()
    ended = job(*command, env={"RAY_ADDRESS": f"127.0.0.1:{port}"})
    assert f"127.0.0.1:{port}" in require_refusal(ended, 3)
    assert time.monotonic() - started < 60
    for scheme in ("ray", "http"):
        said = require_refusal(job(*command, env={"RAY_ADDRESS": f"{scheme}://127.0.0.1:{port}"}), 2)
        assert "ray job submit" in said


def test_pictures_that_kill_or_block_their_process_and_a_process_that_is_killed(
    started: Callable[..., subprocess.Popen[str]], hook: dict[str, str], folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for number in range(12, 300):
        (folder / f"{number}.jpg").write_bytes(encode(scene(seed=number % 12), "JPEG"))
    (folder / "05-killer.jpg").write_bytes(encode(scene(), "JPEG") + KILLER)
    (folder / "07-hanger.jpg").write_bytes(encode(scene(), "JPEG") + HANGER)
    notes, output = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    environment = {**hook, "NOTES": str(notes), "SLOW_S": "0.01"}
    command = ("--input", folder, "--output", output, "--model", tiny_model, "--set", "decode.timeout_s=2")
    process = started("classify", *command, env=environment)
    wait_for(lambda: list(notes.glob("all-*")), process)
    os.kill(int(next(notes.glob("all-*")).name.partition("-")[2]), signal.SIGKILL)

    _out, err = process.communicate(timeout=200)

    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert tables.reasons(output) == {"05-killer.jpg": "crashed", "07-hanger.jpg": "timeout"}
    killer, hanger = tables.rows(output, "rejects")
    assert (killer["stage"], killer["passing"], hanger["stage"], hanger["passing"]) == ("decode", False) * 2
    assert "SIGSEGV" in killer["message"] and "decode.timeout_s" in hanger["message"]
    tables.require_single(output, [path.name for path in folder.iterdir()])
    expected = {name: label for name, label in tables.labels(output).items() if int(name[:-4]) < 12}
    assert all(label == expected[f"{int(name[:-4]) % 12:02d}.jpg"] for name, label in tables.labels(output).items())

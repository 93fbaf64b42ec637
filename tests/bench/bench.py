"""Ours, the limit and the peers, in one sitting on the same objects in a real S3 server.

    make bench                          # 5,000 objects
    python tests/bench/bench.py --objects 500 --images FOLDER --peers daft,ray --json bench.json

Measures the bare stages in core-seconds an image and, from their sum, the limit = cores / sum; then each pipeline end to
end, in turn. Prints a table, and writes the figures as JSON. It asserts nothing: machines differ, and are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from jobs.demo import photos  # noqa: E402
from tests.bench import stages  # noqa: E402
from tests.weed import S3Server, serving  # noqa: E402

PEERS = {"daft": "daft_udf.py", "ray": "ray_data.py", "loader": "loader.py"}


def main() -> None:
    """Measure everything, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=5000)
    parser.add_argument("--images", type=Path, help="a folder of photos; the demo's by default")
    parser.add_argument("--peers", default="daft,ray,loader", help="which peers to run, by commas; '' for none")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    flags = parser.parse_args()
    images = sorted(flags.images.iterdir()) if flags.images else photos()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        os.environ |= server.environment
        upload(server, images, flags.objects)
        found = measure(server, flags)
    flags.json.write_text(json.dumps(found, indent=2))
    print(table(found))


def upload(server: S3Server, images: list[Path], objects: int) -> None:
    """Put the photos into the store again and again, under different names."""
    store = server.bucket("images")
    with ThreadPoolExecutor(8) as pool:
        for number in range(objects):
            image = images[number % len(images)]
            pool.submit(obstore.put, store, f"photos/{number // len(images):04d}/{image.name}", image.read_bytes())


def measure(server: S3Server, flags: argparse.Namespace) -> dict[str, Any]:
    """Run the stages, then ours and the peers in turn."""
    cores = len(os.sched_getaffinity(0))
    bare = stages.measure("s3://images/photos", server.pid)
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": cores, "processor": _processor(), "python": platform.python_version()},
        "objects": flags.objects,
        "stages_ms": bare,
        "limit_per_s": cores * 1000 / sum(bare.values()),
        "runs": [],
    }
    for turn in range(flags.repeat):
        found["runs"].append(ours(turn))
        for peer in filter(None, flags.peers.split(",")):
            script = ROOT / "tests/bench/peers" / PEERS[peer]
            run = watched([sys.executable, str(script), "images/photos", f"out/{peer}{turn}"], peer)
            found["runs"].append(run)
    return found


def ours(turn: int) -> dict[str, Any]:
    """Run the job, and add what its record says."""
    output = f"s3://out/ours{turn}"
    began = time.time()
    run = watched([sys.executable, "jobs/classify.py", "--input", "s3://images/photos", "--output", output], "ours")
    record = stages.record(output)
    run |= {
        "first_row_s": datetime.fromisoformat(record["first_row"]).timestamp() - began,
        "steady_per_s": record["images_per_second"],
        "worker_seconds": record["seconds"],
    }
    return run


def watched(command: list[str], name: str) -> dict[str, Any]:
    """Run a command; return its time, and the CPU and peak memory of its processes by kind."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    usage: dict[int, tuple[str, float, int]] = {}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.25):
            _sample(process.pid, usage)

    sampler = threading.Thread(target=sample)
    sampler.start()
    errors = process.communicate()[1]
    ended.set()
    sampler.join()
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}:\n{errors[-2000:]}")
    kinds: dict[str, dict[str, float]] = {}
    for kind, cpu, memory in usage.values():
        entry = kinds.setdefault(kind, {"cpu_s": 0.0, "peak_mb": 0.0})
        entry["cpu_s"] = round(entry["cpu_s"] + cpu, 1)
        entry["peak_mb"] = max(entry["peak_mb"], round(memory / 1e6))
    return {"name": name, "total_s": round(time.monotonic() - began, 1), "processes": kinds}


def _sample(root: int, usage: dict[int, tuple[str, float, int]]) -> None:
    try:
        tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info().rss
                kind = "driver" if process.pid == root else _kind(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        known = usage.get(process.pid, (kind, 0.0, 0))
        usage[process.pid] = (kind, times.user + times.system, max(known[2], memory))


def _kind(command: str) -> str:
    if "ray::" in command:
        return "workers" if "Map" in command or "submit" in command else "ray"
    return "ray" if "/ray/" in command else "other"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def table(found: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        f"{found['date']}, {found['machine']['cores']} cores of {found['machine']['processor']}, {found['objects']} objects",
        "",
        "| stage | core-ms an image |",
        "| --- | --- |",
        *(f"| {stage} | {cost:.2f} |" for stage, cost in found["stages_ms"].items()),
        f"| **limit** | {found['limit_per_s']:.0f} images/s |",
        "",
        "| pipeline | total s | first row s | steady images/s | steady / limit | total / ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    own = statistics.median(run["total_s"] for run in found["runs"] if run["name"] == "ours")
    for run in found["runs"]:
        steady = run.get("steady_per_s")
        cells = [
            run["name"],
            f"{run['total_s']:.1f}",
            f"{run['first_row_s']:.1f}" if run.get("first_row_s") else "",
            f"{steady:.0f}" if steady else "",
            f"{steady / found['limit_per_s']:.2f}" if steady else "",
            f"{run['total_s'] / own:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

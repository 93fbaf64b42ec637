"""Ours, the limit and the peers, in one sitting on the same objects in a real S3 server.

    make bench                          # 5,000 objects
    python tests/bench/bench.py --objects 500 --images FOLDER --peers daft,ray --repeat 3 --chart bench.png

Measures the bare stages in core-seconds an image, before and after each run of ours, and from the mean of their sums the
limit = cores / sum; each pipeline end to end, in turn; and whether our answers are those of the peers. Prints a table, and
writes the figures as JSON. It asserts nothing: machines differ, and are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from imgbatch.commands.demo import photos  # noqa: E402
from tests.bench import stages  # noqa: E402
from tests.bench.processes import cpu_seconds, watched  # noqa: E402
from tests.bench.table import table  # noqa: E402
from tests.weed import S3Server, serving  # noqa: E402

PEERS = {"daft": "daft_udf.py", "ray": "ray_data.py", "loader": "loader.py", "timm": "timm_folder.py"}


def main() -> None:
    """Measure everything, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=5000)
    parser.add_argument("--images", type=Path, help="a folder of photos; the demo's by default")
    parser.add_argument("--peers", default="daft,ray,loader,timm", help="which peers to run, by commas; '' for none")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    parser.add_argument("--chart", type=Path, help="draw the figures into this PNG as well")
    flags = parser.parse_args()
    images = sorted(flags.images.iterdir()) if flags.images else photos()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        os.environ |= server.environment
        upload(server, images, flags.objects)
        found = measure(server, flags, images[: flags.objects])
    flags.json.write_text(json.dumps(found, indent=2))
    print(table(found))
    if flags.chart:
        from tests.bench.chart import draw

        draw(found, flags.chart)


def upload(server: S3Server, images: list[Path], objects: int) -> None:
    """Put the photos into the store again and again, under different names."""
    store = server.bucket("images")

    def put(number: int) -> None:
        image = images[number % len(images)]
        obstore.put(store, f"photos/{number // len(images):04d}/{image.name}", image.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(objects)))


def measure(server: S3Server, flags: argparse.Namespace, images: list[Path]) -> dict[str, Any]:
    """Run ours for the very first time, the stages, the comparison of answers, then ours and the peers in turn."""
    cores = len(os.sched_getaffinity(0))
    very_first = first_row_very_first(server)
    from tests.bench.parity import compare  # brings torch, of which the very first run is to find nothing in memory

    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": cores, "processor": _processor(), "python": platform.python_version()},
        "objects": flags.objects,
        "parity": compare(images),
        "first_row_very_first_s": very_first,
        "runs": [],
    }
    bare = []
    for turn in range(flags.repeat):
        bare.append(stages.measure("s3://images/photos", server.pid))
        found["runs"].append(ours(server, str(turn)))
        bare.append(stages.measure("s3://images/photos", server.pid))
        for peer in filter(None, flags.peers.split(",")):
            found["runs"].append(theirs(server, peer, turn))
    costs = {name: round(statistics.mean(each[name] for each in bare), 3) for name in bare[0]}
    return found | {"stages_ms": costs, "limit_per_s": cores * 1000 / sum(costs.values())}


def first_row_very_first(server: S3Server) -> float:
    """Return the seconds to the first row of a run that finds the node's cache empty, and converts the model."""
    known = tempfile.gettempdir()
    with tempfile.TemporaryDirectory() as empty:  # the cache lies in the folder for temporary files, as Ray's own do
        run = ours(server, "-very-first", {"TMPDIR": empty, "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", known)})
    return float(run["first_row_s"])


def ours(server: S3Server, turn: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the job, and add what its record says."""
    output = f"s3://out/ours{turn}"
    command = [sys.executable, "jobs/classify.py", "--input", "s3://images/photos", "--output", output]
    began = time.time()
    run = served(server, command, "ours", environment)
    record = stages.record(output)
    run |= {
        "first_row_s": round(datetime.fromisoformat(record["first_row"]).timestamp() - began, 2),
        "steady_per_s": record["images_per_second"],
        "worker_seconds": record["seconds"],
    }
    return run


def theirs(server: S3Server, peer: str, turn: int) -> dict[str, Any]:
    """Run a peer, and add when its network had predicted the first batch, and images a second from there to its last."""
    command = [sys.executable, str(ROOT / "tests/bench/peers" / PEERS[peer]), "images/photos", f"out/{peer}{turn}"]
    with tempfile.NamedTemporaryFile("r") as predicted:
        began = time.time()
        run = served(server, command, peer, {"PREDICTED": predicted.name})
        (first, _), *rest = sorted((float(at), int(rows)) for at, rows in map(str.split, predicted))
    steady = sum(rows for _, rows in rest) / (rest[-1][0] - first)
    return run | {"first_row_s": round(first - began, 2), "steady_per_s": round(steady, 1)}


def served(
    server: S3Server, command: list[str], name: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Watch a command, and what the store does for it: its requests by type, and the server's CPU and memory."""
    requests, cpu = server.requests(), cpu_seconds(server.pid)
    run = watched(command, name, environment)
    run["requests"] = dict(server.requests() - requests)
    run["processes"]["S3 server"] = {
        "cpu_s": round(cpu_seconds(server.pid) - cpu, 1),
        "peak_mb": round(psutil.Process(server.pid).memory_info().rss / 1e6),
    }
    return run


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

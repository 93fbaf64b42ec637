"""Measure imgbatch, the limit of its stages and other programs, in one session, on the same objects in a real S3 server.

    make bench                          # 5,000 objects
    python tests/bench/bench.py --objects 500 --images FOLDER --peers daft,ray --repeat 3 --chart bench.png

Measures the single stages in core-seconds per image, before and after each run of imgbatch. The limit is the number of cores
divided by the mean of their sums. Then each program runs from start to end, and the labels of imgbatch are compared with
those of the others. Prints a table, and writes the figures as JSON. It asserts nothing, because machines differ and are noisy.
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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=5000)
    parser.add_argument("--images", type=Path, help="a folder of photos; default: those of the demo")
    parser.add_argument(
        "--peers", default="daft,ray,loader,timm", help="other programs to run, separated by commas; '' for none"
    )
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    parser.add_argument("--chart", type=Path, help="also draw the figures as this PNG")
    flags = parser.parse_args()
    images = sorted(flags.images.iterdir()) if flags.images else photos()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        os.environ |= server.environment
        upload(server, images, flags.objects)
        results = measure(server, flags, images[: flags.objects])
    flags.json.write_text(json.dumps(results, indent=2))
    print(table(results))
    if flags.chart:
        from tests.bench.chart import draw

        draw(results, flags.chart)


def upload(server: S3Server, images: list[Path], objects: int) -> None:
    """Upload the photos repeatedly under different names, until there are as many objects."""
    store = server.bucket("images")

    def put(number: int) -> None:
        image = images[number % len(images)]
        obstore.put(store, f"photos/{number // len(images):04d}/{image.name}", image.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(objects)))


def measure(server: S3Server, flags: argparse.Namespace, images: list[Path]) -> dict[str, Any]:
    """Measure the very first run, compare labels, then measure stages, imgbatch and the other programs alternately."""
    cores = len(os.sched_getaffinity(0))
    very_first = first_row_very_first(server)
    from tests.bench.parity import compare  # imports torch, which must not be in memory during the very first run

    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": cores, "processor": _processor(), "python": platform.python_version()},
        "objects": flags.objects,
        "parity": compare(images),
        "first_row_very_first_s": very_first,
        "runs": [],
    }
    bare = []
    for repetition in range(flags.repeat):
        bare.append(stages.measure("s3://images/photos", server.pid))
        results["runs"].append(ours(server, str(repetition)))
        bare.append(stages.measure("s3://images/photos", server.pid))
        for peer in filter(None, flags.peers.split(",")):
            results["runs"].append(theirs(server, peer, repetition))
    costs = {name: round(statistics.mean(measurement[name] for measurement in bare), 3) for name in bare[0]}
    return results | {"stages_ms": costs, "limit_per_s": cores * 1000 / sum(costs.values())}


def first_row_very_first(server: S3Server) -> float:
    """Return the seconds to the first row of a run with an empty node cache, which has to convert the model."""
    ray_folder = tempfile.gettempdir()
    with tempfile.TemporaryDirectory() as empty:  # the cache is in the temporary folder, like Ray's files
        run = ours(server, "-very-first", {"TMPDIR": empty, "RAY_TMPDIR": os.environ.get("RAY_TMPDIR", ray_folder)})
    return float(run["first_row_s"])


def ours(server: S3Server, suffix: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the job, and add figures from its record."""
    output = f"s3://out/ours{suffix}"
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


def theirs(server: S3Server, peer: str, repetition: int) -> dict[str, Any]:
    """Run another program, and add the time of its first predicted batch, and images per second from there to the last."""
    command = [
        sys.executable,
        str(ROOT / "tests/bench/peers" / PEERS[peer]),
        "images/photos",
        f"out/{peer}{repetition}",
    ]
    with tempfile.NamedTemporaryFile("r") as predicted:
        began = time.time()
        run = served(server, command, peer, {"PREDICTED": predicted.name})
        (first, _), *rest = sorted((float(at), int(rows)) for at, rows in map(str.split, predicted))
    steady = sum(rows for _, rows in rest) / (rest[-1][0] - first)
    return run | {"first_row_s": round(first - began, 2), "steady_per_s": round(steady, 1)}


def served(
    server: S3Server, command: list[str], name: str, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run and measure a command and the store: requests by type, and the server's CPU and memory."""
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

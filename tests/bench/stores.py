"""What a GET costs on each store, beside fsspec's package for it, and what listing a flat folder costs the driver's memory.

    .venv-stores/bin/python -m tests.bench.stores [--gets 2000] [--objects 10000 200000]

Needs what `make test-stores` installs. CPU seconds are those of the process that reads, all its threads together, and not
those of the server. Only ratios within one run mean something.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.servers import free_ports, running

_SIZE, _OBJECTS, _THREADS = 100_000, 200, 16


def cpu_of(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this process that some work takes."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(name: str, count: int) -> None:
    """Read objects of one server through our store and through fsspec's package, in turns; print milliseconds a GET."""
    import fsspec

    from imgbatch.storage.cloud import BY_SCHEME
    from tests.stores.conftest import SERVERS

    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    with tempfile.TemporaryDirectory() as folder, SERVERS[name].serving(Path(folder)) as server:
        bucket, stores = server.bucket("images"), server.stores()
        keys = [f"bench/{number}" for number in range(_OBJECTS)]
        for key in keys:
            bucket.put(key, os.urandom(_SIZE))
        turns = [keys[number % _OBJECTS] for number in range(count)]
        service = BY_SCHEME[server.scheme]
        protocol, arguments = service.fsspec("images", service.options(stores._config, stores._environment))
        theirs = fsspec.filesystem(protocol, **arguments, skip_instance_cache=True)

        def ours() -> None:
            with ThreadPoolExecutor(_THREADS) as pool:
                for data, _ in pool.map(lambda key: stores.read(f"{server.scheme}://images/{key}"), turns):
                    assert len(data) == _SIZE

        def fsspec_cat() -> None:
            for start in range(0, count, _OBJECTS):
                contents = theirs.cat([f"images/{key}" for key in turns[start : start + _OBJECTS]], batch_size=_THREADS)
                assert all(len(data) == _SIZE for data in contents.values())

        def fsspec_one_by_one() -> None:
            with ThreadPoolExecutor(_THREADS) as pool:
                for data in pool.map(lambda key: theirs.cat_file(f"images/{key}"), turns):
                    assert len(data) == _SIZE

        package = type(theirs).__module__.partition(".")[0]
        works = {"ours": ours, f"{package} in bulk": fsspec_cat, f"{package} one by one": fsspec_one_by_one}
        costs: dict[str, list[float]] = {label: [] for label in works}
        for turn in range(4):
            for label, work in works.items():
                cost = cpu_of(work) * 1000 / count
                if turn:  # the first one imports and connects
                    costs[label].append(cost)
        best = {label: min(values) for label, values in costs.items()}
        shown = ", ".join(f"{label} {value:.2f} ms ({value / best['ours']:.1f})" for label, value in best.items())
        print(f"{name}: CPU of a GET of {_SIZE // 1000} kB (ratio): {shown}", flush=True)


_LIST = """
import re
import sys
from imgbatch.config.sections import StorageConfig
from imgbatch.storage.stores import Folder, Stores
folder = Folder(Stores(StorageConfig()), sys.argv[1])
count = sum(len(batch) for batch in folder.list_objects())
print(count, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def listings(counts: list[int]) -> None:
    """Print what an object of a flat folder adds to the peak memory of a process that lists it."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    environments: dict[str, dict[str, str]] = {
        "s3": {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_REGION": "us-east-1",
        },
        "gs": {"STORAGE_EMULATOR_HOST": url},
        "az": {"AZURITE_BLOB_STORAGE_URL": f"{url}/me", "AZURE_STORAGE_ACCOUNT": "me", "AZURE_STORAGE_KEY": "a2V5"},
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        command = [sys.executable, "-m", "tests.bench.listing_server", str(port)]
        stack.enter_context(running(command, url, Path(folder) / "log"))
        for scheme, environment in environments.items():
            peaks: list[int] = []
            for count in counts:
                started = time.monotonic()
                done = subprocess.run(
                    [sys.executable, "-c", _LIST, f"{scheme}://flat-{count}/album"],
                    env={**os.environ, **environment}, capture_output=True, text=True, check=True,
                )  # fmt: skip
                listed, peak = map(int, done.stdout.split())
                assert listed == count, done.stdout
                peaks.append(peak)
                print(f"{scheme}: {count:>9,} objects: peak {peak / 1e6:.1f} MB, {time.monotonic() - started:.1f} s")
            each = (peaks[-1] - peaks[0]) / (counts[-1] - counts[0])
            print(f"{scheme}: {each:.1f} bytes an object", flush=True)


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gets", type=int, default=2_000, metavar="N", help="GETs of each measurement")
    parser.add_argument(
        "--objects", type=int, nargs=2, default=[10_000, 200_000], metavar="N", help="sizes of the folder"
    )
    parser.add_argument("--server", action="append", help="a server of tests/stores (default: all but seaweedfs)")
    flags = parser.parse_args(argv)
    for name in flags.server or ["fake-gcs-server", "azurite", "moto"]:
        measure(name, flags.gets)
    listings(flags.objects)


if __name__ == "__main__":
    main(sys.argv[1:])

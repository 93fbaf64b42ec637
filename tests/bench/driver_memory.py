"""Measure the driver's memory per image: its peak with 10,000 and 200,000 tiny images, in a first and a second run.

    python tests/bench/driver_memory.py [COUNT COUNT]

The guarantee is a fixed part plus at most 40 bytes per image. Takes some five minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

SIDE = 32
"""Side of the network's input in pixels: small, because the number of images matters here."""


def make_images(place: Path, count: int) -> Path:
    """Fill a folder with subfolders of a thousand names each, all links to one file."""
    from tests.unit.pictures import encode, scene

    images = place / f"images-{count}"
    for number in range(count):
        folder = images / f"{number // 1000:04d}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
            kind = folder / f"{number:08d}.jpg"
            kind.write_bytes(encode(scene(64, 64, seed=number // 1000), "JPEG"))
        else:
            os.link(kind, folder / f"{number:08d}.jpg")
    return images


def make_model(place: Path) -> Path:
    """Write the tests' tiny model for tiny pictures."""
    from tests.conftest import write_model

    model = write_model(place / "model", seed=0)
    config = json.loads((model / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, SIDE, SIDE]
    (model / "config.json").write_text(json.dumps(config))
    return model


def peak_of(command: list[str]) -> tuple[int, float]:
    """Run a job; return the peak resident memory of its driver in bytes, and its duration in seconds."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        for line in _status(process.pid).splitlines():
            if line.startswith("VmHWM:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the job ended with {process.returncode}")
    return peak, time.monotonic() - started


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def main(counts: list[int]) -> None:
    """Measure and print."""
    peaks: dict[str, list[int]] = {"first run": [], "second run": []}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = make_model(place)
        for count in counts:
            images = make_images(place, count)
            job = [sys.executable, "jobs/classify.py", "--input", str(images), "--output", str(place / f"out-{count}")]
            for name in peaks:
                peak, seconds = peak_of([*job, "--model", str(model)])
                peaks[name].append(peak)
                print(f"{count:>9,} images, {name}: peak {peak / 1e6:6.1f} MB, {seconds:.0f} s", flush=True)
    for name, (small, large) in peaks.items():
        per_image = (large - small) / (counts[1] - counts[0])
        print(f"{name}: {per_image:.1f} bytes per image, fixed part {(small - per_image * counts[0]) / 1e6:.0f} MB")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [10_000, 200_000])

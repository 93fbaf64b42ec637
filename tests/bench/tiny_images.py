"""Label a million tiny images (64×64 JPEG) in tars or in Parquet; print images per second, and memory during the run.

    python tests/bench/tiny_images.py [COUNT] [tar|parquet]

Takes some minutes, and 2 GB of disk. The network is timm's `test_resnet` with random weights, at 64×64 pixels.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

_FILE_ROWS, _GROUP_ROWS, _KINDS = 10_000, 1_000, 500
_EVERY_S = 5.0


def make_images(place: Path, count: int, form: str) -> Path:
    """Write the images into files of 10,000 each: 500 pictures, repeated under new names."""
    from tests.unit.pictures import encode, scene

    images = place / "images"
    images.mkdir()
    kinds = [encode(scene(64, 64, seed=number), "JPEG") for number in range(_KINDS)]
    for first in range(0, count, _FILE_ROWS):
        numbers = range(first, min(first + _FILE_ROWS, count))
        if form == "parquet":
            table = pa.table({"image": [kinds[number % _KINDS] for number in numbers], "number": list(numbers)})
            pq.write_table(table, images / f"{first:08d}.parquet", row_group_size=_GROUP_ROWS, use_dictionary=False)
            continue
        with tarfile.open(images / f"{first:08d}.tar", "w") as tar:
            for number in numbers:
                info = tarfile.TarInfo(f"{number:08d}.jpg")
                info.size = len(kinds[number % _KINDS])
                tar.addfile(info, io.BytesIO(kinds[number % _KINDS]))
    return images


def make_model(place: Path) -> Path:
    """Write the tests' tiny model for pictures of 64×64."""
    from tests.conftest import write_model

    model = write_model(place / "model", seed=0)
    config = json.loads((model / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 64, 64], "crop_pct": 1.0}
    (model / "config.json").write_text(json.dumps(config))
    return model


def run(images: Path, model: Path, output: Path) -> list[tuple[float, float, float]]:
    """Run the job; return (seconds, MB of the driver, MB of the largest worker) every few seconds."""
    command = [
        sys.executable,
        "jobs/classify.py",
        "--input",
        str(images),
        "--output",
        str(output),
        "--model",
        str(model),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    began, samples = time.monotonic(), []
    while process.poll() is None:
        with suppress(psutil.Error):  # it has ended
            driver = psutil.Process(process.pid)
            largest = max((_worker_bytes(child) for child in driver.children(recursive=True)), default=0)
            samples.append((time.monotonic() - began, driver.memory_info().rss / 1e6, largest / 1e6))
        time.sleep(_EVERY_S)
    if process.returncode:
        raise SystemExit(f"the job ended with {process.returncode}")
    return samples


def _worker_bytes(process: psutil.Process) -> int:
    """Return the memory of a worker; 0 for other processes and for those that have ended, zombies included."""
    with suppress(psutil.Error):
        return process.memory_info().rss if "Map" in " ".join(process.cmdline()) else 0
    return 0


def main(count: int, form: str) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        images, model = make_images(place, count, form), make_model(place)
        samples = run(images, model, place / "out")
        (record,) = (json.loads(path.read_text()) for path in (place / "out").glob("runs/*/run.json"))
    print(
        f"{form}: {record['counts']['labelled']:,} images, {record['images_per_second']:,.0f} per second after the first row"
    )
    for share in (0.25, 0.5, 0.75, 1.0):
        seconds, driver, worker = samples[int(share * (len(samples) - 1))]
        print(f"  after {seconds:4.0f} s: driver {driver:.0f} MB, largest worker {worker:.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, sys.argv[2] if len(sys.argv) > 2 else "parquet")

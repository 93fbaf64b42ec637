"""Compare plans with the runs after them: photos in a real S3 server three times, tars of tiny images once.

    python -m tests.bench.plan                          # 5,000 photos, 100,000 tiny images
    python -m tests.bench.plan --photos 500 --tiny 5000 --repeat 1

Run it on a quiet machine: whatever else uses the cores makes a plan or a run slower. Prints a line for each pair, in the
form of docs/LOG.md, and how often the outcome was inside the interval. It asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from imgbatch.commands.demo import photos
from imgbatch.config.sections import StorageConfig
from imgbatch.storage.stores import Folder, Stores
from tests.bench.bench import ROOT, upload
from tests.bench.tiny_images import make_images, make_model
from tests.weed import serving

_KINDS = 500
_LOG_SIDE, _SPREAD = 6.2, 0.35  # of the shorter side in pixels: most photos have 30 to 250 kB, as those of ImageNet


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=5_000)
    parser.add_argument("--images", type=Path, help="a folder of photos; default: those of the demo in many sizes")
    parser.add_argument("--tiny", type=int, default=100_000, help="images of 64×64 in tars of 10,000")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as server:
        os.environ |= server.environment
        place = Path(folder) / "work"
        place.mkdir()
        images = sorted(flags.images.iterdir()) if flags.images else resized_photos(place / "photos")
        upload(server, images, flags.photos)
        pairs = [pair("photos", "s3://images/photos", f"s3://out/plan-{n}") for n in range(flags.repeat)]
        if flags.tiny:
            tars, model = make_images(place, flags.tiny, "tar"), make_model(place)
            pairs.append(pair("tars", str(tars), str(place / "out"), "--model", str(model)))
    inside = sum(found["inside"] for found in pairs)
    print(f"inside the interval: {inside} of {len(pairs)}; widest half interval: {max(map(half_width, pairs)):.0%}")
    if flags.json:
        flags.json.write_text(json.dumps(pairs, indent=2))


def resized_photos(folder: Path) -> list[Path]:
    """Write the photos of the demo as JPEGs of many sizes and qualities."""
    folder.mkdir()
    draws, originals = random.Random(0), [Image.open(path).convert("RGB") for path in photos()]
    for number in range(_KINDS):
        image = originals[number % len(originals)]
        factor = draws.lognormvariate(_LOG_SIDE, _SPREAD) / min(image.size)
        sides = [max(1, round(side * factor)) for side in image.size]
        image.resize((sides[0], sides[1])).save(folder / f"{number:03d}.jpg", quality=draws.randint(75, 95))
    return sorted(folder.iterdir())


def pair(name: str, images: str, output: str, *arguments: str) -> dict[str, Any]:
    """Plan a run, make it, and print what came of it."""
    command = ["--quiet", "--input", images, "--output", output, *arguments]
    started, load = time.monotonic(), [os.getloadavg()[0]]
    planned = subprocess.run(
        [sys.executable, "jobs/plan.py", *command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    seconds = time.monotonic() - started
    load.append(os.getloadavg()[0])
    subprocess.run([sys.executable, "jobs/classify.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    plan, run = json.loads(planned.stdout), _record(output)
    found = {
        "input": name,
        "images": run["counts"]["labelled"],
        "planned_images": plan["images"]["to_label"],
        "plan_took_s": round(seconds, 1),
        "phases": plan["forecast"]["seconds"],
        "planned_rate": plan["forecast"]["images_per_second"],
        "rate": run["images_per_second"],
        "load_averages": [*load, os.getloadavg()[0]],  # before the plan, between plan and run, after the run
        **run["plan"],
        "plan": plan,
    }
    print(line(found), flush=True)
    return found


def line(found: dict[str, Any]) -> str:
    """Return a row of a table."""
    seconds, rate = found["predicted_s"], found["planned_rate"]
    return (
        f"| {found['images']:,} {found['input']} | {found['plan_took_s']:.0f} s | {seconds['mid']:.1f} s "
        f"({seconds['low']:.1f} to {seconds['high']:.1f}, ± {half_width(found):.0%}) | {found['actual_s']:.1f} s "
        f"({found.get('deviation', 0):+.0%}) | {rate['mid']:,.0f} | {found['rate']:,.0f} | "
        f"{'yes' if found.get('inside') else 'no'} |"
    )


def half_width(found: dict[str, Any]) -> float:
    """Return half the width of the interval of the seconds, relative to its middle."""
    seconds = found["predicted_s"]
    return float((seconds["high"] - seconds["low"]) / 2 / seconds["mid"])


def _record(output: str) -> dict[str, Any]:
    """Return the record of the only run of an output."""
    folder = Folder(Stores(StorageConfig()), output)
    (name,) = [name for name in folder.folders("runs") if not name.startswith("plan")]
    record: dict[str, Any] = json.loads(folder.read(f"runs/{name}/run.json"))
    return record


if __name__ == "__main__":
    main()

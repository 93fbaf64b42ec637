"""Make what lies beside this file: images, and the model, output and figures that imgbatch 0.1.0 makes of them.

It is run once, with the code of 0.1.0, and kept to show how the fixtures came about; a newer version would write other files:

    git worktree add ../v0.1.0 d6e84c4
    PYTHONPATH=../v0.1.0:. python tests/data/v0.1.0/make.py

All URIs are of the tests' S3 server, so that they are the same on each machine.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import obstore

from tests.integration.tables import download
from tests.unit.pictures import encode, scene
from tests.weed import S3Server, serving

HERE = Path(__file__).parent
CODE = Path(os.environ["PYTHONPATH"].split(":")[0])
IMAGES, MODEL, OUTPUT = "s3://images/v0.1.0", "s3://images/v0.1.0-model", "s3://out/v0.1.0"


def picture(kind: str, seed: int) -> bytes:
    """Return a small JPEG whose colour is that of its class."""
    tint = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}[kind]
    mixed = 0.65 * scene(32, 32, seed=seed) + 0.35 * np.array(tint)
    return encode(mixed.astype(np.uint8), "JPEG", quality=70)


def make_images(place: Path) -> None:
    """Write class folders to train and to evaluate on, a damaged file, a tar with sidecars, and a manifest."""
    for number, kind in enumerate(("red", "green", "blue")):
        for name, first, count in (("folders", 10 * number, 6), ("unseen", 50 + 10 * number, 4)):
            (place / name / kind).mkdir(parents=True)
            for each in range(count):
                (place / name / kind / f"{each}.jpg").write_bytes(picture(kind, first + each))
    (place / "more").mkdir()
    (place / "more" / "damaged.jpg").write_bytes(picture("red", 90)[:400])
    for each in range(2):
        (place / "more" / f"listed-{each}.jpg").write_bytes(picture("green", 91 + each))
    (place / "more" / "list.csv").write_text("uri,camera\nlisted-0.jpg,left\nlisted-1.jpg,right\n")
    with tarfile.open(place / "pairs.tar", "w") as tar:
        for each, kind in enumerate(("blue", "red")):
            for name, content in ((f"{each}.jpg", picture(kind, 95 + each)), (f"{each}.cls", kind.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def base(place: Path) -> Path:
    """Have timm write a network of 100,000 weights for pictures of 32 pixels."""
    import timm
    import torch

    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=2, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    timm.models.save_for_hf(net, str(place), model_config={"label_names": ["a", "b"]}, safe_serialization=True)
    return place


def run(server: S3Server, job: str, *arguments: str) -> None:
    """Run a job of 0.1.0."""
    subprocess.run(
        [sys.executable, str(CODE / "jobs" / f"{job}.py"), *arguments, *("--set", "cluster.device=cpu")],
        cwd=CODE, env={**os.environ, **server.environment, "PYTHONPATH": str(CODE)}, check=True,
    )  # fmt: skip


def put_below(server: S3Server, bucket: str, prefix: str, folder: Path) -> None:
    """Copy a folder into a bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            obstore.put(server.bucket(bucket), f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


def main() -> None:
    """Write all fixtures."""
    exact = ("--set", "classify.runtime=torch", "--set", "classify.dtype=float32")
    for name in ("images", "model", "output", "evaluation"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    make_images(HERE / "images")
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch)) as server:
        put_below(server, "images", "v0.1.0", HERE / "images")
        put_below(server, "images", "base", base(Path(scratch, "base")))
        tree = Path(scratch, "tree.csv")
        tree.write_text("label,warmth\nred,warm\ngreen,cold\nblue,cold\n")
        obstore.put(server.bucket("images"), "tree.csv", tree.read_bytes())
        run(server, "train", "--input", f"{IMAGES}/folders", "--base", "s3://images/base", "--output", MODEL,
            "--taxonomy", "s3://images/tree.csv", "--set", "train.method=head")  # fmt: skip
        run(server, "classify", "--input", f"{IMAGES}/folders", "--input", f"{IMAGES}/more/list.csv", "--input",
            f"{IMAGES}/more/damaged.jpg", "--input", f"{IMAGES}/pairs.tar", "--model", MODEL, "--output", OUTPUT,
            *exact)  # fmt: skip
        run(server, "evaluate", "--input", f"{IMAGES}/unseen", "--model", MODEL, "--output", f"{OUTPUT}-evaluation",
            *exact)  # fmt: skip
        download(server.bucket("images"), "v0.1.0-model", HERE / "model")
        download(server.bucket("out"), "v0.1.0", HERE / "output")
        metrics = bytes(obstore.get(server.bucket("out"), "v0.1.0-evaluation/metrics.json").bytes())
        (HERE / "metrics.json").write_text(json.dumps(json.loads(metrics), indent=1) + "\n")


if __name__ == "__main__":
    main()

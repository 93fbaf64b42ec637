"""Effects: `imgbatch demo`: label the photos that ship in scikit-image and scikit-learn, offline, and print the labels.

make demo    # or: python -m jobs.demo --quiet
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from imgbatch import cli
from imgbatch.commands import classify

OUTPUT = Path("demo-output")
PHOTOS = {
    "skimage": (
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/motorcycle_left.png",
        "data/rocket.jpg",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Classify the photos, and print a table of the answers."""
    parser = cli.parser(
        "Label the photos that ship in scikit-image and scikit-learn with the default model, without a network, into\n"
        f"./{OUTPUT}, and print the labels. --config and --set are those of classify.py.",
        cli.EXIT_CODES,
        verb="demo",
    )
    flags = cli.arguments(parser, argv)
    common = [*(["--config", flags.config] if flags.config else []), *(["--quiet"] if flags.quiet else [])]
    common += [word for setting in flags.settings for word in ("--set", setting)]
    common += ["--log-format", flags.log_format]
    inputs = [argument for photo in photos() for argument in ("--input", str(photo))]
    code = classify.main([*inputs, "--output", str(OUTPUT), *common])
    if code == 0:
        show(OUTPUT)
    return code


def photos() -> list[Path]:
    """Return the paths of the photos, without importing the packages that ship them."""
    paths = []
    for package, names in PHOTOS.items():
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations, f"{package} is not installed: use `make demo`"
        paths += [Path(spec.submodule_search_locations[0], name) for name in names]
    return paths


def show(output: Path) -> None:
    """Print answer, label and score of each row, and the paths of the tables."""
    table = Table("image", "answer", "label", "score", "next best")
    columns = ["uri", "answer", "label", "score", "top_k"]
    for row in pq.read_table(output / "labels", columns=columns).sort_by("uri").to_pylist():
        next_best = ", ".join(candidate["label"] for candidate in row["top_k"][1:3])
        table.add_row(Path(row["uri"]).name, row["answer"], row["label"], f"{row['score']:.2f}", next_best)
    console = Console()
    console.print(table)
    for part in sorted((output / "labels").glob("*.parquet")):
        console.print(f"{part.resolve()}  {pq.read_metadata(part).num_rows} rows", soft_wrap=True, highlight=False)

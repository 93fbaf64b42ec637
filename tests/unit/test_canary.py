"""The canary: a model with wrong weights, preprocessing or labels is found before its first row, on one operator and on two."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image

from imgbatch.config.results import GuardConfig
from imgbatch.config.sections import ClassifyConfig, Config, SourceConfig, StorageConfig
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import ConfigError, GuardError, InputError, Unreachable
from imgbatch.inference.canary import _once_per_node
from imgbatch.inference.messages import received
from imgbatch.inference.worker import Classify, LabelImages, Work, decode_block
from imgbatch.ledger.listing_pages import page_name
from imgbatch.models.model import Model
from imgbatch.pipeline import canary as canary_of_driver
from imgbatch.pipeline.canary import prepare_canary, require_canary
from imgbatch.pipeline.run_statistics import RunStatistics
from imgbatch.schema import LISTING
from imgbatch.storage.stores import Folder, Stores
from tests.conftest import write_model
from tests.unit.networks import STORES, Load
from tests.unit.pictures import encode, scene

IMAGES, SIDE = 42, 160
ONE_IMAGE = 17
"""The seed of the image that the run labels."""

Blocks = list[pa.Table]
Operators = Callable[[Work], Blocks]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of a small network that distinguishes `scene`s by their colours."""
    return write_model(tmp_path_factory.mktemp("right") / "model", seed=0)


@pytest.fixture(scope="module")
def truths(right: Path) -> dict[int, str]:
    """The label that the right model gives to each scene, by its seed, as timm computes it."""
    import torch

    network = timm.create_model(f"local-dir:{right}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    images = [transform(Image.fromarray(scene(SIDE, SIDE, seed=seed))) for seed in range(IMAGES)]
    with torch.inference_mode():
        numbers = network(torch.stack(images)).argmax(1)
    labels = {seed: "abcdefg"[number] for seed, number in enumerate(numbers.tolist())}
    assert len(set(labels.values())) >= 5
    return labels


@pytest.fixture
def folders(truths: dict[int, str], tmp_path: Path) -> Path:
    """The scenes in a folder per class."""
    for seed, label in truths.items():
        (tmp_path / "canary" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "canary" / label / f"{seed}.png").write_bytes(encode(scene(SIDE, SIDE, seed=seed), "PNG"))
    return tmp_path / "canary"


@pytest.fixture
def listing(tmp_path: Path) -> Folder:
    """The listing of a run over one image."""
    (tmp_path / "input.png").write_bytes(encode(scene(SIDE, SIDE, seed=ONE_IMAGE), "PNG"))
    folder = Folder(STORES, str(tmp_path / "run" / "listing"))
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"uri": str(tmp_path / "input.png")}], schema=LISTING), sink)
    folder.put(page_name(0), sink.getvalue())
    return folder


def prepared(
    model: Model, listing: Folder, canary: Path, accuracy: float = 1.0, stores: Stores = STORES, **source: Any
) -> Work:
    """Return the work of a run with a canary."""
    guard = GuardConfig(canary=str(canary), canary_accuracy=accuracy)
    classify = ClassifyConfig(runtime="torch")  # which needs no conversion
    config = Config(guard=guard, source=SourceConfig(**source), classify=classify, input=(str(listing.uri),))
    folder = Folder(STORES, listing.uri.replace("/listing", "/canary"))
    labelled = prepare_canary(stores, config, model, folder)
    return Work(stores, listing, WorkerConfig.of(config), model, canary=labelled)


def fused(work: Work) -> Blocks:
    """Label the image of the run as on a CPU machine."""
    return list(LabelImages(work)(pa.table({"index": np.array([0])})))


def split(work: Work) -> Blocks:
    """Label the image of the run as on a machine with GPUs: decoding is an operator of its own."""
    classify = Classify(work)
    return [block for decoded in decode_block(pa.table({"index": np.array([0])}), work) for block in classify(decoded)]


PATHS = pytest.mark.parametrize("label", [fused, split])


def score_of(blocks: Blocks) -> dict[str, Any]:
    """Return the facts about the canary, which are in the first block."""
    (facts,) = (note["canary"] for note in received(blocks[0]).notes if "canary" in note)
    return dict(facts)


def rows_of(blocks: Blocks) -> int:
    """Return the number of rows of images."""
    return sum(len(received(block).rows) for block in blocks)


@PATHS
def test_the_right_model_passes_and_labels(
    load: Load, right: Path, folders: Path, listing: Folder, label: Operators, truths: dict[int, str]
) -> None:
    blocks = label(prepared(load(right), listing, folders))
    facts = score_of(blocks)
    assert (facts["passed"], facts["accuracy"], facts["images"], facts["wrong"]) == (True, 1.0, IMAGES, [])
    assert facts["runtime"].startswith("torch") and facts["device"] == "cpu" and facts["host"]
    rows = pa.concat_tables(received(block).rows for block in blocks)
    assert rows["label"].to_pylist() == [truths[ONE_IMAGE]]
    require_canary([{"canary": facts}])


def other_weights(right: Path, place: Path, load: Load) -> Model:
    """Return the same network with the weights of another training."""
    return load(write_model(place, seed=1))


def bgr(right: Path, place: Path, load: Load) -> Model:
    """Return a network that was trained on BGR images."""
    network = timm.create_model(f"local-dir:{right}", pretrained=True).eval()
    network.conv1[0].weight.data = network.conv1[0].weight.data.flip(1)
    timm.models.save_for_hf(network, str(place), model_config={"label_names": list("abcdefg")}, safe_serialization=True)
    return load(place)


def other_mean(right: Path, place: Path, load: Load) -> Model:
    """Return the model with the mean and standard deviation of ImageNet."""
    return load(right, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def other_size(right: Path, place: Path, load: Load) -> Model:
    """Return the model with another size of its input."""
    return load(right, image_size=32)


def other_order(right: Path, place: Path, load: Load) -> Model:
    """Return the model with a label file in another order."""
    place.write_text("\n".join("gabcdef") + "\n")
    return load(right, labels=str(place))


@PATHS
@pytest.mark.parametrize("wrong", [other_weights, bgr, other_mean, other_size, other_order])
def test_a_wrong_model_yields_no_row(
    load: Load,
    right: Path,
    tmp_path: Path,
    folders: Path,
    listing: Folder,
    label: Operators,
    wrong: Callable[[Path, Path, Load], Model],
) -> None:
    blocks = label(prepared(wrong(right, tmp_path / "wrong", load), listing, folders, accuracy=0.95))
    facts = score_of(blocks)
    assert not facts["passed"] and facts["accuracy"] < 0.95 and rows_of(blocks) == 0
    with pytest.raises(GuardError, match=r"guard\.canary_accuracy=0\.95 is required") as raised:
        require_canary([{"classify_s": 1.0}, {"canary": facts}])
    assert f"{facts['right']} of {IMAGES} images" in str(raised.value) and facts["wrong"][0]["uri"] in str(raised.value)


def as_manifest(folders: Path, place: Path) -> Path:
    """Return a manifest of the canary."""
    rows = [f"{path},{path.parent.name}" for path in sorted(folders.rglob("*.png"))]
    place.with_suffix(".csv").write_text("\n".join(["uri,label", *rows]) + "\n")
    return place.with_suffix(".csv")


def as_tar(folders: Path, place: Path, *, sidecars_last: bool = False) -> Path:
    """Return a tar of the canary with a sidecar for each image: next to it, or after all images."""
    members = [(f"{path.stem}.png", path.read_bytes()) for path in sorted(folders.rglob("*.png"))]
    members += [(f"{path.stem}.cls", path.parent.name.encode()) for path in sorted(folders.rglob("*.png"))]
    with tarfile.open(place.with_suffix(".tar"), "w") as file:
        for name, content in members if sidecars_last else sorted(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return place.with_suffix(".tar")


def as_late_tar(folders: Path, place: Path) -> Path:
    """Return a tar whose sidecars are not next to their images."""
    return as_tar(folders, place, sidecars_last=True)


def as_parquet(folders: Path, place: Path) -> Path:
    """Return a Parquet file with the bytes of the canary."""
    paths = sorted(folders.rglob("*.png"))
    table = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
    pq.write_table(pa.table(table), place.with_suffix(".parquet"))
    return place.with_suffix(".parquet")


@pytest.mark.parametrize("form", [as_manifest, as_tar, as_late_tar, as_parquet])
def test_a_canary_may_have_any_form_of_labelled_input(
    load: Load, right: Path, tmp_path: Path, folders: Path, listing: Folder, form: Callable[[Path, Path], Path]
) -> None:
    # The form of the input of the run does not apply to the canary.
    work = prepared(load(right), listing, form(folders, tmp_path / "small"), format="objects", suffixes="gif")
    facts = score_of(fused(work))
    assert (facts["passed"], facts["accuracy"], facts["images"]) == (True, 1.0, IMAGES)


def test_the_accuracy_may_be_as_low_as_required_and_no_lower(
    load: Load, right: Path, folders: Path, listing: Folder, truths: dict[int, str]
) -> None:
    for seed in range(4):
        label = truths[seed]
        other = "b" if label == "a" else "a"
        (folders / label / f"{seed}.png").rename(folders / other / f"{seed}.png")
    model, required = load(right), (IMAGES - 4) / IMAGES
    facts = score_of(fused(prepared(model, listing, folders, required)))
    assert facts["passed"] and facts["right"] == IMAGES - 4
    for image in facts["wrong"]:
        assert (
            image["label"] == truths[int(Path(image["uri"]).stem)] != image["truth"] == Path(image["uri"]).parent.name
        )
    blocks = fused(prepared(model, listing, folders, required + 0.01))
    assert not score_of(blocks)["passed"] and rows_of(blocks) == 0


def test_an_image_that_cannot_be_decoded_counts_as_wrong(
    load: Load, right: Path, folders: Path, listing: Folder, truths: dict[int, str]
) -> None:
    broken = folders / truths[0] / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    blocks = fused(prepared(load(right), listing, folders))
    facts = score_of(blocks)
    assert (facts["passed"], facts["rejected"], facts["right"]) == (False, 1, IMAGES - 1)
    with pytest.raises(GuardError, match=r"0\.png is '.', and could not be decoded"):
        require_canary([{"canary": facts}])


def test_an_image_that_may_be_read_later_is_an_error_of_the_store(
    load: Load, right: Path, tmp_path: Path, listing: Folder
) -> None:
    (tmp_path / "table.csv").write_text("uri,label\nhttp://127.0.0.1:9/0.png,a\n")
    stores = Stores(StorageConfig(allow_private_hosts=True, retries=0), {})
    (block,) = fused(prepared(load(right), listing, tmp_path / "table.csv", stores=stores))
    with pytest.raises(Unreachable, match=r"the image http://127\.0\.0\.1:9/0\.png of guard\.canary could not be read"):
        received(block)


def test_the_first_worker_of_a_node_labels_the_canary_for_all(
    load: Load, right: Path, folders: Path, listing: Folder
) -> None:
    work, statistics = prepared(load(right), listing, folders), RunStatistics()
    first = fused(work)
    for path in folders.rglob("*.png"):
        path.unlink()
    second, third = fused(work), split(work)
    for blocks in (first, second, third):
        assert rows_of(blocks) == 1
        statistics.add_notes(received(blocks[0]).notes)
    assert [score["accuracy"] for score in statistics.report()["canary"]] == [1.0]


def test_a_worker_that_fails_the_canary_stays_unusable(
    load: Load, right: Path, tmp_path: Path, folders: Path, listing: Folder
) -> None:
    worker = LabelImages(prepared(other_weights(right, tmp_path / "wrong", load), listing, folders))
    for _ in range(2):
        assert rows_of(list(worker(pa.table({"index": np.array([0])})))) == 0


def test_images_are_decoded_in_child_processes_after_a_process_has_died(tmp_path: Path, load: Load) -> None:
    code = "import os; from imgbatch.inference.canary import _once_per_node as f; f(['x'], lambda _: os._exit(9))"
    process = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": tempfile.gettempdir()})
    assert process.returncode == 9
    score = {"accuracy": 1.0, "images": 1, "right": 1}
    seen: list[bool] = []

    def compute(isolated: bool) -> dict[str, Any]:
        seen.append(isolated)
        return score

    assert [_once_per_node(["x"], compute), _once_per_node(["x"], compute), _once_per_node(["y"], compute)] == 3 * [
        score
    ]
    assert seen == [True, False]


def refused(load: Load, right: Path, listing: Folder, canary: Path, **source: Any) -> str:
    """Return the message with which a canary is refused; nothing is written for the workers."""
    with pytest.raises(InputError) as raised:
        prepared(load(right), listing, canary, **source)
    assert not Folder(STORES, listing.uri.replace("/listing", "/canary")).names()
    return str(raised.value)


def test_a_class_that_the_model_lacks_is_refused(
    load: Load, right: Path, tmp_path: Path, folders: Path, listing: Folder
) -> None:
    (folders / "a").rename(folders / "zebra")
    for canary in (folders, as_tar(folders, tmp_path / "small"), as_manifest(folders, tmp_path / "small")):
        message = refused(load, right, listing, canary)
        assert message.startswith(f"guard.canary={canary}: ") and "unknown to" in message and "'zebra'" in message


def test_a_canary_that_is_empty_unlabelled_missing_or_too_large_is_refused(
    load: Load, right: Path, tmp_path: Path, folders: Path, listing: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    assert "it holds no image" in refused(load, right, listing, tmp_path / "empty")
    assert "nowhere" in refused(load, right, listing, tmp_path / "nowhere")
    (tmp_path / "table.csv").write_text(f"uri\n{tmp_path}/input.png\n")
    assert "has no column 'label'" in refused(load, right, listing, tmp_path / "table.csv")
    (tmp_path / "table.csv").write_text(f"uri,label\n{tmp_path}/input.png,\n")
    assert "without a label" in refused(load, right, listing, tmp_path / "table.csv")
    monkeypatch.setattr(canary_of_driver, "MAX_IMAGES", IMAGES - 1)
    for canary in (folders, as_tar(folders, tmp_path / "small")):
        assert f"more than {IMAGES - 1} images" in refused(load, right, listing, canary)
    monkeypatch.setattr(canary_of_driver, "MAX_IMAGES", IMAGES)
    assert score_of(fused(prepared(load(right), listing, folders)))["passed"]


def test_a_canary_needs_its_accuracy() -> None:
    for guard in ({"canary": "photos"}, {"canary_accuracy": 0.9}):
        with pytest.raises(ConfigError, match="need each other"):
            GuardConfig(**guard)  # type: ignore[arg-type]


def test_passwords_in_uris_of_the_canary_are_masked() -> None:
    guard = GuardConfig(canary="https://me:secret@host/canary.csv", canary_accuracy=0.9)
    assert "secret" not in json.dumps(Config(guard=guard).public())

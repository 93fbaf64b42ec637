"""The canary: a model with wrong weights, preprocessing or labels is found before its first row, on one operator and on two."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image

from imgbatch.config.sections import Config, GuardConfig, SourceConfig
from imgbatch.config.worker import WorkerConfig
from imgbatch.errors import ConfigError, GuardError, InputError, Unreachable
from imgbatch.inference import canary as canary_of_worker
from imgbatch.inference.canary import CLASSES
from imgbatch.inference.messages import received
from imgbatch.inference.worker import Classify, LabelImages, Work, decode_block
from imgbatch.ledger.listing_pages import page_name
from imgbatch.models.model import Model
from imgbatch.pipeline.canary import MAX_IMAGES, prepare_canary, require_canary
from imgbatch.schema import LISTING
from imgbatch.storage.stores import Folder
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


def prepared(model: Model, listing: Folder, canary: Path, accuracy: float = 1.0, **source: Any) -> Work:
    """Return the work of a run with a canary."""
    guard = GuardConfig(canary=str(canary), canary_accuracy=accuracy)
    config = Config(guard=guard, source=SourceConfig(**source), input=(str(listing.uri),))
    folder = Folder(STORES, listing.uri.replace("/listing", "/canary"))
    labelled = prepare_canary(STORES, config, model, folder)
    return Work(STORES, listing, WorkerConfig.of(config), model, canary=labelled)


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
    assert facts["runtime"].startswith(("openvino", "torch")) and facts["device"] == "cpu" and facts["host"]
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
    timm.models.save_for_hf(
        network, str(place), model_config={"label_names": list("abcdefg")}, safe_serialization=True
    )
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

"""Networks that are built differently, from directory to rows: the labels are those of the network called by hand.

Weights are random; each head is centred on what it sees and scaled, so that many labels occur and few nearly tie.

    python -m pytest -m long -s tests/unit/test_architectures.py    # all of them, with a line of figures each
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from imgbatch.config.sections import ClassifyConfig, ClusterConfig, Config, ModelConfig, StorageConfig
from imgbatch.config.worker import WorkerConfig
from imgbatch.decode import decode
from imgbatch.inference.messages import received
from imgbatch.inference.worker import LabelImages, Work
from imgbatch.ledger.listing_pages import page_name
from imgbatch.models import architectures, check, child, directory, loading, pretrained
from imgbatch.models.preprocess import Preprocess
from imgbatch.schema import LISTING
from imgbatch.storage.stores import Folder, Stores
from tests.unit.pictures import encode, scene

LABELS = tuple(f"class {number:02d}" for number in range(20))
STORES = Stores(StorageConfig(), {})
TIED = 0.001
GREY_LEVELS = 3
"""By which torch's resizing of bytes and the libraries' transforms may differ: for random weights sometimes another label."""

NETWORKS = [
    "mobilenetv3_small_100",
    "torchvision:shufflenet_v2_x0_5",
    "resnet50",
    "efficientnet_b0",
    "convnext_tiny",
    "regnety_008",
    "densenet121",
    "vgg11_bn",
    "inception_v3",
    "torchvision:inception_v3",
    "resnext50_32x4d",
    "torchvision:shufflenet_v2_x1_0",
    "seresnet50",
    "tf_efficientnet_b0",
    "torchvision:resnet50",
    "torchvision:mobilenet_v3_small",
]

Transform = Callable[[Image.Image], torch.Tensor]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, photos: list[Path]) -> list[Path]:
    """Photos and some made-up pictures, lossless."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        (folder / f"{number:02d}.png").write_bytes(encode(scene(300, 340, seed=number), "PNG"))
    return [*sorted(folder.iterdir()), *(photo for photo in photos if photo.suffix == ".png")]


def made(architecture: str) -> tuple[nn.Module, Transform, dict[str, Any] | None]:
    """Return a network, its library's own transform, and torchvision's description where it is torchvision's."""
    torch.manual_seed(0)
    if not architecture.startswith(architectures.TORCHVISION):
        net = timm.create_model(architecture, num_classes=len(LABELS)).eval()
        return net, timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False), None
    name = architecture.removeprefix(architectures.TORCHVISION)
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    arguments = {"transform_input": True, "init_weights": False} if name == "inception_v3" else {}
    net = torchvision.models.get_model(name, num_classes=len(LABELS), **arguments).eval()
    config = {
        "architecture": architecture,
        "num_classes": len(LABELS),
        "label_names": LABELS,
        "pretrained_cfg": pretrained._to_pretrained_cfg(preset),
        "model_args": arguments,
    }
    return net, preset, config


def decide(net: nn.Module, images: torch.Tensor) -> None:
    """Centre and scale the head, after the batch norms have seen what a picture looks like."""
    seen: list[torch.Tensor] = []
    head = architectures.find_head(net, len(LABELS))
    assert isinstance(head, nn.Linear)
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):  # wholly, or what tells pictures apart fades from layer to layer
                norm.train().momentum = 1.0
        net(images)
        net.eval()(images)
        features = seen[-1]
        head.weight.mul_(4 / ((features - features.mean(0)) @ head.weight.T).std())
        assert head.bias is not None
        head.bias.copy_(-head.weight @ features.mean(0))
    hook.remove()


def normalised(preprocess: Preprocess, pictures: list[Path]) -> torch.Tensor:
    """Return pictures as the program resizes them, in 32 bits."""
    pixels = np.stack([preprocess(decode(path.read_bytes(), max_pixels=10**8).pixels) for path in pictures])
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (preprocess.mean, preprocess.std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std


def by_program(place: Folder, pictures: list[Path], runs: Folder) -> tuple[pa.Table, dict[str, Any]]:
    """Return the rows that the operator of a CPU machine gives, and what it tells of itself."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"uri": str(path)} for path in pictures], schema=LISTING), sink)
    runs.put(page_name(0), sink.getvalue())
    config = Config(classify=ClassifyConfig(dtype="float32"), cluster=ClusterConfig(device="cpu"))
    work = Work(STORES, runs, WorkerConfig.of(config), loading.load(ModelConfig(name=place.uri), STORES))
    blocks = [received(block) for block in LabelImages(work)(pa.table({"index": np.arange(len(pictures))}))]
    return pa.concat_tables([rows for rows, _, _ in blocks]), blocks[0][1][0]


@pytest.mark.timeout(1800)
@pytest.mark.long
@pytest.mark.parametrize("architecture", NETWORKS)
def test_labels_are_those_of_the_network_called_by_hand(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(child, "run_task", lambda question, **_: check.run_task(dict(question)))
    net, transform, config = made(architecture)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in pictures])
    preprocess = Preprocess.from_timm(getattr(net, "pretrained_cfg", None) or (config or {})["pretrained_cfg"])
    ours = normalised(preprocess, pictures)
    assert ((ours - images) * torch.tensor(preprocess.std).view(1, 3, 1, 1) * 255).abs().max() <= GREY_LEVELS
    decide(net, ours)
    place = Folder(STORES, str(tmp_path / "model"))
    if config is None:
        directory.write_directory(place, net, LABELS)
    else:
        directory.write(place, net.state_dict(), config)

    found, facts = by_program(place, pictures, Folder(STORES, str(tmp_path / "listing")))

    with torch.inference_mode():
        best = net(ours).softmax(1).topk(2)
        theirs = net(images).argmax(1)
    decided = (best.values[:, 0] - best.values[:, 1] > TIED).numpy()
    same = found["label_id"].to_numpy() == best.indices[:, 0].numpy()
    difference = np.abs(found["score"].to_numpy() - best.values[:, 0].numpy()).max()
    occur = len(np.unique(best.indices[:, 0]))
    figures = {"decided": int(decided.sum()), "same": int(same.sum()), "of": len(same), "labels": occur}
    alike = int((found["label_id"].to_numpy() == theirs.numpy()).sum())
    figures["same with the library's transform"] = alike
    print("\n" + json.dumps({architecture: facts["runtime"], **figures, "difference": round(float(difference), 4)}))
    assert same[decided].all()
    assert decided.mean() > 0.7 and occur > 3, "it decides nothing"
    assert difference < TIED
    assert alike >= 0.9 * len(same)

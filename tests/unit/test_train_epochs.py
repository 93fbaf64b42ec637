"""Fine-tuning in one process, on a tiny network and prepared pictures: what is learned, and how a run resumes."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from imgbatch.config.sections import ModelConfig, StorageConfig
from imgbatch.config.training import TrainConfig
from imgbatch.errors import ModelError, UsageError
from imgbatch.models import loading
from imgbatch.storage.stores import Folder, Stores
from imgbatch.training import cache, defaults, network, trainer
from imgbatch.training.cache import ROWS
from imgbatch.training.context import FinetuneSpec, WorkerContext
from tests.unit.pictures import scene

CLASSES, EACH = 3, 8


def keys(numbers: Iterable[int]) -> np.ndarray:
    uris = [f"image {number}" for number in numbers]
    return cache.keys_of(pa.table({"uri": uris, "offset": pa.nulls(len(uris), pa.int64())}))


def keep(folder: Folder, numbers: np.ndarray, pixels: np.ndarray) -> Folder:
    """Write pixels as the operator does, in two shards."""
    for part in np.array_split(np.arange(len(numbers)), 2):
        rows = [{"index": number, "uri": f"image {number}"} for number in numbers[part].tolist()]
        cache.write(folder, pixels[part], pa.Table.from_pylist(rows, schema=ROWS))
    return folder


@pytest.fixture
def spec(tmp_path: Path, tiny_model: Path) -> FinetuneSpec:
    """Three classes of a colour each; two images of each are held out."""
    stores = Stores(StorageConfig())
    base = loading.load(ModelConfig(name=str(tiny_model)), stores)
    classes = np.repeat(np.arange(CLASSES), EACH)
    numbers = np.arange(len(classes)) * 2  # as if others of the listing could not be read
    held_out = np.arange(len(classes)) % EACH >= EACH - 2

    def pictures(side: int) -> np.ndarray:
        pixels = np.stack([scene(side, side, seed=int(number)) for number in numbers])
        for i, colour in enumerate(classes):
            pixels[i, ..., colour] = 255
        return pixels

    folder = Folder(stores, str(tmp_path))
    config = replace(
        defaults.resolve(
            TrainConfig(epochs=3, refit_epochs=1, batch_size=6, lr=3e-3, dtype="float32"),
            18,
            160,
            fixed=False,
            stages=0,
        ),
        resolution=64,
    )
    return FinetuneSpec(
        base=base, config=config, number_of_classes=CLASSES, run=folder.folder("run"),
        pictures=keep(folder.folder("pictures"), numbers, pictures(80)),
        inputs=keep(folder.folder("inputs"), numbers[held_out], pictures(base.preprocess.height)[held_out]),
        keys=keys(numbers),
        classes=classes, aspects=np.ones(len(classes), np.float32), held_out=held_out,
    )  # fmt: skip


def result(spec: FinetuneSpec) -> tuple[dict, dict]:
    """Return the files of a finished run."""
    trained = torch.load(io.BytesIO(spec.run.read(trainer.RESULT)), weights_only=True)
    arrays = np.load(io.BytesIO(spec.run.read(trainer.HELD_OUT)))
    return trained, {name: arrays[name] for name in arrays.files}


def test_held_out_images_are_recognised_and_the_curve_records_the_training(spec: FinetuneSpec) -> None:
    trainer.run(spec, WorkerContext())
    trained, held_out = result(spec)
    assert [(point["phase"], point["epoch"]) for point in trained["curve"]] == [
        ("learn", 1), ("learn", 2), ("learn", 3), ("refit", 1),
    ]  # fmt: skip
    assert (held_out["unseen"].argmax(1) == spec.classes[spec.held_out]).mean() > 0.6
    assert trained["curve"][2]["loss"] < trained["curve"][0]["loss"]
    assert "held_out_loss" not in trained["curve"][-1]  # they are trained on in the refit


def test_one_seed_gives_one_result(spec: FinetuneSpec, tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((0, 0)):
        run = Folder(spec.run.stores, str(tmp_path / f"run-{number}"))
        again = replace(spec, run=run, config=replace(spec.config, seed=seed, epochs=1, refit=False))
        trainer.run(again, WorkerContext())
        results.append(result(again)[1]["final"])
    assert np.array_equal(results[0], results[1])


@pytest.mark.parametrize("killed_after", [1, 4], ids=["in learning", "before the result"])
def test_a_killed_run_resumes_with_the_same_result(spec: FinetuneSpec, tmp_path: Path, killed_after: int) -> None:
    trainer.run(spec, WorkerContext())
    seen = []

    def die(fact: dict) -> None:
        if fact["kind"] == "epoch":
            seen.append(fact["epoch"])
            if len(seen) > killed_after:
                raise KeyboardInterrupt

    again = replace(spec, run=Folder(spec.run.stores, str(tmp_path / "again")))
    if killed_after < 4:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(again, WorkerContext(report=die))
    else:
        trainer.run(again, WorkerContext())
        again.run.delete(trainer.RESULT)
    reports = []
    trainer.run(again, WorkerContext(report=reports.append))
    assert reports[0]["kind"] == "resumed"
    assert len([fact for fact in reports if fact["kind"] == "epoch"]) == 4 - killed_after
    assert np.array_equal(result(spec)[1]["final"], result(again)[1]["final"])
    assert np.array_equal(result(spec)[1]["unseen"], result(again)[1]["unseen"])


def test_a_base_that_is_not_timms_is_refused(spec: FinetuneSpec) -> None:
    from torchvision.models import shufflenet_v2_x0_5

    with pytest.raises(ModelError, match="is no timm network"):
        network.of(replace(spec.base, network=shufflenet_v2_x0_5))


def test_diverged_training_is_refused_with_the_learning_rate(spec: FinetuneSpec) -> None:
    with pytest.raises(UsageError, match=r"training diverged in epoch 1 \(learn\).*lower train.lr, which is 1e\+30"):
        trainer.run(replace(spec, config=replace(spec.config, lr=1e30)), WorkerContext())
    assert not spec.run.names()


def test_the_time_left_includes_the_refit(spec: FinetuneSpec) -> None:
    reports: list[dict] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_REPORT_INTERVAL_S", 0.0)
        trainer.run(spec, WorkerContext(report=reports.append))
    steps = [fact for fact in reports if fact["kind"] == "step"]
    images = [
        round(fact["seconds_left"] * fact["images_per_second"]) for fact in steps if fact["seconds_left"] is not None
    ]
    assert images[0] == 3 * 18 - 6 + 24 and images[-1] == 0 and images == sorted(images, reverse=True)


def test_patience_ends_learning_and_the_best_epoch_is_the_result(spec: FinetuneSpec) -> None:
    config = replace(
        spec.config, epochs=30, patience=2, lr=1.0, refit=False, warmup_fraction=0.0
    )  # it can only get worse
    trainer.run(replace(spec, config=config), WorkerContext())
    trained, held_out = result(spec)
    losses = [point["held_out_loss"] for point in trained["curve"]]
    assert len(losses) == trained["best_epoch"] + 2 < 30
    assert trained["best_epoch"] == 1 + int(np.argmin(losses))
    assert np.allclose(held_out["final"], held_out["unseen"], atol=1e-4)


@pytest.mark.parametrize("sided", [False, True], ids=["alike", "left and right differ"])
def test_pictures_are_mirrored_in_the_refit_if_mirrored_held_out_ones_are_recognised(
    spec: FinetuneSpec, sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(net: object, pixels: np.ndarray, *rest: object) -> np.ndarray:
        """Recognise an image by its first column, or by its mean, which mirroring does not change."""
        return np.eye(CLASSES, dtype=np.float32)[(pixels[:, 0, 0] if sided else pixels.mean((1, 2))).argmax(1)]

    inputs = np.zeros((int(spec.held_out.sum()), 160, 160, 3), np.uint8)
    inputs[np.arange(len(inputs)), :, :80, spec.classes[spec.held_out]] = 255
    inputs[np.arange(len(inputs)), :, 80:, (spec.classes[spec.held_out] + 1) % CLASSES] = 250
    numbers = np.arange(len(spec.classes))[spec.held_out] * 2
    spec = replace(spec, inputs=keep(spec.run.folder("sides"), numbers, inputs), config=replace(spec.config, epochs=1))
    monkeypatch.setattr("imgbatch.training.network.logits", logits)
    trainer.run(spec, WorkerContext())
    trained, _ = result(spec)
    assert trained["mirrored"] is not sided
    assert trained["curve"][0]["held_out_accuracy"] == 1


@pytest.mark.parametrize("apart", [False, True], ids=["near", "far apart"])
def test_weights_are_averaged_unless_that_raises_the_held_out_loss(
    spec: FinetuneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    phases = {}

    def average(instance: Any) -> tuple[np.ndarray, bool]:
        if apart:
            noise = torch.Generator().manual_seed(0)
            instance._best = {
                name: value + 30 * torch.randn(value.shape, generator=noise) if value.dim() == 4 else value
                for name, value in instance._best.items()
            }
        instance._state.best_loss += (
            1.0  # tolerance, since six images are few; the mean of distant weights is worse by far
        )
        phases["learn"] = instance._best
        phases["refit"] = {name: value.clone() for name, value in instance._net.state_dict().items()}
        return real(instance)

    real = trainer.Trainer.average
    monkeypatch.setattr(trainer.Trainer, "average", average)
    trainer.run(spec, WorkerContext())
    trained, held_out = result(spec)
    assert trained["averaged"] is not apart
    for name, value in trained["net"].items():
        mean = 0.25 * phases["learn"][name] + 0.75 * phases["refit"][name]
        expected = phases["refit"][name] if apart or not value.is_floating_point() else mean
        assert torch.allclose(value, expected, atol=1e-6), name
    net = network.build(spec.base, CLASSES, pretrained=True, seed=0).to(memory_format=torch.channels_last)
    net.load_state_dict(trained["net"])
    inputs = cache.load(spec.inputs, spec.keys[spec.held_out], np.empty)
    logits = network.logits(net, inputs, spec.base.preprocess, "float32", torch.device("cpu"))
    assert np.allclose(logits, held_out["final"], atol=1e-3), "the logits are those of the network that is written"


CHANGES = [
    {"mixup": 0.4, "cutmix": 1.0},
    {"class_balancing": "weights", "flip": True, "pretrained": False},
    {"class_balancing": "sampling", "frozen_stages": 2},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_options_of_training_work(spec: FinetuneSpec, change: dict) -> None:
    before = {name: value.clone() for name, value in spec.base.network().state_dict().items()}
    trainer.run(replace(spec, config=replace(spec.config, epochs=1, refit=False, **change)), WorkerContext())
    trained, held_out = result(spec)
    assert np.isfinite(held_out["final"]).all()
    same = [name for name, value in trained["net"].items() if name in before and torch.equal(before[name], value)]
    assert ("conv1.0.weight" in same) == ("frozen_stages" in change)
    statistics = {name for name in before if name.endswith("running_mean")}
    assert statistics and (statistics <= set(same)) == change.get("pretrained", True)

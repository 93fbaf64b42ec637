"""Fine-tuning in one process, on a tiny network and pictures that are ready: what is learned, and what is gone on from."""

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
from imgbatch.training import cache, defaults, network
from imgbatch.training import trainer as trainer_module
from imgbatch.training.cache import ROWS
from imgbatch.training.context import Fit, Place
from tests.unit.pictures import scene

CLASSES, EACH = 3, 8


def keys(numbers: Iterable[int]) -> np.ndarray:
    uris = [f"image {number}" for number in numbers]
    return cache.keys_of(pa.table({"uri": uris, "offset": pa.nulls(len(uris), pa.int64())}))


def keep(folder: Folder, numbers: np.ndarray, pixels: np.ndarray) -> Folder:
    """Write pixels as the operator would, in two shards."""
    for part in np.array_split(np.arange(len(numbers)), 2):
        rows = [{"index": number, "uri": f"image {number}"} for number in numbers[part].tolist()]
        cache.write(folder, pixels[part], pa.Table.from_pylist(rows, schema=ROWS))
    return folder


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Fit:
    """Three classes of a colour each; two images of each are held out."""
    stores = Stores(StorageConfig())
    base = loading.load(ModelConfig(name=str(tiny_model)), stores)
    classes = np.repeat(np.arange(CLASSES), EACH)
    numbers = np.arange(len(classes)) * 2  # as where others of the listing could not be read
    held = np.arange(len(classes)) % EACH >= EACH - 2

    def pictures(side: int) -> np.ndarray:
        found = np.stack([scene(side, side, seed=int(number)) for number in numbers])
        for i, colour in enumerate(classes):
            found[i, ..., colour] = 255
        return found

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
    return Fit(
        base=base, config=config, number_of_classes=CLASSES, run=folder.folder("run"),
        pictures=keep(folder.folder("pictures"), numbers, pictures(80)),
        inputs=keep(folder.folder("inputs"), numbers[held], pictures(base.preprocess.height)[held]),
        keys=keys(numbers),
        classes=classes, aspects=np.ones(len(classes), np.float32), held=held,
    )  # fmt: skip


def result(job: Fit) -> tuple[dict, dict]:
    """Return what a finished run left."""
    trained = torch.load(io.BytesIO(job.run.read(trainer_module.RESULT)), weights_only=True)
    arrays = np.load(io.BytesIO(job.run.read(trainer_module.HELD_OUT)))
    return trained, {name: arrays[name] for name in arrays.files}


def test_the_held_out_images_are_told_apart_and_the_curve_says_how_that_came(job: Fit) -> None:
    trainer_module.run(job, Place())
    trained, held = result(job)
    assert [(point["phase"], point["epoch"]) for point in trained["curve"]] == [
        ("learn", 1), ("learn", 2), ("learn", 3), ("refit", 1),
    ]  # fmt: skip
    assert (held["unseen"].argmax(1) == job.classes[job.held]).mean() > 0.6
    assert trained["curve"][2]["loss"] < trained["curve"][0]["loss"]
    assert "held_out_loss" not in trained["curve"][-1]  # they are learned from by then


def test_one_seed_gives_one_result(job: Fit, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((0, 0)):
        run = Folder(job.run.stores, str(tmp_path / f"run-{number}"))
        again = replace(job, run=run, config=replace(job.config, seed=seed, epochs=1, refit=False))
        trainer_module.run(again, Place())
        found.append(result(again)[1]["final"])
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("killed_behind", [1, 4], ids=["in learning", "before the result"])
def test_a_run_that_was_killed_goes_on_and_comes_to_the_same(job: Fit, tmp_path: Path, killed_behind: int) -> None:
    trainer_module.run(job, Place())
    seen = []

    def die(fact: dict) -> None:
        if fact["kind"] == "epoch":
            seen.append(fact["epoch"])
            if len(seen) > killed_behind:
                raise KeyboardInterrupt

    again = replace(job, run=Folder(job.run.stores, str(tmp_path / "again")))
    if killed_behind < 4:
        with pytest.raises(KeyboardInterrupt):
            trainer_module.run(again, Place(tell=die))
    else:
        trainer_module.run(again, Place())
        again.run.delete(trainer_module.RESULT)
    told = []
    trainer_module.run(again, Place(tell=told.append))
    assert told[0]["kind"] == "resumed"
    assert len([fact for fact in told if fact["kind"] == "epoch"]) == 4 - killed_behind
    assert np.array_equal(result(job)[1]["final"], result(again)[1]["final"])
    assert np.array_equal(result(job)[1]["unseen"], result(again)[1]["unseen"])


def test_a_base_that_is_not_timms_is_refused(job: Fit) -> None:
    from torchvision.models import shufflenet_v2_x0_5

    with pytest.raises(ModelError, match="is no network of timm's"):
        network.of(replace(job.base, network=shufflenet_v2_x0_5))


def test_training_that_diverges_says_so(job: Fit) -> None:
    with pytest.raises(UsageError, match=r"training diverged in epoch 1 \(learn\).*lower train.lr, which is 1e\+30"):
        trainer_module.run(replace(job, config=replace(job.config, lr=1e30)), Place())
    assert not job.run.names()


def test_the_time_left_is_that_of_the_refit_too(job: Fit) -> None:
    told: list[dict] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "_TELL_EACH_S", 0.0)
        trainer_module.run(job, Place(tell=told.append))
    steps = [fact for fact in told if fact["kind"] == "step"]
    images = [
        round(fact["seconds_left"] * fact["images_per_second"]) for fact in steps if fact["seconds_left"] is not None
    ]
    assert images[0] == 3 * 18 - 6 + 24 and images[-1] == 0 and images == sorted(images, reverse=True)


def test_patience_ends_learning_and_the_best_epoch_is_what_stays(job: Fit) -> None:
    config = replace(
        job.config, epochs=30, patience=2, lr=1.0, refit=False, warmup_fraction=0.0
    )  # it can only get worse
    trainer_module.run(replace(job, config=config), Place())
    trained, held = result(job)
    losses = [point["held_out_loss"] for point in trained["curve"]]
    assert len(losses) == trained["best_epoch"] + 2 < 30
    assert trained["best_epoch"] == 1 + int(np.argmin(losses))
    assert np.allclose(held["final"], held["unseen"], atol=1e-4)


@pytest.mark.parametrize("sided", [False, True], ids=["alike", "left and right differ"])
def test_pictures_are_mirrored_in_the_refit_if_held_out_ones_are_told_mirrored(
    job: Fit, sided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(net: object, pixels: np.ndarray, *rest: object) -> np.ndarray:
        """Tell an image by its first column, or by what is the same mirrored."""
        return np.eye(CLASSES, dtype=np.float32)[(pixels[:, 0, 0] if sided else pixels.mean((1, 2))).argmax(1)]

    inputs = np.zeros((int(job.held.sum()), 160, 160, 3), np.uint8)
    inputs[np.arange(len(inputs)), :, :80, job.classes[job.held]] = 255
    inputs[np.arange(len(inputs)), :, 80:, (job.classes[job.held] + 1) % CLASSES] = 250
    numbers = np.arange(len(job.classes))[job.held] * 2
    job = replace(job, inputs=keep(job.run.folder("sides"), numbers, inputs), config=replace(job.config, epochs=1))
    monkeypatch.setattr("imgbatch.training.network.logits", logits)
    trainer_module.run(job, Place())
    trained, _ = result(job)
    assert trained["mirrored"] is not sided
    assert trained["curve"][0]["held_out_accuracy"] == 1


@pytest.mark.parametrize("apart", [False, True], ids=["one valley", "two"])
def test_the_result_is_the_mean_of_both_phases_unless_it_lies_on_a_hill(
    job: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    phases = {}

    def average(trainer: Any) -> tuple[np.ndarray, bool]:
        if apart:
            noise = torch.Generator().manual_seed(0)
            trainer._best = {
                name: value + 30 * torch.randn(value.shape, generator=noise) if value.dim() == 4 else value
                for name, value in trainer._best.items()
            }
        trainer._state.best_loss += 1.0  # six images are few: the chord has some room, a hill is higher
        phases["learn"] = trainer._best
        phases["refit"] = {name: value.clone() for name, value in trainer._net.state_dict().items()}
        return honest(trainer)

    honest = trainer_module._Trainer.average
    monkeypatch.setattr(trainer_module._Trainer, "average", average)
    trainer_module.run(job, Place())
    trained, held = result(job)
    assert trained["averaged"] is not apart
    for name, value in trained["net"].items():
        mean = 0.25 * phases["learn"][name] + 0.75 * phases["refit"][name]
        expected = phases["refit"][name] if apart or not value.is_floating_point() else mean
        assert torch.allclose(value, expected, atol=1e-6), name
    net = network.build(job.base, CLASSES, pretrained=True, seed=0).to(memory_format=torch.channels_last)
    net.load_state_dict(trained["net"])
    inputs = cache.load(job.inputs, job.keys[job.held], np.empty)
    said = network.logits(net, inputs, job.base.preprocess, "float32", torch.device("cpu"))
    assert np.allclose(said, held["final"], atol=1e-3), "the figures are of the network that is written"


CHANGES = [
    {"mixup": 0.4, "cutmix": 1.0},
    {"class_balancing": "weights", "flip": True, "pretrained": False},
    {"class_balancing": "sampling", "frozen_stages": 2},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_can_be_asked_for_runs(job: Fit, change: dict) -> None:
    before = {name: value.clone() for name, value in job.base.network().state_dict().items()}
    trainer_module.run(replace(job, config=replace(job.config, epochs=1, refit=False, **change)), Place())
    trained, held = result(job)
    assert np.isfinite(held["final"]).all()
    same = [name for name, value in trained["net"].items() if name in before and torch.equal(before[name], value)]
    assert ("conv1.0.weight" in same) == ("frozen_stages" in change)
    statistics = {name for name in before if name.endswith("running_mean")}
    assert statistics and (statistics <= set(same)) == change.get("pretrained", True)

"""Effects: the two training methods: a new head on the features of the base, and fine-tuning."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from imgbatch.concurrency.polling import run_with_ticks
from imgbatch.config.training import Training
from imgbatch.config.worker import WorkerConfig
from imgbatch.engine import placement
from imgbatch.engine.placement import Plan
from imgbatch.errors import Unreachable, UsageError
from imgbatch.evaluation.calibration import fit_temperature
from imgbatch.ledger.work_plan import WorkPlan
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console, plurals
from imgbatch.terminal.plurals import counted, rate
from imgbatch.training import cache, defaults, head, network, ray_train, splits, trainer
from imgbatch.training.cache import Preparation
from imgbatch.training.cache_build import Prepared, prepare
from imgbatch.training.context import FinetuneSpec
from imgbatch.training.labels import Labelled
from imgbatch.training.near_duplicates import NearDuplicates, near_duplicates

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

_NOT_IN_DIGEST = ("max_failures", "cpus_per_worker", "cache")
"""Options that may change between a checkpoint and the run that resumes from it."""


@dataclass(frozen=True, slots=True)
class Task:
    """The images of a training run, with the functions that prepare them."""

    config: Training
    stores: Stores
    base: Model
    listing: Folder
    listed: pa.Table
    """The listing's `uri` and carried columns."""
    fingerprint: str
    """Changes with the images, their versions and their labels."""
    work_plan: WorkPlan
    run: Folder
    plan: Plan

    def digest(self, *values: Any) -> str:
        """Return a name that changes with the listing and with the values."""
        return hashlib.sha256(json.dumps([self.fingerprint, *values], default=str).encode()).hexdigest()[:16]

    def images(self, preprocess: Preprocess, *, features: bool = False) -> Preparation:
        """Return how images are prepared: as pixels of this preprocessing, or as features."""
        train = self.config.train
        load = network.LoadFeatures(self.base, train.dtype) if features else None
        kind = ["features", self.base.digest, train.dtype] if features else ["pixels"]
        # Shards of version 0.1 lack the hashes of the images. As the columns are in the digest, such a cache is built again,
        # under another name.
        columns = cache.ROWS.names
        source = self.config.source
        # With other limits other images are rejected; with another image column other bytes are the image.
        limits = [asdict(self.config.decode), self.config.fetch.max_bytes, source.image_column, source.suffixes]
        limits += [
            cache.VERSION,
            source.label_column,
            source.split_column,
        ]  # shards hold labels and splits of members of tars
        folder = Folder(self.stores, absolute(train.cache)) if train.cache else self.run
        return Preparation(
            self.stores,
            self.listing,
            WorkerConfig.of(self.config.shared()),
            replace(self.base, preprocess=preprocess),
            shards=folder.folder(f"{kind[0]}-{self.digest(preprocess.describe(), kind, limits, columns)}"),
            features=load,
        )

    def prepare(self, work: Preparation, selected: Mask) -> Prepared:
        """Prepare some entries of the listing."""
        return prepare(work, self.listed, self.work_plan.restricted(selected), self.plan, self.config.cluster)

    @property
    def gpus(self) -> bool:
        """Whether training runs on GPUs."""
        return self.plan.split


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of training."""

    net: Any
    """The network, with calibrated logits."""
    temperature: float
    held_out: Ints
    """The held-out images: their indices among the prepared ones, ascending."""
    unseen: Floats
    """Their logits by networks that were not trained on them, not calibrated."""
    final: Floats
    """Their logits by the network that is written, calibrated; after a refit it was trained on them."""
    learned: Ints
    """The images that the network that is written was trained on: their indices, ascending; after a refit all of them."""
    curve: list[dict[str, Any]]
    facts: dict[str, Any]
    near_duplicates: NearDuplicates | None = None
    """Held-out images that are almost equal to a training image; None: not known, since there are no features."""


def prepared_for(task: Task, method: str, selected: Mask) -> tuple[Preparation, Prepared]:
    """Prepare the selected images for the method: as features, or as pictures."""
    if method == "head":
        work = task.images(task.base.preprocess, features=True)
    else:
        side = defaults.cached_side(max(task.base.preprocess.height, task.base.preprocess.width))
        work = task.images(
            replace(task.base.preprocess, height=side, width=side, resize=(side, side), crop_mode="squash")
        )
    return work, task.prepare(work, selected)


def by_head(task: Task, work: Preparation, prepared: Prepared, labelled: Labelled, fold: Ints) -> Trained:
    """Fit a new head on the features of the base."""
    images = np.flatnonzero(fold != splits.NEVER)
    # The long steps run in threads, so that the heartbeat is written and a stop request is handled meanwhile.
    console.step("reading the features")
    features = run_with_ticks(lambda: cache.load(work.shards, prepared.keys[images], np.empty))
    classes, fold, config = labelled.classes[images], fold[images], task.config.train
    weights = _class_weights(classes, len(labelled.labels)) if config.class_balancing != "none" else None
    options: dict[str, Any] = {"number_of_classes": len(labelled.labels), "weights": weights}
    console.step("selecting the strength of L2")
    best = run_with_ticks(lambda: head.choose(features, classes, fold, l2=config.l2, report=log.info, **options))
    temperature = fit_temperature(best.logits, classes[best.held_out])
    learned = np.arange(len(fold)) if config.refit else np.flatnonzero(fold == splits.ALWAYS)
    console.step("fitting the head")
    fitted = run_with_ticks(lambda: head.fit(features[learned], classes[learned], l2=best.l2, **options))
    net = network.build(task.base, len(labelled.labels), pretrained=True, seed=config.seed)
    network.set_head(net, fitted.weight, fitted.bias)
    network.divide_logits(net, temperature)
    final = fitted.logits(features[best.held_out]) / temperature
    console.step("comparing images across splits")
    found = run_with_ticks(lambda: near_duplicates(features, fold))
    found = replace(found, held_out=images[found.held_out], trained=images[found.trained])
    facts: dict[str, Any] = {"l2": best.l2, "folds": int(fold.max()) + 1, "images": len(learned)}
    facts["near_duplicates"] = found.public(prepared.images["uri"])
    return Trained(
        net,
        temperature,
        images[best.held_out],
        best.logits,
        final.astype(np.float32),
        images[learned],
        best.curve,
        facts,
        found,
    )


def _class_weights(classes: Ints, number: int) -> Floats:
    """Return weights of the loss with which all classes count equally."""
    counts = np.maximum(np.bincount(classes, minlength=number), 1)
    return (len(classes) / (number * counts)).astype(np.float32)


def by_finetuning(task: Task, work: Preparation, prepared: Prepared, labelled: Labelled, fold: Ints) -> Trained:
    """Fine-tune on Ray Train."""
    images = np.flatnonzero(fold != splits.NEVER)
    held_out, size = fold[images] == 0, task.base.preprocess
    net = network.build(task.base, len(labelled.labels), pretrained=False, seed=0)
    config = defaults.resolve(
        task.config.train, len(images), min(size.height, size.width),
        fixed=network.fixed_input(net), stages=len(network.stages(net)),
    )  # fmt: skip
    if config.workers > (n := int(np.count_nonzero(~held_out))):
        raise UsageError(
            f"train.workers={config.workers} for {counted(n, 'image')} to learn from: each needs at least one"
        )
    inputs = _held_out_inputs(task, prepared, images[held_out])
    options = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_DIGEST}
    pictures = work.shards.uri.rpartition("/")[2]
    # A checkpoint is only valid for the same pictures, folds, base and options: they are in the name of its folder.
    run = task.run.folder(f"fit-{task.digest(pictures, fold.tobytes().hex(), task.base.digest, options)}")
    spec = FinetuneSpec(
        base=task.base, config=config, number_of_classes=len(labelled.labels), run=run, pictures=work.shards,
        inputs=inputs, keys=prepared.keys[images], classes=labelled.classes[images], aspects=prepared.aspects[images],
        held_out=held_out,
    )  # fmt: skip
    console.step("starting the training workers")
    if not run.exists(trainer.RESULT):
        limits = task.config.cluster
        cpus = placement.wait_for_cpus_per_worker(config.workers, config.cpus_per_worker, gpus=task.gpus, config=limits)
        ray_train.fit(spec, gpus=task.gpus, cpus_per_worker=cpus, limits=limits, report=_show)
    console.step("reading the trained network")
    result = torch.load(io.BytesIO(run.read(trainer.RESULT)), map_location="cpu", weights_only=True)
    arrays = np.load(io.BytesIO(run.read(trainer.HELD_OUT)), allow_pickle=False)
    net.load_state_dict(result["net"])
    temperature = fit_temperature(arrays["unseen"], spec.classes[held_out])
    network.divide_logits(net, temperature)
    final = arrays["final"] / np.float32(temperature)
    facts = {name: result[name] for name in ("best_epoch", "mirrored", "averaged")} | {
        "recipe": asdict(config),
        "images": len(images),
    }
    learned = images if config.refit else images[~held_out]
    return Trained(net, temperature, images[held_out], arrays["unseen"], final, learned, result["curve"], facts)


def _held_out_inputs(task: Task, prepared: Prepared, held_out: Ints) -> Folder:
    """Prepare the held-out images as the network gets them in inference; return their shards.

    Raises:
        Unreachable: one that could be read before cannot be read now.
    """
    work, entries = task.images(task.base.preprocess), np.zeros(len(task.listed), bool)
    entries[prepared.images["index"].to_numpy()[held_out]] = True
    inputs = task.prepare(work, entries)
    lost = held_out[~np.isin(prepared.keys[held_out], inputs.keys[inputs.read])]
    if len(lost):
        example = prepared.images["uri"][int(lost[0])].as_py()
        raise Unreachable(
            f"{counted(len(lost), 'held-out image')} could be read before and cannot be read now, such as {example}: run the "
            "same command again"
        )
    return work.shards


def _show(fact: dict[str, Any]) -> None:
    """Log each epoch that the first worker reports, and show the progress of the current one."""
    if fact["kind"] == "resumed":
        log.info("resuming from the checkpoint after epoch %d (%s)", fact["epoch"], fact["phase"])
        return
    console.step("training")
    if fact["kind"] == "epoch":
        log.info("%s", line(fact))
        console.show(f"{fact['phase']} epoch {fact['epoch']}/{fact['epochs']} is done", fact["epoch"], fact["epochs"])
    else:
        console.show(line(fact), fact["epoch"] - 1, fact["epochs"])


def line(fact: dict[str, Any]) -> str:
    """Return the progress line.

    >>> line({"phase": "learn", "epoch": 3, "epochs": 10, "loss": 1.25, "accuracy": 0.7, "images_per_second": 31.0,
    ...       "seconds_left": 3725.0})
    'learn epoch 3/10: loss 1.250, accuracy 70.0 %, 31 images/s, 1:02:05 left'
    """
    text = (
        f"{fact['phase']} epoch {fact['epoch']}/{fact['epochs']}: loss {fact['loss']:.3f}, "
        f"accuracy {100 * fact['accuracy']:.1f} %, {rate(fact['images_per_second'], 'image')}"
    )
    if fact.get("held_out_accuracy") is not None:
        return f"{text}; held out: loss {fact['held_out_loss']:.3f}, accuracy {100 * fact['held_out_accuracy']:.1f} %"
    return text if fact.get("seconds_left") is None else f"{text}, {plurals.clock(fact['seconds_left'])} left"

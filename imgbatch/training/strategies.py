"""Effects: the two ways to a trained network: a head on the base's features, and fine-tuning."""

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
from imgbatch.engine import placement
from imgbatch.engine.placement import Plan
from imgbatch.errors import Unreachable, UsageError
from imgbatch.evaluation.calibration import fit_temperature
from imgbatch.ledger.listing import WorkPlan
from imgbatch.models.model import Model
from imgbatch.models.preprocess import Preprocess
from imgbatch.storage.stores import Folder, Stores
from imgbatch.storage.uris import absolute
from imgbatch.terminal import console, plurals
from imgbatch.terminal.plurals import counted, rate
from imgbatch.training import cache as cache_module
from imgbatch.training import defaults, head, network, ray_train, splits, trainer
from imgbatch.training.cache import Preparation
from imgbatch.training.cache_build import Prepared, prepare
from imgbatch.training.context import Fit
from imgbatch.training.labels import Labelled

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

_NOT_THE_FIT = ("max_failures", "cpus_per_worker", "cache")
"""Settings that may be other ones where training goes on from its last checkpoint."""


@dataclass(frozen=True, slots=True)
class Task:
    """Which images there are, and with what they are made ready and learned from."""

    config: Training
    stores: Stores
    base: Model
    listing: Folder
    listed: pa.Table
    """The listing's `uri` and carried columns."""
    fingerprint: str
    """Tells this listing from others."""
    work_plan: WorkPlan
    run: Folder
    plan: Plan

    def digest(self, *of: Any) -> str:
        """Return a name that changes with the listing, and with what else is given."""
        return hashlib.sha256(json.dumps([self.fingerprint, *of], default=str).encode()).hexdigest()[:16]

    def images(self, preprocess: Preprocess, *, features: bool = False) -> Preparation:
        """Return how images are made ready: as pixels of this preprocessing, or as features."""
        train = self.config.train
        load = network.LoadFeatures(self.base, train.dtype) if features else None
        kind = ["features", self.base.digest, train.dtype] if features else ["pixels"]
        # Shards that 0.1 wrote have no hashes of the images' bytes: such a cache is made again, under another name.
        columns = cache_module.ROWS.names
        source = self.config.source
        # Under others other images are rejected, or other bytes are the image.
        limits = [asdict(self.config.decode), self.config.fetch.max_bytes, source.image_column, source.suffixes]
        limits += [
            cache_module.VERSION,
            source.label_column,
            source.split_column,
        ]  # of what shards say of members of tars
        cache = Folder(self.stores, absolute(train.cache)) if train.cache else self.run
        return Preparation(
            self.stores,
            self.listing,
            self.config.shared(),
            replace(self.base, preprocess=preprocess),
            shards=cache.folder(f"{kind[0]}-{self.digest(preprocess.describe(), kind, limits, columns)}"),
            features=load,
        )

    def ready(self, work: Preparation, wanted: Mask) -> Prepared:
        """Have some entries of the listing made ready."""
        work_plan = replace(self.work_plan, pending=wanted)
        return prepare(work, self.listed, work_plan, self.plan, stall_s=self.config.cluster.stall_timeout_s)

    @property
    def gpus(self) -> bool:
        """Whether training runs on GPUs."""
        return self.plan.split


@dataclass(frozen=True, slots=True)
class Trained:
    """What training came to."""

    net: Any
    """The network, whose logits are calibrated."""
    temperature: float
    held: Ints
    """The held-out images, by their places among those made ready, ascending."""
    unseen: Floats
    """Their logits from networks that had not seen them, not calibrated."""
    final: Floats
    """Their logits from the network as it is written, calibrated; it has seen them where there was a refit."""
    learned: Ints
    """The images that the network as it is written was trained on, by their places, ascending: of a refit all of them."""
    curve: list[dict[str, Any]]
    facts: dict[str, Any]


def ready_for(task: Task, way: str, wanted: Mask) -> tuple[Preparation, Prepared]:
    """Have features, or pictures, made of the wanted images."""
    if way == "head":
        work = task.images(task.base.preprocess, features=True)
    else:
        side = defaults.cached_side(max(task.base.preprocess.height, task.base.preprocess.width))
        work = task.images(
            replace(task.base.preprocess, height=side, width=side, resize=(side, side), crop_mode="squash")
        )
    return work, task.ready(work, wanted)


def by_head(task: Task, work: Preparation, made: Prepared, found: Labelled, fold: Ints) -> Trained:
    """Fit a head on the features that the base gives."""
    places = np.flatnonzero(fold != splits.NEVER)
    # In a thread each, meanwhile the run shows that it lives, and can be ended.
    console.step("reading the features")
    features = run_with_ticks(lambda: cache_module.load(work.shards, made.keys[places], np.empty))
    classes, fold, config = found.classes[places], fold[places], task.config.train
    weights = _class_weights(classes, len(found.labels)) if config.class_balancing != "none" else None
    known: dict[str, Any] = {"number_of_classes": len(found.labels), "weights": weights}
    console.step("choosing the strength of L2")
    chosen = run_with_ticks(lambda: head.choose(features, classes, fold, l2=config.l2, tell=log.info, **known))
    temperature = fit_temperature(chosen.logits, classes[chosen.numbers])
    learned = np.arange(len(fold)) if config.refit else np.flatnonzero(fold == splits.ALWAYS)
    console.step("fitting the head")
    solved = run_with_ticks(lambda: head.fit(features[learned], classes[learned], l2=chosen.l2, **known))
    net = network.build(task.base, len(found.labels), pretrained=True, seed=config.seed)
    network.set_head(net, solved.weight, solved.bias)
    network.divide_logits(net, temperature)
    final = solved.logits(features[chosen.numbers]) / temperature
    facts = {"l2": chosen.l2, "folds": int(fold.max()) + 1, "images": len(learned)}
    return Trained(
        net, temperature, places[chosen.numbers], chosen.logits, final.astype(np.float32), places[learned],
        chosen.curve, facts,
    )  # fmt: skip


def _class_weights(classes: Ints, number: int) -> Floats:
    """Return weights under which all classes count alike."""
    counts = np.maximum(np.bincount(classes, minlength=number), 1)
    return (len(classes) / (number * counts)).astype(np.float32)


def by_finetuning(task: Task, work: Preparation, made: Prepared, found: Labelled, fold: Ints) -> Trained:
    """Fine-tune on Ray Train."""
    places = np.flatnonzero(fold != splits.NEVER)
    held, size = fold[places] == 0, task.base.preprocess
    net = network.build(task.base, len(found.labels), pretrained=False, seed=0)
    config = defaults.resolve(
        task.config.train, len(places), min(size.height, size.width),
        fixed=network.fixed_input(net), stages=len(network.stages(net)),
    )  # fmt: skip
    if config.workers > (learned := int(np.count_nonzero(~held))):
        raise UsageError(
            f"train.workers={config.workers} for {counted(learned, 'image')} to learn from: each needs one at least"
        )
    inputs = _inputs(task, made, places[held])
    said = {name: value for name, value in asdict(config).items() if name not in _NOT_THE_FIT}
    of = work.shards.uri.rpartition("/")[2]  # which pictures
    run = task.run.folder(f"fit-{task.digest(of, fold.tobytes().hex(), task.base.digest, said)}")
    job = Fit(
        base=task.base, config=config, number_of_classes=len(found.labels), run=run, pictures=work.shards,
        inputs=inputs, keys=made.keys[places], classes=found.classes[places], aspects=made.aspects[places],
        held=held,
    )  # fmt: skip
    console.step("starting the training workers")
    if not run.exists(trainer.RESULT):
        limits = task.config.cluster
        each = placement.cpus_of_each(config.workers, config.cpus_per_worker, gpus=task.gpus, config=limits)
        ray_train.fit(job, gpus=task.gpus, cpus_per_worker=each, limits=limits, tell=_tell)
    console.step("reading the trained network")
    result = torch.load(io.BytesIO(run.read(trainer.RESULT)), map_location="cpu", weights_only=True)
    arrays = np.load(io.BytesIO(run.read(trainer.HELD_OUT)), allow_pickle=False)
    net.load_state_dict(result["net"])
    temperature = fit_temperature(arrays["unseen"], job.classes[held])
    network.divide_logits(net, temperature)
    final = arrays["final"] / np.float32(temperature)
    facts = {name: result[name] for name in ("best_epoch", "mirrored", "averaged")} | {
        "recipe": asdict(config),
        "images": len(places),
    }
    trained_on = places if config.refit else places[~held]
    return Trained(net, temperature, places[held], arrays["unseen"], final, trained_on, result["curve"], facts)


def _inputs(task: Task, made: Prepared, held: Ints) -> Folder:
    """Have the held-out images made ready as the network will meet them; return their shards.

    Raises:
        Unreachable: one that could be read before cannot be read now.
    """
    work, entries = task.images(task.base.preprocess), np.zeros(len(task.listed), bool)
    entries[made.images["index"].to_numpy()[held]] = True
    again = task.ready(work, entries)
    gone = held[~np.isin(made.keys[held], again.keys[again.read])]
    if len(gone):
        first = made.images["uri"][int(gone[0])].as_py()
        raise Unreachable(
            f"{counted(len(gone), 'held-out image')} could be read once and not again, such as {first}: run the same "
            "command again"
        )
    return work.shards


def _tell(fact: dict[str, Any]) -> None:
    """Log each epoch that the first worker reports, and show how far the current one is."""
    if fact["kind"] == "resumed":
        log.info("going on from the checkpoint behind epoch %d (%s)", fact["epoch"], fact["phase"])
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

"""Effects: fine-tuning: epochs over images that are ready, in one process or in several that share them.

First the model learns on the images that are not held out and is judged on those that are, epoch by epoch. Then, in the
refit, it learns anew on all of them, for as many epochs; the result is a mean of both networks' weights. A checkpoint
behind every epoch, in the store, is what a run goes on from, whoever was killed.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from imgbatch.errors import NotFound, UsageError
from imgbatch.evaluation.calibration import cross_entropy, fit_temperature
from imgbatch.evaluation.metrics import as_well
from imgbatch.training import cache, network
from imgbatch.training.augment import Chosen, Views
from imgbatch.training.context import Fit, Place
from imgbatch.training.loss import Cosine, Loss

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

CHECKPOINT, RESULT, HELD_OUT = "checkpoint.pt", "trained.pt", "held-out.npz"
LEARN, REFIT = "learn", "refit"

_TELL_EACH_S = 2.0
_OF_THE_REFIT = 0.75
"""Its part in the mean of both phases' weights: what it alone has seen is still there, and the mean is nearly as good as
that of equal parts (docs/LOG.md)."""


def run(job: Fit, place: Place) -> None:
    """Fine-tune, from the last checkpoint if there is one; the first worker writes the result."""
    trainer = _Trainer(job, place)
    trainer.resume()
    for phase in (LEARN, REFIT):
        if trainer.begin(phase):
            while trainer.goes_on():
                trainer.epoch()
    trainer.write_result(*trainer.average())


@dataclass
class _State:
    """Where a run stands; with the weights and the optimiser it is the checkpoint."""

    phase: str = LEARN
    epoch: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_epoch: int = 0
    best_logits: torch.Tensor | None = None
    """Of the held-out images, at the best epoch: that of the least loss if there is patience, else the last one."""
    mirrors: bool = False
    """Whether held-out images are told as well mirrored as straight, at the best epoch."""


class _Trainer:
    def __init__(self, job: Fit, place: Place) -> None:
        self._job, self._place = job, place
        self._state = _State()
        self._best: dict[str, torch.Tensor] | None = None
        self._net = self._fresh().to(place.device, memory_format=torch.channels_last)
        # Shares apart, so that no worker has a step less than another, who would wait for it for ever.
        self._held = _share(np.flatnonzero(job.held), place)
        self._mine = np.sort(np.concatenate([_share(np.flatnonzero(~job.held), place), self._held]))
        self._pictures = cache.load(job.pictures, job.keys[self._mine], cache.on_disk)
        self._inputs = (
            cache.load(job.inputs, job.keys[self._held], cache.on_disk)
            if len(self._held)
            else np.zeros((0, job.base.preprocess.height, job.base.preprocess.width, 3), np.uint8)
        )
        self._rate = _Rate()

    def _fresh(self) -> Any:
        config = self._job.config
        return network.build(
            self._job.base, self._job.number_of_classes, pretrained=config.pretrained, seed=config.seed
        )

    def begin(self, phase: str) -> bool:
        """Set a phase up: its images, optimiser and schedule; return False if it is behind us, or not wanted."""
        job, config, state = self._job, self._job.config, self._state
        epochs = config.epochs or 0
        if phase == REFIT:  # without held-out images all of them were learned from
            epochs = (config.refit_epochs or state.best_epoch) if config.refit and job.held.any() else 0
        if epochs == 0 or (state.phase == REFIT and phase == LEARN):
            return False
        resumed = self._resumed if state.phase == phase else None
        if state.phase != phase:
            self._state = replace(state, phase=phase, epoch=0)
            self._net.load_state_dict(self._fresh().state_dict())
        chosen = self._mine if phase == REFIT else self._mine[~job.held[self._mine]]
        places = np.searchsorted(self._mine, chosen)
        self._views = Views(
            Chosen(self._pictures, places), job.aspects[chosen], job.classes[chosen], job.keys[chosen], config,
            flip=(phase == REFIT and self._state.mirrors) if config.flip is None else config.flip,
        )  # fmt: skip
        held, world = int(job.held.sum()), self._place.world
        least = (len(job.held) - held) // world + (held // world if phase == REFIT else 0)
        self._batch = min(max(1, (config.batch_size or 1) // world), max(1, least))
        self._steps, self._epochs = max(1, least // self._batch), epochs
        self._loss = Loss(config, job.classes[chosen], job.number_of_classes, self._place.device)
        groups = network.trainable_groups(
            self._net, config.lr, config.head_lr_factor, config.weight_decay,
            config.frozen_stages or 0,
        )  # fmt: skip
        self._wrapped = self._place.wrap(self._net)
        self._optimiser = torch.optim.AdamW(groups)
        warm = round(config.warmup_fraction * self._steps * epochs)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, Cosine(warm, self._steps * epochs))
        if resumed is not None:
            self._optimiser.load_state_dict(resumed["optimiser"])
            self._schedule.load_state_dict(resumed["schedule"])
        return True

    def goes_on(self) -> bool:
        """Return whether another epoch is due: the last one is not done, and patience is not at an end."""
        state, patience = self._state, self._job.config.patience
        if patience and state.phase == LEARN and state.best_epoch and state.epoch - state.best_epoch >= patience:
            return False
        return state.epoch < self._epochs

    def epoch(self) -> None:
        """Train for one epoch, judge, and write the checkpoint."""
        state, job = self._state, self._job
        self._views.epoch = (1_000 if state.phase == REFIT else 0) + state.epoch
        network.train_mode(self._net, pretrained=job.config.pretrained)
        total = right = seen = 0.0
        for step, (pixels, classes) in enumerate(self._batches()):
            loss, hits = self._step(pixels, classes)
            total, right, seen = total + loss * len(classes), right + hits, seen + len(classes)
            self._rate.mark(len(classes) * self._place.world)
            self._tell(step, total / seen, right / seen)
        state.epoch += 1
        self._require_finite(total)
        point = {"phase": state.phase, "epoch": state.epoch, "loss": total / seen, "accuracy": right / seen}
        point["images_per_second"] = self._rate()
        state.curve.append(point)
        if state.phase == LEARN and job.held.any():
            self._judge(point)
        self._place.tell({"kind": "epoch", "epochs": self._epochs, **point})
        if state.phase == LEARN and not self.goes_on():
            self._end_learning()
        self._write_checkpoint()

    def _require_finite(self, said: float) -> None:
        """Refuse to go on with a network that gives no numbers any more; all workers together.

        Raises:
            UsageError: on one of them the loss, or a logit, is infinite or no number.
        """
        if not all(map(math.isfinite, self._place.gather(said))):
            state = self._state
            raise UsageError(
                f"training diverged in epoch {state.epoch} ({state.phase}): it gives no numbers any more; lower train.lr, "
                f"which is {self._job.config.lr:g}"
            )

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this worker's share of each step: equally many on all workers, in an order that the seed gives."""
        draw = torch.Generator().manual_seed(
            hash((self._job.config.seed, self._views.epoch, self._place.rank)) & 0x7FFF_FFFF
        )
        order = self._loss.order(len(self._views), draw)[: self._steps * self._batch]
        yield from DataLoader(
            self._views, batch_size=self._batch, sampler=order.tolist(), num_workers=self._place.loaders,
            pin_memory=self._place.device.type == "cuda",
        )  # fmt: skip

    def _step(self, pixels: torch.Tensor, classes: torch.Tensor) -> tuple[float, float]:
        device, job = self._place.device, self._job
        pixels, classes = pixels.to(device, non_blocking=True), classes.to(device, non_blocking=True)
        x = network.normalise(pixels, job.base.preprocess)
        x, target = self._loss.mix(x, classes)
        with network.autocast(job.config.dtype, device):
            logits = self._wrapped(x)
        loss = self._loss(logits.float(), target)
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._schedule.step()
        return float(loss.detach()), float((logits.detach().argmax(1) == classes).sum())

    def _judge(self, point: dict[str, Any]) -> None:
        """Judge the network on the held-out images, all workers together."""
        job, state = self._job, self._state
        logits = self._held_out_logits()
        self._require_finite(float(logits.sum()))  # the loss is that of before the last step
        classes = job.classes[job.held]
        # At the best temperature, since one is fitted anyway: else an epoch that is surer than another would look worse.
        point["held_out_loss"] = cross_entropy(logits / fit_temperature(logits, classes), classes)
        point["held_out_accuracy"] = float((logits.argmax(1) == classes).mean())
        if job.config.patience is None or point["held_out_loss"] < state.best_loss:
            state.best_loss, state.best_epoch = point["held_out_loss"], state.epoch
            state.best_logits = torch.from_numpy(logits)
            self._best = self._weights()

    def _end_learning(self) -> None:
        """Go back to the best epoch, which without a refit is the result, and see what it says of mirrored pictures."""
        state, job = self._state, self._job
        if self._best is None or state.best_logits is None:
            return
        self._net.load_state_dict(self._best)
        if job.config.flip is None and job.config.refit:
            classes = job.classes[job.held]
            mirrored = self._held_out_logits(flip=True).argmax(1) == classes
            state.curve[-1]["held_out_mirrored_accuracy"] = float(mirrored.mean())
            state.mirrors = as_well(mirrored, state.best_logits.numpy().argmax(1) == classes)

    def average(self) -> tuple[Floats, bool]:
        """Put a mean of both phases' weights in the place of the refit's, if that is well; return the logits of the result.

        Both began at one pretrained network and lie in one valley, where a mean is better than either (Wortsman et al.
        2022, Model soups). If not, there is a hill between them: the loss on the held-out images lies above the chord.
        """
        refitted, classes = self._held_out_logits(), self._job.classes[self._job.held]
        if self._state.phase != REFIT or self._best is None or not self._job.config.pretrained:
            return refitted, False

        def loss(logits: Floats) -> float:
            return cross_entropy(logits / fit_temperature(logits, classes), classes)

        before = self._weights()
        self._net.load_state_dict(
            {name: torch.lerp(self._best[name], value, _OF_THE_REFIT) if value.is_floating_point() else value
             for name, value in before.items()}
        )  # fmt: skip
        mean = self._held_out_logits()
        if loss(mean) <= self._state.best_loss + _OF_THE_REFIT * (loss(refitted) - self._state.best_loss):
            return mean, True
        self._net.load_state_dict(before)
        return refitted, False

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self._net.state_dict().items()}

    def _held_out_logits(self, *, flip: bool = False) -> Floats:
        job = self._job
        inputs = self._inputs[:, :, ::-1] if flip else self._inputs
        mine = network.logits(self._net, inputs, job.base.preprocess, job.config.dtype, self._place.device)
        found = np.zeros((int(job.held.sum()), job.number_of_classes), np.float32)
        for rank, part in enumerate(self._place.gather(mine)):
            found[rank :: self._place.world] = part
        return found

    def _tell(self, step: int, loss: float, accuracy: float) -> None:
        if self._place.rank == 0 and self._rate.due():
            state = self._state
            done = state.epoch * self._steps + step + 1
            left = (self._steps * self._epochs - done) * self._batch * self._place.world + self._images_of_the_refit()
            rate = self._rate()
            self._place.tell(
                {"kind": "step", "phase": state.phase, "epoch": state.epoch + 1, "epochs": self._epochs, "loss": loss,
                 "accuracy": accuracy, "images_per_second": rate, "seconds_left": left / rate if rate else None}
            )  # fmt: skip

    def _images_of_the_refit(self) -> int:
        """Return how many images it will go through, all epochs together, while it is still to come."""
        job, config = self._job, self._job.config
        if self._state.phase == REFIT or not config.refit or not job.held.any():
            return 0
        return len(job.held) * (config.refit_epochs or self._epochs)

    def resume(self) -> None:
        """Go on where the last checkpoint was written; all workers from that which the first one reads."""
        self._resumed: dict[str, Any] | None = None
        content = b""
        if self._place.rank == 0:
            try:
                content = self._job.run.read(CHECKPOINT)
            except NotFound:
                content = b""
        content = self._place.gather(content)[0]
        if content:
            self._resumed = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            assert self._resumed is not None
            self._state, self._best = _State(**self._resumed["state"]), self._resumed["best"]
            self._net.load_state_dict(self._resumed["net"])
            self._place.tell({"kind": "resumed", "phase": self._state.phase, "epoch": self._state.epoch})

    def _write_checkpoint(self) -> None:
        if self._place.rank:
            return
        state = self._state
        content = io.BytesIO()
        torch.save(
            {
                "state": {name: getattr(state, name) for name in state.__dataclass_fields__},
                "net": self._net.state_dict(),
                "best": self._best,
                "optimiser": self._optimiser.state_dict(),
                "schedule": self._schedule.state_dict(),
            },
            content,
        )
        self._job.run.put(CHECKPOINT, content.getvalue())

    def write_result(self, final: Floats, averaged: bool) -> None:
        """Write the trained weights, and what the model said and says (`final`) of the held-out images."""
        self._require_finite(float(final.sum()))
        if self._place.rank == 0:
            state, content, arrays = self._state, io.BytesIO(), io.BytesIO()
            torch.save(
                {
                    "net": self._net.state_dict(),
                    "curve": state.curve,
                    "best_epoch": state.best_epoch,
                    "mirrored": self._views.flip,
                    "averaged": averaged,
                },
                content,
            )
            unseen = final if state.best_logits is None else state.best_logits.numpy()
            np.savez(arrays, unseen=unseen, final=final)
            self._job.run.put(HELD_OUT, arrays.getvalue())
            self._job.run.put(RESULT, content.getvalue())


@dataclass
class _Rate:
    """Images a second since the last epoch's start was half a minute ago, or more."""

    _marks: list[tuple[float, int]] = field(default_factory=lambda: [(time.monotonic(), 0)])
    _told: float = 0.0

    def mark(self, images: int) -> None:
        self._marks = [*self._marks[-40:], (time.monotonic(), self._marks[-1][1] + images)]

    def __call__(self) -> float:
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def due(self) -> bool:
        if time.monotonic() - self._told < _TELL_EACH_S:
            return False
        self._told = time.monotonic()
        return True


def _share(chosen: Ints, place: Place) -> Ints:
    return chosen[place.rank :: place.world]

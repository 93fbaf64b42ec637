"""Effects: fine-tuning: epochs over prepared images, in one process or divided among several.

First the model is trained on the images that are not held out, and evaluated on the held-out ones after each epoch. Then, in
the refit, a new network is trained on all images, for as many epochs; the result is a mean of the weights of both networks.
After every epoch a checkpoint is written to the store, from which a run resumes after any process was killed.
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

from imgbatch.errors import UsageError
from imgbatch.evaluation.calibration import calibrated_loss
from imgbatch.evaluation.metrics import not_worse
from imgbatch.training import cache, checkpoint, network
from imgbatch.training.augment import ArraySubset, AugmentedDataset
from imgbatch.training.checkpoint import LEARN, REFIT, State
from imgbatch.training.context import FinetuneSpec, WorkerContext
from imgbatch.training.loss import Cosine, Loss

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

RESULT, HELD_OUT = "trained.pt", "held-out.npz"

_REPORT_INTERVAL_S = 2.0
_REFIT_FRACTION = 0.75
"""The weight of the refit in the mean of both networks: the images that only the refit was trained on still count, and the mean
is nearly as good as that of equal parts (docs/LOG.md)."""


def run(spec: FinetuneSpec, context: WorkerContext) -> None:
    """Fine-tune, from the last checkpoint if there is one; the first worker writes the result."""
    trainer = Trainer(spec, context)
    trainer.resume()
    for phase in (LEARN, REFIT):
        if trainer.begin_phase(phase):
            while trainer.has_epochs_left():
                trainer.run_epoch()
    trainer.write_result(*trainer.average())


class Trainer:
    """The training loop of one worker."""

    def __init__(self, spec: FinetuneSpec, context: WorkerContext) -> None:
        self._spec, self._context = spec, context
        self._state = State()
        self._best: dict[str, torch.Tensor] | None = None
        self._net = self._fresh_network().to(context.device, memory_format=torch.channels_last)
        if context.device.type == "cpu":
            network.compute_depthwise_in_float32(self._net)
        # The held-out images and the others are divided separately, so that in both phases all workers have equally many
        # steps. A worker with one step less would leave the others waiting forever.
        self._held_out = _part_of(np.flatnonzero(spec.held_out), context)
        self._mine = np.sort(np.concatenate([_part_of(np.flatnonzero(~spec.held_out), context), self._held_out]))
        self._pictures = cache.load(spec.pictures, spec.keys[self._mine], cache.on_disk)
        self._inputs = (
            cache.load(spec.inputs, spec.keys[self._held_out], cache.on_disk)
            if len(self._held_out)
            else np.zeros((0, spec.base.preprocess.height, spec.base.preprocess.width, 3), np.uint8)
        )
        self._throughput = _Throughput()

    def _fresh_network(self) -> Any:
        spec, config = self._spec, self._spec.config
        return network.build(spec.base, spec.number_of_classes, pretrained=config.pretrained, seed=config.seed)

    def begin_phase(self, phase: str) -> bool:
        """Set up images, optimiser and schedule of a phase; return False if the phase is finished or not configured."""
        spec, config, state = self._spec, self._spec.config, self._state
        epochs = config.epochs or 0
        if phase == REFIT:  # without held-out images, the first phase was trained on all images
            epochs = (config.refit_epochs or state.best_epoch) if config.refit and spec.held_out.any() else 0
        if epochs == 0 or (state.phase == REFIT and phase == LEARN):
            return False
        resumed = self._resumed if state.phase == phase else None
        if state.phase != phase:
            self._state = replace(state, phase=phase, epoch=0)
            self._net.load_state_dict(self._fresh_network().state_dict())
        self._epochs = epochs
        images = self._mine if phase == REFIT else self._mine[~spec.held_out[self._mine]]
        self._set_images(images, phase)
        self._loss = Loss(config, spec.classes[images], spec.number_of_classes, self._context.device)
        groups = network.trainable_groups(
            self._net, config.lr, config.head_lr_factor, config.weight_decay, config.frozen_stages or 0
        )
        self._wrapped = self._context.wrap(self._net)
        self._optimiser = torch.optim.AdamW(groups)
        warmup = round(config.warmup_fraction * self._steps * epochs)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, Cosine(warmup, self._steps * epochs))
        if resumed is not None:
            self._optimiser.load_state_dict(resumed["optimiser"])
            self._schedule.load_state_dict(resumed["schedule"])
        return True

    def _set_images(self, images: Ints, phase: str) -> None:
        """Set the images of a phase, and the size and number of its batches, which are the same on all workers."""
        spec, config, world_size = self._spec, self._spec.config, self._context.world_size
        self._dataset = AugmentedDataset(
            ArraySubset(self._pictures, np.searchsorted(self._mine, images)),
            spec.aspects[images], spec.classes[images], spec.keys[images], config,
            flip=(phase == REFIT and self._state.mirrors) if config.flip is None else config.flip,
        )  # fmt: skip
        held_out = int(spec.held_out.sum())
        min_images = (len(spec.held_out) - held_out) // world_size + (held_out // world_size if phase == REFIT else 0)
        self._batch_size = min(max(1, (config.batch_size or 1) // world_size), max(1, min_images))
        self._steps = max(1, min_images // self._batch_size)

    def has_epochs_left(self) -> bool:
        """Return whether another epoch follows: not all are done, and patience has not ended the phase."""
        state, patience = self._state, self._spec.config.patience
        if patience and state.phase == LEARN and state.best_epoch and state.epoch - state.best_epoch >= patience:
            return False
        return state.epoch < self._epochs

    def run_epoch(self) -> None:
        """Train for one epoch, evaluate on the held-out images, and write the checkpoint."""
        state, spec = self._state, self._spec
        self._dataset.epoch = (1_000 if state.phase == REFIT else 0) + state.epoch
        network.train_mode(self._net, pretrained=spec.config.pretrained)
        total = right = processed = 0.0
        for step, (pixels, classes) in enumerate(self._batches()):
            loss, hits = self._step(pixels, classes)
            total, right, processed = total + loss * len(classes), right + hits, processed + len(classes)
            self._throughput.add(len(classes) * self._context.world_size)
            self._report_step(step, total / processed, right / processed)
        state.epoch += 1
        self._require_finite(total)
        point = {"phase": state.phase, "epoch": state.epoch, "loss": total / processed, "accuracy": right / processed}
        point["images_per_second"] = self._throughput.rate()
        state.curve.append(point)
        if state.phase == LEARN and spec.held_out.any():
            self._evaluate(point)
        self._context.report({"kind": "epoch", "epochs": self._epochs, **point})
        if state.phase == LEARN and not self.has_epochs_left():
            self._end_learning()
        self._write_checkpoint()

    def _require_finite(self, value: float) -> None:
        """Stop, on all workers together, if a loss or a logit of one of them is infinite or NaN.

        Raises:
            UsageError: training has diverged.
        """
        if not all(map(math.isfinite, self._context.gather(value))):
            state = self._state
            raise UsageError(
                f"training diverged in epoch {state.epoch} ({state.phase}): the loss is infinite or NaN; lower train.lr, "
                f"which is {self._spec.config.lr:g}"
            )

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this worker's part of each step, in the order of the seed; all workers have the same number of steps."""
        generator = torch.Generator().manual_seed(
            hash((self._spec.config.seed, self._dataset.epoch, self._context.rank)) & 0x7FFF_FFFF
        )
        order = self._loss.order(len(self._dataset), generator)[: self._steps * self._batch_size]
        yield from DataLoader(
            self._dataset, batch_size=self._batch_size, sampler=order.tolist(), num_workers=self._context.loader_processes,
            pin_memory=self._context.device.type == "cuda",
        )  # fmt: skip

    def _step(self, pixels: torch.Tensor, classes: torch.Tensor) -> tuple[float, float]:
        """Train on one batch; return its mean loss and the number of images that were right."""
        device, spec = self._context.device, self._spec
        pixels, classes = pixels.to(device, non_blocking=True), classes.to(device, non_blocking=True)
        x = network.normalise(pixels, spec.base.preprocess)
        x, target = self._loss.mix(x, classes)
        with network.autocast(spec.config.dtype, device):
            logits = self._wrapped(x)
        loss = self._loss(logits.float(), target)
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._schedule.step()
        return float(loss.detach()), float((logits.detach().argmax(1) == classes).sum())

    def _evaluate(self, point: dict[str, Any]) -> None:
        """Evaluate the network on the held-out images, all workers together; keep the weights if it is the best so far."""
        spec, state = self._spec, self._state
        logits = self._held_out_logits()
        self._require_finite(float(logits.sum()))  # the loss of the epoch is that before its last step
        classes = spec.classes[spec.held_out]
        # At the best temperature: without it, an epoch whose scores are merely more extreme would look worse.
        point["held_out_loss"] = calibrated_loss(logits, classes)
        point["held_out_accuracy"] = float((logits.argmax(1) == classes).mean())
        if spec.config.patience is None or point["held_out_loss"] < state.best_loss:
            state.best_loss, state.best_epoch = point["held_out_loss"], state.epoch
            state.best_logits = torch.from_numpy(logits)
            self._best = self._weights()

    def _end_learning(self) -> None:
        """Return to the weights of the best epoch, and decide whether the refit mirrors pictures.

        Without a refit these weights are the result.
        """
        state, spec = self._state, self._spec
        if self._best is None or state.best_logits is None:
            return
        self._net.load_state_dict(self._best)
        if spec.config.flip is None and spec.config.refit:
            classes = spec.classes[spec.held_out]
            mirrored = self._held_out_logits(flip=True).argmax(1) == classes
            state.curve[-1]["held_out_mirrored_accuracy"] = float(mirrored.mean())
            state.mirrors = not_worse(mirrored, state.best_logits.numpy().argmax(1) == classes)

    def average(self) -> tuple[Floats, bool]:
        """Replace the weights by a mean of those of both phases, if the mean is good; return the logits of the result.

        Both phases started from one pretrained network. Their weights are usually in one basin of the loss, where the mean is
        better than either (Wortsman et al. 2022, Model soups). The mean is used if averaging does not raise the held-out loss
        above linear interpolation between the losses of the two networks.

        Returns:
            The logits of the held-out images, and whether the weights were averaged.
        """
        refitted, classes = self._held_out_logits(), self._spec.classes[self._spec.held_out]
        if self._state.phase != REFIT or self._best is None or not self._spec.config.pretrained:
            return refitted, False
        before = self._weights()
        self._net.load_state_dict(
            {name: torch.lerp(self._best[name], value, _REFIT_FRACTION) if value.is_floating_point() else value
             for name, value in before.items()}
        )  # fmt: skip
        mean, best_loss = self._held_out_logits(), self._state.best_loss
        interpolated = best_loss + _REFIT_FRACTION * (calibrated_loss(refitted, classes) - best_loss)
        if calibrated_loss(mean, classes) <= interpolated:
            return mean, True
        self._net.load_state_dict(before)
        return refitted, False

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self._net.state_dict().items()}

    def _held_out_logits(self, *, flip: bool = False) -> Floats:
        """Return the logits of all held-out images, of which each worker computes its part."""
        spec, context = self._spec, self._context
        inputs = self._inputs[:, :, ::-1] if flip else self._inputs
        part = network.logits(self._net, inputs, spec.base.preprocess, spec.config.dtype, context.device)
        logits = np.zeros((int(spec.held_out.sum()), spec.number_of_classes), np.float32)
        for rank, gathered in enumerate(context.gather(part)):
            logits[rank :: context.world_size] = gathered
        return logits

    def _report_step(self, step: int, loss: float, accuracy: float) -> None:
        """Report the progress in an epoch and the time that remains, every few seconds."""
        if self._context.rank == 0 and self._throughput.report_is_due():
            state = self._state
            finished_steps = state.epoch * self._steps + step + 1
            images_left = (self._steps * self._epochs - finished_steps) * self._batch_size * self._context.world_size
            images_left += self._images_of_refit()
            rate = self._throughput.rate()
            self._context.report(
                {"kind": "step", "phase": state.phase, "epoch": state.epoch + 1, "epochs": self._epochs, "loss": loss,
                 "accuracy": accuracy, "images_per_second": rate, "seconds_left": images_left / rate if rate else None}
            )  # fmt: skip

    def _images_of_refit(self) -> int:
        """Return how many images a later refit processes, in all of its epochs."""
        spec, config = self._spec, self._spec.config
        if self._state.phase == REFIT or not config.refit or not spec.held_out.any():
            return 0
        return len(spec.held_out) * (config.refit_epochs or self._epochs)

    def resume(self) -> None:
        """Continue from the last checkpoint. The first worker reads it for all, so that all have the same one."""
        self._resumed: dict[str, Any] | None = None
        content = self._context.gather(checkpoint.read(self._spec.run) if self._context.rank == 0 else b"")[0]
        if content:
            self._state, self._resumed = checkpoint.decode(content)
            self._best = self._resumed["best"]
            self._net.load_state_dict(self._resumed["net"])
            self._context.report({"kind": "resumed", "phase": self._state.phase, "epoch": self._state.epoch})

    def _write_checkpoint(self) -> None:
        if self._context.rank == 0:
            tensors = {
                "net": self._net.state_dict(),
                "best": self._best,
                "optimiser": self._optimiser.state_dict(),
                "schedule": self._schedule.state_dict(),
            }
            checkpoint.write(self._spec.run, self._state, tensors)

    def write_result(self, final: Floats, averaged: bool) -> None:
        """Write the trained weights, and the logits of the held-out images before the refit and at the end.

        Args:
            final: the logits at the end.
        """
        self._require_finite(float(final.sum()))
        if self._context.rank == 0:
            state, content, arrays = self._state, io.BytesIO(), io.BytesIO()
            torch.save(
                {
                    "net": self._net.state_dict(),
                    "curve": state.curve,
                    "best_epoch": state.best_epoch,
                    "mirrored": self._dataset.flip,
                    "averaged": averaged,
                },
                content,
            )
            unseen = final if state.best_logits is None else state.best_logits.numpy()
            np.savez(arrays, unseen=unseen, final=final)
            self._spec.run.put(HELD_OUT, arrays.getvalue())
            self._spec.run.put(RESULT, content.getvalue())


@dataclass
class _Throughput:
    """Images per second over the last 40 steps, and when the next report is due."""

    _marks: list[tuple[float, int]] = field(default_factory=lambda: [(time.monotonic(), 0)])
    _reported: float = 0.0

    def add(self, images: int) -> None:
        self._marks = [*self._marks[-40:], (time.monotonic(), self._marks[-1][1] + images)]

    def rate(self) -> float:
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def report_is_due(self) -> bool:
        if time.monotonic() - self._reported < _REPORT_INTERVAL_S:
            return False
        self._reported = time.monotonic()
        return True


def _part_of(images: Ints, context: WorkerContext) -> Ints:
    """Return the images of one worker."""
    return images[context.rank :: context.world_size]

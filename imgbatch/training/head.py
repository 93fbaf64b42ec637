"""Effects: a head on features: multinomial logistic regression, with the strength of L2 selected on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imgbatch.errors import ModelError
from imgbatch.evaluation.calibration import calibrated_loss
from imgbatch.training.splits import held_out

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
"""Of L2, from strong to weak: each fit starts from the solution of the previous one."""

_DEFAULT_L2 = 1e-2  # if no image can be held out: the best one for 2,640 groceries (docs/LOG.md)
_ITERATIONS = 100
_HISTORY = 10  # pairs of the size of the weights: with torch's 100, gigabytes where there are many classes
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Head:
    """Weights (classes, features) and biases, for features that are not standardised."""

    weight: Floats
    bias: Floats

    def logits(self, features: Floats) -> Floats:
        """Return (n, classes)."""
        logits: Floats = features @ self.weight.T + self.bias
        return logits


def fit(
    features: Floats,
    classes: Ints,
    number_of_classes: int,
    l2: float,
    *,
    weights: Floats | None = None,
    start: Head | None = None,
) -> Head:
    """Minimise mean cross-entropy + l2/2 · the sum of squared weights on standardised features, by L-BFGS.

    Args:
        weights: of the classes in the loss.
        start: the solution to start from.
    """
    mean = features.mean(0)
    scale = features.std(0) + 1e-6
    x, target = torch.from_numpy((features - mean) / scale), torch.from_numpy(classes)
    theta = torch.zeros(features.shape[1] + 1, number_of_classes)
    if start is not None:
        theta[:-1] = torch.from_numpy((start.weight * scale).T)
        theta[-1] = torch.from_numpy(start.bias + start.weight @ mean)
    theta.requires_grad_()
    weight = None if weights is None else torch.from_numpy(weights)
    solver = torch.optim.LBFGS(
        [theta], max_iter=_ITERATIONS, tolerance_grad=_TOLERANCE, tolerance_change=1e-7, history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ theta[:-1] + theta[-1], target, weight=weight)
        value = value + l2 / 2 * theta[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    solved = theta.detach().numpy()
    weight_of = np.ascontiguousarray((solved[:-1] / scale[:, None]).T)
    return Head(weight_of, solved[-1] - weight_of @ mean)


@dataclass(frozen=True, slots=True)
class BestL2:
    """The best strength of L2, and the logits of the held-out images by heads that were not trained on them."""

    l2: float
    held_out: Ints
    """The numbers of the held-out images, ascending."""
    logits: Floats
    curve: list[dict[str, Any]]


def choose(
    features: Floats,
    classes: Ints,
    fold: Ints,
    number_of_classes: int,
    l2: float | None,
    *,
    weights: Floats | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BestL2:
    """Fit a head for each fold that is held out and each strength; return the strength with the lowest held-out loss.

    The loss is that at the best temperature, as the head is calibrated afterwards.

    Args:
        l2: the only strength; None: `STRENGTHS`.
        report: takes a line for each strength.

    Raises:
        ModelError: features are infinite or NaN.
    """
    if not (finite := np.isfinite(features).all(1)).all():
        raise ModelError(
            f"the features of the base are infinite or NaN for {np.count_nonzero(~finite):,} images: try "
            "train.dtype=float32, or another base"
        )
    strengths = STRENGTHS if l2 is None else (l2,)
    evaluated = np.flatnonzero(fold >= 0)
    if not len(evaluated):
        return BestL2(_DEFAULT_L2 if l2 is None else l2, evaluated, np.zeros((0, number_of_classes), np.float32), [])
    splits = [held_out(fold, number) for number in range(int(fold.max()) + 1)]
    heads: list[Head | None] = [None] * len(splits)
    min_loss, curve, best = math.inf, [], None
    for strength in strengths:
        logits = np.zeros((len(evaluated), number_of_classes), np.float32)
        for number, (train_rows, held_rows) in enumerate(splits):
            learned, start = (features[train_rows], classes[train_rows]), heads[number]
            heads[number] = head = fit(*learned, number_of_classes, strength, weights=weights, start=start)
            logits[np.searchsorted(evaluated, held_rows)] = head.logits(features[held_rows])
        loss = calibrated_loss(logits, classes[evaluated])
        accuracy = float((logits.argmax(1) == classes[evaluated]).mean())
        curve.append({"l2": strength, "held_out_loss": loss, "held_out_accuracy": accuracy})
        images = f"{len(splits)} folds held out in turn" if len(splits) > 1 else "the held-out images"
        report(f"L2 of {strength:g}: {accuracy:.1%} of {images} right, loss {loss:.3f}")
        if loss < min_loss:
            min_loss, best = loss, BestL2(strength, evaluated, logits, curve)
    assert best is not None
    return best

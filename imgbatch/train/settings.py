"""The configuration of a training run: the sections that it shares with the main job, and its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from imgbatch.config import (
    ClusterConfig,
    Config,
    DecodeConfig,
    FetchConfig,
    OutputConfig,
    RejectsConfig,
    SourceConfig,
    StopConfig,
    StorageConfig,
)
from imgbatch.knobs import at_least, knob, one_of, positive, share


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained. What is unset depends on the number of images (`recipe.py`)."""

    way: str = knob(
        "auto",
        "auto (head on CPUs, finetune on GPUs and from scratch), head: features once, then the head; finetune: the layers "
        "as well",
    )
    pretrained: bool = knob(True, "start from the weights of --base; false: from scratch, by fine-tuning")
    seed: int = knob(0, "of the split, the order of images and their augmentation")
    refit: bool = knob(True, "when all is chosen, train on the held-out images as well")
    folds: int | None = knob(
        None, "1/folds of each class is held out where the input names no val split; unset: by size"
    )
    l2: float | None = knob(None, "way=head: weight of the squared weights; unset: chosen on held-out images")
    epochs: int | None = knob(None, "passes over the images; unset: by size, 10 for 2,900 images")
    refit_epochs: int | None = knob(None, "passes over all images in the refit; unset: as many as before it")
    patience: int | None = knob(
        None,
        "epochs without a better held-out loss before training stops, and goes back to the best; unset: it does not",
    )
    batch_size: int | None = knob(None, "images of a step, over all workers; unset: by size, 32 for 2,900 images")
    lr: float = knob(4e-4, "learning rate of the body, for batches of 32")
    head_lr_factor: float = knob(10.0, "the head learns so many times faster than the body")
    weight_decay: float = knob(0.01, "of AdamW, on matrices and kernels")
    warmup: float = knob(0.3, "share of the steps in which the learning rate rises; behind them it falls as a cosine")
    frozen_stages: int | None = knob(
        None,
        "stages at the network's input, its stem among them, that keep their weights; unset: a third if pretrained",
    )
    label_smoothing: float = knob(0.1, "share of the target that all classes divide among them")
    min_crop: float = knob(0.35, "least share of a picture's area that a random crop shows")
    jitter: float = knob(0.4, "most relative change of brightness, contrast and saturation")
    flip: bool | None = knob(
        None,
        "mirror half of the pictures; unset: in the refit, if held-out images are told as well mirrored as straight",
    )
    mixup: float = knob(0.0, "alpha of mixup; 0: none")
    cutmix: float = knob(0.0, "alpha of cutmix; 0: none")
    balance: str = knob("none", "against skewed classes: none, weights (of the loss), sampling")
    resolution: int | None = knob(
        None, "pixels of training crops; unset: 6/7 of the network's input, where it allows that"
    )
    dtype: str = knob("auto", "auto (bfloat16 where the processor has it), float32, bfloat16")
    workers: int = knob(1, "way=finetune: processes that train together")
    cpus_per_worker: int | None = knob(None, "unset: as many as the nodes have room for")
    max_failures: int = knob(3, "how often workers may be lost before the run ends with exit code 3")
    cache: str = knob("", "where features and pixels are kept between runs; unset: below --output, until it is done")

    def way_on(self, *, gpus: bool) -> str:
        """Return the way to go: features say nothing without the weights that make them, and are for CPUs.

        >>> TrainConfig().way_on(gpus=False), TrainConfig(pretrained=False).way_on(gpus=False)
        ('head', 'finetune')
        """
        return self.way if self.way != "auto" else "finetune" if gpus or not self.pretrained else "head"

    def __post_init__(self) -> None:
        one_of("train.way", self.way, ("auto", "head", "finetune"))
        one_of("train.balance", self.balance, ("none", "weights", "sampling"))
        one_of("train.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        for key in (
            "folds",
            "epochs",
            "refit_epochs",
            "batch_size",
            "workers",
            "patience",
            "resolution",
            "cpus_per_worker",
        ):
            value = getattr(self, key)
            if value is not None:
                at_least(f"train.{key}", value, 2 if key == "folds" else 1)
        for key in ("max_failures", "frozen_stages", "seed", "l2", "weight_decay", "mixup", "cutmix"):
            at_least(f"train.{key}", getattr(self, key) or 0, 0)
        for key in ("lr", "head_lr_factor", "min_crop"):
            positive(f"train.{key}", getattr(self, key))
        for key in ("label_smoothing", "min_crop", "jitter", "warmup"):
            share(f"train.{key}", getattr(self, key))


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A complete training run."""

    input: tuple[str, ...] = knob((), "labelled images (--input)")
    output: str = knob("", "where the model directory is written (--output)")
    base: str = knob("efficientnet_lite0", "name or URI of the model to start from (--base)")
    taxonomy: str = knob("", "label tree, CSV or JSON, that goes with the model (--taxonomy)")
    train: TrainConfig = field(default_factory=TrainConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    rejects: RejectsConfig = field(default_factory=RejectsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: StopConfig = field(default_factory=StopConfig)

    def public(self) -> dict[str, Any]:
        """Return the config as plain values with every secret masked."""
        return Config.public(self)  # type: ignore[arg-type]

    def shared(self) -> Config:
        """Return what the main job's operators want to know, without secrets."""
        return Config(
            source=self.source, fetch=self.fetch, decode=self.decode, rejects=self.rejects, cluster=self.cluster,
            output=OutputConfig(content_hash=True),  # the model directory says which images it has seen
        )  # fmt: skip

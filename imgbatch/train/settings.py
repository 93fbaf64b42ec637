"""The configuration of a training run: the sections that it shares with the main job, and its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

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
from imgbatch.knobs import Fraction, Positive, Section, option


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Section):
    """How a model is trained. What is unset depends on the number of images (`recipe.py`)."""

    way: Literal["auto", "head", "finetune"] = option(
        "auto",
        "auto (head on CPUs, finetune on GPUs and from scratch), head: features once, then the head; finetune: the layers "
        "as well",
    )
    pretrained: bool = option(True, "start from the weights of --base; false: from scratch, by fine-tuning")
    seed: Annotated[int, Ge(0)] = option(0, "of the split, the order of images and their augmentation")
    refit: bool = option(True, "when all is chosen, train on the held-out images as well")
    folds: Annotated[int, Ge(2)] | None = option(
        None, "1/folds of each class is held out where the input names no val split; unset: by size"
    )
    l2: Annotated[float, Ge(0)] | None = option(
        None, "way=head: weight of the squared weights; unset: chosen on held-out images"
    )
    epochs: Annotated[int, Ge(1)] | None = option(None, "passes over the images; unset: by size, 10 for 2,900 images")
    refit_epochs: Annotated[int, Ge(1)] | None = option(
        None, "passes over all images in the refit; unset: as many as before it"
    )
    patience: Annotated[int, Ge(1)] | None = option(
        None,
        "epochs without a better held-out loss before training stops, and goes back to the best; unset: it does not",
    )
    batch_size: Annotated[int, Ge(1)] | None = option(
        None, "images of a step, over all workers; unset: by size, 32 for 2,900 images"
    )
    lr: Annotated[float, Positive] = option(4e-4, "learning rate of the body, for batches of 32")
    head_lr_factor: Annotated[float, Positive] = option(10.0, "the head learns so many times faster than the body")
    weight_decay: Annotated[float, Ge(0)] = option(0.01, "of AdamW, on matrices and kernels")
    warmup: Annotated[float, Fraction] = option(
        0.3, "share of the steps in which the learning rate rises; behind them it falls as a cosine"
    )
    frozen_stages: Annotated[int, Ge(0)] | None = option(
        None,
        "stages at the network's input, its stem among them, that keep their weights; unset: a third if pretrained",
    )
    label_smoothing: Annotated[float, Fraction] = option(0.1, "share of the target that all classes divide among them")
    min_crop: Annotated[float, Interval(gt=0, le=1)] = option(
        0.35, "least share of a picture's area that a random crop shows"
    )
    jitter: Annotated[float, Fraction] = option(0.4, "most relative change of brightness, contrast and saturation")
    flip: bool | None = option(
        None,
        "mirror half of the pictures; unset: in the refit, if held-out images are told as well mirrored as straight",
    )
    mixup: Annotated[float, Ge(0)] = option(0.0, "alpha of mixup; 0: none")
    cutmix: Annotated[float, Ge(0)] = option(0.0, "alpha of cutmix; 0: none")
    balance: Literal["none", "weights", "sampling"] = option(
        "none", "against skewed classes: none, weights (of the loss), sampling"
    )
    resolution: Annotated[int, Ge(1)] | None = option(
        None, "pixels of training crops; unset: 6/7 of the network's input, where it allows that"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto (bfloat16 where the processor has it), float32, bfloat16"
    )
    workers: Annotated[int, Ge(1)] = option(1, "way=finetune: processes that train together")
    cpus_per_worker: Annotated[int, Ge(1)] | None = option(None, "unset: as many as the nodes have room for")
    max_failures: Annotated[int, Ge(0)] = option(
        3, "how often workers may be lost before the run ends with exit code 3"
    )
    cache: str = option("", "where features and pixels are kept between runs; unset: below --output, until it is done")

    def way_on(self, *, gpus: bool) -> str:
        """Return the way to go: features say nothing without the weights that make them, and are for CPUs.

        >>> TrainConfig().way_on(gpus=False), TrainConfig(pretrained=False).way_on(gpus=False)
        ('head', 'finetune')
        """
        return self.way if self.way != "auto" else "finetune" if gpus or not self.pretrained else "head"


@dataclass(frozen=True, kw_only=True, slots=True)
class Training(Section):
    """A complete training run."""

    input: tuple[str, ...] = option((), "labelled images (--input)")
    output: str = option("", "where the model directory is written (--output)")
    base: str = option("efficientnet_lite0", "name or URI of the model to start from (--base)")
    taxonomy: str = option("", "label tree, CSV or JSON, that goes with the model (--taxonomy)")
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

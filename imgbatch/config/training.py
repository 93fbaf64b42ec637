"""Values: the configuration of a training run: sections shared with classification, and its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from imgbatch.config.options import Fraction, Positive, Section, option
from imgbatch.config.results import MetricsConfig, NotifyConfig, ReportConfig
from imgbatch.config.sections import (
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Section):
    """Training of a model. Defaults of unset options depend on the number of images (`training/defaults.py`)."""

    method: Literal["auto", "head", "finetune"] = option(
        "auto",
        "auto (head on CPUs, finetune on GPUs and from scratch), head (only the head, on extracted features),"
        " finetune (the layers as well)",
        formerly="way",
    )
    pretrained: bool = option(True, "start from the weights of --base; false: train from scratch, with finetune")
    seed: Annotated[int, Ge(0)] = option(0, "seed of the split, the order of images and the augmentation")
    refit: bool = option(True, "after selection, train again on all images, including the held-out ones")
    folds: Annotated[int, Ge(2)] | None = option(
        None, "if the input has no val split, hold out 1/folds of each class; unset: by size"
    )
    l2: Annotated[float, Ge(0)] | None = option(
        None, "method=head: weight of the L2 penalty; unset: selected on held-out images"
    )
    epochs: Annotated[int, Ge(1)] | None = option(None, "passes over the images; unset: by size (10 for 2,900 images)")
    refit_epochs: Annotated[int, Ge(1)] | None = option(
        None, "passes over all images in the refit; unset: as many as before it"
    )
    patience: Annotated[int, Ge(1)] | None = option(
        None,
        "stop after this many epochs without a lower held-out loss, and use the best epoch; unset: no early stopping",
    )
    batch_size: Annotated[int, Ge(1)] | None = option(
        None, "images per step, over all workers; unset: by size (32 for 2,900 images)"
    )
    lr: Annotated[float, Positive] = option(4e-4, "learning rate of the body, for batches of 32")
    head_lr_factor: Annotated[float, Positive] = option(
        10.0, "learning rate of the head, as a multiple of that of the body"
    )
    weight_decay: Annotated[float, Ge(0)] = option(0.01, "weight decay of AdamW, on matrices and kernels")
    warmup_fraction: Annotated[float, Fraction] = option(
        0.3,
        "proportion of the steps in which the learning rate rises; after that it follows a cosine",
        formerly="warmup",
    )
    frozen_stages: Annotated[int, Ge(0)] | None = option(
        None,
        "number of stages from the network's input, including the stem, whose weights are frozen; unset: a "
        "third if pretrained",
    )
    label_smoothing: Annotated[float, Fraction] = option(
        0.1, "proportion of the target that is spread over all classes"
    )
    min_crop_area: Annotated[float, Interval(gt=0, le=1)] = option(
        0.35, "minimum proportion of the image's area in a random crop", formerly="min_crop"
    )
    color_jitter: Annotated[float, Fraction] = option(
        0.4, "maximum relative change of brightness, contrast and saturation", formerly="jitter"
    )
    flip: bool | None = option(
        None,
        "mirror half of the images; unset: in the refit, if the network classifies mirrored held-out images "
        "as well as unmirrored ones",
    )
    mixup: Annotated[float, Ge(0)] = option(0.0, "alpha of mixup; 0: off")
    cutmix: Annotated[float, Ge(0)] = option(0.0, "alpha of cutmix; 0: off")
    class_balancing: Literal["none", "weights", "sampling"] = option(
        "none", "class balancing for skewed classes: none, weights (of the loss), sampling", formerly="balance"
    )
    resolution: Annotated[int, Ge(1)] | None = option(
        None, "side of training crops in pixels; unset: 6/7 of the network's input, if the network allows it"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto (bfloat16 if the processor supports it), float32, bfloat16"
    )
    workers: Annotated[int, Ge(1)] = option(1, "method=finetune: number of training processes")
    cpus_per_worker: Annotated[int, Ge(1)] | None = option(
        None, "CPUs per training process; unset: as many as the nodes have"
    )
    max_failures: Annotated[int, Ge(0)] = option(3, "maximum number of lost workers; after that exit code 3")
    cache: str = option(
        "", "folder for features and pixels that later runs reuse; unset: below --output, deleted after training"
    )

    def method_on(self, *, gpus: bool) -> str:
        """Return the method; `auto` is resolved: head needs pretrained weights, and suits CPUs.

        >>> TrainConfig().method_on(gpus=False), TrainConfig(pretrained=False).method_on(gpus=False)
        ('head', 'finetune')
        """
        return self.method if self.method != "auto" else "finetune" if gpus or not self.pretrained else "head"


@dataclass(frozen=True, kw_only=True, slots=True)
class Training(Section):
    """The config of a training run."""

    input: tuple[str, ...] = option((), "labelled images (--input)")
    output: str = option("", "URI of the model directory to write (--output)")
    base: str = option("efficientnet_lite0", "name or URI of the model to start from (--base)")
    taxonomy: str = option("", "label tree of the model, CSV or JSON (--taxonomy)")
    date: str | None = option(
        None, "fills {date} in the input and the output: YYYY-MM-DD; unset: IMGBATCH_DATE, or else today (UTC) (--date)"
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    rejects: RejectsConfig = field(default_factory=RejectsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: StopConfig = field(default_factory=StopConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    notify: NotifyConfig = field(default_factory=NotifyConfig)

    def public(self) -> dict[str, Any]:
        """Return the config as plain values with every secret masked."""
        return Config.public(self)  # type: ignore[arg-type]

    def shared(self) -> Config:
        """Return the sections that training shares with the main job, for `WorkerConfig.of`."""
        return Config(
            source=self.source, fetch=self.fetch, decode=self.decode, rejects=self.rejects, cluster=self.cluster,
            output=OutputConfig(content_hash=True),  # the model directory records its training images
        )  # fmt: skip

"""Values: the configuration of a run: every option with its help text.

docs/configuration.md is generated from it.
"""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Interval

from imgbatch.config import deadline
from imgbatch.config.options import Fraction, Positive, Section, iter_options, option
from imgbatch.config.results import GuardConfig, MetricsConfig, NotifyConfig, ReportConfig
from imgbatch.config.secrets import masked
from imgbatch.errors import ConfigError

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "pnm", "pbm", "pgm", "ppm"),
    *("apng", "avif", "heic", "heif", "hif", "jp2", "j2k", "jpc", "jpf", "jpx", "dcm", "dicom"),
)
"""Image candidates are names with one of these suffixes, in any case, and names without a suffix."""

RuntimeName = Literal["auto", "torch", "openvino"]
Interpolation = Literal["bicubic", "bilinear", "nearest"]
INTERPOLATIONS: tuple[str, ...] = typing.get_args(Interpolation)

_CALL_S = 300.0

_SHOWN_OPTIONS = {
    "anon", "endpoint_url", "region", "region_name", "profile", "requester_pays", "use_ssl", "addressing_style",
    "account_name", "account_host", "project",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    """The network that labels the images. `model = "NAME"` is short for `model.name`."""

    name: str = option(
        "efficientnet_lite0",
        "efficientnet_lite0, timm:NAME[.TAG], torchvision:NAME[@WEIGHTS], or the URI of a model directory or "
        "state dict (--model)",
    )
    weights: str | None = option(None, "URI of a state dict that replaces the weights of timm:NAME or torchvision:NAME")
    architecture: str | None = option(None, "network of a state dict: NAME or timm:NAME, torchvision:NAME")
    labels: str | None = option(None, "URI of a text file with the class names, one per line, in the order of the head")
    taxonomy: str | None = option(None, "URI of a taxonomy (CSV or JSON); unset: the model's own")
    crop_pct: Annotated[float, Interval(gt=0, le=1)] | None = option(
        None, "proportion of the resized side that the centre crop keeps; unset: as the model states"
    )
    image_size: Annotated[int, Ge(1)] | None = option(
        None, "side of the network's input in pixels; unset: as the model states"
    )
    interpolation: Interpolation | None = option(None, "bicubic, bilinear or nearest; unset: as the model states")
    mean: tuple[float, ...] = option(
        (), "means of R, G and B on the scale 0 to 1, e.g. [0.5, 0.5, 0.5]; unset: as the model states"
    )
    std: tuple[float, ...] = option(
        (), "standard deviations of R, G and B on the scale 0 to 1, e.g. [0.5, 0.5, 0.5]; unset: as the model states"
    )

    def validate(self) -> None:
        """Refuse means and standard deviations that cannot be right."""
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values and (len(values) != 3 or not all(map(math.isfinite, values))):
                raise ConfigError(f"model.{key}={list(values)}: give three numbers, for R, G and B")
            # Values on the scale of bytes, 0 to 255, would give wrong input to the network.
            if any(abs(value) > 10 for value in values):
                raise ConfigError(f"model.{key}={list(values)}: use the scale 0 to 1; divide values of 0 to 255 by 255")
        if self.std and min(self.std) <= 0:
            raise ConfigError(f"model.std={list(self.std)}: each must be more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig(Section):
    """Location and content of the tables. `output = "URI"` is short for `output.uri`."""

    uri: str = option("", "where labels/ and rejects/ are written; {model} and {date} are filled in (--output)")
    embeddings: bool = option(False, "add the column `embedding` to labels/: the features before the head, as float16")
    content_hash: bool = option(
        False, "add the column `content_hash` to labels/: 64 bits of a hash of the image's bytes; evaluate.py sets it"
    )
    columns: tuple[str, ...] = option(
        (),
        "columns of labels/, e.g. ['label', 'score']; uri, size, etag, last_modified are always included; unset: all",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Section):
    """Form of the input, and which of its objects are images."""

    format: Literal["auto", "objects", "manifest", "parquet", "tar", "inventory"] = option(
        "auto", "form of the input: auto, objects, manifest, parquet, tar, inventory"
    )
    image_column: str | None = option(None, "column of a Parquet file with the images; unset: selected by its type")
    suffixes: str = option(
        "images", "names of images: 'images' (known suffixes, or no suffix), '*' (all), or a list such as 'jpg,png'"
    )
    schemes: str = option(
        "auto",
        "schemes that a manifest may refer to: auto (s3, gs, az, https, and its own), or a list such as 's3,file'",
    )
    allow_empty: bool = option(False, "accept an input without images; otherwise exit code 2")
    uri_column: str | None = option(None, "column of a manifest with the URIs of the images; unset: uri")
    uri_template: str | None = option(
        None,
        "template for the URIs of a manifest, filled from its columns, e.g. 'train/{id}.jpg'; unset: the uri column",
    )
    labels: Literal["auto", "column", "sidecars", "folders"] = option(
        "auto", "train, evaluate: source of the labels: auto, column, sidecars (in tars), folders"
    )
    label_column: str | None = option(None, "train, evaluate: column with the label; unset: label")
    label_depth: Annotated[int, Ge(1)] | None = option(
        None,
        "train, evaluate: depth below the input of the folder that is the class, from 1; unset: the folder "
        "that holds the image",
    )
    label_is: Literal["name", "index"] = option(
        "name",
        "evaluate: meaning of labels: name (class names, or WordNet ids for ImageNet), index (class numbers "
        "from 0, in the order of the head)",
    )
    splits: Literal["auto", "column", "folders", "names", "none"] = option(
        "auto", "train, evaluate: source of the split: auto, column, folders, names (of tables and tars), none"
    )
    split_column: str | None = option(None, "train, evaluate: column with the split; unset: split")

    def validate(self) -> None:
        """Refuse two sources for the URIs, and an empty list of suffixes."""
        if self.uri_column is not None and self.uri_template is not None:
            raise ConfigError("source.uri_column and source.uri_template are both set: set only one of them")
        if not any(part.strip(" .") for part in self.suffixes.split(",")):
            raise ConfigError(f"source.suffixes={self.suffixes!r}: use 'images', '*', or suffixes such as 'jpg,png'")


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig(Section):
    """Requests to stores."""

    options: dict[str, Any] = option(
        dict,
        "options of the stores under the names of s3fs, gcsfs and adlfs, e.g. anon, profile, token, account_name; those in "
        "storage.options.s3, .gs and .az are for one store",
    )
    timeout_s: Annotated[float, Positive] = option(30.0, "timeout of one request, in seconds")
    allow_private_hosts: bool = option(
        False, "allow http:// and https:// URIs to reach private addresses and this machine", formerly="private_hosts"
    )
    retries: Annotated[int, Ge(0)] = option(
        10,
        "maximum retries of a request after a transient failure, with exponential back-off and jitter (10: about 80 s)",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig(Section):
    """Prefetching of images, and their maximum size."""

    concurrency: Annotated[int, Ge(1)] = option(
        128, "maximum concurrent GETs per worker process; refilled when half have completed", formerly="ahead"
    )
    max_inflight_bytes: Annotated[int, Ge(1)] = option(
        256 << 20, "maximum bytes of these GETs in memory", formerly="ahead_bytes"
    )
    max_bytes: Annotated[int, Ge(1)] = option(
        256 << 20, "maximum size of an object, in bytes; larger ones are rejected as too_large before they are read"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig(Section):
    """Limits of decoding."""

    max_pixels: Annotated[int, Ge(1)] = option(
        200_000_000,
        "maximum pixels of an image; larger ones are rejected as too_large, by their header, before decoding",
    )
    timeout_s: Annotated[float, Positive] = option(
        30.0, "timeout for decoding one image, in seconds; after that the image is rejected"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig(Section):
    """Execution of the network. These options are not part of the fingerprint."""

    batch_size: Annotated[int, Ge(1)] | None = option(
        None, "images per forward pass (smaller batches are padded); unset: chosen for the device"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "auto (bfloat16 or float16 if the processor supports it), float32, bfloat16, float16"
    )

    runtime: RuntimeName = option("auto", "auto (OpenVINO on CPUs, torch on GPUs), torch, openvino")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerConfig(Section):
    """The choice of the answer among the labels of a taxonomy."""

    min_score: Annotated[float, Fraction] = option(
        0.5, "with a taxonomy: minimum probability of the answer, the finest label that reaches it"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectsConfig(Section):
    """The maximum number of rejects, and which of them are retried."""

    max_share: Annotated[float, Fraction] = option(
        0.10,
        "maximum proportion of rejects among the listed images; above it, exit code 4. 20 rejects are always allowed",
    )
    max_count: Annotated[int, Ge(0)] | None = option(None, "maximum number of rejects, exact; unset: no limit")
    retry: Literal["transient", "all"] = option(
        "transient", "which rejects of earlier runs are retried: transient, all", former_values={"passing": "transient"}
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig(Section):
    """Resources of Ray, and timeouts."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto (GPUs if a live node has one), cpu, cuda")
    startup_timeout_s: Annotated[float, Positive] = option(
        60.0, "timeout for the requested CPUs or GPUs, in seconds; then exit code 3", formerly="wait_s"
    )
    gpus_per_actor: Annotated[float, Positive] = option(1.0, "GPUs per classify actor; a fraction shares a GPU")
    min_actors: Annotated[int, Ge(1)] = option(1, "minimum number of classify actors at the start")
    max_actors: int | None = option(
        None,
        "maximum number of classify actors; unset: as many as fit when the run starts. A growing cluster is "
        "used up to this number",
    )
    stall_timeout_s: Annotated[float, Positive] = option(
        900.0,
        "maximum seconds without a new row; then exit code 3. Also the timeout of a call into Ray, at most 300 s",
        formerly="stall_s",
    )

    @property
    def call_s(self) -> float:
        """The timeout of one call into Ray, in seconds."""
        return min(_CALL_S, self.stall_timeout_s)

    def validate(self) -> None:
        """Refuse numbers of GPUs and actors that cannot be placed."""
        if self.gpus_per_actor > 1 and self.gpus_per_actor != int(self.gpus_per_actor):
            raise ConfigError(f"cluster.gpus_per_actor={self.gpus_per_actor}: above 1, only whole numbers are possible")
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ConfigError(f"cluster.max_actors={self.max_actors} is less than cluster.min_actors={self.min_actors}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StopConfig(Section):
    """The end of a run, for all jobs."""

    SECTION: ClassVar[str] = "run"
    stop_timeout_s: Annotated[float, Positive] = option(
        25.0, "maximum seconds for an orderly stop after SIGTERM or SIGINT; then the run exits at once"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(StopConfig):
    """Commits and the end of a classification."""

    commit_interval_s: Annotated[float, Positive] = option(10.0, "seconds between commits", formerly="commit_s")
    check_owner: bool = option(True, "refuse an output that another live run is writing")
    prune: bool = option(False, "remove the rows of images that are no longer in the listing")
    finish_by: str | None = option(
        None,
        "when the run should have ended: HH:MM (UTC) of the date of the run, HH:MM+1 of the next day, HH:MM@ZONE, or ISO "
        "8601. If the forecast passes it, the run warns once, and uses all actors that it may",
    )

    def validate(self) -> None:
        """Refuse a time that cannot be read."""
        if self.finish_by is not None:
            deadline.parse(self.finish_by, "run.finish_by")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Section):
    """The config of a classification. Equal configs and equal inputs give equal tables."""

    input: tuple[str, ...] = option((), "images to classify: prefix, folder, glob, object, list or archive (--input)")
    limit: Annotated[int, Ge(1)] | None = option(None, "only the first N images of the listing (--limit)")
    date: str | None = option(
        None, "fills {date} in the input and the output: YYYY-MM-DD; unset: IMGBATCH_DATE, or else today (UTC) (--date)"
    )
    top_k: Annotated[int, Ge(1)] = option(5, "number of classes in a row, best first")
    model: ModelConfig = field(default_factory=ModelConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    rejects: RejectsConfig = field(default_factory=RejectsConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    notify: NotifyConfig = field(default_factory=NotifyConfig)

    def validate(self) -> None:
        """Refuse pruning with a limit, since images beyond the limit would look deleted, and guards without their columns."""
        if self.limit is not None and self.run.prune:
            raise ConfigError("run.prune=true with --limit would remove all rows beyond the limit: omit one of them")
        for key, value, column in (
            ("max_label_shift", self.guard.max_label_shift, "label"),
            ("max_score_drop", self.guard.max_score_drop, "score"),
        ):
            if value is not None and self.output.columns and column not in self.output.columns:
                raise ConfigError(f"guard.{key} needs the column {column}: add it to output.columns")

    def public(self) -> dict[str, Any]:
        """Return the config as plain values with every secret masked, for `run.json` and logs."""
        plain = asdict(self)
        plain["storage"]["options"] = _shown(plain["storage"]["options"])
        plain["notify"]["url"] = "***" if plain["notify"]["url"] else ""
        return typing.cast(dict[str, Any], json.loads(masked(json.dumps(plain, default=str))))


def _shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of stores, and those in their sections, with all values masked that may be secret.

    >>> _shown({"gs": {"token": "x", "project": "p"}, "anon": True})
    {'gs': {'token': '***', 'project': 'p'}, 'anon': True}
    """
    shown: dict[str, Any] = {}
    for key, value in options.items():
        if key in ("s3", "gs", "az") and isinstance(value, Mapping):
            shown[key] = _shown(value)
        else:
            shown[key] = value if key in _SHOWN_OPTIONS or isinstance(value, bool) else "***"
    return shown


def describe(kind: type = Config) -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) of every option, with sections in the order of a run."""
    yield from iter_options(kind)

"""The configuration of a run: what every knob is, with its help text beside it.

`describe()` prints them all, and a test holds the README against them.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from imgbatch.errors import ConfigError
from imgbatch.knobs import at_least, described, knob, load_as, one_of, positive, share

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "pnm", "pbm", "pgm", "ppm"),
    *("apng", "avif", "heic", "heif", "hif", "jp2", "j2k", "jpc", "jpf", "jpx", "dcm", "dicom"),
)
"""A name with one of these, in any case, or with no suffix at all, is an image candidate."""

_USER = re.compile(r"://[^/@\s\"]+@")
_SIGNATURE = re.compile(
    r"([?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|sig|AWSAccessKeyId|token)=)[^&\s\"]+",
    re.I,
)

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")

_CALL_S = 300.0

_SHOWN_OPTIONS = {"anon", "endpoint_url", "region", "region_name", "profile", "requester_pays", "use_ssl"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network labels the images. `model = "NAME"` is short for `model.name`."""

    name: str = knob(
        "efficientnet_lite0",
        "efficientnet_lite0, timm:NAME[.TAG], torchvision:NAME[@WEIGHTS], or the URI of a model directory or state dict "
        "(--model)",
    )
    weights: str | None = knob(
        None, "URI of a state dict in place of the weights that timm:NAME or torchvision:NAME have"
    )
    architecture: str | None = knob(None, "the network of a state dict: NAME or timm:NAME, torchvision:NAME")
    labels: str | None = knob(
        None, "URI of a text file with the names of the classes, one a line, in the order of the head"
    )
    taxonomy: str | None = knob(None, "URI of a taxonomy (CSV or JSON) in place of the model's own; unset: its own")
    crop_pct: float | None = knob(
        None, "the share of a side that the centre crop keeps after resizing; unset: as the model was made"
    )
    image_size: int | None = knob(None, "pixels a side of the network's input; unset: as the model was made")
    interpolation: str | None = knob(None, "bicubic, bilinear or nearest; unset: as the model was made")
    mean: tuple[float, ...] = knob(
        (), "of R, G and B on the scale 0 to 1, e.g. [0.5, 0.5, 0.5]; unset: as the model was made"
    )
    std: tuple[float, ...] = knob(
        (), "of R, G and B on the scale 0 to 1, e.g. [0.5, 0.5, 0.5]; unset: as the model was made"
    )

    def __post_init__(self) -> None:
        if self.interpolation is not None:
            one_of("model.interpolation", self.interpolation, INTERPOLATIONS)
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values and (len(values) != 3 or not all(map(math.isfinite, values))):
                raise ConfigError(f"model.{key}={list(values)}: three numbers are needed, for R, G and B")
            # On the scale of bytes, 0 to 255, nothing that a network sees would be right.
            if any(abs(value) > 10 for value in values):
                raise ConfigError(f"model.{key}={list(values)}: on the scale 0 to 1; divide values of 0 to 255 by 255")
        if self.std and min(self.std) <= 0:
            raise ConfigError(f"model.std={list(self.std)}: each must be more than 0")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"model.crop_pct={self.crop_pct}: must be more than 0 and at most 1")
        if self.image_size is not None:
            at_least("model.image_size", self.image_size, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Where the tables go, and what stands in them. `output = "URI"` is short for `output.uri`."""

    uri: str = knob("", "where labels/ and rejects/ are written; {model} and {date} may stand in it (--output)")
    embeddings: bool = knob(False, "a column `embedding` in labels/: the features before the head, as float16")
    content_hash: bool = knob(
        False, "a column `content_hash` in labels/: 64 bits of a hash of the image's bytes; evaluate.py sets it"
    )
    columns: tuple[str, ...] = knob(
        (), "columns of labels/, e.g. ['label', 'score']; uri, size, etag, last_modified always; unset: all"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Which objects of the input are images."""

    format: str = knob("auto", "what the input is: auto, objects, manifest, inventory, parquet, tar")
    image_column: str | None = knob(None, "the column of a Parquet file that holds images; unset: it is found")
    suffixes: str = knob("images", "candidates: 'images' (known suffixes and none), '*' for all, or 'jpg,png'")
    schemes: str = knob(
        "auto", "what a manifest may name: auto (s3, gs, az, https, and its own kind of place), or 's3,file'"
    )
    allow_empty: bool = knob(False, "an input without a single image is a success instead of exit code 2")
    uri_column: str | None = knob(None, "the column of a manifest that names the images; unset: uri")
    uri_template: str | None = knob(
        None, "what a manifest's rows name, filled from their columns, such as 'train/{id}.jpg'; unset: the uri column"
    )
    labels: str = knob("auto", "train, evaluate: where labels come from: auto, column, sidecars (in tars), folders")
    label_column: str | None = knob(None, "train, evaluate: the column of a table that holds the label; unset: label")
    label_depth: int | None = knob(
        None,
        "train, evaluate: which folder below the input is the class, 1 is the first; unset: the one that holds the image",
    )
    label_is: str = knob(
        "name",
        "evaluate: what labels are: name (of classes, or WordNet ids of ImageNet's), index (numbers of classes, from 0, in the "
        "order of the model's head)",
    )
    splits: str = knob(
        "auto", "train, evaluate: where the split comes from: auto, column, folders, names (of tables and tars), none"
    )
    split_column: str | None = knob(None, "train, evaluate: the column of a table that holds the split; unset: split")

    def __post_init__(self) -> None:
        one_of("source.labels", self.labels, ("auto", "column", "sidecars", "folders"))
        one_of("source.splits", self.splits, ("auto", "column", "folders", "names", "none"))
        one_of("source.label_is", self.label_is, ("name", "index"))
        if self.label_depth is not None:
            at_least("source.label_depth", self.label_depth, 1)
        if self.uri_column is not None and self.uri_template is not None:
            raise ConfigError("source.uri_column and source.uri_template both name the images: set one of them")
        one_of("source.format", self.format, ("auto", "objects", "manifest", "parquet", "tar", "inventory"))
        if not any(part.strip(" .") for part in self.suffixes.split(",")):
            raise ConfigError(f"source.suffixes={self.suffixes!r}: write 'images', '*', or suffixes such as 'jpg,png'")


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """How stores are reached."""

    options: dict[str, Any] = knob(
        dict, "options of the fsspec store, e.g. anon, requester_pays, profile, key, secret, endpoint_url"
    )
    timeout_s: float = knob(30.0, "seconds that one request may take")
    private_hosts: bool = knob(False, "http:// and https:// may lead to private addresses and to this machine")
    retries: int = knob(
        10, "how often a request is tried again after a passing failure: some 80 s, with back-off and jitter"
    )

    def __post_init__(self) -> None:
        positive("storage.timeout_s", self.timeout_s)
        at_least("storage.retries", self.retries, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """How far reading runs ahead of decoding."""

    ahead: int = knob(
        128, "most GETs in flight in each process while images are decoded; new ones begin by the half of it"
    )
    ahead_bytes: int = knob(256 << 20, "most bytes that these GETs may hold together")
    max_bytes: int = knob(256 << 20, "a larger object is rejected as too_large before it is read")

    def __post_init__(self) -> None:
        at_least("fetch.ahead", self.ahead, 1)
        at_least("fetch.ahead_bytes", self.ahead_bytes, 1)
        at_least("fetch.max_bytes", self.max_bytes, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """What is decoded."""

    max_pixels: int = knob(
        200_000_000, "a larger picture is rejected as too_large, from its header, before it is decoded"
    )
    timeout_s: float = knob(30.0, "seconds that decoding one image may take; it is rejected if it takes longer")

    def __post_init__(self) -> None:
        at_least("decode.max_pixels", self.max_pixels, 1)
        positive("decode.timeout_s", self.timeout_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig:
    """How the network runs. None of it is part of the fingerprint."""

    batch_size: int | None = knob(
        None, "images in a forward pass, fewer are padded to it; unset: what suits the device"
    )
    dtype: str = knob("auto", "auto (bfloat16 or float16 where the processor has it), float32, bfloat16, float16")

    runtime: str = knob("auto", "auto (OpenVINO on CPUs, torch on GPUs), torch, openvino")

    def __post_init__(self) -> None:
        one_of("classify.runtime", self.runtime, ("auto", "torch", "openvino"))
        if self.batch_size is not None:
            at_least("classify.batch_size", self.batch_size, 1)
        one_of("classify.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerConfig:
    """Which label is the answer."""

    min_score: float = knob(0.5, "with a taxonomy: the finest label whose probability reaches this is the answer")

    def __post_init__(self) -> None:
        share("answer.min_score", self.min_score)


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectsConfig:
    """How many images may go without a label, and which are tried again."""

    max_share: float = knob(
        0.10,
        "most rejects as a share of the images listed; more end the run with exit code 4; 20 rejects or fewer always pass it",
    )
    max_count: int | None = knob(None, "most rejects as a number, exactly; unset: no such limit")
    retry: str = knob("passing", "which rejects of earlier runs are tried again: passing, all")

    def __post_init__(self) -> None:
        share("rejects.max_share", self.max_share)
        if self.max_count is not None:
            at_least("rejects.max_count", self.max_count, 0)
        one_of("rejects.retry", self.retry, ("passing", "all"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What the run asks of Ray."""

    device: str = knob("auto", "auto (GPUs if a live node has one), cpu, cuda")
    wait_s: float = knob(60.0, "seconds to wait for the asked-for CPUs or GPUs before exit code 3")
    gpus_per_actor: float = knob(1.0, "GPUs of one classify actor; a fraction shares a card")
    min_actors: int = knob(1, "classify actors that the run needs before it starts")
    max_actors: int | None = knob(
        None, "most classify actors; unset: all that fit when the run starts; a cluster that scales grows up to it"
    )
    stall_s: float = knob(
        900.0,
        "seconds without a single new row before the run ends with exit code 3; one call into Ray may take 300 s, or "
        "this if it is less",
    )

    @property
    def call_s(self) -> float:
        """Seconds that one call into Ray may take."""
        return min(_CALL_S, self.stall_s)

    def __post_init__(self) -> None:
        one_of("cluster.device", self.device, ("auto", "cpu", "cuda"))
        positive("cluster.wait_s", self.wait_s)
        positive("cluster.stall_s", self.stall_s)
        positive("cluster.gpus_per_actor", self.gpus_per_actor)
        if self.gpus_per_actor > 1 and self.gpus_per_actor != int(self.gpus_per_actor):
            raise ConfigError(f"cluster.gpus_per_actor={self.gpus_per_actor}: above 1 only whole numbers are possible")
        at_least("cluster.min_actors", self.min_actors, 1)
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ConfigError(f"cluster.max_actors={self.max_actors} is less than cluster.min_actors={self.min_actors}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StopConfig:
    """How a run of any job ends."""

    stop_timeout_s: float = knob(
        25.0, "seconds that a run may take to end in order after SIGTERM or SIGINT before it is given up"
    )

    def __post_init__(self) -> None:
        positive("run.stop_timeout_s", self.stop_timeout_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(StopConfig):
    """How the run commits and ends."""

    commit_s: float = knob(10.0, "seconds between two commits")
    check_owner: bool = knob(True, "refuse an output that another live run writes")
    prune: bool = knob(False, "take the rows of images that the listing no longer holds out of the tables")

    def __post_init__(self) -> None:
        StopConfig.__post_init__(self)  # dataclasses with slots are made twice, so that super() finds the wrong one
        positive("run.commit_s", self.commit_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A complete run. Equal configs over equal inputs give equal tables."""

    input: tuple[str, ...] = knob((), "what to classify: prefix, folder, glob, object or manifest (--input)")
    limit: int | None = knob(None, "only the first N images of the listing (--limit)")
    top_k: int = knob(5, "how many classes a row names, best first")
    model: ModelConfig = field(default_factory=ModelConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    rejects: RejectsConfig = field(default_factory=RejectsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        at_least("top_k", self.top_k, 1)
        if self.limit is not None:
            at_least("limit", self.limit, 1)
            if self.run.prune:
                raise ConfigError(
                    "run.prune=true with --limit would take out every row beyond the limit: leave one away"
                )

    def public(self) -> dict[str, Any]:
        """Return the config as plain values with every secret masked, for `run.json` and logs."""
        plain = asdict(self)
        plain["storage"]["options"] = {
            key: value if key in _SHOWN_OPTIONS or isinstance(value, bool) else "***"
            for key, value in plain["storage"]["options"].items()
        }
        return typing.cast(dict[str, Any], json.loads(masked(json.dumps(plain, default=str))))


def masked(text: str) -> str:
    """Return a text without the passwords and signatures that URIs in it may carry.

    >>> masked("GET https://me:secret@host/a.jpg?X-Amz-Signature=0123&x=1 failed")
    'GET https://***@host/a.jpg?X-Amz-Signature=***&x=1 failed'
    """
    return _SIGNATURE.sub(r"\1***", _USER.sub("://***@", text))


def load(path: str | None, settings: Sequence[str] = (), **flags: Any) -> Config:
    """Build the config: defaults, then the TOML file, then `--set` pairs, then flags that were given.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.

    >>> load(None, ["top_k=3", "cluster.device=cpu"]).top_k
    3
    """
    return load_as(Config, path, settings, **flags)


def describe(kind: type = Config) -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, help) of every knob, sections in the order of a run."""
    yield from described(kind)


def with_output(config: Config, *, model: str, date: str = "") -> Config:
    """Fill `{model}` and `{date}` in the output; without a date, with that of today (UTC).

    Raises:
        ConfigError: another name stands in braces.
    """
    date = date or datetime.now(UTC).strftime("%Y-%m-%d")
    try:
        return replace(config, output=replace(config.output, uri=config.output.uri.format(model=model, date=date)))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"--output {config.output.uri!r}: only {{model}} and {{date}} may stand in braces") from error

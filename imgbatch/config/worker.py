"""Values: the part of a configuration that workers need.

It is sent to every worker process, and Ray shows the arguments of an operator. So it has no option that may hold a secret:
no options of a store, and no URI, since a URI may hold a password or a signature.
"""

from __future__ import annotations

from dataclasses import dataclass

from imgbatch.config.sections import ClassifyConfig, Config, DecodeConfig, FetchConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """The options of `SourceConfig` that apply to the bytes and sidecars of an image; the others apply to the listing."""

    suffixes: str
    image_column: str | None
    label_column: str | None
    split_column: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """The options that a worker needs to read, decode and classify images."""

    source: ReadOptions
    fetch: FetchConfig
    decode: DecodeConfig
    classify: ClassifyConfig
    device: str
    """`cluster.device`"""
    top_k: int
    min_score: float
    """`answer.min_score`"""
    embeddings: bool
    """`output.embeddings`"""
    content_hash: bool
    """`output.content_hash`"""

    @classmethod
    def of(cls, config: Config) -> WorkerConfig:
        """Return the options that workers need from a complete configuration."""
        source = config.source
        return cls(
            source=ReadOptions(
                suffixes=source.suffixes,
                image_column=source.image_column,
                label_column=source.label_column,
                split_column=source.split_column,
            ),
            fetch=config.fetch,
            decode=config.decode,
            classify=config.classify,
            device=config.cluster.device,
            top_k=config.top_k,
            min_score=config.answer.min_score,
            embeddings=config.output.embeddings,
            content_hash=config.output.content_hash,
        )

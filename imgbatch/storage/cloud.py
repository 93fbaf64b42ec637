"""Effects: the services that obstore supports, by URI scheme: their options in the config, and the stores of their buckets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from imgbatch.config.sections import StorageConfig
from imgbatch.errors import BadPath, ConfigError
from imgbatch.storage import azure, gcs, s3, s3_options
from imgbatch.storage.fsspec_store import FsspecStore
from imgbatch.storage.obstore_store import ObstoreStore

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Service:
    """One service: how its URIs are read, how its options are merged, and how its buckets are opened."""

    name: str
    """The scheme, and the section of its own in `storage.options`."""
    split: Callable[[str], tuple[str, str]]
    merge: Callable[[Options, Mapping[str, str]], dict[str, Any]]
    bucket: Callable[[str, Options, StorageConfig], Any]
    fsspec: Callable[[str, Options], tuple[str, dict[str, Any]]]
    """Returns fsspec's protocol for the service, and its arguments."""
    extra: str
    """The extra of our package that installs fsspec's for the service."""

    def options(self, config: StorageConfig, environment: Mapping[str, str]) -> dict[str, Any]:
        """Return the options of the service: those for all stores, its own, and those that the environment sets.

        Raises:
            ConfigError: it does not have one of them.
        """
        shared = {name: value for name, value in config.options.items() if name not in SECTIONS}
        own = config.options.get(self.name, {})
        if not isinstance(own, Mapping):
            raise ConfigError(
                f"storage.options.{self.name} is a section, not a value: write storage.options.{self.name}.NAME=…"
            )
        return self.merge({**shared, **own}, environment)

    def open(self, bucket: str, config: StorageConfig, environment: Mapping[str, str]) -> ObstoreStore:
        """Open a bucket or container through obstore."""
        opened = self.bucket(bucket, self.options(config, environment), config)
        return ObstoreStore(opened, self.split, config.retries)

    def open_with_fsspec(self, bucket: str, config: StorageConfig, environment: Mapping[str, str]) -> FsspecStore:
        """Open the service through fsspec, which supports keys that obstore refuses.

        Raises:
            BadPath: its package is not installed. An object with such a key is then rejected.
        """
        protocol, arguments = self.fsspec(bucket, self.options(config, environment))
        try:
            return FsspecStore(protocol, arguments, config.timeout_s)
        except ImportError as error:
            raise BadPath(
                f"{bucket}: keys such as a//b need another package: pip install imgbatch[{self.extra}]"
            ) from error


def _azure(bucket: str, options: Options) -> tuple[str, dict[str, Any]]:
    return "abfs", azure.for_adlfs(azure.of_account(options, bucket.partition("@")[2]))


SERVICES = [
    Service(
        "s3", s3.split, s3_options.merged_options,
        lambda bucket, options, config: s3.S3Bucket(bucket, options, config.timeout_s, config.retries),
        lambda _, options: ("s3", s3_options.for_s3fs(options)), "s3",
    ),
    Service(
        "gs", gcs.split, gcs.merged_options,
        lambda bucket, options, config: gcs.GcsBucket(bucket, options, config.timeout_s),
        lambda _, options: ("gcs", gcs.for_gcsfs(options)), "gcs",
    ),
    Service(
        "az", azure.split, azure.merged_options,
        lambda bucket, options, config: azure.AzureBucket(bucket, options, config.timeout_s),
        _azure, "azure",
    ),
]  # fmt: skip
SECTIONS = tuple(service.name for service in SERVICES)
"""Sections in `storage.options`."""

BY_SCHEME = {
    scheme: service for service, module in zip(SERVICES, (s3, gcs, azure), strict=True) for scheme in module.SCHEMES
}


def require_readable(uri: str, scheme: str) -> None:
    """Refuse a scheme of Azure that is read under another name.

    Raises:
        BadPath: with what to write instead.
    """
    if instead := azure.REFUSED.get(scheme):
        raise BadPath(
            f"{uri}: {scheme}:// is not supported: write {instead}://CONTAINER@ACCOUNT.dfs.core.windows.net/…"
        )


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the driver's environment that the workers need."""
    names = (*s3_options.ENVIRONMENT, *azure.ENVIRONMENT)
    return {name: environment[name] for name in names if name in environment} | gcs.travelling(environment)

"""Effects: buckets and containers through obstore: S3, Google Cloud Storage and Azure Blob Storage.

obstore costs a sixth of the CPU that fsspec's stores take for a GET, gives the ETag with the bytes, and raises an error of
its own where a conditional creation fails (docs/LOG.md). What it cannot do is done by the service's `Bucket`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import obstore
import obstore.exceptions
import pyarrow as pa

from imgbatch.errors import BadPath, ConfigError, Conflict, Forbidden, TooLarge, Unreachable
from imgbatch.storage.base import Meta, unquote_etag
from imgbatch.storage.bucket import Bucket, Tag
from imgbatch.storage.error_mapping import of_status
from imgbatch.storage.obstore_listing import ObstoreListing

_STREAMED = 1 << 20


def open_client(kind: Callable[..., Any], bucket: str, name: str, **options: Any) -> Any:
    """Return obstore's client of one bucket.

    Args:
        kind: S3Store, GCSStore or AzureStore.
        name: for messages.

    Raises:
        ConfigError: obstore does not accept an option.
    """
    # Attempts are counted, and waits limited, in one place for every store: `Stores`.
    try:
        return kind(bucket, **{"retry_config": {"max_retries": 0}, **options})
    except (obstore.exceptions.BaseError, TypeError) as error:
        raise ConfigError(f"storage.options for {name}: {error}") from error


def _exact(key: str) -> str:
    """Refuse a key that begins or ends with a slash: obstore would strip it and read another key. fsspec then takes it."""
    if key != key.strip("/"):
        raise BadPath(f"{key}: has a slash at an end")
    return key


class ObstoreStore:
    """One bucket or container."""

    conditional = True

    def __init__(self, bucket: Bucket, split: Callable[[str], tuple[str, str]], retries: int) -> None:
        self._bucket, self._store, self._split = bucket, bucket.store, split
        self._listing = ObstoreListing(bucket, retries)

    def path(self, uri: str) -> str:
        """Return the key of a URI."""
        return self._split(uri)[1]

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return the content of an object and the metadata of the version that was read, in one GET."""
        result = obstore.get(self._store, _exact(path))
        size = result.meta["size"]
        if limit is not None and size > limit:
            raise TooLarge(f"read {path}: {size} bytes are more than {limit}")
        return result.bytes().to_bytes(), _meta(result.meta)

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return a range of bytes of an object that still has this ETag (If-Match)."""
        options: Any = {"range": (start, end)} | _if_match(etag)
        return obstore.get(self._store, _exact(path), options=options).bytes().to_bytes()

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the content of an object that still has this ETag (If-Match), from a position on."""
        options: Any = {"range": {"offset": start}} if start else {}
        result = obstore.get(self._store, _exact(path), options=options | _if_match(etag))
        for data in result.stream(min_chunk_size=_STREAMED):
            yield bytes(data)

    def head(self, path: str) -> Meta:
        """Return the metadata of an object."""
        return _meta(obstore.head(self._store, _exact(path)))

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder, a thousand keys per request."""
        return self._listing.list_objects(path)

    def folders(self, path: str) -> list[str]:
        """Return the names of the folders directly below `path`."""
        below = obstore.list_with_delimiter(self._store, path or None)["common_prefixes"]
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in below)

    def create(self, path: str, data: bytes) -> None:
        """Write an object that must not exist yet (If-None-Match: *, or generation 0)."""
        obstore.put(self._store, _exact(path), data, mode="create", use_multipart=False)

    def put(self, path: str, data: bytes) -> None:
        """Write an object, whether it exists or not."""
        obstore.put(self._store, _exact(path), data, use_multipart=False)

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        """Return the content of an object and its tag: the ETag as the server sends it, and the generation if there is one."""
        result = obstore.get(self._store, _exact(path))
        return result.bytes().to_bytes(), Tag(result.meta["e_tag"], result.meta["version"]).text

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Replace an object that still has this tag (If-Match, or the generation)."""
        if tag is None:
            return self.put(path, data)
        mode: Any = Tag.of(tag).update_mode
        obstore.put(self._store, _exact(path), data, mode=mode, use_multipart=False)
        return None

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove an object; a missing object is no error. With a tag only that version."""
        _exact(path)
        if tag is not None:
            status = self._bucket.delete(path, Tag.of(tag))
            if status < 300:
                return
            try:
                current = obstore.head(self._store, path)
            except FileNotFoundError:  # an earlier attempt removed it, and its response was lost
                return
            if _differs(current, Tag.of(tag)):
                raise Conflict(f"delete {self._bucket.name}/{path}: another writer has replaced it")
            if status not in self._bucket.codes_without_support:
                raise (Forbidden if status in (401, 403) else Unreachable)(
                    f"delete {self._bucket.name}/{path}: status {status}, although the object has not changed"
                )
        status = self._bucket.delete(path, None)
        if status >= 300 and status != 404:
            raise of_status(status)(f"delete {self._bucket.name}/{path}: status {status}")


def _differs(current: Mapping[str, Any], tag: Tag) -> bool:
    """Return whether an object is another version than that of a tag."""
    if tag.version:
        return bool(current["version"] != tag.version)
    return unquote_etag(current["e_tag"]) != unquote_etag(tag.etag)


def _if_match(etag: str | None) -> dict[str, Any]:
    return {"if_match": f'"{etag}"'} if etag else {}


def _meta(result: Mapping[str, Any]) -> Meta:
    return Meta(size=result["size"], etag=unquote_etag(result["e_tag"]), last_modified=result["last_modified"])

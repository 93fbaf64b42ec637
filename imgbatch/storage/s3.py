"""Effects: S3 buckets, through obstore.

For a GET, obstore takes a sixth of the CPU time of s3fs and returns the ETag with the content. It raises an error of its
own if a conditional creation fails (docs/LOG.md). Options and keys that it does not support go through s3fs
(`fsspec_store`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import obstore
import obstore.exceptions
import pyarrow as pa
from obstore.store import S3Store

from imgbatch.errors import BadPath, ConfigError, Conflict, Forbidden, TooLarge, Unreachable
from imgbatch.storage.base import Meta, unquote_etag
from imgbatch.storage.s3_listing import S3Listing

# The options of s3fs, and their names in obstore.
_OPTIONS = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "anon": "skip_signature",
    "endpoint_url": "endpoint",
    "region": "region",
    "requester_pays": "request_payer",
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
}
_BOTO_ONLY = {"profile"}
_STREAMED = 1 << 20
_URL_VALID_FOR = timedelta(minutes=10)
_NOT_SUPPORTED = (301, 307, 400, 403, 405, 501)
"""Statuses with which servers answer that do not support conditional deletion or signed URLs."""

# Variables of the driver's environment, and the options that they set; see `merged_options`.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_SESSION_TOKEN": "token",
    "AWS_ENDPOINT_URL_S3": "endpoint_url",
    "AWS_ENDPOINT_URL": "endpoint_url",
    "AWS_REGION": "region",
    "AWS_DEFAULT_REGION": "region",
    "AWS_PROFILE": "profile",
}
_CREDENTIALS = {"key", "secret", "token", "profile", "anon"}


def merged_options(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Merge options with the environment into one flat mapping, under the names of s3fs. Options take precedence.

    If the options contain credentials, those of the environment are not used. Returns None if obstore does not support an
    option, so that s3fs has to be used.
    """
    flat = dict(options)
    flat |= flat.pop("client_kwargs", {}) | flat.pop("s3_additional_kwargs", {})
    if "region_name" in flat:
        flat["region"] = flat.pop("region_name")
    if not flat.keys() <= _OPTIONS.keys() | _BOTO_ONLY:
        return None
    own_credentials = bool(flat.keys() & _CREDENTIALS)
    for name, option in ENVIRONMENT.items():
        if environment.get(name) and not (own_credentials and option in _CREDENTIALS):
            flat.setdefault(option, environment[name])
    return flat


def for_s3fs(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of `merged_options` as arguments of s3fs."""
    names = ("key", "secret", "token", "anon", "endpoint_url", "profile", "requester_pays")
    arguments = {name: flat[name] for name in names if name in flat}
    return {**arguments, "client_kwargs": {"region_name": flat.get("region", "us-east-1")}}


def _region(profile: str | None) -> str:
    """Return the region that the AWS tools use."""
    import botocore.session

    return botocore.session.Session(profile=profile).get_config_variable("region") or "us-east-1"


def _exact(key: str) -> str:
    """Refuse a key that begins or ends with a slash: obstore would strip it and read another key. s3fs then takes it."""
    if key != key.strip("/"):
        raise BadPath(f"{key}: has a slash at an end")
    return key


# botocore renews credentials 15 minutes before they expire, so these are still valid after 10 minutes.
_CREDENTIALS_VALID_FOR = timedelta(minutes=10)


class BotoCredentials:
    """Credentials from the sources of the AWS tools (profile, role, container, instance), renewed before they expire."""

    def __init__(self, profile: str | None) -> None:
        import botocore.session

        credentials = botocore.session.Session(profile=profile).get_credentials()
        if credentials is None:
            raise Forbidden(
                "no S3 credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, "
                "or --set storage.options.anon=true for a public bucket"
            )
        self._credentials = credentials

    def __call__(self) -> dict[str, Any]:
        """Return the credentials with which obstore signs until they expire."""
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_VALID_FOR,
        }


class S3:
    """One bucket."""

    conditional = True

    def __init__(self, bucket: str, options: Mapping[str, Any], timeout_s: float, retries: int) -> None:
        config: Any = {_OPTIONS[key]: _as_text(value) for key, value in options.items() if key in _OPTIONS}
        config.setdefault("region", _region(options.get("profile")))
        endpoint = str(config.get("endpoint", ""))
        in_options = bool(options.get("anon") or options.get("key"))
        credentials: Any = None if in_options else BotoCredentials(options.get("profile"))
        try:
            self._store = S3Store(
                bucket,
                config=config,
                virtual_hosted_style_request=not endpoint,
                client_options={
                    "timeout": f"{timeout_s}s",
                    "connect_timeout": f"{min(timeout_s, 10.0)}s",
                    "allow_http": endpoint.startswith("http://"),
                },
                # `Stores.call` counts attempts and limits waits for all stores, so obstore must not retry itself.
                retry_config={"max_retries": 0},
                credential_provider=credentials,
            )
        except (obstore.exceptions.BaseError, TypeError) as error:
            raise ConfigError(f"storage.options for s3://{bucket}: {error}") from error
        self._timeout_s = timeout_s
        self._can_sign = not options.get("anon")
        self._listing = S3Listing(self._store, bucket, for_s3fs(options), retries)

    def path(self, uri: str) -> str:
        """Return the key of a URI."""
        return uri.partition("://")[2].partition("/")[2]

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return the content of an object and the metadata of the version that was read, in one GET."""
        result = obstore.get(self._store, _exact(path))
        size = result.meta["size"]
        if limit is not None and size > limit:
            raise TooLarge(f"read {path}: {size} bytes are more than {limit}")
        return result.bytes().to_bytes(), _meta(result.meta)

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return a range of bytes of an object that still has this ETag (If-Match)."""
        options: Any = {"range": (start, end)} | ({"if_match": f'"{etag}"'} if etag else {})
        return obstore.get(self._store, _exact(path), options=options).bytes().to_bytes()

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the content of an object that still has this ETag (If-Match), from a position on."""
        options: Any = {"range": {"offset": start}} | ({"if_match": f'"{etag}"'} if etag else {})
        for data in obstore.get(self._store, _exact(path), options=options).stream(min_chunk_size=_STREAMED):
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
        """Write an object that must not exist yet (If-None-Match: *)."""
        obstore.put(self._store, _exact(path), data, mode="create", use_multipart=False)

    def put(self, path: str, data: bytes) -> None:
        """Write an object, whether it exists or not."""
        obstore.put(self._store, path, data, use_multipart=False)

    def read_tagged(self, path: str) -> tuple[bytes, str | None]:
        """Return the content of an object and its ETag, quoted as the server sends it."""
        result = obstore.get(self._store, path)
        return result.bytes().to_bytes(), result.meta["e_tag"]

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Replace an object that still has this ETag (If-Match)."""
        if tag is None:
            return self.put(path, data)
        obstore.put(self._store, path, data, mode={"e_tag": tag}, use_multipart=False)
        return None

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove an object; a missing object is no error. With a tag only the version with this ETag (If-Match)."""
        if tag is not None:
            status = self._delete_if_match(path, tag)
            if status < 300:
                return
            try:
                current = self.head(path).etag
            except FileNotFoundError:  # an earlier attempt removed it, and its response was lost
                return
            if current != unquote_etag(tag):
                raise Conflict(f"delete {path}: another writer has replaced it")
            if status not in _NOT_SUPPORTED:
                raise Unreachable(f"delete {path}: status {status}, although the object has not changed")
        obstore.delete(self._store, path)

    def _delete_if_match(self, path: str, tag: str) -> int:
        """Remove one version of an object and return the status, one of `_NOT_SUPPORTED` if that is not possible.

        A signed URL is used, since obstore has no conditional deletion (0.12).
        """
        if not self._can_sign:
            return 405
        import ssl  # imported here: needed at most once in a run
        import urllib.error
        import urllib.request

        url = obstore.sign(self._store, "DELETE", _exact(path), _URL_VALID_FOR)
        request = urllib.request.Request(url, method="DELETE", headers={"If-Match": tag})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in (404, 412, *_NOT_SUPPORTED):
                raise
            return error.code
        except urllib.error.URLError as error:
            if isinstance(
                error.reason, ssl.SSLError
            ):  # Python may lack certificates where obstore, with its own, has them
                return 405
            raise error.reason if isinstance(error.reason, OSError) else error from None


def _as_text(value: Any) -> Any:
    """Return an option in the type that obstore expects: `--set storage.options.key=123` is read as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _meta(entry: Mapping[str, Any]) -> Meta:
    return Meta(size=entry["size"], etag=unquote_etag(entry["e_tag"]), last_modified=entry["last_modified"])

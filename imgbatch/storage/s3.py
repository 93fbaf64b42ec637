"""Effects: buckets that speak S3, through obstore.

obstore costs a sixth of the CPU that s3fs takes for a GET, gives the ETag with the bytes, and raises an error of its own
where a conditional creation fails (docs/LOG.md). What it cannot express goes through `other`, that is, s3fs.
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
from imgbatch.storage.base import Meta, unquoted
from imgbatch.storage.s3_listing import Listing

# What s3fs calls its options, and what obstore calls the same.
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
_SIGNED_FOR = timedelta(minutes=10)
_NOT_SUPPORTED = (301, 307, 400, 403, 405, 501)
"""What a server may answer that does not know conditional deletion, or signed URLs."""

# What the environment of the driver tells; see `settings`.
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


def settings(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Return one flat set of options in s3fs's words: those given, then what the environment says.

    None where an option is not known here, so that s3fs has to take over. Options that name credentials keep those of
    the environment out.
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
    """Return what `settings` gave in the form that s3fs takes."""
    plain = {name: flat[name] for name in ("key", "secret", "token", "anon", "endpoint_url", "profile") if name in flat}
    if "requester_pays" in flat:
        plain["requester_pays"] = flat["requester_pays"]
    return {**plain, "client_kwargs": {"region_name": flat.get("region", "us-east-1")}}


def _region(profile: str | None) -> str:
    """Return the region that the AWS tools would use."""
    import botocore.session

    return botocore.session.Session(profile=profile).get_config_variable("region") or "us-east-1"


def _exact(key: str) -> str:
    """Refuse a key that obstore would read as another one, without the slashes at its ends; s3fs then takes it."""
    if key != key.strip("/"):
        raise BadPath(f"{key}: has a slash at an end")
    return key


_SIGNS_FOR = timedelta(minutes=10)  # less than botocore allows for: it renews those that expire in 15 minutes


class BotoCredentials:
    """Credentials from where the AWS tools look: profile, role, container, instance; renewed before they expire."""

    def __init__(self, profile: str | None) -> None:
        import botocore.session

        found = botocore.session.Session(profile=profile).get_credentials()
        if found is None:
            raise Forbidden(
                "no S3 credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role, "
                "or --set storage.options.anon=true for a public bucket"
            )
        self._found = found

    def __call__(self) -> dict[str, Any]:
        """Return what obstore signs with until it asks again."""
        frozen = self._found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _SIGNS_FOR,
        }


class S3:
    """One bucket."""

    conditional = True

    def __init__(self, bucket: str, options: Mapping[str, Any], timeout_s: float, retries: int) -> None:
        config: Any = {_OPTIONS[key]: _spelt(value) for key, value in options.items() if key in _OPTIONS}
        config.setdefault("region", _region(options.get("profile")))
        endpoint = str(config.get("endpoint", ""))
        given = bool(options.get("anon") or options.get("key"))
        credentials: Any = None if given else BotoCredentials(options.get("profile"))
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
                # Attempts are counted, and waits limited, in one place for every store: `Stores`.
                retry_config={"max_retries": 0},
                credential_provider=credentials,
            )
        except (obstore.exceptions.BaseError, TypeError) as error:
            raise ConfigError(f"storage.options for s3://{bucket}: {error}") from error
        self._timeout_s = timeout_s
        self._signs = not options.get("anon")
        self._listing = Listing(self._store, bucket, for_s3fs(options), retries)

    def path(self, uri: str) -> str:
        """Return the key of a URI."""
        return uri.partition("://")[2].partition("/")[2]

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return an object's bytes and what was read, in one GET."""
        answer = obstore.get(self._store, _exact(path))
        size = answer.meta["size"]
        if limit is not None and size > limit:
            raise TooLarge(f"read {path}: {size} bytes are more than {limit}")
        return answer.bytes().to_bytes(), _meta(answer.meta)

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return some bytes of an object that still has this ETag (If-Match)."""
        options: Any = {"range": (start, end)} | ({"if_match": f'"{etag}"'} if etag else {})
        return obstore.get(self._store, _exact(path), options=options).bytes().to_bytes()

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the bytes of an object that still has this ETag (If-Match), from a position on."""
        options: Any = {"range": {"offset": start}} | ({"if_match": f'"{etag}"'} if etag else {})
        for data in obstore.get(self._store, _exact(path), options=options).stream(min_chunk_size=_STREAMED):
            yield bytes(data)

    def head(self, path: str) -> Meta:
        """Return what is known of an object."""
        return _meta(obstore.head(self._store, _exact(path)))

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder, a thousand keys to a request."""
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
        """Return an object's bytes and its ETag, quoted as the server gave it."""
        answer = obstore.get(self._store, path)
        return answer.bytes().to_bytes(), answer.meta["e_tag"]

    def replace(self, path: str, data: bytes, tag: str | None) -> None:
        """Write over an object that still has this ETag (If-Match)."""
        if tag is None:
            return self.put(path, data)
        obstore.put(self._store, path, data, mode={"e_tag": tag}, use_multipart=False)
        return None

    def delete(self, path: str, tag: str | None = None) -> None:
        """Remove an object; one that is not there is no error. With its ETag only that version of it (If-Match)."""
        if tag is not None:
            status = self._delete_if_match(path, tag)
            if status < 300:
                return
            try:
                there = self.head(path).etag
            except FileNotFoundError:  # removed already: the answer to an earlier try was lost
                return
            if there != unquoted(tag):
                raise Conflict(f"delete {path}: another writer has replaced it")
            if status not in _NOT_SUPPORTED:
                raise Unreachable(f"delete {path}: refused, although it is the version that was read")
        obstore.delete(self._store, path)

    def _delete_if_match(self, path: str, tag: str) -> int:
        """Remove a version of an object by a signed URL, since obstore has no conditional deletion (0.12); return the status.

        It is one of `_NOT_SUPPORTED` where that cannot be had.
        """
        if not self._signs:
            return 405
        import ssl  # needed once in a run, if at all
        import urllib.error
        import urllib.request

        url = obstore.sign(self._store, "DELETE", _exact(path), _SIGNED_FOR)
        request = urllib.request.Request(url, method="DELETE", headers={"If-Match": tag})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in (404, 412, *_NOT_SUPPORTED):
                raise
            return error.code
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):  # Python finds no certificates, but obstore has its own
                return 405
            raise error.reason if isinstance(error.reason, OSError) else error from None


def _spelt(value: Any) -> Any:
    """Return an option as obstore takes it: `--set storage.options.key=123` gives a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _meta(answer: Mapping[str, Any]) -> Meta:
    return Meta(size=answer["size"], etag=unquoted(answer["e_tag"]), last_modified=answer["last_modified"])

"""Buckets that speak S3, through obstore.

obstore costs a sixth of the CPU that s3fs takes for a GET, gives the ETag with the bytes, and raises an error of its own
where a conditional creation fails (docs/LOG.md). What it cannot express goes through `other`, that is, s3fs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import obstore
import obstore.exceptions
import pyarrow as pa
import pyarrow.compute as pc
from obstore.store import S3Store

from imgbatch.errors import BadPath, ConfigError, Forbidden, TimedOut, TooLarge, Unreachable
from imgbatch.storage.backoff import backoff
from imgbatch.storage.base import FOUND, Meta, unquoted, unquoted_all
from imgbatch.storage.faults import judge

_PAGE = 1000  # keys in one answer of S3
_HEADS_AT_ONCE = 16
_NO_XML = "\ufffd"  # what some servers put in place of a control code, unless they are asked for encoded keys

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
        """Return what obstore signs with for the next ten minutes."""
        frozen = self._found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }


class S3:
    """One bucket."""

    def __init__(self, bucket: str, options: Mapping[str, Any], timeout_s: float, retries: int) -> None:
        self._bucket, self._options, self._retries = bucket, options, retries
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

    def head(self, path: str) -> Meta:
        """Return what is known of an object."""
        return _meta(obstore.head(self._store, _exact(path)))

    def found(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder, a thousand keys to a request, in the order of their keys."""
        last, failed = "", 0
        if path != path.strip("/") or (not path and self._has_keys_from_a_slash()):
            yield from self._list_any_key(path, last)
            return
        while True:
            try:
                for found in self._pages(path, last):
                    if pc.any(pc.match_substring(found["path"], _NO_XML)).as_py():
                        raise obstore.exceptions.InvalidPathError("a control code")
                    yield self._without_markers(path, found)
                    last, failed = found["path"][-1].as_py() if len(found) else last, 0
                return
            except obstore.exceptions.InvalidPathError:
                yield from self._list_any_key(path, last)
                return
            except obstore.exceptions.BaseError as error:
                failed += 1
                if failed > self._retries or judge(error) not in (Unreachable, TimedOut):
                    raise
                time.sleep(backoff(failed))  # and on behind the last key, not anew

    def _pages(self, path: str, after: str) -> Iterator[pa.RecordBatch]:
        for chunk in obstore.list(self._store, path or None, offset=after or None, chunk_size=_PAGE, return_arrow=True):
            found = pa.record_batch(chunk)
            columns = [found["path"].cast(pa.string()), found["size"].cast(pa.int64())]
            columns += [unquoted_all(found["e_tag"]), found["last_modified"]]
            yield pa.record_batch(columns, schema=FOUND)

    def _has_keys_from_a_slash(self) -> bool:
        """Ask whether a key begins with a slash, which obstore would drop: `/a` would become `a`, another object."""
        import s3fs

        client = s3fs.S3FileSystem(**for_s3fs(self._options))
        return bool(client.call_s3("list_objects_v2", Bucket=self._bucket, Prefix="/", MaxKeys=1).get("Contents"))

    def _without_markers(self, path: str, found: pa.RecordBatch) -> pa.RecordBatch:
        """Leave out what stands for a folder: an empty object named `a/`, which obstore lists, and only lists, as `a`."""
        empty = np.flatnonzero(pc.equal(found["size"], 0).to_numpy(zero_copy_only=False))
        if not len(empty):
            return found
        with ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
            kept = np.ones(len(found), bool)
            names = found["path"].take(pa.array(empty)).to_pylist()
            kept[empty] = list(pool.map(lambda name: name != path and self._is_there(name), names))
        return found.filter(pa.array(kept))

    def _is_there(self, path: str) -> bool:
        try:
            self.head(path)
        except FileNotFoundError:
            return False
        except obstore.exceptions.BaseError:  # no right to look at it, say: reading it will tell
            return True
        return True

    def _list_any_key(self, path: str, after: str) -> Iterator[pa.RecordBatch]:
        """Go on listing behind the key `after` with s3fs, which takes keys that obstore refuses: `a//b`, control codes."""
        import s3fs

        client = s3fs.S3FileSystem(**for_s3fs(self._options))
        request = {"Bucket": self._bucket, "Prefix": f"{path}/" if path else "", "StartAfter": after}
        while True:
            answer = client.call_s3("list_objects_v2", **request)
            objects = [entry for entry in answer.get("Contents", []) if not entry["Key"].endswith("/")]
            yield pa.record_batch(
                [
                    pa.array([entry["Key"] for entry in objects], pa.string()),
                    pa.array([entry["Size"] for entry in objects], pa.int64()),
                    pa.array([unquoted(entry["ETag"]) for entry in objects], pa.string()),
                    pa.array([entry["LastModified"] for entry in objects], FOUND.field(3).type),
                ],
                schema=FOUND,
            )
            if not answer.get("IsTruncated"):
                return
            request["ContinuationToken"] = answer["NextContinuationToken"]

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

    def delete(self, path: str) -> None:
        """Remove an object; one that is not there is no error."""
        obstore.delete(self._store, path)


def _spelt(value: Any) -> Any:
    """Return an option as obstore takes it: `--set storage.options.key=123` gives a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _meta(answer: Mapping[str, Any]) -> Meta:
    return Meta(size=answer["size"], etag=unquoted(answer["e_tag"]), last_modified=answer["last_modified"])

"""Effects: how a bucket is listed: a thousand keys to a request, several folders at a time, whatever the keys are.

obstore lists; what it cannot express goes through s3fs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import obstore
import obstore.exceptions
import pyarrow as pa
import pyarrow.compute as pc
from obstore.store import S3Store

from imgbatch.concurrency.prefetch import prefetch_streams
from imgbatch.errors import TimedOut, Unreachable
from imgbatch.storage.base import FOUND, unquoted, unquoted_all
from imgbatch.storage.error_mapping import judge
from imgbatch.storage.retry import backoff

_PAGE = 1000  # keys in one answer of S3
_HEADS_AT_ONCE = 16
_NO_XML = "\ufffd"  # what some servers put in place of a control code, unless they are asked for encoded keys

_PAGES_IN_TURN = 10  # for fewer, s3fs is not worth its second of imports
_MOST_FOLDERS = 256  # each costs a request, and more where it is large
_FOLDERS_WANTED, _LEVELS = 16, 3  # looked for, so that as many may be listed at a time as `_LISTS_AT_ONCE` says
_LISTS_AT_ONCE, _PAGES_AHEAD = 8, 8


_SAID_AFTER = 4  # failures in a row: some 5 s

log = logging.getLogger(__name__)


class Listing:
    """Lists one bucket."""

    def __init__(self, store: S3Store, bucket: str, for_s3fs: Mapping[str, Any], retries: int) -> None:
        self._store, self._bucket, self._for_s3fs, self._retries = store, bucket, for_s3fs, retries

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder, in an order that repeats.

        Where some requests do not end it, the folders below are looked for, and listed several at a time. Each is asked
        for by its prefix, so that nothing depends on how the server orders its keys.
        """
        in_turn = self._in_turn(path)
        begun: list[pa.Array] = []
        for found in islice(in_turn, _PAGES_IN_TURN):
            begun.append(found["path"])
            yield found
        streams = self._apart(path) if len(begun) == _PAGES_IN_TURN else []
        if len(streams) > 1:
            known = pa.concat_arrays(begun)
            for found in prefetch_streams(streams, concurrency=_LISTS_AT_ONCE, max_pending=_PAGES_AHEAD):
                yield found.filter(pc.invert(pc.is_in(found["path"], known)))
        else:
            yield from in_turn

    def _apart(self, path: str) -> list[Callable[[], Iterator[pa.RecordBatch]]]:
        """Return iterators that give, one after the other, what `_in_turn` gives, after at most 31 requests."""
        parts: list[str | pa.RecordBatch] = [path]
        whole: set[str] = set()
        for _ in range(_LEVELS):
            if sum(isinstance(part, str) for part in parts) >= _FOLDERS_WANTED:
                break
            below: list[str | pa.RecordBatch] = []
            for part in parts:
                level = self._level(part) if isinstance(part, str) and part not in whole else None
                if level is None and isinstance(part, str):
                    whole.add(part)
                below += [part] if level is None else level
            if len(below) > _MOST_FOLDERS:
                break
            parts = below
        return [partial(self._in_turn, part) if isinstance(part, str) else partial(iter, [part]) for part in parts]

    def _level(self, path: str) -> list[str | pa.RecordBatch] | None:
        """Return the objects directly in a folder, and the folders below it.

        None where that takes more than one request, or is not to be had: listing it as a whole then tells why.
        """
        request = {"Bucket": self._bucket, "Prefix": f"{path}/" if path else "", "Delimiter": "/", "MaxKeys": _PAGE}
        try:
            answer = self._client().call_s3("list_objects_v2", **request)
        except Exception:  # noqa: BLE001 - whatever botocore raises: this request only saves time
            return None
        folders = [entry["Prefix"].removesuffix("/") for entry in answer.get("CommonPrefixes", [])]
        if answer.get("IsTruncated") or any(_is_changed(folder) for folder in folders):
            return None
        objects = [entry for entry in answer.get("Contents", []) if not entry["Key"].endswith("/")]
        if any(_is_changed(entry["Key"]) for entry in objects):
            return None
        return [_batch(objects), *folders] if objects else list(folders)

    def _in_turn(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder with one request after the other."""
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
                if failed == _SAID_AFTER:
                    log.warning("list s3://%s/%s: %s; trying again", self._bucket, path, str(error)[:200])
                time.sleep(backoff(failed))  # and on behind the last key, not anew

    def _pages(self, path: str, after: str) -> Iterator[pa.RecordBatch]:
        for chunk in obstore.list(self._store, path or None, offset=after or None, chunk_size=_PAGE, return_arrow=True):
            found = pa.record_batch(chunk)
            columns = [found["path"].cast(pa.string()), found["size"].cast(pa.int64())]
            columns += [unquoted_all(found["e_tag"]), found["last_modified"]]
            yield pa.record_batch(columns, schema=FOUND)

    def _has_keys_from_a_slash(self) -> bool:
        """Ask whether a key begins with a slash, which obstore would drop: `/a` would become `a`, another object."""
        return bool(
            self._client().call_s3("list_objects_v2", Bucket=self._bucket, Prefix="/", MaxKeys=1).get("Contents")
        )

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
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        except obstore.exceptions.BaseError:  # no right to look at it, say: reading it will tell
            return True
        return True

    def _list_any_key(self, path: str, after: str) -> Iterator[pa.RecordBatch]:
        """Go on listing behind the key `after` with s3fs, which takes keys that obstore refuses: `a//b`, control codes."""
        client = self._client()
        request = {"Bucket": self._bucket, "Prefix": f"{path}/" if path else "", "StartAfter": after}
        while True:
            answer = client.call_s3("list_objects_v2", **request)
            objects = [entry for entry in answer.get("Contents", []) if not entry["Key"].endswith("/")]
            yield _batch(objects)
            if not answer.get("IsTruncated"):
                return
            request["ContinuationToken"] = answer["NextContinuationToken"]

    def _client(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(**self._for_s3fs)


def _batch(objects: list[Mapping[str, Any]]) -> pa.RecordBatch:
    """Return entries of S3's answer as FOUND."""
    columns = [
        pa.array([entry["Key"] for entry in objects], pa.string()),
        pa.array([entry["Size"] for entry in objects], pa.int64()),
        pa.array([unquoted(entry["ETag"]) for entry in objects], pa.string()),
        pa.array([entry["LastModified"] for entry in objects], FOUND.field(3).type),
    ]
    return pa.record_batch(columns, schema=FOUND)


def _is_changed(key: str) -> bool:
    """Return whether obstore would refuse a key, or read it as another one."""
    return not key.isprintable() or bool({"", ".", ".."} & set(key.split("/")))

"""Effects: the listing of buckets and containers: a thousand keys per request, several folders at a time.

obstore lists. Keys that it does not support are listed by the client of the service (`Bucket.page`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np
import obstore
import obstore.exceptions
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.concurrency.prefetch import prefetch_streams
from imgbatch.config.secrets import masked
from imgbatch.errors import TimedOut, Unreachable
from imgbatch.storage.base import STORE_LISTING, unquote_etags
from imgbatch.storage.bucket import Bucket
from imgbatch.storage.error_mapping import classify_error
from imgbatch.storage.retry import backoff

_PAGE = 1000  # keys in one batch, and in one response of S3 and Google
_HEADS_AT_ONCE = 16
_REPLACED = "\ufffd"  # some servers write it in place of a control code, since XML cannot hold one

_PAGES_IN_TURN = (
    10  # a listing of fewer pages is not split: the import of the service's client alone takes half a second
)
_MAX_FOLDERS = 256  # each takes at least one request
# Folders are split up to this depth, until there are enough of them to keep `_LISTS_AT_ONCE` busy.
_MIN_FOLDERS, _MAX_LEVELS = 16, 3
_LISTS_AT_ONCE, _PAGES_AHEAD = 8, 8

_WARN_AFTER = 4  # consecutive failures: about 5 s

log = logging.getLogger(__name__)


class ObstoreListing:
    """Lists one bucket."""

    def __init__(self, bucket: Bucket, retries: int) -> None:
        self._bucket, self._store, self._retries = bucket, bucket.store, retries

    def list_objects(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder, in a reproducible order.

        If a few requests do not reach the end, the listing is split by folder, and several folders are listed at a time.
        Each is listed by its prefix, so that the result does not depend on the order in which the server sorts keys.
        """
        in_turn = self._in_turn(path)
        first_pages: list[pa.Array] = []
        for page in islice(in_turn, _PAGES_IN_TURN):
            first_pages.append(page["path"])
            yield page
        streams = self._split(path) if len(first_pages) == _PAGES_IN_TURN else []
        if len(streams) > 1:
            yielded = pa.concat_arrays(first_pages)
            for page in prefetch_streams(streams, concurrency=_LISTS_AT_ONCE, max_pending=_PAGES_AHEAD):
                yield page.filter(pc.invert(pc.is_in(page["path"], yielded)))
        else:
            yield from in_turn

    def _split(self, path: str) -> list[Callable[[], Iterator[pa.RecordBatch]]]:
        """Split the listing below a folder. The streams in a row yield what `_in_turn` yields. Makes up to 31 requests."""
        parts: list[str | pa.RecordBatch] = [path]  # folders that are to be listed, and the objects between them
        unsplit: set[str] = set()
        for _ in range(_MAX_LEVELS):
            if sum(isinstance(part, str) for part in parts) >= _MIN_FOLDERS:
                break
            deeper: list[str | pa.RecordBatch] = []
            for part in parts:
                level = self._level(part) if isinstance(part, str) and part not in unsplit else None
                if level is None and isinstance(part, str):
                    unsplit.add(part)
                deeper += [part] if level is None else level
            if len(deeper) > _MAX_FOLDERS:
                break
            parts = deeper
        return [partial(self._in_turn, part) if isinstance(part, str) else partial(iter, [part]) for part in parts]

    def _level(self, path: str) -> list[str | pa.RecordBatch] | None:
        """Return the objects directly in a folder, and the folders below it.

        Returns None if that takes more than one request or fails. The folder is then listed as a whole, which reports why.
        """
        try:
            page = self._bucket.page(f"{path}/" if path else "", folders=True)
        except Exception:  # noqa: BLE001 - the client may raise anything, and this request only saves time
            return None
        keys = page.objects["path"].to_pylist()
        if page.next_page or any(_is_unsupported(key) for key in [*keys, *page.folders]):
            return None
        return [page.objects, *page.folders] if keys else list(page.folders)

    def _in_turn(self, path: str) -> Iterator[pa.RecordBatch]:
        """Yield the objects below the folder, one request after the other.

        After a failure the listing resumes after the last key. If obstore does not support a key, the service's client
        lists the rest. A listing that is not sorted cannot resume: its failure is raised, after obstore's own retries.
        """
        last_key, failures = "", 0
        if path != path.strip("/") or (not path and self._has_keys_from_a_slash()):
            yield from self._list_any_key(path, last_key)
            return
        while True:
            try:
                for page in self._pages(path, last_key):
                    if pc.any(pc.match_substring(page["path"], _REPLACED)).as_py():
                        raise obstore.exceptions.InvalidPathError("a control code")
                    yield self._without_markers(path, page)
                    last_key, failures = page["path"][-1].as_py() if len(page) else last_key, 0
                return
            except obstore.exceptions.InvalidPathError:
                yield from self._list_any_key(path, last_key)
                return
            except obstore.exceptions.BaseError as error:
                failures += 1
                if failures > self._retries or classify_error(error) not in (Unreachable, TimedOut):
                    raise
                if last_key and not self._bucket.sorted_listing:
                    raise
                if failures == _WARN_AFTER:
                    log.warning("list %s/%s: %s; trying again", self._bucket.name, path, masked(str(error))[:200])
                time.sleep(backoff(failures))

    def _pages(self, path: str, after: str) -> Iterator[pa.RecordBatch]:
        for chunk in obstore.list(self._store, path or None, offset=after or None, chunk_size=_PAGE, return_arrow=True):
            page = pa.record_batch(chunk)
            columns = [page["path"].cast(pa.string()), page["size"].cast(pa.int64())]
            columns += [unquote_etags(page["e_tag"]), page["last_modified"]]
            yield pa.record_batch(columns, schema=STORE_LISTING)

    def _has_keys_from_a_slash(self) -> bool:
        """Return whether a key begins with a slash. obstore would drop the slash: `/a` would become `a`, another object."""
        return len(self._bucket.page("/").objects) > 0

    def _without_markers(self, path: str, page: pa.RecordBatch) -> pa.RecordBatch:
        """Drop folder markers: empty objects named `a/`. obstore lists them as `a`, but has no object of that name."""
        empty = np.flatnonzero(pc.equal(page["size"], 0).to_numpy(zero_copy_only=False))
        if not len(empty):
            return page
        with ThreadPoolExecutor(_HEADS_AT_ONCE) as pool:
            keep = np.ones(len(page), bool)
            names = page["path"].take(pa.array(empty)).to_pylist()
            keep[empty] = list(pool.map(lambda name: name != path and self._exists(name), names))
        return page.filter(pa.array(keep))

    def _exists(self, path: str) -> bool:
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        except obstore.exceptions.BaseError:  # such as a missing permission, which reading the object reports
            return True
        return True

    def _list_any_key(self, path: str, after: str) -> Iterator[pa.RecordBatch]:
        """List the keys after `after` with the service's client, which supports keys that obstore refuses: `a//b`."""
        token: str | None = None
        while True:
            page = self._bucket.page(f"{path}/" if path else "", after=after, token=token)
            yield page.objects
            token = page.next_page
            if not token:
                return


def _is_unsupported(key: str) -> bool:
    """Return whether obstore would refuse a key, or read it as another key."""
    return not key.isprintable() or bool({"", ".", ".."} & set(key.split("/")))

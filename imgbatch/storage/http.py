"""Effects: objects on web servers: single GETs that end in time, never hold more than they may, and do not go where they
should not.

A manifest may have been written by anybody, and a web server may send its reader on to any other address. So each
connection, the redirected ones too, is checked when it is made, by the address that it is made to: no name that resolves
to a harmless address the first time and to another the second gets past that.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
from fsspec.asyn import sync

from imgbatch.errors import BadPath, Conflict, Forbidden, TooLarge
from imgbatch.storage.base import Meta, unquoted
from imgbatch.storage.fsspec_store import Other

_CHUNK = 1 << 16


class Web(Other):
    """What `http://` and `https://` name."""

    def __init__(self, protocol: str, timeout_s: float, *, private_hosts: bool) -> None:
        super().__init__(protocol, {} if private_hosts else {"get_client": _careful_client}, timeout_s)

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return an object's bytes and what its server tells with them, in one GET."""
        data, headers = sync(self._fs.loop, self._get, path, limit, timeout=self._timeout_s)
        return data, Meta(len(data), unquoted(headers.get("ETag")), _moment(headers))

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return some bytes of an object; BadPath where its server gives wholes only."""
        some = {"Range": f"bytes={start}-{end - 1}"}
        data, headers = sync(self._fs.loop, self._get, path, end - start, some, timeout=self._timeout_s)
        _require_version(path, etag, headers)
        return bytes(data)

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the bytes of an object from a position on, in one request; each chunk has the time of a request."""
        answer = sync(self._fs.loop, self._begin, path, start, etag, timeout=self._timeout_s)
        try:
            while data := sync(self._fs.loop, answer.content.read, _CHUNK, timeout=self._timeout_s):
                yield data
        finally:
            self._fs.loop.call_soon_threadsafe(answer.close)

    async def _begin(self, url: str, start: int, etag: str | None) -> aiohttp.ClientResponse:
        session = await self._fs.set_session()
        answer: aiohttp.ClientResponse = await session.get(
            self._fs.encode_url(url), headers={"Range": f"bytes={start}-"} if start else None
        )
        self._fs._raise_not_found_for_status(answer, url)
        try:
            _require_version(url, etag, answer.headers)
        except Conflict:
            answer.close()
            raise
        if start and answer.status != 206:
            answer.close()
            raise BadPath(f"read {url}: its server gives no parts of objects")
        return answer

    def head(self, path: str) -> Meta:
        """Return what is known of an object; by a GET whose body is left, since not every server answers a HEAD."""
        headers = sync(self._fs.loop, self._headers, path, timeout=self._timeout_s)
        size = headers.get("Content-Length")
        return Meta(int(size) if size and size.isdigit() else None, unquoted(headers.get("ETag")), _moment(headers))

    async def _headers(self, url: str) -> Any:
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(url), headers={"Accept-Encoding": "identity"}) as answer:
            self._fs._raise_not_found_for_status(answer, url)
            answer.close()
            return answer.headers

    async def _get(
        self, url: str, limit: int | None, some: Mapping[str, str] | None = None
    ) -> tuple[bytes, Mapping[str, str]]:
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(url), headers=some) as answer:
            self._fs._raise_not_found_for_status(answer, url)
            if some and answer.status != 206:
                raise BadPath(f"read {url}: its server gives no parts of objects")
            data = bytearray()
            async for chunk in answer.content.iter_chunked(_CHUNK):
                data += chunk
                if limit is not None and len(data) > limit:  # whatever length it told, if it told one
                    raise TooLarge(f"read {url}: more than {limit} bytes")
            return bytes(data), answer.headers


def _require_version(url: str, etag: str | None, headers: Mapping[str, str]) -> None:
    told = unquoted(headers.get("ETag"))
    if etag is not None and told is not None and told != etag:
        raise Conflict(f"read {url}: it is another version now")


async def _careful_client(**options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=public_socket), **options)


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a socket for an address as `getaddrinfo` gives it.

    Raises:
        Forbidden: it lies in a private network, is this machine's own, or tells cloud machines their credentials.
    """
    family, kind, protocol, _, where = address
    host = ipaddress.ip_address(str(where[0]).partition("%")[0])
    host = getattr(host, "ipv4_mapped", None) or host
    if not host.is_global or host.is_multicast:
        raise Forbidden(
            f"{where[0]} is a private address: --set storage.allow_private_hosts=true lets web addresses lead there"
        )
    return socket.socket(family, kind, protocol)


def _moment(headers: Mapping[str, str]) -> Any:
    try:
        return parsedate_to_datetime(headers["Last-Modified"])
    except (KeyError, ValueError):
        return None

"""Effects: objects on web servers: GETs with a timeout, a size limit and no access to private addresses.

Manifests are untrusted: by default they cannot refer to private addresses. A web server may redirect to any address, and a
host name may resolve to a public address when it is checked and to a private one when it is used. Therefore the address
itself is checked when a connection is made, for redirects too.
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
from imgbatch.storage.base import Meta, unquote_etag
from imgbatch.storage.fsspec_store import FsspecStore

_CHUNK = 1 << 16


class HttpStore(FsspecStore):
    """Web servers, through `http://` and `https://`."""

    def __init__(self, protocol: str, timeout_s: float, *, private_hosts: bool) -> None:
        super().__init__(protocol, {} if private_hosts else {"get_client": _client_without_private_hosts}, timeout_s)

    def read(self, path: str, limit: int | None = None) -> tuple[bytes, Meta]:
        """Return the content of an object and the metadata in the response, in one GET."""
        data, headers = sync(self._fs.loop, self._get, path, limit, timeout=self._timeout_s)
        return data, Meta(len(data), unquote_etag(headers.get("ETag")), _last_modified(headers))

    def read_range(self, path: str, start: int, end: int, etag: str | None) -> bytes:
        """Return a range of bytes; BadPath if the server does not support range requests."""
        request = {"Range": f"bytes={start}-{end - 1}"}
        data, headers = sync(self._fs.loop, self._get, path, end - start, request, timeout=self._timeout_s)
        _require_version(path, etag, headers)
        return bytes(data)

    def stream(self, path: str, start: int, etag: str | None) -> Iterator[bytes]:
        """Yield the content of an object from a position on, in one request; each chunk may take the time of a request."""
        response = sync(self._fs.loop, self._open_response, path, start, etag, timeout=self._timeout_s)
        try:
            while data := sync(self._fs.loop, response.content.read, _CHUNK, timeout=self._timeout_s):
                yield data
        finally:
            self._fs.loop.call_soon_threadsafe(response.close)

    async def _open_response(self, url: str, start: int, etag: str | None) -> aiohttp.ClientResponse:
        session = await self._fs.set_session()
        response: aiohttp.ClientResponse = await session.get(
            self._fs.encode_url(url), headers={"Range": f"bytes={start}-"} if start else None
        )
        self._fs._raise_not_found_for_status(response, url)
        try:
            _require_version(url, etag, response.headers)
        except Conflict:
            response.close()
            raise
        if start and response.status != 206:
            response.close()
            raise BadPath(f"read {url}: the server does not support range requests")
        return response

    def head(self, path: str) -> Meta:
        """Return the metadata of an object, by a GET whose body is not read: some servers do not answer a HEAD."""
        headers = sync(self._fs.loop, self._headers, path, timeout=self._timeout_s)
        length = headers.get("Content-Length")
        size = int(length) if length and length.isdigit() else None
        return Meta(size, unquote_etag(headers.get("ETag")), _last_modified(headers))

    async def _headers(self, url: str) -> Any:
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(url), headers={"Accept-Encoding": "identity"}) as response:
            self._fs._raise_not_found_for_status(response, url)
            response.close()
            return response.headers

    async def _get(
        self, url: str, limit: int | None, request: Mapping[str, str] | None = None
    ) -> tuple[bytes, Mapping[str, str]]:
        session = await self._fs.set_session()
        async with session.get(self._fs.encode_url(url), headers=request) as response:
            self._fs._raise_not_found_for_status(response, url)
            if request and response.status != 206:
                raise BadPath(f"read {url}: the server does not support range requests")
            data = bytearray()
            async for chunk in response.content.iter_chunked(_CHUNK):
                data += chunk
                if limit is not None and len(data) > limit:  # Content-Length may be missing or wrong
                    raise TooLarge(f"read {url}: more than {limit} bytes")
            return bytes(data), response.headers


def _require_version(url: str, etag: str | None, headers: Mapping[str, str]) -> None:
    current = unquote_etag(headers.get("ETag"))
    if etag is not None and current is not None and current != etag:
        raise Conflict(f"read {url}: the object has changed since it was listed")


async def _client_without_private_hosts(**options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=public_socket), **options)


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """Return a socket for an address in the form of `getaddrinfo`.

    Raises:
        Forbidden: the address is in a private network, is this machine, or is a cloud's metadata service.
    """
    family, kind, protocol, _, host_and_port = address
    host = ipaddress.ip_address(str(host_and_port[0]).partition("%")[0])
    host = getattr(host, "ipv4_mapped", None) or host
    if not host.is_global or host.is_multicast:
        raise Forbidden(
            f"{host_and_port[0]} is a private address. --set storage.allow_private_hosts=true allows URIs to reach it"
        )
    return socket.socket(family, kind, protocol)


def _last_modified(headers: Mapping[str, str]) -> Any:
    try:
        return parsedate_to_datetime(headers["Last-Modified"])
    except (KeyError, ValueError):
        return None

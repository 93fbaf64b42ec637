"""What fake-gcs-server lacks of Google's XML API, which obstore uses, in front of it: `python -m tests.gcs_front PORT BACKEND`.

fake-gcs-server takes no PUT of the XML API, ignores preconditions everywhere but in multipart uploads of the JSON API, and
lists a bucket in one page. This front turns a PUT into such an upload, so that the server itself checks the generation;
checks preconditions of GET and DELETE, one request after the other for each object; and cuts listings into pages. It asks
for a token and refuses rights where the name of a bucket says so. Everything else is passed on as it is.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from typing import Any
from urllib.parse import quote

from aiohttp import ClientSession, web

TOKEN = "a-token-that-no-log-may-hold"
_JSON = ("storage", "upload", "download", "batch")
_GENERATION, _IF_GENERATION = "x-goog-generation", "x-goog-if-generation-match"
_HEADERS = ("content-length", "content-range", "content-type", "etag", "last-modified", _GENERATION)
_MOST_KEYS = 1000
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")  # characters that XML cannot hold

Entry = dict[str, str]


class Front:
    """The server's state: a client of the backend, locks for objects, and listings that are being paged."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.client: ClientSession
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.listings: dict[str, list[Entry]] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer any request."""
        if request.path == "/token":
            return web.json_response({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
        if request.path.startswith("/computeMetadata") or (
            request.path == "/" and "Metadata-Flavor" in request.headers
        ):
            return _metadata(request.path)
        if request.path == "/expired":
            return web.json_response({"error": "invalid_grant", "error_description": "Token has expired"}, status=400)
        bucket, _, key = request.path.removeprefix("/").partition("/")
        if bucket in _JSON:
            return await self.pass_on(request)
        if refused := _refusal(request, bucket, key):
            return refused
        if not key:
            return await self.list(request, bucket)
        if request.method == "PUT":
            return await self.put(request, bucket, key)
        if request.method == "DELETE":
            return await self.delete(request, bucket, key)
        return await self.get(request, bucket, key)

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """Let the backend answer."""
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in ("host", "content-length")
        }
        async with self.client.request(
            request.method, self.backend + request.raw_path, headers=headers, data=await request.read()
        ) as answer:
            return web.Response(status=answer.status, body=await answer.read(), headers=_kept(answer.headers))

    async def get(self, request: web.Request, bucket: str, key: str) -> web.StreamResponse:
        """Answer a GET or HEAD, if the object meets its conditions."""
        headers = {"Range": request.headers["Range"]} if "Range" in request.headers else {}
        async with self.client.request(request.method, self._url(bucket, key), headers=headers) as answer:
            if answer.status < 400:
                wanted = request.headers.get("If-Match")
                generation = request.headers.get(_IF_GENERATION)
                if wanted not in (None, "*", answer.headers["etag"]) or generation not in (
                    None,
                    answer.headers[_GENERATION],
                ):
                    return _error(412, "PreconditionFailed")
            if answer.status == 404:
                return _error(404, "NoSuchKey")
            body = await answer.read()
            return web.Response(status=answer.status, body=body, headers=_kept(answer.headers))

    async def put(self, request: web.Request, bucket: str, key: str) -> web.StreamResponse:
        """Write an object; the backend checks the generation."""
        edge = "edge-of-a-part"
        part = f"--{edge}\r\nContent-Type: {{}}\r\n\r\n"
        body = b"".join(
            [part.format("application/json").encode(), json.dumps({"name": key}).encode(), b"\r\n",
             part.format("application/octet-stream").encode(), await request.read(), f"\r\n--{edge}--\r\n".encode()]
        )  # fmt: skip
        query = {"uploadType": "multipart"}
        if _IF_GENERATION in request.headers:
            query["ifGenerationMatch"] = request.headers[_IF_GENERATION]
        url = f"{self.backend}/upload/storage/v1/b/{bucket}/o"
        async with (
            self.locks[f"{bucket}/{key}"],
            self.client.post(
                url, params=query, data=body, headers={"Content-Type": f"multipart/related; boundary={edge}"}
            ) as answer,
        ):
            if answer.status == 412:
                return _error(412, "PreconditionFailed")
            if answer.status == 404:
                return _error(404, "NoSuchBucket")
            written = await answer.json(content_type=None)
            return web.Response(headers={"ETag": f'"{written["etag"]}"', _GENERATION: written["generation"]})

    async def delete(self, request: web.Request, bucket: str, key: str) -> web.StreamResponse:
        """Delete an object that meets the condition, while no other request writes it."""
        wanted = request.headers.get(_IF_GENERATION)
        async with self.locks[f"{bucket}/{key}"]:
            async with self.client.head(self._url(bucket, key)) as answer:
                if answer.status == 404:
                    return _error(404, "NoSuchKey")
                if wanted not in (None, answer.headers[_GENERATION]):
                    return _error(412, "PreconditionFailed")
            async with self.client.delete(self._url(bucket, key)):
                return web.Response(status=204)

    async def list(self, request: web.Request, bucket: str) -> web.StreamResponse:
        """Answer one page of a listing."""
        token = request.query.get("continuation-token", "")
        if not token:
            query = {name: request.query[name] for name in ("prefix", "delimiter") if name in request.query}
            async with self.client.get(f"{self.backend}/storage/v1/b/{bucket}/o", params=query) as answer:
                if answer.status >= 400:
                    return _error(404, "NoSuchBucket")
                entries = _entries(await answer.json(content_type=None))
            after = request.query.get("start-after", "")
            token = f"{time.monotonic_ns()}:0"
            self.listings[token.partition(":")[0]] = [entry for entry in entries if entry["Key"] > after]
        name, _, start = token.partition(":")
        entries, end = self.listings[name], int(start) + int(request.query.get("max-keys", _MOST_KEYS))
        root = ET.Element("ListBucketResult")
        ET.SubElement(root, "IsTruncated").text = "true" if end < len(entries) else "false"
        if end < len(entries):
            ET.SubElement(root, "NextContinuationToken").text = f"{name}:{end}"
        else:
            del self.listings[name]
        for entry in entries[int(start) : end]:
            element = ET.SubElement(root, "Contents" if "Size" in entry else "CommonPrefixes")
            for name, value in entry.items():
                text = (
                    quote(value, safe="/")
                    if request.query.get("encoding-type") == "url"
                    else _NO_XML.sub("\ufffd", value)
                )
                ET.SubElement(element, name if "Size" in entry else "Prefix").text = text if name == "Key" else value
        return web.Response(body=ET.tostring(root), content_type="application/xml")

    def _url(self, bucket: str, key: str) -> str:
        return f"{self.backend}/{bucket}/{quote(key, safe='')}"


def _entries(listing: dict[str, Any]) -> list[Entry]:
    """Return a listing of the JSON API as the elements that the XML API has, in the order of the keys."""
    entries = [{"Key": prefix} for prefix in listing.get("prefixes", [])]
    entries += [
        {"Key": item["name"], "Size": item["size"], "ETag": f'"{item["etag"]}"', "LastModified": item["updated"]}
        for item in listing.get("items", [])
    ]
    return sorted(entries, key=lambda entry: entry["Key"])


def _metadata(path: str) -> web.Response:
    """Answer as the metadata server of a machine with a service account."""
    answers = {
        "token": {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"},
        "default": {
            "email": "tests@p.iam.gserviceaccount.com",
            "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
        },
    }
    answer = answers.get(path.rstrip("/").rpartition("/")[2])
    headers = {"Metadata-Flavor": "Google"}
    return web.json_response(answer, headers=headers) if answer else web.Response(text="p", headers=headers)


def _refusal(request: web.Request, bucket: str, key: str) -> web.StreamResponse | None:
    """Return what a bucket with such a name refuses: `private-…` everyone without the token, others one right."""
    if bucket.startswith("private-") and request.headers.get("Authorization") != f"Bearer {TOKEN}":
        return _error(401, "AuthenticationRequired")
    writes = request.method in ("PUT", "DELETE")
    if (
        (bucket.startswith("no-listing") and not key)
        or (bucket.startswith("no-writing") and writes)
        or (key.endswith("no-reading.jpg") and request.method in ("GET", "HEAD"))
    ):
        return _error(403, "AccessDenied")
    return None


def _error(status: int, code: str) -> web.Response:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}.</Message></Error>"
    return web.Response(status=status, text=body, content_type="application/xml")


def _kept(headers: object) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() in _HEADERS}  # type: ignore[attr-defined]


async def serve(port: int, backend: str) -> None:
    """Serve until the process is ended."""
    front = Front(backend)
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{anything:.*}", front.answer)
    async with ClientSession(auto_decompress=False) as front.client:
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2]))

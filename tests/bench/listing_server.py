"""A server whose buckets and containers hold as many objects in one flat folder as their names say: `flat-200000`.

    python -m tests.bench.listing_server PORT

It answers listings in the protocols of S3, Google and Azure, a thousand keys to a page (Azure: 5,000), and 404 to all else.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

ETAG = "0123456789abcdef0123456789abcdef"


def key(number: int) -> str:
    """Return the key of an object."""
    return f"album/{number:08d}.jpg"


def s3_page(start: int, count: int, total: int) -> str:
    """Return a page of S3's, and Google's, protocol."""
    entries = "".join(
        f"<Contents><Key>{key(number)}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified>"
        f"<ETag>&quot;{ETAG}&quot;</ETag><Size>100000</Size></Contents>"
        for number in range(start, min(total, start + count))
    )
    end = start + count
    more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < total else ""
    return f"<ListBucketResult><IsTruncated>{str(end < total).lower()}</IsTruncated>{more}{entries}</ListBucketResult>"


def azure_page(start: int, count: int, total: int) -> str:
    """Return a page of Azure's protocol."""
    entries = "".join(
        f"<Blob><Name>{key(number)}</Name><Properties><Last-Modified>Fri, 02 Jan 2026 03:04:05 GMT</Last-Modified>"
        f"<Etag>0x8DE{number:012d}</Etag><Content-Length>100000</Content-Length>"
        "<Content-Type>image/jpeg</Content-Type><BlobType>BlockBlob</BlobType></Properties></Blob>"
        for number in range(start, min(total, start + count))
    )
    end = start + count
    return (
        f'<?xml version="1.0"?><EnumerationResults><Blobs>{entries}</Blobs>'
        f"<NextMarker>{end if end < total else ''}</NextMarker></EnumerationResults>"
    )


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        names = [name for name in unquote(parts.path).split("/") if name.startswith("flat-")]
        listing = names and ("list-type" in query or "comp" in query)
        album = "album/".startswith(query.get("prefix", "")) or query.get("prefix") == "album/"
        total = int(names[0].removeprefix("flat-")) if listing and album else 0
        start = int(query.get("continuation-token") or query.get("marker") or 0)
        page = azure_page(start, 5000, total) if "comp" in query else s3_page(start, 1000, total)
        self.answer(200 if listing else 404, page.encode() if listing else b"")

    def do_HEAD(self) -> None:
        self.answer(404, b"")

    def answer(self, status: int, body: bytes) -> None:
        """Send a response."""
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()

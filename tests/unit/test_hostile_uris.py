"""Untrusted URIs: what they must not reach, and what they cannot do to a run."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fsspec.implementations.http import HTTPFileSystem

from imgbatch.config.sections import FetchConfig, SourceConfig, StorageConfig
from imgbatch.errors import BadPath, Conflict, Forbidden, InputError, TimedOut, TooLarge
from imgbatch.rejects import Refusal
from imgbatch.schema import LISTING
from imgbatch.sources.fetch import Fetcher
from imgbatch.sources.recognise import list_all, recognise
from imgbatch.storage import http as http_module
from imgbatch.storage.stores import Folder, Stores

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
Served = Callable[..., str]


def stores(**config: Any) -> Stores:
    """Return stores with credentials, which must not be sent to any server."""
    return Stores(StorageConfig(retries=0, **config), KEYS)


@pytest.fixture
def served() -> Iterator[Served]:
    """Start a web server on an address of this machine, with replies that a test sets; return its URL."""
    with ExitStack() as running:

        def start(reply: Callable[[Any], None], host: str = "127.0.0.1") -> str:
            handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"do_GET": reply, "log_message": _silent})
            server = http.server.ThreadingHTTPServer((host, 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            running.callback(server.server_close)
            running.callback(server.shutdown)
            return f"http://{host}:{server.server_port}"

        HTTPFileSystem.clear_instance_cache()
        yield start
        HTTPFileSystem.clear_instance_cache()


def _silent(*arguments: object) -> None:
    """Log nothing."""


def body(data: bytes, **headers: str) -> Callable[[Any], None]:
    """Return a reply with these bytes."""

    def reply(request: Any) -> None:
        request.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(data)

    return reply


def redirect(url: str) -> Callable[[Any], None]:
    """Return a reply that redirects."""

    def reply(request: Any) -> None:
        request.send_response(302)
        request.send_header("Location", url)
        request.end_headers()

    return reply


# Buckets


@pytest.mark.parametrize(
    "bucket", ["evil.org#", "169.254.169.254#", "evil.org?", "a@evil.org", "b:99", "..", ".", "my bucket", "bü", "a\nb"]
)
def test_a_bucket_name_cannot_redirect_a_signed_request(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: pytest.fail(f"asked for {arguments}"))
    with pytest.raises(BadPath, match="not a valid bucket name"):
        stores().read(f"s3://{bucket}/latest/meta-data")
    (fetched,) = Fetcher(stores(), FetchConfig(concurrency=1), SourceConfig())(listed(f"s3://{bucket}/x.jpg"))
    assert isinstance(fetched.content, Refusal) and fetched.content.reason == "unsupported"


def listed(*uris: str) -> pa.Table:
    """Return listing rows with only a URI."""
    return pa.Table.from_pylist([{"uri": uri} for uri in uris], schema=LISTING)


# Web servers


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.9", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "::1", "fe80::1%lo", "fd00:ec2::254", "::ffff:169.254.169.254", "::ffff:10.0.0.1"],
)  # fmt: skip
def test_private_addresses_are_refused(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(Forbidden, match=r"storage\.allow_private_hosts"):
        http_module.public_socket((family, socket.SOCK_STREAM, 6, "", (address, 80)))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1"])
def test_public_addresses_are_allowed(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    http_module.public_socket((family, socket.SOCK_STREAM, 6, "", (address, 80))).close()


def test_a_name_that_resolves_to_a_private_address_is_refused_by_default(served: Served) -> None:
    port = served(body(b"secret", ETag='"e1"', Last_Modified="Fri, 02 Jan 2026 03:04:05 GMT")).rpartition(":")[2]
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(Forbidden, match="private address"):
            stores().read(f"http://{host}:{port}/latest")
        with pytest.raises(Forbidden, match="private address"):
            recognise(stores(), [f"http://{host}:{port}/latest"], SourceConfig())
    data, meta = stores(allow_private_hosts=True).read(f"http://localhost:{port}/latest")
    assert (data, meta.size, meta.etag) == (b"secret", 6, "e1")
    assert meta.last_modified is not None and meta.last_modified.year == 2026


def test_the_target_of_a_redirect_is_checked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two addresses of this machine are taken for a public and a private one."""
    asked: list[str] = []

    def guarded(address: tuple[Any, ...]) -> socket.socket:
        asked.append(address[4][0])
        return socket.socket(*address[:3]) if asked[-1] == "127.0.0.1" else web_public(address)

    web_public = http_module.public_socket
    monkeypatch.setattr(http_module, "public_socket", guarded)
    inside = served(body(b"secret"), host="127.0.0.2")
    with pytest.raises(Forbidden, match=r"127\.0\.0\.2 is a private address"):
        stores().read(f"{served(redirect(inside + '/x'))}/a.jpg")
    assert asked == ["127.0.0.1", "127.0.0.2"]
    with pytest.raises(Exception, match="file"):
        stores().read(f"{served(redirect('file:///etc/passwd'))}/a.jpg")


def test_an_endless_body_is_too_large_and_a_slow_one_times_out(served: Served) -> None:
    def endless(request: Any) -> None:
        request.send_response(200)
        request.end_headers()
        while True:
            request.wfile.write(bytes(1 << 16))

    def silent(request: Any) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "5")
        request.end_headers()
        gone.wait(20)

    gone = threading.Event()
    with pytest.raises(TooLarge):
        stores(allow_private_hosts=True).read(f"{served(_until_left(endless))}/a.jpg", 1_000_000)
    with pytest.raises(TimedOut):
        stores(allow_private_hosts=True, timeout_s=0.5).read(f"{served(silent)}/a.jpg")
    gone.set()


def _until_left(reply: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(request: Any) -> None:
        try:
            reply(request)
        except ConnectionError:
            request.close_connection = True

    return run


def test_web_servers_with_and_without_range_requests(served: Served) -> None:
    def parts(request: Any) -> None:
        first, _, last = (request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
        data = b"0123456789"[int(first) : int(last or 9) + 1]
        request.send_response(206 if "Range" in request.headers else 200)
        for name, value in (("Content-Length", str(len(data))), ("ETag", '"e1"')):
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)

    store, path = stores(allow_private_hosts=True).resolve(f"{served(parts)}/a.tar")
    assert store.read_range(path, 2, 5, "e1") == b"234"
    assert b"".join(store.stream(path, 0, "e1")) == b"0123456789" and b"".join(store.stream(path, 7, None)) == b"789"
    with pytest.raises(Conflict):
        list(store.stream(path, 0, "e0"))
    store, path = stores(allow_private_hosts=True).resolve(f"{served(body(b'0123456789'))}/a.tar")
    for read in (lambda s, p: s.read_range(p, 2, 5, None), lambda s, p: list(s.stream(p, 7, None))):
        with pytest.raises(BadPath, match="range requests"):
            read(store, path)


# Manifests


def uris(folder: Folder, name: str, **config: Any) -> list[str]:
    """List a manifest as the job does."""
    sources = recognise(folder.stores, [folder.at(name)], SourceConfig(**config))
    result = list_all(sources)
    return [uri for each in result for uri in each.batch["uri"].to_pylist()]


@pytest.mark.parametrize(
    "name", ["file:///etc/passwd", "/etc/passwd", "local:///etc/passwd", "memory://x", "ftp://h/x"]
)
def test_a_manifest_in_a_bucket_cannot_name_other_schemes(s3: Any, name: str) -> None:
    folder = Folder(s3.stores(), "s3://images/hostile")
    folder.put("list.csv", f"uri\na.jpg\n{name}\n".encode())
    with pytest.raises(InputError, match=r"list\.csv, line \d, names .*source\.schemes=") as caught:
        uris(folder, "list.csv")
    assert caught.value.exit_code == 2
    allowed = "s3,file,memory,ftp"
    assert len(uris(folder, "list.csv", schemes=allowed)) == 2


def test_dots_in_a_manifest_stay_within_its_scheme(s3: Any, tmp_path: Path) -> None:
    folder = Folder(s3.stores(), "s3://images/hostile")
    folder.put("dots.csv", b"uri\n../../../../../etc/passwd\n../../..\n")
    result = uris(folder, "dots.csv")
    assert all(uri.startswith("s3://") for uri in result)
    reasons = [
        fetched.content.reason
        for fetched in Fetcher(s3.stores(), FetchConfig(concurrency=1), SourceConfig())(listed(*result))
    ]
    assert reasons == ["unsupported"] * 2
    local = Folder(s3.stores(), str(tmp_path))
    local.put("list.csv", b"uri\n../other/a.jpg\n/elsewhere/b.jpg\n")
    assert uris(local, "list.csv") == [f"{tmp_path.parent}/other/a.jpg", "/elsewhere/b.jpg"]

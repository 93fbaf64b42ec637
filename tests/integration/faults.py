"""Faults put into processes from outside: a `sitecustomize` on PYTHONPATH, and a proxy before the S3 server.

The product has no hook for tests; what a fault needs is wrapped around its functions when a module is imported.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from textwrap import indent

from tests.servers import serving_http

_HOOK = """
import importlib.abc, importlib.util, os, signal, sys, time

def patch(module):
{body}

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None, patch=patch):
        if name != {name!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module, run=run, patch=patch: (run(module), patch(module))
        return spec

sys.meta_path.insert(0, Hook())
"""


def patched(place: Path, module: str, body: str, **more: str) -> dict[str, str]:
    """Return an environment in which every Python process runs `body` when it has imported `module`.

    `more` gives bodies for further modules of the package, by their short names.
    """
    place.mkdir(parents=True, exist_ok=True)
    bodies = {module: body, **{f"imgbatch.{name}": text for name, text in more.items()}}
    hooks = [_HOOK.format(name=name, body=indent(text, "    ")) for name, text in bodies.items()]
    (place / "sitecustomize.py").write_text("".join(hooks))
    return {"PYTHONPATH": str(place)}


def slow_decoding(place: Path, seconds: float) -> dict[str, str]:
    """Return an environment in which each image takes so long that a run can be met in its middle."""
    return patched(
        place,
        "imgbatch.decode",
        f"original = module.decode\nmodule.decode = lambda *a, **k: (time.sleep({seconds}), original(*a, **k))[1]\n",
    )


def waiting_for_claims(place: Path, ready: Path, go: Path) -> dict[str, str]:
    """Return an environment in which a run notes itself in a folder before it takes the claim, and waits for a file."""
    body = f"""
original = module.take
def take(*arguments, **options):
    open({str(ready)!r} + f"/{{os.getpid()}}", "w").close()
    while not os.path.exists({str(go)!r}):
        time.sleep(0.001)
    return original(*arguments, **options)
module.take = take
"""
    return patched(place, "imgbatch.ledger.claims", body)


Plan = Callable[[str, str, int], int | str | float | None]
"""(method, path, how often this was asked before) -> what becomes of the request.

None: it is let through. A status: that is the answer; 0: hang up. A float: it is let through so many seconds later.
lost: it is let through, and then no answer. cut: half of the body, then the connection ends. short: half of the body as if
it were all of it. lying: another ETag. expired: the credentials are no longer good.
"""


@contextmanager
def proxy(endpoint: str, plan: Plan) -> Iterator[str]:
    """Serve what the S3 server serves, but for what the plan answers itself; yield the URL."""
    known = {"target": re.sub("^http://", "", endpoint), "plan": staticmethod(plan), "asked": Counter()}
    with serving_http(type("Handler", (_Proxy,), known)) as url:
        yield url


class _Proxy(BaseHTTPRequestHandler):
    """Asks the plan, and then the server."""

    protocol_version = "HTTP/1.1"
    target: str
    plan: Plan
    asked: Counter[tuple[str, str]]
    lock = threading.Lock()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.lock:
            count = self.asked[self.command, self.path]
            self.asked[self.command, self.path] += 1
        planned = self.plan(self.command, self.path, count)
        if isinstance(planned, float):
            time.sleep(planned)
        elif planned == "expired":
            self._reply(400, [("Content-Type", "application/xml")], _error(400, "ExpiredToken"))
            return
        elif planned == 0:
            self.close_connection = True
            return
        elif isinstance(planned, int):
            self._reply(planned, [("Content-Type", "application/xml")], _error(planned))
            return
        connection = http.client.HTTPConnection(self.target, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self._spoil(str(planned), answer.status, answer.getheaders(), content)

    def _spoil(self, how: str, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        if how == "lost":
            self.close_connection = True
            return
        if how == "lying":
            headers = [(name, '"a lie"' if name.lower() == "etag" else value) for name, value in headers]
        half = body[: len(body) // 2]
        self._reply(status, headers, half if how == "short" else body, half if how == "cut" else None)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 - the names that http.server calls

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes, sent: bytes | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        known = {name.lower(): value for name, value in headers}
        length = known.get("content-length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if sent is None else sent)
        self.close_connection = self.close_connection or sent is not None

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def _error(status: int, code: str = "") -> bytes:
    code = code or {403: "AccessDenied", 404: "NoSuchKey", 503: "SlowDown"}.get(status, "InternalError")
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by plan</Message></Error>".encode()

"""A process that starts Ray once and then runs job after job, one JSON line each: {"argv": …, "env": …}.

Most tests ask what a job does, not how Ray starts; this saves each of them the ten seconds of a cold start. A job takes
an already initialised Ray as it is. The tests in which a process dies or a signal comes start one of their own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one job; return what it left on the screen, and its exit code."""
    import importlib

    out, err = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    os.environ.update(request["env"])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(f"imgbatch.commands.{request['name']}").main(request["argv"])
        except SystemExit as error:
            code = error.code
        except BaseException:  # noqa: BLE001 - as the interpreter would
            traceback.print_exc()
            code = 1
    os.environ.clear()
    os.environ.update(before)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def serve() -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    serve()

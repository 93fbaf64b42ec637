"""What the tests of the recipes share: their files, the exit codes, and programs that stand in for imgbatch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from imgbatch.errors import EXIT_CODES, retry_helps
from tests.conftest import ROOT
from tests.deploy.conftest import DEPLOY, missing

BIN = ROOT / ".venv-recipes" / "bin"
"""Programs of `recipes.txt`."""

KILLED = 137
CODES = sorted({*(entry.code for entry in EXIT_CODES), KILLED} - {0})
RETRIED = {code for code in CODES if retry_helps(code)}


def documents(name: str) -> list[dict[str, Any]]:
    """Return the documents of a YAML file of `deploy/`."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    """Return the one document of a kind."""
    (found,) = (document for document in documents(name) if document["kind"] == kind)
    return found


def program(name: str) -> str:
    """Return the path of a program in `.venv-recipes`; skip the test if that environment is missing."""
    if not (BIN / name).exists():
        missing(f".venv-recipes/bin/{name}")
    return str(BIN / name)


def system_program(name: str) -> str:
    """Return the path of a program of this machine; skip the test if it is missing."""
    path = shutil.which(name)
    if path is None:
        missing(name)
    return str(path)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the root of the checkout."""
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )


def in_recipes(code: str, *arguments: object) -> Any:
    """Run Python code in `.venv-recipes`; it gets the arguments in `given`, and prints its result as JSON."""
    head = "import json, sys\ngiven = json.loads(sys.argv[1])\n"
    with tempfile.TemporaryDirectory() as home:  # SkyPilot writes there
        done = run(program("python"), "-c", head + code, json.dumps(arguments), HOME=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Fake:
    """A folder for PATH with an `imgbatch` that records its arguments and ends with the given codes, one after another.

    The scripts are under test here, not imgbatch. After the last code it ends with 0.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calls, self._codes = folder / "calls", folder / "codes"
        self._calls.touch()
        self.add(
            "imgbatch",
            f'echo "$@" >> {self._calls}\n'
            f"code=$(head -n 1 {self._codes})\nsed -i 1d {self._codes}\n"
            'if [ "$code" = 137 ]; then kill -KILL $$; fi\n'
            'if [ "$code" = wait ]; then trap "exit 143" TERM; echo waiting; while :; do sleep 0.1; done; fi\n'
            'exit "${code:-0}"\n',
        )
        self.ends_with()

    def add(self, name: str, body: str) -> None:
        """Add a program."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{body}")
        path.chmod(0o755)

    def ends_with(self, *codes: int | str) -> None:
        """Set the codes of the next calls; `wait` waits for SIGTERM and ends with 143."""
        self._codes.write_text("".join(f"{code}\n" for code in codes))

    @property
    def calls(self) -> list[str]:
        """The arguments of each call so far."""
        return self._calls.read_text().splitlines()

    @property
    def path(self) -> str:
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

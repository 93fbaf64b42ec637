"""Effects: a file of environment variables for a Ray job: credentials that must not be in the metadata of the job.

The driver and each worker read the file that IMGBATCH_ENV_FILE names when they import the package, before a store is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from imgbatch.errors import ConfigError

VARIABLE = "IMGBATCH_ENV_FILE"
"""Names the file; a relative path is one below the working directory of the job."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def load(*, strict: bool = True) -> None:
    """Set the variables of the file that IMGBATCH_ENV_FILE names, if it names one. They replace those of the node.

    Args:
        strict: False: do nothing if the file cannot be read. A driver reports that later.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        os.environ.update(parse(Path(path).read_text(encoding="utf-8"), path, os.environ))
    except OSError as error:
        if strict:
            raise ConfigError(f"{VARIABLE} {path}: {error.strerror}") from error
    except (ConfigError, UnicodeDecodeError):
        if strict:
            raise


def parse(text: str, name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a file with lines `NAME=VALUE`, as Docker reads it.

    A line with a name alone takes the value from the environment. Empty lines and lines that begin with `#` are skipped,
    `export` before a name, and quotes around a value.

    Args:
        name: the name of the file, for messages, which contain no value.
        environment: the source of values that the file does not have.

    Raises:
        ConfigError: a line is not of this form, or its variable is not set.

    >>> parse("# key\\nexport A='x y'\\nB\\n", "job.env", {"B": "2"})
    {'A': 'x y', 'B': '2'}
    """
    variables: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        key, separator, value = (part.strip() for part in line.partition("="))
        place = f"--env-file {name}, line {number}"
        if not _NAME.fullmatch(key):
            raise ConfigError(f"{place}: expected NAME=VALUE")
        if key.startswith("RAY_"):  # Ray's processes have started when the file is read
            raise ConfigError(f"{place}: {key} must be set when Ray starts the job: use env_vars in --runtime-env")
        if not separator and key not in environment:
            raise ConfigError(f"{place}: {key} has no value, and is not set in the environment")
        variables[key] = _unquoted(value) if separator else environment[key]
    return variables


def serialize(variables: Mapping[str, str]) -> str:
    """Return the text of a file with these variables.

    >>> parse(serialize({"A": "'x'", "B": ""}), "job.env", {})
    {'A': "'x'", 'B': ''}

    Raises:
        ConfigError: a value has more than one line.
    """
    for name, value in variables.items():
        if len(value.splitlines()) > 1:
            raise ConfigError(f"--env-file: the value of {name} has more than one line")
    return "".join(f'{name}="{value}"\n' for name, value in variables.items())


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value

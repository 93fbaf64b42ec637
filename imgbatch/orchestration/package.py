"""Effects: the package that a Ray job runs in: the files that are uploaded, and the command that starts there.

The job runs in the directory to which Ray unpacks the package, on each node. So a relative path in the arguments of a verb can
only mean a file of the package.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import imgbatch
from imgbatch.errors import UsageError
from imgbatch.storage.uris import is_local
from imgbatch.terminal.plurals import counted

ENV_FILE = ".imgbatch-env"
_SCRIPT, _FILES = ".imgbatch-job.sh", ".imgbatch-files"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # so that equal files give an equal package, which Ray has already
_SHOWN = 5  # of the largest files

# The interpreter is that of Ray on this cluster, which need not be the `python` of its PATH. A virtual environment that Ray
# made for the job, or in which Ray was started, is in VIRTUAL_ENV. Otherwise the process that started this script, Ray's
# supervisor of the job, has loaded Ray from below the right environment. The traps matter until `exec`: a shell continues after
# a SIGINT that only its child took.
_ENTRYPOINT = """\
trap 'exit 130' INT
trap 'exit 143' TERM HUP
has_ray='import importlib.util, sys; sys.exit(importlib.util.find_spec("ray") is None)'
loaded='s|.* \\(/.*\\)/lib/python[0-9.]*/[a-z]*-packages/ray/_raylet.*|\\1|p'
prefix=$(sed -n "$loaded" "/proc/$PPID/maps" 2>/dev/null | head -n 1)
for python in "$IMGBATCH_PYTHON" "$VIRTUAL_ENV/bin/python" "$prefix/bin/python" "$prefix/bin/python3" python3 python; do
    if [ -n "$python" ] && "$python" -c "$has_ray" 2>/dev/null; then
        exec "$python" -m imgbatch "$@"
    fi
done
echo "error: no Python interpreter with Ray was found on this node: set IMGBATCH_PYTHON in env_vars of --runtime-env" >&2
exit 2
"""

# Options whose value may be a file or folder on the machine that submits, by the name of the flag or key.
_FLAGS = ("config", "taxonomy", "prices", "model", "base", "against")
_MODEL_KEYS = ("name", "weights", "labels", "taxonomy")


@dataclass(slots=True)
class Package:
    """Files to upload, by their path in the package, and the arguments of the verb as they are written there."""

    arguments: tuple[str, ...]
    files: dict[str, Path] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    """The variables of --env-file."""
    has_code: bool = True
    """Whether the package `imgbatch` is uploaded."""

    @property
    def entrypoint(self) -> list[str]:
        """The words of the command that starts the job, before those of the verb."""
        return ["exec", "sh", _SCRIPT]

    def contents(self) -> tuple[str, ...]:
        """Return a digest of each file that the arguments name."""
        return tuple(
            f"{name}:{hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in sorted(self.files.items())
        )

    def add_to(self, archive: Path) -> None:
        """Add the files to a zip archive, which is created if it does not exist.

        Ray keeps the modes of files: what may be secret is for their owner alone.
        """
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as package:
            present = set(package.namelist())
            if self.has_code and "imgbatch/__init__.py" not in present:
                for name, path in _code():
                    _write(package, name, path.read_bytes(), 0o644)
            for name, path in sorted(self.files.items()):
                if name not in present:
                    _write(package, name, path.read_bytes(), 0o600)
            _write(package, _SCRIPT, _ENTRYPOINT.encode(), 0o644)
            if self.variables:
                from imgbatch.config import env_file

                # The URI of a package, which is in the metadata, is a hash of its content: it must not identify a secret.
                salt = f"# {secrets.token_hex(16)}\n"
                _write(package, ENV_FILE, (salt + env_file.serialize(self.variables)).encode(), 0o600)


def collect(arguments: Sequence[str], flags: Any, config: Any, working_dir: Path | None) -> Package:
    """Return the package of a job: the files of this machine that its arguments name.

    With a working directory, relative paths are those of its files, and only absolute ones are added.

    Args:
        arguments: of the verb.
        flags: the same, parsed.
        config: the configuration that results from them.
        working_dir: what the user uploads; None: the package imgbatch and the files that are named.

    Raises:
        UsageError: an argument names a local path that the job cannot read or write.
    """
    package = Package(tuple(arguments))
    _require_reachable(config, flags, uploaded=working_dir is not None)
    for flag in ("config", "taxonomy", "prices"):  # the driver alone reads these, so that they may be anywhere
        path = getattr(flags, flag, None)
        if path and is_local(path) and not _is_inside(path):
            name = f"{_FILES}/{flag}-{Path(path).name}"
            if Path(path).is_file():
                package.files[name] = Path(path)
                package.arguments = tuple(_replaced(package.arguments, f"--{flag}", path, name))
    if working_dir is None:
        for path in _named(flags, config):
            package.files |= _below(path)
    return package


def _named(flags: Any, config: Any) -> Iterator[str]:
    """Yield the relative local paths that exist, of the options that take a file or a model directory."""
    values = [getattr(flags, flag, None) for flag in _FLAGS]
    values += [getattr(config, key, None) for key in ("base", "taxonomy")]
    model = getattr(config, "model", None)
    values += [getattr(model, key, None) for key in _MODEL_KEYS]
    for value in dict.fromkeys(values):
        if isinstance(value, str) and value and is_local(value) and _is_inside(value) and Path(value).exists():
            yield value


def _below(path: str) -> dict[str, Path]:
    """Return a file, or all files of a folder, by their path in the package."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    return {str(PurePosixPath(os.path.normpath(file))): file for file in files}


def _require_reachable(config: Any, flags: Any, *, uploaded: bool) -> None:
    """Refuse inputs and outputs that are relative paths: they would be in a temporary directory of the job."""
    output = getattr(config, "output", "")
    output = output if isinstance(output, str) else output.uri or getattr(flags, "output", "") or ""
    inputs = [] if uploaded else [*getattr(config, "input", ()), getattr(flags, "labels", None) or ""]
    for flag, uris in (("--output", [output]), ("--input", inputs)):
        for uri in filter(None, uris):
            if is_local(uri) and not os.path.isabs(uri.rpartition("://")[2]):
                raise UsageError(
                    f"{flag} {uri} is a relative path, which does not exist on the cluster: use a store, or an absolute path "
                    "that is the same shared folder on all nodes"
                )
    model = getattr(getattr(config, "model", None), "name", None) or getattr(config, "base", None)
    if isinstance(model, str) and is_local(model) and model.startswith("..") and not uploaded:
        raise UsageError(
            f"the model {model} is outside of this directory: submit from a directory above it, or use a store"
        )


def _is_inside(path: str) -> bool:
    """Return whether a path is relative, and stays below the directory that it is relative to."""
    return not os.path.isabs(path) and not os.path.normpath(path).startswith("..")


def _replaced(arguments: Iterable[str], flag: str, value: str, new: str) -> Iterator[str]:
    """Yield arguments with another value of a flag, written as one word or two."""
    previous = ""
    for word in arguments:
        if previous == flag and word == value:
            yield new
        else:
            yield f"{flag}={new}" if word == f"{flag}={value}" else word
        previous = word


def _code() -> Iterator[tuple[str, Path]]:
    """Yield the files of the package imgbatch, with their names in the package."""
    root = Path(imgbatch.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(PurePosixPath("imgbatch", path.relative_to(root))), path


def _write(package: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = (stat.S_IFREG | mode) << 16
    package.writestr(info, content)


def describe_size(archive: Path, max_bytes: int) -> str:
    """Return an error message that names the largest files of an archive."""
    with zipfile.ZipFile(archive) as package:
        infos = sorted(package.infolist(), key=lambda info: info.compress_size, reverse=True)
    largest = ", ".join(f"{info.filename} ({_mib(info.compress_size)})" for info in infos[:_SHOWN])
    return (
        f"the package of the job has {_mib(archive.stat().st_size)} in {counted(len(infos), 'file')}, and Ray accepts at most "
        f"{_mib(max_bytes)}. The largest are {largest}. Omit them with .gitignore or .rayignore, or with excludes in "
        "--runtime-env; put models into a store"
    )


def _mib(count: int) -> str:
    """Return a number of bytes with its unit.

    >>> _mib(3 << 19), _mib(2000)
    ('1.5 MiB', '2.0 kB')
    """
    return f"{count / (1 << 20):,.1f} MiB" if count >= 1 << 20 else f"{count / 1000:.1f} kB"

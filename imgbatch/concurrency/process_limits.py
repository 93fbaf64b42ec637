"""Effects: resource limits of a process (`ulimit`, batch systems), compared with what Ray needs on this machine."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from imgbatch.errors import UsageError

_GIB = 1 << 30
# Ray's own defaults for the size of its object store (2.60).
_STORE_PROPORTION, _STORE_CAP_WITHOUT_SHM, _STORE_MAX = 0.3, 10_000_000_000, 200_000_000_000
_STORE_VARIABLE = "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"
_MAX_OPEN_FILES = 1 << 16

# Needed in addition to the object store, measured with 2 cores: with a store of 7 GiB, a run succeeds with 14 GiB of
# address space and ends without a message with 10 (28 November 2026). A thread reserves 72 MiB, and some libraries start
# one per core.
_ADDRESS_SPACE, _ADDRESS_SPACE_PER_CORE = 6 * _GIB, 72 << 20
_DATA = 2 * _GIB  # with 1 GiB every image is rejected as out_of_memory
_OPEN_FILES = 256  # with 64 the actors never start


def memory_of_node() -> int:
    """Return the bytes of memory of this machine, or of the container that this process runs in."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.exists() else "max"
    return min(memory, int(limit)) if limit.isdigit() else memory


def require_limits() -> None:
    """Refuse limits under which Ray, its workers or this process would end without a message.

    The limit of open files is raised as far as the system allows.

    Raises:
        UsageError: a limit is too low. The message names it and how to raise it.
    """
    proportion = float(os.environ.get(_STORE_VARIABLE, _STORE_PROPORTION))
    store = object_store_bytes(memory_of_node(), _shared_memory(), proportion)
    address_space = store + _ADDRESS_SPACE + _ADDRESS_SPACE_PER_CORE * (os.cpu_count() or 1)
    for kind, name, flag, description, needed in (
        (resource.RLIMIT_AS, "RLIMIT_AS", "v", "the address space of a process", address_space),
        (resource.RLIMIT_DATA, "RLIMIT_DATA", "d", "the data of a process", _DATA),
        (resource.RLIMIT_FSIZE, "RLIMIT_FSIZE", "f", "the size of a file", store),
    ):
        limit = _soft_limit(kind)
        if limit is not None and limit < needed:
            raise UsageError(
                f"{description} is limited to {_readable(limit)} ({name}, ulimit -{flag}); Ray, with an object store of "
                f"{_readable(store)}, needs {_readable(needed)} on this machine. Lift the limit (ulimit -{flag} unlimited; in "
                f"a batch system, limit the memory in use instead), or make the store smaller ({_STORE_VARIABLE}=0.1)"
            )
    _raise_open_files()
    files = _soft_limit(resource.RLIMIT_NOFILE)
    if files is not None and files < _OPEN_FILES:
        raise UsageError(
            f"a process may open {files} files (RLIMIT_NOFILE, ulimit -n); Ray needs {_OPEN_FILES}, and each request in "
            "flight one more: raise the limit (ulimit -n 4096)"
        )


def address_space_hint() -> str:
    """Return a suffix for the message about a process that ended, if a limit of its address space may be the cause."""
    limit = _soft_limit(resource.RLIMIT_AS)
    return f" (its address space is limited to {_readable(limit)}: ulimit -v)" if limit is not None else ""


def limit_data(max_bytes: int) -> None:
    """Limit the data of this process. A lower limit that is already set is kept."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    max_bytes = max_bytes if hard == resource.RLIM_INFINITY else min(max_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


def object_store_bytes(memory: int, shared_memory: int, proportion: float = _STORE_PROPORTION) -> int:
    """Return the maximum size of Ray's object store on a machine.

    >>> object_store_bytes(64 << 30, 32 << 30) >> 30, object_store_bytes(512 << 30, 64 << 20) // 10**9
    (19, 10)
    """
    return min(int(proportion * memory), max(_STORE_CAP_WITHOUT_SHM, int(0.95 * shared_memory)), _STORE_MAX)


def _shared_memory() -> int:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return status.f_frsize * status.f_blocks


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def _soft_limit(kind: int) -> int | None:
    """Return the limit in force; None if there is none."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _readable(count: int) -> str:
    """Return a number of bytes with its unit.

    >>> _readable(8 << 30), _readable(1024000)
    ('8.0 GiB', '0.98 MiB')
    """
    return f"{count / _GIB:.1f} GiB" if count >= _GIB / 10 else f"{count / (1 << 20):.2f} MiB"

"""Effects: what the operating system allows a process (`ulimit`, batch systems), compared with what Ray needs on this
machine.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from imgbatch.errors import UsageError

_GIB = 1 << 30
_STORE_SHARE, _STORE_LEAST_CAP, _STORE_MOST = 0.3, 10_000_000_000, 200_000_000_000  # as Ray sizes it (2.60)
_STORE_VARIABLE = "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"
_MOST_FILES = 1 << 16

# Beside the object store, measured with 2 cores: a run succeeds with 14 GiB of address space where the store has 7, and
# ends without a message with 10 (28 November 2026). A thread reserves 72 MiB, and some libraries start one a core.
_ADDRESSES, _ADDRESSES_A_CORE = 6 * _GIB, 72 << 20
_DATA = 2 * _GIB  # 1 GiB: every image is rejected as out_of_memory
_FILES = 256  # 64: the actors never start


def memory_of_node() -> int:
    """Return the bytes of memory that this machine, or the container that we are in, has."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.exists() else "max"
    return min(memory, int(said)) if said.isdigit() else memory


def require_room() -> None:
    """Refuse limits under which Ray, its workers or this process would end without a message.

    The number of open files is raised as far as it is allowed.

    Raises:
        UsageError: naming the limit, and what to do.
    """
    store = object_store(memory_of_node(), _shared_memory(), float(os.environ.get(_STORE_VARIABLE, _STORE_SHARE)))
    addresses = store + _ADDRESSES + _ADDRESSES_A_CORE * (os.cpu_count() or 1)
    for kind, name, flag, what, needed in (
        (resource.RLIMIT_AS, "RLIMIT_AS", "v", "the address space of a process", addresses),
        (resource.RLIMIT_DATA, "RLIMIT_DATA", "d", "the data of a process", _DATA),
        (resource.RLIMIT_FSIZE, "RLIMIT_FSIZE", "f", "the size of a file", store),
    ):
        limit = _soft(kind)
        if limit is not None and limit < needed:
            raise UsageError(
                f"{what} is limited to {_shown(limit)} ({name}, ulimit -{flag}); Ray, whose processes share an object store "
                f"of {_shown(store)}, needs {_shown(needed)} on this machine. Lift the limit (ulimit -{flag} unlimited; in a "
                f"batch system, limit the memory that is used instead), or make the store smaller ({_STORE_VARIABLE}=0.1)"
            )
    _raise_files()
    files = _soft(resource.RLIMIT_NOFILE)
    if files is not None and files < _FILES:
        raise UsageError(
            f"a process may open {files} files (RLIMIT_NOFILE, ulimit -n); Ray needs {_FILES}, and each request in flight "
            "one more: raise the limit (ulimit -n 4096)"
        )


def hint() -> str:
    """Return what to add to the message of a process that ended: its address space may have been too small for it."""
    limit = _soft(resource.RLIMIT_AS)
    return f" (its address space is limited to {_shown(limit)}: ulimit -v)" if limit is not None else ""


def limit_data(most: int) -> None:
    """Limit the data of this process, to less than that where less is allowed already."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def object_store(memory: int, shared_memory: int, share: float = _STORE_SHARE) -> int:
    """Return the most bytes that Ray's object store takes on a machine.

    >>> object_store(64 << 30, 32 << 30) >> 30, object_store(512 << 30, 64 << 20) // 10**9
    (19, 10)
    """
    return min(int(share * memory), max(_STORE_LEAST_CAP, int(0.95 * shared_memory)), _STORE_MOST)


def _shared_memory() -> int:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_frsize * found.f_blocks


def _raise_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _soft(kind: int) -> int | None:
    """Return the limit that is in force, None if there is none."""
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _shown(count: int) -> str:
    """Return a number of bytes for people.

    >>> _shown(8 << 30), _shown(1024000)
    ('8.0 GiB', '0.98 MiB')
    """
    return f"{count / _GIB:.1f} GiB" if count >= _GIB / 10 else f"{count / (1 << 20):.2f} MiB"

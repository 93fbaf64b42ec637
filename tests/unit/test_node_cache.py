"""The cache of a node: damaged entries are made again; without a usable cache there are private copies."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgbatch.models import node_cache
from tests.conftest import ROOT, clean_environment

CONTENT = {"network.xml": b"<net/>" * 50, "network.bin": bytes(range(1, 256)) * 40, "more/notes.txt": b"two"}


class Made:
    """Makes an entry and counts the calls."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> None:
        self.times += 1
        for name, content in CONTENT.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def whole(path: Path) -> bool:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()} == CONTENT


def zeroed(path: Path) -> None:
    """Zero a third of the file, like a power cut before a sync: the length stays."""
    content = bytearray(path.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = bytes(third)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "zeroed": lambda path: zeroed(path / "network.bin"),
    "truncated": lambda path: os.truncate(path / "network.bin", 1000),
    "empty": lambda path: (path / "network.xml").write_bytes(b""),
    "missing": lambda path: (path / "network.bin").unlink(),
    "missing folder": lambda path: shutil.rmtree(path / "more"),
    "foreign file": lambda path: (path / "network.bin.tmp").write_bytes(b"x"),
    "a folder for a file": lambda path: ((path / "network.bin").unlink(), (path / "network.bin").mkdir()),
    "a link for a file": lambda path: ((path / "network.bin").unlink(), (path / "network.bin").symlink_to("nowhere")),
    "a file for the folder": lambda path: (shutil.rmtree(path), path.write_bytes(b"x")),
    "all gone": shutil.rmtree,
    "no digests": lambda path: path.with_name("entry.sums").unlink(),
    "empty digests": lambda path: path.with_name("entry.sums").write_bytes(b""),
    "digests that are none": lambda path: path.with_name("entry.sums").write_text('["made", "files"]'),
    "digests of nothing": lambda path: path.with_name("entry.sums").write_text('{"made": "1", "files": {}}'),
    "zeroed digests": lambda path: zeroed(path.with_name("entry.sums")),
}


def test_entry_is_made_once() -> None:
    make = Made()
    assert whole(node_cache.get_or_make("entry", make)) and whole(node_cache.get_or_make("entry", make))
    assert make.times == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_made_again(damage: str) -> None:
    make = Made()
    path = node_cache.get_or_make("entry", make)
    DAMAGE[damage](path)
    assert whole(node_cache.get_or_make("entry", make)) and make.times == 2
    assert whole(node_cache.get_or_make("entry", make)) and make.times == 2, "and then it is kept"


@pytest.mark.parametrize(
    "damage", [zeroed, Path.unlink, lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 9)]
)
def test_file_is_compared_with_known_digest(damage: Callable[[Path], object]) -> None:
    content, made = b"weights" * 100, []
    known = hashlib.sha256(content).hexdigest()

    def make(path: Path) -> None:
        made.append(path)
        path.write_bytes(content)

    path = node_cache.get_or_make("weights", make, sha256=known)
    assert node_cache.get_or_make("weights", make, sha256=known) == path and len(made) == 1
    damage(path)
    assert node_cache.get_or_make("weights", make, sha256=known).read_bytes() == content and len(made) == 2


def test_rejected_entry_is_made_again_once() -> None:
    make = Made()
    stamp = node_cache.stamp(node_cache.get_or_make("entry", make))
    assert stamp
    path = node_cache.get_or_make("entry", make, rejected_stamp=stamp)
    assert make.times == 2 and node_cache.stamp(path) not in ("", stamp)
    node_cache.get_or_make("entry", make, rejected_stamp=stamp)
    assert make.times == 2, "another one has made it again since"


def test_processes_repair_the_same_damage_once(place: Path) -> None:
    zeroed(node_cache.get_or_make("entry", Made()) / "network.bin")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from imgbatch.models import node_cache; from tests.unit import test_node_cache\n"
        "def make(path):\n"
        "    Path(sys.argv[1], str(time.time_ns())).touch(); time.sleep(0.3); test_node_cache.Made()(path)\n"
        "assert test_node_cache.whole(node_cache.get_or_make('entry', make))"
    )
    (made := place / "made").mkdir()
    environment = {**clean_environment(), "TMPDIR": str(place)}
    command = [sys.executable, "-c", code, str(made)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(4)]
    assert [process.wait(timeout=100) for process in processes] == [0] * 4
    assert len(list(made.iterdir())) == 1


def test_leftovers_of_killed_processes_are_removed(place: Path) -> None:
    kept = node_cache.folder()
    (kept / "entry.lock").write_bytes(b"12345")
    old, young = kept / ".partial-old", kept / ".partial-young"
    for left in (old, young):
        left.mkdir()
        (left / "network.bin").write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    assert whole(node_cache.get_or_make("entry", Made()))
    assert not old.exists() and young.exists()


def test_failed_make_leaves_no_entry() -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        raise ValueError("no such network")

    with pytest.raises(ValueError, match="no such network"):
        node_cache.get_or_make("entry", fail)
    assert [path.name for path in node_cache.folder().iterdir()] == ["entry.lock"]


def test_lock_that_is_never_released_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "_LOCK_S", 0.2)
    holder = (
        "import sys, time; from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", holder, str(node_cache.folder() / "entry.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        path = node_cache.get_or_make("entry", Made())
        process.kill()
    assert whole(path) and path.parent != node_cache.folder()


@pytest.fixture
def taken(place: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the cache that others can write, or that is not a folder."""
    path = place / f"imgbatch-{os.getuid()}"
    if request.param == "a file":
        path.write_bytes(b"")
    elif request.param == "a link":
        (place / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(place / "elsewhere")
    else:
        path.mkdir()
        path.chmod(0o777)
    yield path


@pytest.mark.parametrize("taken", ["open to others", "a file", "a link"], indirect=True)
def test_folder_writable_by_others_is_not_used(taken: Path) -> None:
    make = Made()
    for times in (1, 2):
        path = node_cache.get_or_make("entry", make)
        assert whole(path) and make.times == times and taken not in path.parents


FULL = 'mount -t tmpfs -o size=64k,mode=1777 none "$0"'
READ_ONLY = 'mkdir "$0/imgbatch-0" && mount -t tmpfs -o ro,mode=700 none "$0/imgbatch-0"'


@pytest.mark.parametrize("mounts", [FULL, READ_ONLY])
def test_full_or_read_only_disk_gives_a_private_copy(place: Path, mounts: str) -> None:
    """TMPDIR or the cache is a separate disk: a private copy is made elsewhere, and deleted with the process."""
    code = (
        "import sys; from imgbatch.models import node_cache\n"
        "path = node_cache.get_or_make('entry', lambda path: path.write_bytes(bytes(1 << 20)))\n"
        "assert path.stat().st_size == 1 << 20; print(path)"
    )
    disk = place / "disk"
    disk.mkdir()
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mounts} && exec "$@"', str(disk)]
    environment = {**clean_environment(), "TMPDIR": str(disk)}
    done = subprocess.run(
        [*shell, sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.parent.name != "imgbatch-0" and not path.exists()


def test_no_disk_with_room_is_an_error(place: Path) -> None:
    code = (
        "import resource; from imgbatch.models import node_cache; from imgbatch.errors import Full\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: node_cache.get_or_make('entry', lambda path: path.write_bytes(bytes(1 << 20)))\n"
        "except Full as error: print(error)"
    )
    environment = {**clean_environment(), "TMPDIR": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert "no disk of this node has room for entry" in done.stdout and "TMPDIR" in done.stdout, done.stderr

"""The layout of the package: which room imports which, what each kind of module touches, who uses the heavy libraries."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "imgbatch"
FLOORS = (
    ("errors",),
    ("schema", "rejects", "uri_index"),
    ("config",),
    ("concurrency", "terminal"),
    ("storage", "decode"),
    ("sources",),
    ("models",),
    ("ledger",),
    ("evaluation", "quality"),
    ("inference",),
    ("engine", "verification"),
    ("report", "orchestration", "labelling"),
    ("pipeline",),
    ("planning", "training", "cli"),
    ("commands",),
)
"""Rooms, from the ground up. A room imports only from lower floors; `imgbatch/__init__.py` and `__main__.py` stand on top."""

KINDS = ("Values", "Effects", "Ray")
WORLD = {
    *(
        "os",
        "threading",
        "subprocess",
        "time",
        "logging",
        "socket",
        "tempfile",
        "shutil",
        "signal",
        "concurrent",
        "queue",
    ),
    *("multiprocessing", "fsspec", "obstore", "s3fs", "aiohttp", "psutil", "filelock", "grpc", "ray"),
}
"""What a module of values does not import."""
ON_RAY = {"engine", "training/ray_train", "orchestration/ray_jobs"}
TOP = {"errors", "schema", "rejects", "uri_index", "cli"}


def name_of(path: Path) -> str:
    """Return a module's name below the package, with slashes; that of a package is its folder's."""
    name = str(path.relative_to(PACKAGE).with_suffix(""))
    return name.removesuffix("/__init__") if name != "__init__" else ""


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """Yield the absolute names that a module imports anywhere, and whether that is for type checkers alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in typing_only


def module_of(imported: str) -> str | None:
    """Return which module of the package a name is, or is from; None: another package's."""
    head, *parts = imported.split(".")
    if head != "imgbatch":
        return None
    while parts and "/".join(parts) not in MODULES:
        parts.pop()
    return "/".join(parts)


@cache
def ours(name: str, *, typing_too: bool = True) -> frozenset[str]:
    """Return the modules of the package that a module imports, lazily or not."""
    found = {module_of(imported) for imported, only in imports(name) if typing_too or not only}
    return frozenset(found - {None, "", name})  # type: ignore[arg-type]


def floor_of(name: str) -> int:
    room = name.partition("/")[0]
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def test_five_modules_lie_beside_the_rooms() -> None:
    assert {name for name in MODULES if name and "/" not in name and MODULES[name].name != "__init__.py"} <= TOP | {
        "__main__"
    }
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms | TOP == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("", "__main__")])
def test_a_room_imports_from_lower_floors_alone(name: str) -> None:
    room = name.partition("/")[0]
    upwards = {other for other in ours(name) if other.partition("/")[0] != room and floor_of(other) >= floor_of(name)}
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Lazy imports included; those for type checkers alone are not made when the program runs."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(ours(name, typing_too=False)):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def kind_of(name: str) -> str:
    first = (ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or "").partition(":")[0]
    return first if first in KINDS else ""


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if name and path.stat().st_size])
def test_a_module_says_of_which_kind_it_is_and_keeps_to_it(name: str) -> None:
    kind = kind_of(name)
    assert kind, f"{name}: the docstring begins with one of {KINDS}"
    libraries = {imported.partition(".")[0] for imported, only in imports(name) if not only}
    if kind == "Values":
        assert not libraries & WORLD
        assert not {other for other in ours(name, typing_too=False) if kind_of(other) in ("Effects", "Ray")}
    if kind == "Effects":
        assert "ray" not in libraries
    if kind == "Ray":
        assert name in ON_RAY or name.partition("/")[0] in ON_RAY

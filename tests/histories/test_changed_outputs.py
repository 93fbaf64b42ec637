"""An output, or a part of it, is deleted during a run: exit 3 naming it, and the same command restores it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.histories.stores import Image
from tests.histories.world import World

STORES = ["memory", "disk", "s3"]


def world_on(store: str, tmp_path: Path, s3: S3Server) -> World:
    """Return a world with images of which two cannot be read, and an output in a store."""
    name = uuid.uuid4().hex
    if store == "memory":
        made = World()
    elif store == "disk":
        made = World(output=f"{tmp_path}/{name}")
    else:
        made = World(output=f"s3://out/changed/{name}", environment=s3.environment)
    for number, letter in enumerate("abcdefghi"):
        made.images[f"{letter}.png"] = Image("not_an_image" if number in (1, 4) else letter, f"e{number}")
    made.images["h.png"], made.images["i.png"] = Image("a", "e7"), Image("b", "e8")
    return made


def delete(world: World, names: Iterable[str]) -> None:
    """Delete folders and objects of the output without the program."""
    for name in names:
        if world.output.startswith("/") and name.endswith("/"):
            shutil.rmtree(Path(world.output) / name, ignore_errors=True)
            continue
        folder = world.folder("")
        for found in folder.names(name.rstrip("/")) if name.endswith("/") else [""]:
            folder.stores.call("delete", folder.at(f"{name}{found}"), lambda store, path: store._store.delete(path))


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["labels/", "rejects/", "runs/"], "{output} was deleted or emptied"),
        (["labels/"], "{output}/labels was deleted or emptied"),
        (["rejects/"], "{output}/rejects was deleted or emptied"),
        (["runs/"], "/listing was deleted or emptied"),
        (["labels/part-00000001.parquet"], "{output}/labels/part-00000001.parquet was deleted"),
        (["rejects/part-00000001.parquet"], "{output}/rejects/part-00000001.parquet was deleted"),
    ],
    ids=["everything", "labels", "rejects", "runs", "a part of labels", "a part of rejects"],
)
def test_files_deleted_during_a_run_are_named(
    store: str, names: list[str], named: str, tmp_path: Path, s3: S3Server
) -> None:
    world = world_on(store, tmp_path, s3)
    settings = ("rejects.max_share=1",)
    code = world.run(*settings, faults={("rejects/part", 3): lambda: delete(world, names)})
    assert code == 3, world.error
    assert named.format(output=world.output) in world.error
    assert "The same command restores it" in world.error
    assert not world.folder("").exists("_SUCCESS")

    assert world.run(*settings) == 0, world.error
    assert world.verify() == 0
    again = world.run(*settings)
    assert again == 0 and world.verify() == 0, world.error


@pytest.mark.parametrize("store", STORES)
def test_the_claim_alone_is_deleted(store: str, tmp_path: Path, s3: S3Server) -> None:
    world = world_on(store, tmp_path, s3)
    settings = ("rejects.max_share=1",)
    assert world.run(*settings, faults={("labels/part", 1): lambda: delete(world, ["runs/claim.json"])}) == 3
    assert "runs/claim.json is gone" in world.error
    assert world.run(*settings) == 0 and world.verify() == 0


def test_a_part_deleted_while_nothing_is_pending(tmp_path: Path, s3: S3Server) -> None:
    """`_SUCCESS` existed before, and is wrong now."""
    world = world_on("disk", tmp_path, s3)
    settings = ("rejects.max_share=1",)
    assert world.run(*settings) == 0
    gone = ["labels/part-00000001.parquet"]
    assert world.run(*settings, faults={("listing/", 3): lambda: delete(world, gone)}) == 3, world.error
    assert "part-00000001.parquet" in world.error
    assert not world.folder("").exists("_SUCCESS")
    assert world.run(*settings) == 0 and world.verify() == 0

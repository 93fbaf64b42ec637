"""A replacement that a killed run had sent arrives after the next run has ended, and must not change a part.

Where the next run has no reason of its own to rewrite the part, only the fence changes its ETag.
"""

from __future__ import annotations

from typing import Any

import pytest

from imgbatch.errors import Conflict
from imgbatch.ledger import commit_log
from tests.histories.stores import Image
from tests.histories.world import World

SETTINGS = ("rejects.max_share=1",)


def killed_while_it_prunes(world: World) -> None:
    """A run is killed while it removes the row of an image that is not listed, and the image is back for the next run."""
    image = world.images.pop("a.png")
    assert world.run(*SETTINGS, "run.prune=true", faults={("replace", 1): "killed in flight"}) is None
    world.images["a.png"] = image


def killed_while_it_retries(world: World) -> None:
    """A run is killed while it removes the reject of an image that it has labelled; the next run removes it as well."""
    world.images["b.png"] = Image("b", world.images["b.png"].etag)
    assert world.run(*SETTINGS, "rejects.retry=all", faults={("replace", 1): "killed in flight"}) is None


def killed_while_it_corrects(world: World) -> None:
    """A run is killed while it corrects a carried value; the correction is taken back before the next run."""
    world.notes["c.png"] = "bad"
    assert world.run(*SETTINGS, faults={("replace", 1): "killed in flight"}) is None
    world.notes["c.png"] = "good"


FENCED = [killed_while_it_prunes, killed_while_it_corrects]


def parts(world: World) -> dict[str, bytes]:
    return {path: data for path, (data, _) in world.memory.objects.items() if "/part-" in path}


def history(case: Any) -> tuple[World, Any]:
    """Return a world in which a replacement is late and the next run has ended, and that replacement."""
    world = World()
    for name, kind in {"a.png": "a", "b.png": "not_an_image", "c.png": "c", "d.png": "d"}.items():
        world.images[name] = Image(kind, f"e-{name}")
    world.notes["c.png"] = "good"
    assert world.run(*SETTINGS) == 0, world.error
    case(world)
    (late,) = world.late
    assert world.run(*SETTINGS) == 0, world.error
    return world, late


@pytest.mark.parametrize("case", [*FENCED, killed_while_it_retries])
def test_a_late_replacement_is_refused(case: Any) -> None:
    world, late = history(case)
    before = parts(world)
    with pytest.raises(Conflict):
        late()
    assert parts(world) == before
    assert world.verify() == 0, world.error


@pytest.mark.parametrize("case", FENCED)
def test_it_would_land_without_the_fence(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_log.Log, "fence", lambda self, fingerprint: None)
    world, late = history(case)
    before = parts(world)
    late()
    assert parts(world) != before

"""A few hundred of the mutations of which `make fuzz` tries tens of thousands."""

from __future__ import annotations

from tests.fuzz.decoding import fuzz
from tests.fuzz.mutations import corpus, mutated


def test_damage_of_every_format_yields_an_image_or_a_reject() -> None:
    files = corpus()
    outcomes = list(fuzz(files, range(10 * len(files)), seed=1))
    assert [outcome for outcome in outcomes if not outcome.good] == []
    assert len({outcome.what for outcome in outcomes}) >= 5
    assert {outcome.name for outcome in outcomes} == files.keys()


def test_damage_is_reproducible() -> None:
    files = {"png": b"\x89PNG" * 20, "gif": b"GIF89a" * 20}
    assert mutated(files, 7, seed=3) == mutated(files, 7, seed=3) != mutated(files, 9, seed=3)

"""Names of candidates, without junk, markers and documents, for every kind of input."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from imgbatch.sources import patterns
from imgbatch.sources.patterns import Candidates, is_junk, junk

PAGE = (Path(__file__).parents[2] / "docs" / "inputs.md").read_text(encoding="utf-8")

JUNK = [
    ".x.jpg", "..x.jpg", "...", "a/.git/x.jpg", ".ipynb_checkpoints/x-checkpoint.jpg", "a/.Trash-1000/files/x.jpg",
    "__MACOSX/._x.jpg", "__macosx/x.jpg", "a/@eaDir/x.jpg/THUMB.jpg", "$RECYCLE.BIN/x.jpg", "$Recycle.Bin/x.jpg",
    "lost+found/1", "#recycle/x.jpg", "@Recycle/x.jpg", "System Volume Information/x", "Thumbs.db", "a/THUMBS.DB",
    "desktop.ini", "a/.DS_Store", "_temporary/0/x.jpg", ".Trashes/501/x.jpg", ".\nx.jpg",
]  # fmt: skip
NOT_JUNK = [
    "x.jpg", "./x.jpg", "../x.jpg", "a/./x.jpg", "a/../x.jpg", "./a.b/x.jpg", "a..b/x.jpg", "_x.jpg", "x", "@eadir/x.jpg",
    "recycle/x.jpg", "my__MACOSX/x.jpg", "lost+found.jpg", "Thumbs.db.jpg", "$RECYCLE.BIN.jpg", "a//x.jpg", "temporary/x.jpg",
]  # fmt: skip
NO_IMAGES = [
    "_SUCCESS", "a/_metadata", "_common_metadata", "_committed_8917", "_started_", "LICENSE", "a/license", "Licence", "README",
    "Makefile", "DOCKERFILE", "SHA256SUMS", "DICOMDIR", "Icon\r", "cat_$folder$", "a/b_$FOLDER$", "a/", "photos/cat/",
]  # fmt: skip
IMAGES = [
    "_x",
    "_success_story",
    "_meta",
    "LICENSE.jpg",
    "licenses",
    "READ",
    "n02123159_1",
    "_started",
    "a/README.d/x",
    "folder$",
]


@pytest.mark.parametrize("suffixes", ["images", "*"])
def test_a_name_and_a_column_have_the_same_result(suffixes: str) -> None:
    candidates = Candidates(suffixes)
    for some, expected in ((JUNK, False), (NOT_JUNK, True), (NO_IMAGES, False), (IMAGES, True)):
        assert (
            candidates.mask(pa.array(some)).to_pylist()
            == [name in candidates for name in some]
            == [expected] * len(some)
        )


def test_junk_in_any_segment_counts() -> None:
    for some, expected in ((JUNK, True), (NOT_JUNK + NO_IMAGES + IMAGES, False)):
        assert junk(pa.array(some)).to_pylist() == [is_junk(name) for name in some] == [expected] * len(some)


@pytest.mark.parametrize("name", ["x.jpg\n", "x.jpg ", "x.txt", "x.jpg/", ""])
def test_names_with_another_suffix_are_not_candidates(name: str) -> None:
    candidates = Candidates("images")
    assert candidates.mask(pa.array([name])).to_pylist() == [name in candidates] == [False]


@pytest.mark.parametrize(
    ("before", "listed"),
    [("**Junk.** An", (*patterns.JUNK, *patterns.JUNK_AS_WRITTEN)), ("**Not images.** These", patterns.NO_IMAGES)],
    ids=["junk", "no images"],
)
def test_the_inputs_page_documents_each_of_them(before: str, listed: tuple[str, ...]) -> None:
    """Between the words and the end of the sentence, names are in backticks."""
    sentence = PAGE[PAGE.index(before) :].partition(".\n")[0]
    documented = {name.replace("\\r", "\r") for name in re.findall(r"`([^`]+)`", sentence)}
    assert documented == {*listed}

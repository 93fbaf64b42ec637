"""Pages in a browser (`make test-browser`): Debian's Chromium, driven by Playwright, without a network."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.browser import pages, report_pages

GENERATED = {**pages.GENERATED, **report_pages.GENERATED}
OF_CLASSES = ["evaluation", "training", *pages.GENERATED]

AXE = Path(sys.prefix) / "axe" / "node_modules" / "axe-core" / "axe.min.js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def missing(what: str) -> None:
    """Skip a test, naming what this machine lacks; with CI set, nothing may be missing."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(
        f"{what} is missing: see make test-browser in CONTRIBUTING.md"
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        missing("Chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core."""
    if not AXE.exists():
        missing("axe-core")
    return AXE.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def pages_of_jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages of a training and of an evaluation, by their names."""
    return pages.of_jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="session")
def file_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a page as a file, by its name."""
    place = tmp_path_factory.mktemp("pages")

    @cache
    def of(name: str) -> Path:
        generated = GENERATED.get(name)
        text = generated() if generated is not None else request.getfixturevalue("pages_of_jobs")[name]
        (place / f"{name}.html").write_text(text, encoding="utf-8")
        return place / f"{name}.html"

    return of


@pytest.fixture(params=OF_CLASSES)
def file_of_classes(request: pytest.FixtureRequest, file_of: Callable[[str], Path]) -> Path:
    """Each page with a table of classes in turn."""
    return file_of(request.param)


@pytest.fixture(params=[*OF_CLASSES, *report_pages.GENERATED])
def file(request: pytest.FixtureRequest, file_of: Callable[[str], Path]) -> Path:
    """Each page in turn."""
    return file_of(request.param)

"""What the pages of evaluations, trainings and runs do in a browser: nothing is loaded, and every part can be used and read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import HOSTILE, MODEL, SCRIPT

WIDE, NARROW = {"width": 1_400, "height": 1_000}, {"width": 390, "height": 844}

CONTROLS = "a[href], button, summary, input, [tabindex='0']"
VISIBLE = f"""() => [...document.querySelectorAll("{CONTROLS}")].filter(each => each.checkVisibility()).length"""


@contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """Open a page without a network; what its console says and what it requests is collected in `page.events`."""
    context = browser.new_context(offline=True, **{"viewport": WIDE, **options})
    page = context.new_page()
    page.events = []
    page.on("console", lambda message: page.events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: page.events.append(f"error: {error}"))
    page.on("dialog", lambda dialog: page.events.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: page.events.append(request.url))
    page.goto(file.as_uri())
    yield page
    context.close()


def test_a_page_loads_nothing_and_has_no_error(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        page.get_by_role("button", name="Open all").click()
        assert [event for event in page.events if not event.startswith("data:")] == [file.as_uri()]
        assert page.evaluate("document.scripts.length") == 1
        pictures = page.locator("img").evaluate_all("all => all.map(each => each.naturalWidth > 0)")
        assert all(pictures) and (pictures or "first run" in file.name)
    assert file.stat().st_size < 1_000_000


def test_what_a_page_could_load_is_refused(browser: Any, file_of: Callable[[str], Path]) -> None:
    with opened(browser, file_of("evaluation")) as page:
        with page.expect_console_message() as message:
            page.evaluate("document.body.append(Object.assign(new Image(), {src: 'https://example.org/x.png'}))")
        assert "Content Security Policy" in message.value.text and "has been blocked" in message.value.text
        with page.expect_console_message() as message:
            page.evaluate(f"document.body.append(document.createRange().createContextualFragment(`{SCRIPT}`))")
        assert "Content Security Policy" in message.value.text and page.title() != "run"


def test_collapsible_sections_open_with_the_mouse_and_together(browser: Any, file: Path) -> None:
    with opened(browser, file) as page:
        details = page.locator("details")
        assert details.count() >= 3
        first = details.first
        content = first.locator("xpath=*[2]")
        assert not content.is_visible()
        first.locator("summary").first.click()
        assert content.is_visible()
        page.get_by_role("button", name="Open all").click()
        assert details.evaluate_all("all => all.every(each => each.open)")
        page.get_by_role("button", name="Close all").click()
        assert not details.evaluate_all("all => all.some(each => each.open)")


def test_the_table_of_classes_is_filtered_and_sorted(browser: Any, file_of_classes: Path) -> None:
    with opened(browser, file_of_classes) as page:
        section = page.locator("#classes")
        rows = section.locator("[data-filter] tbody tr")
        total = rows.count()
        name = rows.nth(1).locator("td").first.inner_text()
        section.get_by_role("searchbox").fill(name.upper())
        shown = rows.locator("td:first-child:visible").all_inner_texts()
        assert shown and all(name.lower() in text.lower() for text in shown) and len(shown) < total
        assert section.get_by_role("status").inner_text() == f"{len(shown)} of {total} rows"
        section.get_by_role("searchbox").fill("no class has this name")
        assert rows.locator("visible=true").count() == 0
        section.get_by_role("searchbox").fill("")

        head = section.locator("[data-filter] th", has_text="F1")
        column = head.evaluate("head => head.cellIndex + 1")
        for direction in ("descending", "ascending"):
            head.get_by_role("button").click()
            assert head.get_attribute("aria-sort") == direction
            texts = rows.locator(f"td:nth-child({column})").all_inner_texts()
            numbers = [float(text.rstrip("%")) for text in texts if text != "–"]
            assert numbers == sorted(numbers, reverse=direction == "descending") and len(set(numbers)) > 1
            assert "–" not in texts[: len(numbers)]


def test_everything_is_reached_and_used_with_the_keyboard(browser: Any, file_of: Callable[[str], Path]) -> None:
    with opened(browser, file_of("evaluation")) as page:
        wanted = page.evaluate(VISIBLE)
        reached = set()
        for _ in range(wanted + 5):
            page.keyboard.press("Tab")
            focused = page.evaluate(
                f"""() => [...document.querySelectorAll("{CONTROLS}")].indexOf(document.activeElement)"""
            )
            if focused >= 0:
                reached.add(focused)
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", "the focus is visible"
        assert len(reached) == wanted > 20
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        assert page.locator("details").first.evaluate("each => each.open")
        button = page.locator("#classes [data-filter] th button").first
        button.focus()
        page.keyboard.press("Space")
        assert page.locator("#classes [data-filter] th").first.get_attribute("aria-sort") == "ascending"
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize(("scheme", "size"), [("light", WIDE), ("dark", NARROW)], ids=["light", "dark"])
def test_axe_finds_nothing_to_improve(browser: Any, axe: str, file: Path, scheme: str, size: dict[str, int]) -> None:
    """Contrast, names of controls, order of headings, and what else axe-core checks."""
    with opened(browser, file, color_scheme=scheme, viewport=size) as page:
        page.get_by_role("button", name="Open all").click()
        page.evaluate(axe)
        found = page.evaluate("() => axe.run({exclude: ['tbody tr:nth-child(n+30)']})")  # rows are alike
        problems = [
            (problem["id"], problem["help"], node["html"][:120], node["failureSummary"][:200])
            for problem in found["violations"]
            for node in problem["nodes"][:3]
        ]
        assert not problems
        assert any(check["id"] == "color-contrast" for check in found["passes"])


def test_a_page_fits_a_small_screen(browser: Any, file: Path) -> None:
    with opened(browser, file, viewport=NARROW) as page:
        page.get_by_role("button", name="Open all").click()
        assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
        sizes = page.locator(".figure:not(.wide) svg .t:not(.small)").evaluate_all(
            "all => all.map(each => each.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 11, "the texts of figures are legible"


def test_a_page_is_printed_dark_on_white_in_every_mode(browser: Any, file: Path) -> None:
    with opened(browser, file, color_scheme="dark") as page:
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert not page.locator("nav").is_visible() and page.locator(".filter:visible").count() == 0
        for table in page.locator("tbody").all():
            assert table.locator("tr:visible").count() <= 40
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_page_is_complete_without_scripts(browser: Any, file_of_classes: Path) -> None:
    with opened(browser, file_of_classes, java_script_enabled=False) as page:
        assert page.locator("#classes [data-filter] tbody tr").first.is_visible()
        page.locator("summary").first.click()
        assert page.locator("details").first.locator("xpath=*[2]").is_visible()
        assert page.locator("button").count() == 0 and page.locator("input").count() == 0


@pytest.mark.parametrize("name", ["hostile evaluation", "hostile training"])
def test_names_with_markup_are_texts(browser: Any, file_of: Callable[[str], Path], name: str) -> None:
    with opened(browser, file_of(name)) as page:
        page.get_by_role("button", name="Open all").click()
        assert page.locator("h1").inner_text() == MODEL and MODEL in page.title()
        assert SCRIPT in page.locator("#classes").inner_text()
        first_cells = page.locator("#classes [data-filter] td:first-child").all_inner_texts()
        for label in HOSTILE:
            assert label in first_cells or any(
                "…" in cell and cell.split("…")[0] == label[: len(cell.split("…")[0])] for cell in first_cells
            )
        assert page.title() != "run" and page.locator("img[onerror]").count() == 0
        assert page.locator("[dir=auto]", has_text="تفاح أخضر").count() > 0


def test_a_thousand_classes_have_a_row_each(browser: Any, file_of: Callable[[str], Path]) -> None:
    with opened(browser, file_of("large evaluation")) as page:
        assert page.locator("#classes [data-filter] tbody tr").count() == 1_000
        assert page.locator(".cards > li").count() == 8


def test_a_report_says_first_what_happened_and_opens_levels_and_commands(
    browser: Any, file_of: Callable[[str], Path]
) -> None:
    with opened(browser, file_of("report")) as page:
        verdict = page.locator(".verdict")
        assert verdict.locator("strong").inner_text() == "Held back"
        assert "guard.max_label_shift=0.05" in verdict.inner_text()
        headings = page.locator("h2").all_inner_texts()
        assert headings == [
            "Counts", "Time and cost", "Label mix", "What moved", "Scores", "Least certain", "Rejects", "Random sample",
            "Provenance", "Next commands",
        ]  # fmt: skip
        levels = page.locator("#labels summary", has_text="Level")
        assert levels.all_inner_texts()[0].startswith("Level kind")
        levels.last.click()
        rows = page.locator("#labels [data-filter] tbody tr:visible")
        total = rows.count()
        page.locator("#labels").get_by_role("searchbox").fill("class 1")
        assert 0 < rows.count() < total
        card = page.locator("#moved .thumbnail").first
        card.locator("summary").click()
        assert card.locator("code").inner_text().startswith("imgbatch explain ")
        assert page.locator("#rejects .placeholder").first.inner_text().startswith("not shown: ")
        assert page.title() != "run"

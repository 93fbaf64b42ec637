"""The progress of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from imgbatch.terminal import console
from imgbatch.terminal.console import Console
from imgbatch.terminal.progress import Progress, Rate, progress_line


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    """The console of this process, which shows nothing."""
    made = Console()
    monkeypatch.setattr(console, "_console", made)
    yield made


def test_rate_uses_the_last_half_minute() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    assert rate() == 0
    for second in range(200):
        now = float(second)
        rate.mark(10 * second if second < 100 else 1000 + 50 * (second - 100))
    assert rate() == pytest.approx(50)


def test_time_left_is_unknown_without_rate() -> None:
    assert progress_line(0, 10, 0, 0.0) == "0/10 images, time left unknown, 0/s, 0 rejects"
    assert progress_line(10, 10, 1, 5.0) == "10/10 images, 0:00 left, 5.0/s, 1 reject"
    assert progress_line(0, 0, 0, 0.0).startswith("0/0 images")
    assert progress_line(1234, None, 0, 70.4) == "1,234 images, 70/s, 0 rejects"


def test_facts_for_the_record(shown: Console) -> None:
    now = 0.0
    progress = Progress("labelling", 1000, lambda: now)
    assert progress.facts() == {"done": 0, "total": 1000, "rate": None, "seconds_left": None}
    for now in (1.0, 11.0):
        progress.update(int(10 * now), 0)
    assert progress.facts() == {"done": 110, "total": 1000, "rate": 10.0, "seconds_left": 89.0}
    unknown = Progress("labelling", None, lambda: now)
    for now in (1.0, 2.0):
        unknown.update(int(now), 0)
    assert unknown.facts() == {"done": 2, "total": None, "rate": 1.0, "seconds_left": None}


def test_start_of_workers_is_shown_until_first_row(shown: Console) -> None:
    progress = Progress("labelling", 1000)
    progress.start(1000, 4096)
    progress.update(0, 0)
    assert (shown.state.name, shown.state.text) == ("starting the workers", "")
    progress.update(300, 2)
    assert shown.state.name == "labelling" and shown.state.text.startswith("300/1,000 images, ")
    assert (shown.state.done, shown.state.total) == (300, 1000)
    assert shown.state.line(0.0).startswith("labelling: 30 %, 300/1,000 images, ")
    progress.start(700, 4096)
    progress.update(300, 2)
    again = "submitting 700 lost images again, in units of 4,096"
    assert shown.state.name == again, "what came before says nothing of this round"
    progress.update(301, 2)
    assert shown.state.name == "labelling" and shown.state.done == 301
    progress.close()
    assert shown.state.name == "committing the last rows"

"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import logging

import pytest

from imgbatch.progress import LogProgress, Rate, TerminalProgress, line, progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_rate_forgets_what_is_long_ago() -> None:
    now = 0.0
    rate = Rate(lambda: now)
    assert rate() == 0
    for second in range(200):
        now = float(second)
        rate.mark(10 * second if second < 100 else 1000 + 50 * (second - 100))
    assert rate() == pytest.approx(50)


def test_no_rate_no_time_left() -> None:
    assert line(0, 10, 0, 0.0) == "0/10 images (0 %), 0/s, 0 rejects, time left not known yet"
    assert line(10, 10, 1, 5.0) == "10/10 images (100 %), 5/s, 1 reject, 0:00:00 left"
    assert "(100 %)" in line(0, 0, 0, 0.0)


def test_elsewhere_than_on_a_terminal_there_is_a_line_each_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    shown = LogProgress(1000, lambda: now)
    with caplog.at_level(logging.INFO, "imgbatch"):
        for second in range(35):
            now = float(second)
            shown.update(10 * second, 0)
    shown.close()
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == [
        "100/1,000",
        "200/1,000",
        "300/1,000",
    ]


def test_on_a_terminal_a_bar_moves_and_goes() -> None:
    stream = Terminal()
    shown = progress(10, stream)
    assert isinstance(shown, TerminalProgress)
    shown.update(0, 0)
    shown.update(10, 2)
    shown.close()
    assert isinstance(progress(10, io.StringIO()), LogProgress)

"""What all jobs share on the command line."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from imgbatch import cli, errors
from imgbatch.config.sections import describe
from imgbatch.errors import BudgetError, ImgbatchError, Interrupted


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    """Put the log handlers of pytest back."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def kinds(kind: type[ImgbatchError]) -> Iterator[type[ImgbatchError]]:
    """Yield an error class and all below it."""
    yield kind
    for below in kind.__subclasses__():
        yield from kinds(below)


def test_every_imgbatch_error_is_one_line_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in kinds(ImgbatchError):
        error = Interrupted(15) if kind is Interrupted else kind("what to do")

        def body(error: ImgbatchError = error) -> int:
            raise error

        assert cli.run(body) == error.exit_code
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err == f"error: {error}\n"
        assert f"\n  {error.exit_code} " in cli.EXIT_CODES


def test_control_characters_in_an_error_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise errors.InputError("a\x1b[2J\r.jpg is not there")

    assert cli.run(body) == 2
    assert capsys.readouterr().err == "error: a\\x1b[2J\\x0d.jpg is not there\n"


def test_ctrl_c_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise KeyboardInterrupt

    assert cli.run(body) == 130
    assert capsys.readouterr().err == "error: stopped by signal 2\n"


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(lambda: int("https://me:secret@host/x")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and "ValueError: invalid literal" in shown and "secret" not in shown
    assert cli.run(lambda: 0) == 0


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    made = cli.parser("A job.")
    made.add_argument("--input")
    with pytest.raises(SystemExit) as ended:
        cli.arguments(made, ["--inp", "x"])
    assert ended.value.code == 2 and "--inp" in capsys.readouterr().err


def test_set_may_be_repeated() -> None:
    flags = cli.arguments(cli.parser("A job."), ["--set", "top_k=3", "--set", "cluster.device=cpu"])
    assert flags.settings == ["top_k=3", "cluster.device=cpu"] and flags.config is None


def test_help_lists_every_key_that_has_no_flag() -> None:
    for key, _, help in describe():
        assert ("." not in key and key != "top_k") or (f"  {key}=" in cli.config_keys() and help in cli.config_keys())


def test_the_exit_codes_are_those_of_the_error_tree() -> None:
    codes = {kind.exit_code for kind in kinds(ImgbatchError) if isinstance(kind.__dict__.get("exit_code", 1), int)}
    codes |= {Interrupted(signum).exit_code for signum in (1, 2, 15)}
    reserved = {0, 129}  # success, and a signal that no run could handle
    assert codes | reserved == {entry.code for entry in errors.EXIT_CODES} and not codes & reserved
    assert BudgetError.exit_code == 4 and errors.AuditError.exit_code == 6 and errors.OutputBusyError.exit_code == 7


def test_which_exit_codes_are_worth_a_retry() -> None:
    assert {entry.code for entry in errors.EXIT_CODES if entry.retry} == {3, 7, 129, 130, 143}
    assert all(errors.retry_helps(code) for code in (3, 7, 129, 130, 143, 137, 139))
    assert not any(errors.retry_helps(code) for code in (0, 1, 2, 4, 5, 6, 8))

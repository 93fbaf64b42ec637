"""Values: the errors of imgbatch, and the exit code of each.

    ImgbatchError
    ├── UsageError        2   the flags, the config, the model or the input are wrong: change the command
    │   ├── ConfigError
    │   ├── InputError
    │   └── ModelError
    ├── StoreError        3   a store refused or was unreachable: fix the store or the rights, run again
    │   ├── NotFound          no such object or bucket
    │   ├── Forbidden         no rights, or wrong credentials
    │   ├── Unreachable       no answer, or none that can be used (5xx, a cut connection)
    │   ├── TimedOut          no answer within the timeout
    │   ├── Exists            a conditional creation found an object of this name
    │   ├── Conflict          a conditional replacement found another content
    │   ├── TooLarge          an object larger than `fetch.max_bytes`
    │   ├── Full              no space left, or a file system that is read-only
    │   └── BadPath           a name that the store's client cannot express
    ├── ClusterError      3   Ray or its nodes refused, were unreachable or are too small
    ├── BudgetError       4   more rejects than the budget allows
    ├── OutputChangedError 3  another run took over, or files of the output were deleted during the run: run again
    ├── OutputError       5   the output belongs to another fingerprint, or contains foreign parts
    ├── AuditError        6   the counts do not reconcile
    ├── OutputBusyError   7   another live run is writing the output: run again later
    ├── GuardError        8   a guard or the canary held the run back: somebody accepts it, or changes the input or the model
    └── Interrupted     130   SIGINT (143: SIGTERM or SIGHUP); rows that had reached the driver are committed

Any other exception is a bug (exit code 1) and keeps its traceback. `EXIT_CODES` is the table of all codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar


class ImgbatchError(Exception):
    """An error that the user can act on. The message names the thing, the value and the remedy."""

    exit_code: ClassVar[int] = 1


class UsageError(ImgbatchError):
    """The command has to be changed."""

    exit_code = 2


class ConfigError(UsageError):
    """A flag or a config key is unknown or has an invalid value."""


class InputError(UsageError):
    """The input contains no image, or is not in the format that it claims."""


class ModelError(UsageError):
    """The model does not exist, is damaged, or contradicts itself."""


class StoreError(ImgbatchError):
    """A store refused, or did not answer. `reason` is the value of that column in a reject's row."""

    exit_code = 3
    reason: ClassVar[str] = "unreachable"
    attempts: int = 1
    """Number of requests that were made."""


class NotFound(StoreError):
    """The object or bucket does not exist."""

    reason = "vanished"


class Forbidden(StoreError):
    """The store denied access, or did not accept the credentials."""

    reason = "forbidden"


class Unreachable(StoreError):
    """The store gave no answer, or none that can be used."""

    reason = "unreachable"


class TimedOut(StoreError):
    """The store gave no answer within the timeout."""

    reason = "timeout"


class Exists(StoreError):
    """A conditional creation found that an object of this name exists."""


class Conflict(StoreError):
    """A conditional replacement found that the object had changed since it was read."""

    reason = "changed"


class TooLarge(StoreError):
    """The object is larger than `fetch.max_bytes`."""

    reason = "too_large"


class Full(StoreError):
    """No space is left, or the file system is read-only."""


class BadPath(StoreError):
    """The name cannot be expressed in the store's client."""

    reason = "unsupported"


class ClusterError(ImgbatchError):
    """Ray refused, was unreachable, or has fewer resources than the run requests."""

    exit_code = 3


class OutputChangedError(ImgbatchError):
    """The output was changed during this run: another run took over, or files were deleted."""

    exit_code = 3


class BudgetError(ImgbatchError):
    """More images were rejected than `rejects.max_share` and `rejects.max_count` allow."""

    exit_code = 4


class OutputError(ImgbatchError):
    """The output cannot be continued by this run."""

    exit_code = 5


class AuditError(ImgbatchError):
    """The counts do not reconcile: an image is in no row, or in more than one; or rows are wrong."""

    exit_code = 6


class OutputBusyError(ImgbatchError):
    """Another live run is writing the output."""

    exit_code = 7


class GuardError(ImgbatchError):
    """A guard or the canary held the run back: `_SUCCESS` is not written, and rows that exist are kept."""

    exit_code = 8


class Interrupted(ImgbatchError):
    """A signal stopped the run: in order, or by force after `timeout_s` seconds."""

    def __init__(self, signum: int, timeout_s: float | None = None) -> None:
        late = "" if timeout_s is None else f", and could not end in order within {timeout_s:g} s (run.stop_timeout_s)"
        super().__init__(f"stopped by signal {signum}{late}; run the same command again to resume")
        self.signum = signum

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 + the signal's number, as shells count; that of SIGTERM for SIGHUP."""
        return exit_code_of_signal(self.signum)


def exit_code_of_signal(signum: int) -> int:
    """Return the exit code of a run that a signal stopped: 128 + its number, as shells count.

    SIGHUP counts as SIGTERM, so that orchestrators need one rule for both.

    >>> exit_code_of_signal(2), exit_code_of_signal(15), exit_code_of_signal(1)
    (130, 143, 143)
    """
    return 128 + (_SIGTERM if signum == _SIGHUP else signum)


_SIGHUP, _SIGTERM = 1, 15


@dataclass(frozen=True, slots=True)
class ExitCode:
    """An exit code of the commands."""

    code: int
    meaning: str
    retry: bool
    """Whether the same command, run again without any change, may succeed."""
    action: str
    """What to do about it; empty: nothing."""


EXIT_CODES = (
    ExitCode(0, "success: the counts reconcile, that is, each listed image is in exactly one row", False, ""),
    ExitCode(1, "a bug", False, "report it with its traceback"),
    ExitCode(2, "wrong flags, config, model or input", False, "change the command"),
    ExitCode(
        3,
        "a store or the cluster refused, was unavailable, or was too small; or the output was changed during the run",
        True,
        "fix the cause if there is one, then run the same command again",
    ),
    ExitCode(4, "more rejects than the budget allows", False, "look at the reasons in `rejects/`"),
    ExitCode(5, "the output belongs to another fingerprint or contains foreign parts", False, "use another `--output`"),
    ExitCode(
        6,
        "the counts do not reconcile",
        False,
        "follow the message: it names the files to move away, or the command to run again. If that does not help, report it",
    ),
    ExitCode(7, "another live run is writing this output", True, "wait for the other run"),
    ExitCode(
        8,
        "a guard or the canary held the run back",
        False,
        "look at `drift` and `canary` in run.json; accept the run with `guard.accept`, or change the input or the model",
    ),
    ExitCode(129, "ended by SIGHUP before the run could handle it", True, "run the same command again"),
    ExitCode(130, "stopped by SIGINT", True, "run the same command again to resume"),
    ExitCode(143, "stopped by SIGTERM or SIGHUP", True, "run the same command again to resume"),
)
"""All exit codes. --help, the documentation, `run.json` and the recipes for orchestrators agree with this table."""


def retry_helps(code: int) -> bool:
    """Return whether running the same command again may help after this exit code.

    Codes that are not in the table are those of a process that was killed, such as 137: the next run resumes.

    >>> retry_helps(3), retry_helps(2), retry_helps(137)
    (True, False, True)
    """
    return next((entry.retry for entry in EXIT_CODES if entry.code == code), True)


def closest(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the candidate that is most similar to a name, None if none is similar.

    Args:
        cutoff: minimum similarity, from 0 to 1 (`difflib.get_close_matches`).
    """
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return the end of an error message that suggests the closest candidate; an empty text if none is similar.

    >>> did_you_mean("resnet5O", ["resnet50", "vgg11"])
    "; did you mean 'resnet50'?"
    """
    match = closest(name, candidates, cutoff=cutoff)
    return f"; did you mean {match!r}?" if match is not None else ""

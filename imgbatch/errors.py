"""Values: the errors of imgbatch: who has to act, and the exit code that says so to an orchestrator.

    ImgbatchError
    ├── UsageError        2   the flags, the config, the model or the input are wrong: change the command
    │   ├── ConfigError
    │   ├── InputError
    │   └── ModelError
    ├── StoreError        3   a store refused or stayed away: mend the store or the rights, run again
    │   ├── NotFound          no such object or bucket
    │   ├── Forbidden         no rights, or wrong credentials
    │   ├── Unreachable       no answer, or an answer that was none (5xx, a cut connection)
    │   ├── TimedOut          no answer in time
    │   ├── Exists            a conditional creation found the name taken
    │   ├── Conflict          a conditional replacement found another content
    │   ├── TooLarge          an object larger than `fetch.max_bytes`
    │   ├── Full              no space left, or a file system that is read-only
    │   └── BadPath           a name that the store's client cannot express
    ├── ClusterError      3   Ray or its nodes refused, stayed away or are too small
    ├── BudgetError       4   more rejects than the budget allows
    ├── OutputChangedError 3  another run took over, or files of the output were deleted meanwhile: run again
    ├── OutputError       5   the output belongs to another fingerprint, or holds foreign parts
    ├── BooksError        6   the counts do not reconcile
    ├── OutputBusyError   7   another live run is writing the output: run again later
    └── Interrupted     130   SIGINT (143: SIGTERM, 129: SIGHUP); what had reached the driver is committed

Whatever else leaves a job is a bug (exit code 1) and keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class ImgbatchError(Exception):
    """Something that the user, not the programmer, can act on. The message names the thing, the value and the remedy."""

    exit_code: ClassVar[int] = 1


class UsageError(ImgbatchError):
    """The command has to change before it can work."""

    exit_code = 2


class ConfigError(UsageError):
    """A flag or a config key is unknown or has a value that cannot be used."""


class InputError(UsageError):
    """The input names nothing that can be classified, or cannot be read as what it says it is."""


class ModelError(UsageError):
    """The model does not exist, is damaged, or contradicts itself."""


class StoreError(ImgbatchError):
    """A store refused, or did not answer. `reason` is what a reject row says of it."""

    exit_code = 3
    reason: ClassVar[str] = "unreachable"
    attempts: int = 1
    """How often the request was made before it was given up."""


class NotFound(StoreError):
    """There is no such object or bucket."""

    reason = "vanished"


class Forbidden(StoreError):
    """The store knows who asks and says no, or does not know who asks."""

    reason = "forbidden"


class Unreachable(StoreError):
    """The store gave no answer, or one that means nothing."""

    reason = "unreachable"


class TimedOut(StoreError):
    """The store gave no answer within the time allowed."""

    reason = "timeout"


class Exists(StoreError):
    """A conditional creation found the name taken."""


class Conflict(StoreError):
    """A conditional replacement found that the object had changed since it was read."""

    reason = "changed"


class TooLarge(StoreError):
    """The object is larger than may be read."""

    reason = "too_large"


class Full(StoreError):
    """Nothing more can be written there."""


class BadPath(StoreError):
    """The name cannot be expressed in the store's client."""

    reason = "unsupported"


class ClusterError(ImgbatchError):
    """Ray refused, stayed away, or has less than the run asks for."""

    exit_code = 3


class OutputChangedError(ImgbatchError):
    """The output was changed under this run: another run took over, or files of it were deleted."""

    exit_code = 3


class BudgetError(ImgbatchError):
    """More images were rejected than `rejects.max_share` and `rejects.max_count` allow."""

    exit_code = 4


class OutputError(ImgbatchError):
    """The output cannot be continued by this run."""

    exit_code = 5


class BooksError(ImgbatchError):
    """An image is in no row, or in more than one."""

    exit_code = 6


class OutputBusyError(ImgbatchError):
    """Another live run is writing the output."""

    exit_code = 7


class Interrupted(ImgbatchError):
    """A signal asked the run to stop; it did so in order, or was given up after `timeout_s` seconds."""

    def __init__(self, signum: int, timeout_s: float | None = None) -> None:
        late = "" if timeout_s is None else f", and could not end in order within {timeout_s:g} s (run.stop_timeout_s)"
        super().__init__(f"stopped by signal {signum}{late}; the same command goes on where this run ended")
        self.signum = signum

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 + the signal's number, as shells count."""
        return 128 + self.signum

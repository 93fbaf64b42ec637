"""Values: the names of Ray jobs, and which of the jobs of a cluster is the one to follow.

Each submission of a verb and an output has the id `imgbatch-HASH-k`, with k = 1, 2, …. So a submitter that is started again
finds the job of the first one, and never starts a second run of an output.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from imgbatch.config.secrets import masked
from imgbatch.errors import EXIT_CODES, OutputBusyError, exit_code_of_signal

VERB, OUTPUT, ARGUMENTS, DATE = "imgbatch.verb", "imgbatch.output", "imgbatch.arguments", "imgbatch.date"
"""Keys of a job's metadata."""

STOP_WAIT_S = 60
"""Seconds from SIGTERM to SIGKILL in a job that is stopped: more than `run.stop_timeout_s`, less than a pod has."""

_SIGNALS = (1, 2, 15)
_KNOWN = {entry.code for entry in EXIT_CODES}


@dataclass(frozen=True, slots=True)
class RayJob:
    """What Ray knows of a submitted job."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    """Of the entrypoint: None if it was stopped or never started; negative if a signal killed it."""
    message: str = ""
    started_ms: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass(frozen=True, slots=True)
class Submission:
    """A verb that is to run as a Ray job."""

    verb: str
    output: str
    """The URI as written, with `{date}` filled in."""
    arguments: tuple[str, ...]
    """The arguments of the verb, as written."""
    date: str = ""
    """The date of the run; empty if no argument has `{date}`."""
    contents: tuple[str, ...] = ()
    """Digests of local files that the arguments name."""

    @property
    def prefix(self) -> str:
        """The ids of its jobs, without their number.

        >>> Submission("classify", "s3://out/labels", ()).prefix
        'imgbatch-64ab25cbc93f-'
        """
        return f"imgbatch-{_digest(self.verb, self.output)}-"

    def metadata(self) -> dict[str, str]:
        """Return the metadata of its jobs."""
        arguments = _digest(self.verb, *self.arguments, *self.contents)
        return {VERB: self.verb, OUTPUT: masked(self.output), ARGUMENTS: arguments, DATE: self.date}

    def find(self, jobs: Iterable[RayJob]) -> RayJob | str:
        """Return the job to follow, if one is active, or else the id of a new one.

        Raises:
            OutputBusyError: the newest job is active, and is not this submission.
        """
        numbered = {number: job for job in jobs if (number := self._number(job.id))}
        newest = max(numbered, default=0)
        if newest and not numbered[newest].has_ended:
            self.require_same(numbered[newest])
            return numbered[newest]
        return f"{self.prefix}{newest + 1}"

    def require_same(self, job: RayJob) -> None:
        """Refuse a job with this submission's id and other arguments.

        Raises:
            OutputBusyError: it is another submission, or was not submitted by imgbatch.
        """
        ours = self.metadata()
        if job.metadata.get(VERB) != self.verb or job.metadata.get(OUTPUT) != ours[OUTPUT]:
            raise OutputBusyError(
                f"the Ray job {job.id} is {job.status.lower()}, has the id that belongs to {self.verb} of {ours[OUTPUT]}, and "
                "was not submitted by imgbatch: wait for it, or stop it (ray job stop)"
            )
        theirs = {key: job.metadata.get(key, "") for key in (ARGUMENTS, DATE)}
        if theirs[ARGUMENTS] != ours[ARGUMENTS] or theirs[DATE] != self.date:
            day = f" for {theirs[DATE]}" if theirs[DATE] != self.date else ""
            raise OutputBusyError(
                f"the Ray job {job.id} is {job.status.lower()}{day} and writes {ours[OUTPUT]} with other arguments: wait for "
                "it, stop it (ray job stop), or repeat its arguments to follow it"
            )

    def _number(self, job_id: str) -> int | None:
        match = re.fullmatch(rf"{self.prefix}([1-9]\d*)", job_id)
        return int(match[1]) if match else None


def _digest(*words: str) -> str:
    r"""Return 12 hex digits of the SHA-256 of words, joined by newlines."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def exit_code_of_job(job: RayJob, end_line: int | None, recorded: int | None = None) -> int:
    """Return the exit code of a job that has ended.

    Ray knows the code of a job that ended by itself. For a job that was stopped it is the one that the job wrote: in its last
    line, or else in run.json.

    Args:
        job: as Ray knows it.
        end_line: the exit code of the end line in its log.
        recorded: the exit code of its run.json.

    >>> exit_code_of_job(RayJob("x", "FAILED", exit_code=4), 4)
    4
    >>> exit_code_of_job(RayJob("x", "STOPPED"), 130), exit_code_of_job(RayJob("x", "STOPPED"), None)
    (130, 143)
    >>> exit_code_of_job(RayJob("x", "FAILED", exit_code=137), None), exit_code_of_job(RayJob("x", "FAILED"), None)
    (3, 3)
    """
    if job.status == "SUCCEEDED":
        return 0
    code = job.exit_code
    if job.status == "FAILED" and code is not None:
        if -code in _SIGNALS:
            return exit_code_of_signal(-code)
        return code if code in _KNOWN or 0 < code <= 128 else 3  # killed, such as by the kernel for its memory
    for written in (end_line, recorded):
        if written is not None:
            return written
    return 143 if job.status == "STOPPED" else 3

"""Effects: the end line: one JSON object, the last line of a command, for orchestrators that read only its log.

    {"event": "end", "verb": "classify", "exit_code": 0, "retry": false, "status": "succeeded", "run_id": "…", "output": "s3://…",
     "counts": {"listed": 500, …}, "rejects": {}, "this_run": {…}, "message": "…"}

Ray records no exit code for a job that was stopped, and an orchestrator may have no access to the store. So it looks for the
last line of the log that parses as such an object. Keys without a value are omitted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from imgbatch.concurrency import process
from imgbatch.config.secrets import masked
from imgbatch.errors import exit_code_of_signal, retry_helps

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable in the entrypoint of a job."""

_FROM_RECORD = ("run_id", "output", "counts", "rejects", "this_run")
_STATUS = {0: "succeeded", **dict.fromkeys((exit_code_of_signal(2), exit_code_of_signal(15)), "interrupted")}


class EndLine:
    """Collects the facts of a command, and writes the end line once."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.message: str | None = None
        """The error, or the result that the command printed."""
        self._facts: dict[str, Any] = {}
        self._written = False

    def take(self, record: Mapping[str, Any]) -> None:
        """Copy facts of a run that ended, for `run_record.on_finish`."""
        self._facts = facts_of(record)
        self.message = record.get("error") or self.message

    def write(self, exit_code: int) -> None:
        """Write the line to stderr, after everything that was printed to stdout. Only the first call has an effect."""
        if self._written:
            return
        self._written = True
        line = compose(self.verb, exit_code, self._facts, self.message)
        sys.stdout.flush()
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of run.json that an end line has."""
    return {key: record[key] for key in _FROM_RECORD if record.get(key) is not None}


def compose(verb: str, exit_code: int, facts: Mapping[str, Any], message: str | None) -> str:
    """Return the end line of a command.

    >>> compose("classify", 2, {}, "no --output")
    '{"event": "end", "verb": "classify", "exit_code": 2, "retry": false, "status": "failed", "message": "no --output"}'
    """
    line: dict[str, Any] = {"event": "end", "verb": verb, "exit_code": exit_code, "retry": retry_helps(exit_code)}
    line |= {"status": _STATUS.get(exit_code, "failed"), **facts}
    if message:
        line["message"] = masked(message)
    return json.dumps(line, default=str)


def is_wanted(log_format: str = "text") -> bool:
    """Return whether this process writes an end line: as a Ray job, or with `--log-format json`."""
    return log_format == "json" or RAY_JOB in os.environ


@contextmanager
def collecting(verb: str) -> Iterator[EndLine]:
    """Collect the facts of the runs within the block; also write the line if a second signal or a limit ends the process."""
    from imgbatch.ledger import run_record  # imports Arrow

    end = EndLine(verb)
    with run_record.on_finish(end.take), process.before_immediate_exit(end.write):
        yield end


def last_end_line(text: str) -> dict[str, Any] | None:
    """Return the last end line in a log; None if there is none.

    >>> last_end_line('a line\\n{"event": "end", "exit_code": 0}\\nmore')
    {'event': 'end', 'exit_code': 0}
    """
    for line in reversed(text.splitlines()):
        if line.startswith("{") and '"event"' in line:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and found.get("event") == "end" and isinstance(found.get("exit_code"), int):
                return found
    return None

"""Effects: `imgbatch status`: show the state of a run from its output, from any machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any

from imgbatch import cli
from imgbatch.config import reading
from imgbatch.terminal import console

if TYPE_CHECKING:
    from imgbatch.orchestration.status import Found, Status

_CODES = """\
exit codes:
  0  the run is running, or has succeeded
  1  the run ended with a bug, or this command has one
  2  wrong flags, or no run was started at OUTPUT; or the run ended with 2
  3  the store could not be read; or the run is lost: its heartbeat stopped, and no end is recorded; or it ended with 3
  other codes are those of the run, as in `imgbatch classify --help`
"""

_INTERVAL_S = 2.0  # a run writes its record every 5 s


def main(argv: Sequence[str] | None = None) -> int:
    """Show the state; return 0 if the run is running or has succeeded, else its exit code."""
    parser = cli.parser(
        "Show the state of the newest run of an output: how far it is, its rate, rejects by reason, the time left, the\n"
        "time of each stage, the bottleneck, and the age of the heartbeat. Reads run.json from the store, and needs no\n"
        "connection to the cluster.",
        f"examples:\n"
        f"  imgbatch status s3://bucket/labels\n"
        f"  imgbatch status s3://bucket/labels --watch\n"
        f"  imgbatch status s3://bucket/labels --json | jq .progress\n\n{_CODES}",
        verb="status",
    )
    parser.add_argument("output", metavar="OUTPUT", help="the --output of classify, train or evaluate")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show each change until the run ends: on a terminal in place, else a line each",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object; with --watch one per change")
    cli.add_date(parser, "OUTPUT")
    flags = cli.arguments(parser, argv)
    return cli.run(lambda: status(flags), quiet=flags.quiet, log_format=flags.log_format)


def status(flags: Any) -> int:
    """Show the state of the newest run, once or until it ends."""
    from imgbatch.orchestration import status as runs  # after the flags: --help needs no Arrow
    from imgbatch.storage.stores import Folder, Stores
    from imgbatch.storage.uris import absolute

    config = reading.load(flags.config, flags.settings)
    uri = absolute(reading.fill_date(flags.output, reading.resolve_date(flags.date)))
    found = runs.find(Folder(Stores(config.storage), uri))
    if flags.watch:
        return show_changes(found, runs.watch(found, _INTERVAL_S), flags.json)
    state = runs.look(found)
    cli.result(as_json(found, state) if flags.json else "\n".join(lines_of(found, state)))
    return state.exit_code


def show_changes(found: Found, states: Iterable[Status], json_lines: bool) -> int:
    """Show each state that differs from the one before; return the exit code of the last one."""
    from imgbatch.orchestration.status_text import as_line

    in_place = not json_lines and console.is_terminal(sys.stdout)
    before, code = "", 0
    with live_view() if in_place else nullcontext() as view:
        for state in states:
            code, running = state.exit_code, state.state == "running"
            if view is not None:
                progress = state.facts.get("progress") or {}
                view.show(lines_of(found, state), progress.get("done") if running else None, progress.get("total"))
                continue
            line = as_line(state.facts, state.age_s)
            change = str(state.facts.get("heartbeat")) if json_lines else line
            if not running:
                cli.result(as_json(found, state) if json_lines else "\n".join(lines_of(found, state)))
            elif change != before:
                now = f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}"
                cli.result(as_json(found, state) if json_lines else f"{now} {line}")
            before = change
            sys.stdout.flush()
    return code


def live_view() -> Any:
    """Return a view of the terminal."""
    from imgbatch.terminal.live_view import LiveView

    return LiveView(sys.stdout)


def lines_of(found: Found, state: Status) -> list[str]:
    """Return the state as lines of text."""
    from imgbatch.orchestration.status_text import as_lines

    arguments = (state.facts, state.state, state.exit_code, found.output.uri, state.age_s, state.age_of)
    return [console.escape_control_characters(line) for line in as_lines(*arguments)]


def as_json(found: Found, state: Status) -> str:
    """Return the state as one line of JSON."""
    from imgbatch.orchestration.status_text import as_object

    return json.dumps(as_object(state.facts, state.state, state.exit_code, found.output.uri, state.age_s))

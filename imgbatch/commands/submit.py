"""Effects: `imgbatch submit`: run another verb as a Ray job, and return its exit code."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imgbatch import cli
from imgbatch.concurrency import signals
from imgbatch.config import reading
from imgbatch.errors import UsageError, did_you_mean

VERBS = ("classify", "plan", "report", "train", "evaluate", "verify")
"""The verbs that can run as Ray jobs."""

_DATE_FIELD = "{date}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code of the job."""
    own, command = split(cli.words(argv))
    flags = cli.arguments(parser(), own)
    return cli.run(lambda: submit(flags, command), quiet=flags.quiet, log_format=flags.log_format)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags before `--`."""
    parser = cli.parser(
        "Run a verb as a Ray job: start the job, or follow the one that runs this output already; print its log, and exit\n"
        "with its exit code. After SIGTERM or SIGINT the job commits its rows and ends; after a second signal submit\n"
        "does not wait for that.",
        f"verbs: {', '.join(VERBS)}\n\n"
        f"examples:\n"
        f"  imgbatch submit --address http://head:8265 -- classify --input s3://bucket/photos --output s3://bucket/labels\n"
        f"  imgbatch submit --env-file job.env -- classify --config RUN.toml --output 's3://bucket/labels/{{date}}'\n\n"
        f"{cli.EXIT_CODES}",
        verb="submit",
        configurable=False,
        usage="imgbatch submit [options] -- VERB ARGUMENTS",
    )
    parser.add_argument(
        "--address", metavar="URL",
        help="the cluster's dashboard; unset: RAY_API_SERVER_ADDRESS, or else http://127.0.0.1:8265",
    )  # fmt: skip
    parser.add_argument(
        "--working-dir", metavar="DIR",
        help="upload this directory; unset: the package imgbatch, and the local files that the arguments name",
    )  # fmt: skip
    parser.add_argument(
        "--runtime-env", metavar="FILE", help="a runtime environment of Ray, YAML or JSON: env_vars, pip, excludes, …"
    )
    parser.add_argument(
        "--env-file", metavar="FILE",
        help="lines NAME=VALUE: variables of the job and its workers, such as credentials; not in Ray's metadata",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=_seconds, metavar="S", help="stop the job if it has not ended after S seconds"
    )
    parser.add_argument(
        "--lost-after", type=_seconds, default=300.0, metavar="S",
        help="exit with 3 if the cluster has not answered for S seconds (default: 300)",
    )  # fmt: skip
    parser.add_argument("--detach", action="store_true", help="print the id of the job, and exit with 0")
    return parser


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of submit itself, and those of the verb.

    >>> split(["--detach", "--", "verify", "s3://out"]), split(["--help"])
    ((['--detach'], ['verify', 's3://out']), (['--help'], []))
    """
    words = list(argv)
    if "--" not in words:
        return words, []
    return words[: words.index("--")], words[words.index("--") + 1 :]


def submit(flags: Any, command: Sequence[str]) -> int:
    """Check the verb and its arguments, and run it as a job."""
    from imgbatch.orchestration import package, submit

    if not command:
        raise UsageError("no verb: imgbatch submit [options] -- VERB ARGUMENTS")
    verb, *arguments = command
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; submit runs {', '.join(VERBS)}")
    runtime_env = submit.read_runtime_env(flags.runtime_env)
    place = flags.working_dir or runtime_env.get("working_dir")
    if place is not None and not Path(place).is_dir():
        raise UsageError(f"--working-dir {place} is no directory")
    verb_flags, config = read(verb, arguments, place)
    job = package.collect(arguments, verb_flags, config, Path(place) if place else None)
    job.variables = submit.read_env_file(flags.env_file, os.environ)
    options = submit.Options(
        address=flags.address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265",
        working_dir=Path(place) if place else None, runtime_env=runtime_env, timeout_s=flags.timeout,
        lost_after_s=flags.lost_after, detach=flags.detach,
    )  # fmt: skip
    with signals.handle_signals() as stop:
        return submit.submit(submission_of(verb, arguments, verb_flags, config, job.contents()), job, options, stop)


def read(verb: str, arguments: Sequence[str], working_dir: str | None) -> tuple[Any, Any]:
    """Return the flags of a verb, and the configuration that results from them: wrong ones are found before the upload.

    Raises:
        UsageError: an argument has a secret, which everybody who may see the cluster's dashboard could read.
    """
    module = importlib.import_module(f"imgbatch.commands.{verb}")
    flags = module.parser().parse_args(arguments)
    config_path = flags.config
    if working_dir is not None and config_path is not None:
        flags.config = os.path.join(working_dir, config_path)
    config = module.read_config(flags)
    flags.config = None
    shown = module.read_config(flags).public()
    flags.config = config_path
    if "***" in json.dumps(shown):
        raise UsageError(
            "an argument has a secret, which Ray's dashboard would show: put it into the file of --config or --env-file"
        )
    return flags, config


def submission_of(verb: str, arguments: Sequence[str], flags: Any, config: Any, contents: tuple[str, ...]) -> Any:
    """Return the submission, with the date if an argument or the config file has `{date}`."""
    from imgbatch.orchestration.submission import Submission

    date = config.date or reading.resolve_date(flags.date)
    output = getattr(config, "output", "")
    output = output if isinstance(output, str) else output.uri
    output = output or reading.fill_date(flags.output or "", date)
    if not output:
        raise UsageError("no --output: set where the results are written")
    is_used = config.date is not None or any(_DATE_FIELD in word for word in arguments)
    return Submission(verb, output, tuple(arguments), date if is_used else "", contents)


def _seconds(text: str) -> float:
    """Return a positive number."""
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return seconds

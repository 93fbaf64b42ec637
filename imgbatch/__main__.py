"""Effects: `imgbatch VERB …`, and `python -m imgbatch VERB …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import imgbatch
from imgbatch.errors import did_you_mean

VERBS = {
    "classify": "label every image of a store with a CNN, and write the label tables back to it",
    "plan": "measure a sample on the cluster, and forecast the time and the cost of a run",
    "train": "train a model on labelled images, and write its directory",
    "evaluate": "label images whose class is known, and compute how good the labels are",
    "verify": "recount a finished output from its files, and check the files",
    "report": "write the report of a run again, with what moved, rejects and samples as pictures",
    "explain": "show everything that an output says about one image",
    "export": "write images worth a person's time to a file, as a manifest or as tasks for Label Studio",
    "compact": "write a merged copy of the tables of an output, in few large files",
    "submit": "run another verb as a Ray job, follow it, and exit with its exit code",
    "status": "show how far a run is, from its output",
    "demo": "label seven photos that ship with scikit-image and scikit-learn, offline",
}

_VERSION = ("--version", "-V")
_HELP = ("--help", "-h", "help")


def usage() -> str:
    """Return the list of verbs."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {description}" for verb, description in VERBS.items())
    return f"usage: imgbatch VERB …\n\n{verbs}\n\nimgbatch VERB --help shows the flags and options of a verb.\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return its exit code, 2 for an unknown verb."""
    verb, *arguments = [*(sys.argv[1:] if argv is None else argv), ""][:-1] or [""]
    if verb in _VERSION:
        sys.stdout.write(f"imgbatch {imgbatch.__version__}\n")
        return 0
    if verb in _HELP:
        sys.stdout.write(usage())
        return 0
    if verb not in VERBS:
        problem = f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}" if verb else "no verb"
        sys.stderr.write(f"error: {problem}\n{usage()}")
        return 2
    code: int = importlib.import_module(f"imgbatch.commands.{verb}").main(arguments)
    return code


def run() -> None:
    """Run the verb of the command line, and exit; after a failure all child processes are ended too."""
    from imgbatch.concurrency.process import exit_process, restart_in_utf8_mode

    restart_in_utf8_mode()
    exit_process(main())


if __name__ == "__main__":
    run()

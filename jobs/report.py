"""Run `imgbatch report` from a checkout, as in `ray job submit --working-dir . -- python jobs/report.py …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # finds the package from any working directory

from imgbatch.commands.report import main
from imgbatch.concurrency.process import exit_process

if __name__ == "__main__":
    exit_process(main())

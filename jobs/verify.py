"""`imgbatch verify` as a file, for `ray job submit --working-dir . -- python jobs/verify.py …`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package beside this folder, wherever the script is started

from imgbatch.commands.verify import main
from imgbatch.concurrency.process import exit_process

if __name__ == "__main__":
    exit_process(main())

"""Effects: the checks of a finished output, from its files alone, and a sample that is labelled again."""

from __future__ import annotations

import logging

log = logging.getLogger("imgbatch")


AGAIN = "run the same classify.py command again, which does no work twice"

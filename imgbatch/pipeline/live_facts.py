"""Effects: the facts about a run that run.json has while the run works: progress, counts, seconds by stage, bottleneck."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from imgbatch.ledger.listing import Counts
from imgbatch.pipeline.committer import Committer
from imgbatch.pipeline.run_summary import counts_so_far
from imgbatch.terminal.progress import Progress

_BUSY = 0.7  # actors that classify for this share of the time are the bottleneck
_COMMITTING = 0.5  # the same for the driver
_SETTLED_S = 30.0  # before that, the first commit alone may be most of the time


@dataclass
class LiveFacts:
    """The facts about a run that labels images."""

    listed: Counts
    committer: Committer
    progress: Progress
    gpu_actors: int | None = None
    """The number of actors that only classify; None: each worker does all stages, or the cluster is not known yet."""
    now: Callable[[], float] = time.monotonic
    _labelling_since: float | None = None

    @property
    def stage(self) -> str:
        """The current stage of the run."""
        return "labelling" if self.committer.arrived else "starting"

    def public(self) -> dict[str, Any]:
        """Return the facts for run.json."""
        committer, statistics = self.committer, self.committer.statistics
        if self._labelling_since is None and committer.arrived:
            self._labelling_since = self.now()
        elapsed_s = self.now() - self._labelling_since if self._labelling_since is not None else 0.0
        return {
            "counts": counts_so_far(self.listed.with_streams(committer.work_plan.found), statistics),
            "progress": {
                **self.progress.facts(),
                "committed": committer.committed,
                "last_commit": committer.last_commit,
                "bytes": statistics.bytes,
                "rejects": dict(statistics.reasons),
            },
            "bottleneck": bottleneck(statistics.seconds, self.gpu_actors, elapsed_s),
            **statistics.report(),
        }


def bottleneck(seconds: Mapping[str, float], gpu_actors: int | None, elapsed_s: float) -> str | None:
    """Return the stage that limits the rate; None while nothing was measured.

    Where there are no GPUs, each worker does all stages, and the longest one is the bottleneck. Where there are, classifying
    is the bottleneck if its actors are busy most of the time; otherwise they wait for fetching or decoding.

    Args:
        seconds: of each stage, over all workers.
        gpu_actors: the number of actors that only classify; None: there are none.
        elapsed_s: seconds since the first rows arrived.

    >>> bottleneck({"fetch": 9.0, "decode": 20.0, "classify": 30.0, "commit": 1.0}, None, 60.0)
    'classify'
    >>> bottleneck({"fetch": 9.0, "decode": 200.0, "classify": 30.0, "commit": 1.0}, 1, 60.0)
    'decode'
    >>> bottleneck({"fetch": 9.0, "decode": 200.0, "classify": 50.0, "commit": 1.0}, 1, 60.0)
    'classify'
    >>> bottleneck({"decode": 5.0, "classify": 2.0, "commit": 1.0}, None, 1.5)
    'decode'
    """
    stages = {stage: value for stage, value in seconds.items() if stage != "commit" and value}
    if not stages:
        return None
    if elapsed_s >= _SETTLED_S and seconds.get("commit", 0.0) > _COMMITTING * elapsed_s:
        return "commit"
    if gpu_actors is not None and elapsed_s and len(stages) > 1:
        classify_s = stages.pop("classify", 0.0)
        if classify_s >= _BUSY * gpu_actors * elapsed_s:
            return "classify"
    return max(stages, key=lambda stage: stages[stage])

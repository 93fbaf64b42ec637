"""Effects: the comparison of a run with the plan that `imgbatch plan` left below its output."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgbatch.errors import StoreError
from imgbatch.ledger.fingerprint import differences
from imgbatch.ledger.run_record import json_object
from imgbatch.storage.stores import Folder

log = logging.getLogger("imgbatch")

PLAN = "runs/plan.json"
"""The newest plan of an output."""
_TOLERANCE = 0.1
_FORECASTS = ("forecast", "forecast_here")  # for --nodes, and for the cluster of the plan


@dataclass
class PlanOutcome:
    """The plan of an output, and whether it is about this run."""

    plan: Mapping[str, Any]
    mismatch: str | None = None
    """Why the outcome cannot be compared with the plan."""
    _actors: int | None = None

    @classmethod
    def read(cls, output: Folder, fingerprint: Mapping[str, Any], rows: int) -> PlanOutcome | None:
        """Return the plan of an output; None if there is none. A plan that cannot be read is none.

        Args:
            fingerprint: that of this run.
            rows: the number of images and streams of the listing that this run will read.
        """
        try:
            plan = json_object(output.read(PLAN))
            planned_rows = int(plan["images"]["rows"])
            outcome = cls(plan)
            outcome.seconds()
        except (StoreError, KeyError, TypeError, ValueError):
            return None
        if differences(plan.get("fingerprint") or {}, fingerprint):
            outcome.mismatch = "it was made with another model or other options"
        elif abs(planned_rows - rows) > _TOLERANCE * max(planned_rows, rows):
            outcome.mismatch = f"it was made for {planned_rows:,} pending images or tars, this run has {rows:,}"
        return outcome

    def seconds(self) -> dict[str, float]:
        """Return the planned interval of the seconds of a run."""
        total = self._forecast()["seconds"]["total"]
        return {name: float(total[name]) for name in ("low", "mid", "high")}

    @property
    def images(self) -> float | None:
        """The planned number of images to label; None: the plan is not about this run."""
        return None if self.mismatch else float(self.plan["images"]["to_label"]["mid"])

    def compare(self, seconds: float, actors: int | None) -> dict[str, Any]:
        """Compare the plan with the seconds of this run, log the result, and return the facts for run.json.

        Args:
            seconds: of the whole run, which labelled all images of the plan.
            actors: the number of its actors.
        """
        self._actors = actors
        planned_actors = sorted({self.plan[name]["actors"] for name in _FORECASTS})
        if self.mismatch is None and actors not in planned_actors:
            self.mismatch = f"it was made for {' or '.join(map(str, planned_actors))} actors, this run has {actors}"
        facts = {"id": self.plan.get("id"), "predicted_s": self.seconds(), "actual_s": round(seconds, 1)}
        if self.mismatch is not None:
            log.info("the plan %s is not compared with this run: %s", self.plan.get("id"), self.mismatch)
            return {**facts, "not_compared": self.mismatch}
        planned = self.seconds()
        inside = planned["low"] <= seconds <= planned["high"]
        deviation = seconds / planned["mid"] - 1 if planned["mid"] else 0.0
        log.info(
            "planned: %.1f s (%.1f to %.1f); this run took %.1f s, %s: %s the interval",
            planned["mid"], planned["low"], planned["high"], seconds, f"{deviation:+.0%}",
            "inside" if inside else "outside of",
        )  # fmt: skip
        return {**facts, "inside": inside, "deviation": round(deviation, 3)}

    def _forecast(self) -> Mapping[str, Any]:
        """Return a forecast of the plan: the one for the actors of this run if there is one."""
        forecasts: list[Mapping[str, Any]] = [self.plan[name] for name in _FORECASTS]
        return next((one for one in forecasts if one["actors"] == self._actors), forecasts[0])

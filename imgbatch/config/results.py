"""Values: the sections of the configuration that are about results: guards, the report, metrics and the notification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval

from imgbatch.config.options import Fraction, Positive, Section, option
from imgbatch.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig(Section):
    """Guards, which hold `_SUCCESS` back (exit code 8). All are off by default; docs/guards.md describes them."""

    max_label_shift: Annotated[float, Fraction] | None = option(
        None,
        "maximum shift of the label mix against the last success, as a Jensen-Shannon distance beyond chance; unset: off",
    )
    max_score_drop: Annotated[float, Fraction] | None = option(
        None, "maximum drop of the mean score against the last success; unset: off"
    )
    max_reject_rise: Annotated[float, Fraction] | None = option(
        None, "maximum rise of the proportion of rejects against the last success, e.g. 0.02; unset: off"
    )
    min_images: Annotated[int, Ge(1)] | None = option(
        None, "minimum number of images that are new since the last success; unset: off"
    )
    canary: str | None = option(
        None,
        "URI of a small labelled set, which each node labels before its first image; unset: off. Its labels are read as in "
        "evaluate",
    )
    canary_accuracy: Annotated[float, Interval(gt=0, le=1)] | None = option(
        None, "minimum proportion of the canary's images with the right label, e.g. 0.9"
    )
    reference: str | None = option(
        None, "URI of another output whose last success is compared with; unset: the last success of this output"
    )
    accept: str | None = option(None, "RUN_ID of a run that was held back and is accepted")
    accepted_by: str | None = option(None, "who accepts it, for run.json; unset: the user of the process")

    def validate(self) -> None:
        """Refuse a canary without an accuracy, and the reverse."""
        if (self.canary is None) != (self.canary_accuracy is None):
            raise ConfigError("guard.canary and guard.canary_accuracy need each other: set both, or none")

    @property
    def is_on(self) -> bool:
        """Whether the comparison with earlier rows may hold a run back."""
        limits = (self.max_label_shift, self.max_score_drop, self.max_reject_rise, self.min_images)
        return any(limit is not None for limit in limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig(Section):
    """Pages for people."""

    enabled: bool = option(True, "classify: write runs/RUN_ID/report.html at the end of each run that has new rows")
    thumbnails: bool = option(True, "small pictures of images on pages; false for faces and medical images")
    timeout_s: Annotated[float, Positive] | None = option(
        None,
        "maximum seconds to read the pictures of a page; unset: 30, and for the report of classify 4, or 3 % of the run's "
        "time, up to 20",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig(Section):
    """Metrics of a run, beside those that Ray exports."""

    textfile: str | None = option(
        None,
        "local file that is replaced every few seconds by the metrics of the run, in Prometheus's text format; for the "
        "textfile collector of node exporter, which reads names that end in .prom",
    )

    def validate(self) -> None:
        """Refuse a name that node exporter would not read."""
        if self.textfile is not None and not self.textfile.endswith(".prom"):
            raise ConfigError(
                f"metrics.textfile={self.textfile}: the name must end in .prom, since node exporter reads no others"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class NotifyConfig(Section):
    """The notification at the end of a job. The URL is a secret."""

    url: str = option(
        str,
        "http:// or https:// URL that gets one POST when the job ends: JSON with a text, which Slack shows, and the facts; "
        "unset: the environment variable IMGBATCH_NOTIFY_URL, which keeps the URL out of command lines",
    )
    timeout_s: Annotated[float, Positive] = option(10.0, "timeout of that POST, in seconds; its failure is a warning")

    def validate(self) -> None:
        """Refuse another scheme, without repeating the URL."""
        if self.url and not self.url.lower().startswith(("http://", "https://")):
            raise ConfigError(
                "notify.url must begin with http:// or https:// (its value is not shown, it may be secret)"
            )

"""Values: the time by which a run should end: `run.finish_by`, and `--finish-by` of `imgbatch plan`.

06:00                    at this time of the run's date (--date), in UTC; without a date: the next time it is 06:00
06:00+1                  the same on the next day
06:00@Europe/Berlin      in a time zone
2026-11-29T06:00+01:00   ISO 8601; without an offset in UTC
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from imgbatch.errors import ConfigError, did_you_mean

_TIME = re.compile(r"(\d\d):(\d\d)(?:\+(\d))?(?:@(\S+))?")
_FORMS = "use HH:MM, HH:MM+1 for the next day, HH:MM@ZONE such as 06:00@Europe/Berlin, or ISO 8601"


@dataclass(frozen=True, slots=True)
class FinishBy:
    """A time of day in a zone, or a point in time."""

    text: str
    moment: datetime | None = None
    time: time | None = None
    days: int = 0
    zone: tzinfo = UTC

    def at(self, now: datetime, day: str | None = None) -> datetime:
        """Return the point in time, in UTC.

        Args:
            now: the start of the run.
            day: the date of the run; None: it has none.

        >>> now = datetime(2026, 11, 28, 22, 0, tzinfo=UTC)
        >>> parse("06:00@Europe/Berlin", "run.finish_by").at(now).isoformat()
        '2026-11-29T05:00:00+00:00'
        >>> parse("06:00", "run.finish_by").at(now, "2026-11-28").isoformat()
        '2026-11-28T06:00:00+00:00'
        """
        if self.moment is not None:
            return self.moment.astimezone(UTC)
        assert self.time is not None
        if day is not None:
            return self._on(date.fromisoformat(day))
        today = now.astimezone(self.zone).date()
        first = self._on(today)
        return first if self.days or first > now.astimezone(UTC) else self._on(today + timedelta(days=1))

    def _on(self, day: date) -> datetime:
        assert self.time is not None
        return datetime.combine(day + timedelta(days=self.days), self.time, self.zone).astimezone(UTC)


def parse(text: str, name: str) -> FinishBy:
    """Read a time.

    Args:
        name: the option, for messages.

    Raises:
        ConfigError: it is no time, or its zone is not known.
    """
    text = text.strip()
    if match := _TIME.fullmatch(text):
        hour, minute, days, zone = match.groups()
        try:
            of_day = time(int(hour), int(minute))
        except ValueError as error:
            raise ConfigError(f"{name}={text!r}: {error}; {_FORMS}") from error
        return FinishBy(text, time=of_day, days=int(days or 0), zone=_zone(zone, f"{name}={text!r}") if zone else UTC)
    try:
        moment = datetime.fromisoformat(text)
        if "T" not in text and " " not in text:
            raise ValueError("it has no time of day")
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a time: {_FORMS}") from error
    return FinishBy(text, moment=moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def _zone(name: str, where: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        zones = available_timezones()
        hint = did_you_mean(name, zones) if zones else "; this machine has no database of time zones (package tzdata)"
        raise ConfigError(f"{where}: there is no time zone {name!r}{hint}") from error

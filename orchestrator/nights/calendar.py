"""When a night is due: a time of day in a stated zone, made into instants. Pure functions but for the log.

A night has one date, that of its wall time in the zone, and one instant. A time that the clock skips in spring comes
that much later (02:30 becomes 03:30 where 02:00 jumps to 03:00); one that it shows twice in autumn counts the first
time. So every date has exactly one night.
"""

import re
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo, available_timezones

from pydantic import Field, field_validator

from orchestrator.experiment.settings import suggest_choice
from workers.config import Mistake, Record

ONE_DAY = timedelta(days=1)


class Schedule(Record):
    """A night a day, `at` a time of 24 hours such as 02:30, in a time `zone` such as Europe/Berlin or UTC."""

    at: str = Field(description="time of day, of 24 hours, such as 02:30")
    zone: str = Field(description="time zone of the IANA database, such as UTC or Europe/Berlin")

    @field_validator("at")
    @classmethod
    def _check_time(cls, at: str) -> str:
        if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", at):
            raise ValueError(f"{at!r} is not a time of day; write hours and minutes of 24 hours, such as 02:30")
        return at

    @field_validator("zone")
    @classmethod
    def _check_zone(cls, zone: str) -> str:
        known = available_timezones()
        if zone not in known:
            raise ValueError(
                f"{zone!r} is no time zone; write a name of the IANA database, such as UTC or Europe/Paris"
                f"{suggest_choice(zone, known)}"
            )
        return zone

    @property
    def time(self) -> time:
        return time.fromisoformat(self.at)

    @property
    def tz(self) -> ZoneInfo:
        return ZoneInfo(self.zone)

    def __str__(self) -> str:
        return f"{self.at} {self.zone}"


def compute_instant(day: date, schedule: Schedule) -> datetime:
    """When the night of `day` begins, in UTC."""
    return datetime.combine(day, schedule.time, schedule.tz).astimezone(UTC)


def find_next_run(now: datetime, schedule: Schedule) -> datetime:
    """The first beginning of a night after `now`, in UTC: a zone's own times do not compare across its changes."""
    begins = (compute_instant(day, schedule) for day in _list_dates_around(now, schedule))
    return min(begin for begin in begins if begin > now)


def find_last_night(now: datetime, schedule: Schedule) -> date:
    """The date of the newest night that has begun by `now`."""
    return max(day for day in _list_dates_around(now, schedule) if compute_instant(day, schedule) <= now)


def _list_dates_around(now: datetime, schedule: Schedule) -> list[date]:
    """Dates enough that some begin before `now` and some after, whatever the clock does."""
    today = now.astimezone(schedule.tz).date()
    return [today + days * ONE_DAY for days in range(-3, 4)]


def list_missed(previous: date | None, day: date) -> list[date]:
    """The nights that nobody ran between the previous one and `day`."""
    return [previous + n * ONE_DAY for n in range(1, (day - previous).days)] if previous else []


def parse_date(text: str, now: datetime, schedule: Schedule) -> date:
    """The date that a person gave. Raises Mistake where it is none, or not there yet in the schedule's zone."""
    today = now.astimezone(schedule.tz).date()
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day = None
    if day is None or day.isoformat() != text:
        raise Mistake(f"--date {text}: not a date; write year-month-day, such as {today}")
    if day > today:
        raise Mistake(f"--date {text}: in the future; it is {today} in {schedule.zone}")
    return day


def write_crontab(existing: str, label: str, command: str) -> str:
    """A user's crontab with our entry in it, instead of the one that was there under this label.

    Cron knows only its machine's zone, so it asks every five minutes whether a night is due; what answers knows the
    schedule's zone, its clock changes and the nights that were missed while the machine was off.
    """
    begin, end = f"# begin {label} (diffusion-orchestrator)", f"# end {label} (diffusion-orchestrator)"
    kept = re.sub(rf"^{re.escape(begin)}$.*?^{re.escape(end)}\n?", "", existing, flags=re.DOTALL | re.MULTILINE)
    entry = "*/5 * * * * " + command.replace("%", r"\%")  # cron takes a bare % for the end of the line
    return "\n".join([*kept.rstrip("\n").splitlines(), begin, entry, end]) + "\n"


def format_time(schedule: Schedule) -> str:
    """The time now in the schedule's zone, with its offset from UTC."""
    return datetime.now(schedule.tz).isoformat(" ", "seconds")


def say(schedule: Schedule, text: str) -> None:
    """A line of the log, in the schedule's zone."""
    print(f"{datetime.now(schedule.tz):%Y-%m-%d %H:%M:%S %Z}  {text}", flush=True)

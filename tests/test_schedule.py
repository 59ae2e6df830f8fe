"""When a night is due: one a date, whatever the clock does, and none in the future."""

from datetime import UTC, date, datetime, timedelta

import pytest
from pydantic import ValidationError

from orchestrator.nights.calendar import (
    Schedule,
    compute_instant,
    find_last_night,
    find_next_run,
    list_missed,
    parse_date,
    write_crontab,
)
from workers.config import Mistake

BERLIN = Schedule(
    at="02:30", zone="Europe/Berlin"
)  # in 2026 the clock skips 02:00 on March 29, repeats it on October 25


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-01-10 01:29:59", "2026-01-10 01:30"),  # winter: 02:30 is 01:30 UTC
        ("2026-01-10 01:30:00", "2026-01-11 01:30"),
        ("2026-07-10 00:00:00", "2026-07-10 00:30"),  # summer: 00:30 UTC
        ("2026-03-28 12:00:00", "2026-03-29 01:30"),  # 02:30 does not exist: that much later, 03:30 of summer
        ("2026-03-29 01:30:00", "2026-03-30 00:30"),
        ("2026-10-24 12:00:00", "2026-10-25 00:30"),  # 02:30 is there twice: the first
        ("2026-10-25 00:30:00", "2026-10-26 01:30"),  # and not the second, at 01:30 UTC
    ],
)
def test_the_next_night_begins_at_its_wall_time(now: str, expected: str) -> None:
    assert find_next_run(utc(now), BERLIN) == utc(expected)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"])
@pytest.mark.parametrize("at", ["00:00", "01:45", "02:30", "23:59"])
def test_every_date_of_a_year_has_one_night_in_order(zone: str, at: str) -> None:
    schedule = Schedule(at=at, zone=zone)
    now, nights = compute_instant(date(2026, 1, 1), schedule), [date(2026, 1, 1)]
    while now < compute_instant(date(2026, 12, 31), schedule):
        now = find_next_run(now, schedule)
        nights.append(find_last_night(now, schedule))
        assert find_last_night(now - timedelta(seconds=1), schedule) == nights[-2]
    assert nights == [date(2026, 1, 1) + timedelta(days=n) for n in range(365)]


def test_before_its_time_the_newest_night_is_yesterday_s() -> None:
    assert find_last_night(utc("2026-01-10 01:29"), BERLIN) == date(2026, 1, 9)
    assert find_last_night(utc("2026-01-09 23:30"), BERLIN) == date(
        2026, 1, 9
    )  # the 10th in Berlin, before half past two


def test_one_night_covers_those_that_nobody_ran() -> None:
    assert list_missed(date(2026, 2, 26), date(2026, 3, 2)) == [date(2026, 2, 27), date(2026, 2, 28), date(2026, 3, 1)]
    assert list_missed(date(2026, 2, 26), date(2026, 2, 27)) == list_missed(None, date(2026, 3, 2)) == []


def test_a_date_is_one_that_has_come_in_the_zone() -> None:
    now = utc("2026-01-09 23:30")
    assert parse_date("2026-01-10", now, BERLIN) == date(2026, 1, 10)
    with pytest.raises(Mistake, match=r"2026-01-10: in the future; it is 2026-01-09 in UTC"):
        parse_date("2026-01-10", now, Schedule(at="02:30", zone="UTC"))
    for bad in ("2026-02-30", "20260109", "yesterday", "2026-1-9", ""):
        with pytest.raises(Mistake, match="not a date; write year-month-day"):
            parse_date(bad, now, BERLIN)


@pytest.mark.parametrize(
    ("at", "zone", "told"),
    [
        ("2:30", "UTC", "not a time of day"),
        ("24:00", "UTC", "not a time of day"),
        ("02:30", "Europe/Berln", "did you mean 'Europe/Berlin'"),
        ("02:30", "CET+1", "no time zone"),
        ("02:30", "../../etc/passwd", "no time zone"),
    ],
)
def test_what_is_no_time_or_zone_is_refused(at: str, zone: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Schedule(at=at, zone=zone)


def test_the_crontab_keeps_what_is_not_ours_and_has_our_entry_once() -> None:
    theirs = "MAILTO=me\n0 4 * * * backup\n"
    once = write_crontab(theirs, "nightly", "run --date +%F")
    assert once.startswith(theirs) and "*/5 * * * * run --date +\\%F\n" in once
    assert write_crontab(once, "nightly", "run --date +%F") == once
    both = write_crontab(once, "nightly-cifar10", "other")
    assert both.startswith(once) and write_crontab(both, "nightly", "new").count("*/5") == 2
    assert "run" not in write_crontab(both, "nightly", "new")

"""Reading of time columns: datetimes, text, whole numbers, periods and zones."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, timedelta, timezone, tzinfo
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedcast.data.problems import BoolArray, Findings, IntArray

# Behind whatever ISO 8601 lets end a time: minutes or seconds of one digit or two, or an hour alone.
_OFFSET = r"(?:T\d{1,6}|:\d{1,2}|\d{4}-\d{2}-\d{2} \d{1,2})(?:[.,]\d+)?\s*(Z|z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)$"
_MISSING_TEXT = ("", "nat", "nan", "none", "null", "na", "<na>")
_DATES = (
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d.%m.%Y",
    "%d-%m-%Y",
    "%m-%d-%Y",
    "%Y.%m.%d",
    "%d %b %Y",
    "%d-%b-%Y",
    "%b %d, %Y",
    "%B %d, %Y",
    "%b %Y",
    "%B %Y",
    "%b-%Y",
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H:%M:%S.%f", " %H-%M-%S", " %I:%M %p", " %I:%M:%S %p")
_EXTRA = ("%Y-%m-%d %H-%M-%S", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S")
_USUAL_ZONES = (
    "Europe/London",
    "Europe/Paris",
    "Europe/Athens",
    "America/New_York",
    "America/Chicago",
    "America/Denver",
    "America/Los_Angeles",
    "America/Sao_Paulo",
    "Australia/Sydney",
)


@dataclass(frozen=True)
class Stamps:
    """Times of the rows of a frame.

    Attributes
    ----------
    values
        int64 [n]: nanoseconds since 1970 in UTC, or whole numbers; 0 where not ``good``.
    good
        bool [n], False where the time is missing or cannot be read.
    zone
        Time zone, ``None`` for naive times and whole numbers.
    integer
        True where the times are whole numbers.
    """

    values: IntArray
    good: BoolArray
    zone: tzinfo | None = None
    integer: bool = False


def looks_like_time(column: pd.Series[Any]) -> bool:
    """Say whether a column of text or datetimes can be the time column, from its first values."""
    if pd.api.types.is_datetime64_any_dtype(column.dtype) or isinstance(column.dtype, pd.PeriodDtype):
        return True
    if pd.api.types.is_numeric_dtype(column.dtype) or isinstance(column.dtype, pd.CategoricalDtype):
        return False
    head = column.dropna().iloc[:20].astype(str)
    dated = head.str.match(r"\d{4}-\d{2}|\d{1,4}[./]\d{1,2}[./]\d{1,4}")
    return bool(len(head)) and bool(dated.all())


def read_times(column: pd.Series[Any], name: str, findings: Findings) -> Stamps:
    """Turn a time column of any type into int64 stamps; what cannot be read is noted.

    Text is read as ISO 8601 or as one of the common day-first, month-first and dotted forms, one form for the whole column. Offsets
    that one time zone explains (summer time) are kept as that zone; any other mixture is refused.

    Parameters
    ----------
    column
        The times, [n].
    name
        The column's name, for the messages.
    findings
        Where problems go.
    """
    if isinstance(column.dtype, pd.PeriodDtype):
        column = column.dt.to_timestamp()
    if pd.api.types.is_datetime64_any_dtype(column.dtype):
        stamps = _from_datetimes(pd.DatetimeIndex(column), name, findings)
    elif pd.api.types.is_bool_dtype(column.dtype) or not pd.api.types.is_numeric_dtype(column.dtype):
        stamps = _from_text(column.astype(object), name, findings)
    else:
        stamps = _from_numbers(column, name, findings)
    return stamps


def _note_missing(missing: BoolArray, name: str, findings: Findings) -> None:
    if missing.any():
        findings.add(
            "missing-times",
            f"{int(missing.sum())} rows have no time in column {name!r}",
            f"frame = frame.dropna(subset=[{name!r}])",
            column=name,
            mask=missing,
        )


def _note_unreadable(bad: BoolArray, example: object, name: str, findings: Findings) -> None:
    findings.add(
        "unparsable-times",
        f"{int(bad.sum())} values of column {name!r} are no times between 1678 and 2262, such as {str(example)[:40]!r}",
        f"frame[{name!r}] = pd.to_datetime(frame[{name!r}], errors='coerce'); frame = frame.dropna(subset=[{name!r}])",
        column=name,
        mask=bad,
    )


def _from_datetimes(index: pd.DatetimeIndex, name: str, findings: Findings) -> Stamps:
    missing = np.asarray(index.isna(), dtype=bool)
    _note_missing(missing, name, findings)
    lowest, highest = pd.Timestamp.min, pd.Timestamp.max
    naive = index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index
    far = np.asarray((naive < lowest) | (naive > highest), dtype=bool) if index.unit != "ns" else np.zeros(len(index), dtype=bool)
    if far.any():
        _note_unreadable(far, index[int(np.argmax(far))], name, findings)
    good = ~missing & ~far
    nanoseconds = naive.where(good, lowest.ceil("D")).as_unit("ns").asi8
    return Stamps(np.where(good, nanoseconds, 0).astype(np.int64), good, index.tz)


def _from_numbers(column: pd.Series[Any], name: str, findings: Findings) -> Stamps:
    missing = column.isna().to_numpy(dtype=bool)
    _note_missing(missing, name, findings)
    if pd.api.types.is_complex_dtype(column.dtype):
        whole = np.zeros(len(column))
        bad = ~missing
    else:
        whole = column.to_numpy(dtype=np.float64, na_value=np.nan)
        with np.errstate(invalid="ignore"):
            bad = ~missing & ((whole != np.floor(whole)) | (np.abs(whole) > 2**62))
    if bad.any():
        _note_unreadable(bad, column.iloc[int(np.argmax(bad))], name, findings)
    good = ~missing & ~bad
    exact = (
        column.to_numpy(dtype=np.int64)
        if good.all() and pd.api.types.is_integer_dtype(column.dtype)
        else np.where(good, whole, 0.0).astype(np.int64)
    )
    return _compact_dates(exact, good) or Stamps(exact, good, integer=True)


def _compact_dates(values: IntArray, good: BoolArray) -> Stamps | None:
    """Read whole numbers such as 20240131 as dates, where every one of them is a date."""
    uniques, inverse = np.unique(values[good], return_inverse=True)
    if len(uniques) < 2 or uniques[0] < 16780101 or uniques[-1] > 22620101:
        return None
    dates = pd.to_datetime(pd.Series(uniques).astype(str), format="%Y%m%d", errors="coerce")
    if dates.isna().any():
        return None
    stamps = np.zeros(len(values), dtype=np.int64)
    stamps[good] = pd.DatetimeIndex(dates).as_unit("ns").asi8[inverse]
    return Stamps(stamps, good)


def _from_text(column: pd.Series[Any], name: str, findings: Findings) -> Stamps:
    if pd.api.types.infer_dtype(column, skipna=True) != "string":
        column = column.map(str)  # equal instants of different zones would otherwise count as one value
    codes, raw = pd.factorize(column)
    # Only the different texts are parsed: a panel of a thousand series repeats each stamp a thousand times.
    texts = pd.Series(raw, dtype=object).astype(str).str.strip()
    void = texts.str.lower().isin(_MISSING_TEXT).to_numpy(dtype=bool)
    missing = np.append(void, True)[codes]
    _note_missing(missing, name, findings)
    if void.all():
        return Stamps(np.zeros(len(column), dtype=np.int64), ~missing)
    offsets = texts.str.extract(_OFFSET, expand=False)
    if offsets.notna().any():
        parsed, zone = _with_offsets(texts, offsets, void, codes, name, findings)
    else:
        parsed, zone = _without_offsets(texts, void, name, findings, codes), None
    good = np.append(parsed.notna() & ~void, False)[codes]
    bad = ~good & ~missing
    if bad.any() and not any(problem.kind in ("mixed-time-zones", "ambiguous-times") for problem in findings.problems):
        _note_unreadable(bad, column.iloc[int(np.argmax(bad))], name, findings)
    values = np.append(np.where(parsed.notna(), parsed.asi8, 0), 0)[codes]
    return Stamps(np.where(good, values, 0).astype(np.int64), good, zone)


def _parse(texts: pd.Series[Any], form: str, *, utc: bool = False) -> pd.DatetimeIndex:
    # Always in UTC, which changes no time without an offset: pandas raises where some have one and others have not.
    parsed = pd.DatetimeIndex(pd.to_datetime(texts, format=form, errors="coerce", utc=True)).as_unit("ns")
    return parsed if utc else parsed.tz_localize(None)


def _forms() -> Iterator[str]:
    yield from _EXTRA
    for clock in _CLOCKS:
        for date in _DATES:
            yield date + clock


def _without_offsets(
    texts: pd.Series[Any], void: BoolArray, name: str, findings: Findings, codes: npt.NDArray[np.intp]
) -> pd.DatetimeIndex:
    """Parse text without offsets; texts that are not ISO 8601 must share one other form, and that without doubt about day and month."""
    texts = texts.str.replace(r"^(\d{4})[- ]?Q([1-4])$", lambda match: f"{match[1]}-{3 * int(match[2]) - 2:02}", regex=True)
    parsed = _parse(texts, "ISO8601")
    rest = np.flatnonzero(np.asarray(parsed.isna(), dtype=bool) & ~void)
    if not len(rest):
        return parsed
    left = texts.iloc[rest]
    best = _parse(left, "ISO8601")
    complete: list[tuple[str, pd.DatetimeIndex]] = []
    for form in _forms():
        if not _parse(left.iloc[:50], form).notna().any():
            continue
        other = _parse(left, form)
        if other.notna().all() and not any(other.equals(known) for _, known in complete):
            complete.append((form, other))
        if np.count_nonzero(other.notna()) > np.count_nonzero(best.notna()):
            best = other
    if len(complete) > 1:
        findings.add(
            "ambiguous-times",
            f"column {name!r} can be read day-first and month-first, such as {left.iloc[0]!r}",
            f"frame[{name!r}] = pd.to_datetime(frame[{name!r}], format={complete[0][0]!r})  # or {complete[1][0]!r}",
            column=name,
            mask=np.append(np.isin(np.arange(len(texts)), rest), False)[codes],
        )
        return parsed
    # A form that reads only some of the rest shows which values are no times; where most are ISO, those are.
    readable = complete[0][1] if complete else best
    if complete or 2 * np.count_nonzero(best.notna()) > len(texts):
        stamps = np.array(parsed.asi8)
        stamps[rest] = readable.asi8
        parsed = pd.DatetimeIndex(stamps)
    return parsed


def _with_offsets(
    texts: pd.Series[Any], offsets: pd.Series[Any], void: BoolArray, codes: npt.NDArray[np.intp], name: str, findings: Findings
) -> tuple[pd.DatetimeIndex, tzinfo | None]:
    plain = texts.str.replace(r"\s*(?:UTC|GMT|z)$", "Z", regex=True)
    parsed = _parse(plain, "ISO8601", utc=True)
    minutes = offsets.map(_offset_minutes).to_numpy(dtype=np.float64)
    usable = np.asarray(parsed.notna(), dtype=bool) & ~void
    without = usable & np.isnan(minutes)
    different = np.unique(minutes[usable & ~np.isnan(minutes)])
    zone: tzinfo | None = UTC if len(different) == 0 else _fixed(int(different[0]))
    odd = without
    if not without.any() and len(different) > 1:
        zone = _explaining_zone(parsed.asi8[usable], minutes[usable].astype(np.int64))
        usual = np.bincount(np.searchsorted(different, minutes[usable])).argmax()
        odd = usable & (minutes != different[usual]) if zone is None else odd
    if odd.any():
        findings.add(
            "mixed-time-zones",
            f"column {name!r} mixes {'times with and without a zone' if without.any() else f'{len(different)} time zones'}",
            f"frame[{name!r}] = pd.to_datetime(frame[{name!r}], utc=True, format='ISO8601')",
            column=name,
            mask=np.append(odd, False)[codes],
        )
    return parsed, zone or UTC


def _offset_minutes(text: object) -> float:
    if not isinstance(text, str):
        return float("nan")
    match = re.fullmatch(r"([+-])(\d{2}):?(\d{2})?", text)
    if match is None:
        return 0.0
    sign, hours, minutes = match.groups()
    return (-1.0 if sign == "-" else 1.0) * (60 * int(hours) + int(minutes or 0))


def _fixed(minutes: int) -> tzinfo:
    return timezone(timedelta(minutes=minutes)) if minutes else UTC


def _explaining_zone(stamps: IntArray, minutes: IntArray) -> tzinfo | None:
    """Return a zone whose offsets, with summer time, are those of the stamps, or ``None``.

    Only the ends of each stretch of equal offsets are tried, so that 600 zones cost milliseconds.
    """
    order = np.argsort(stamps, kind="stable")
    stamps, minutes = stamps[order], minutes[order]
    change = np.flatnonzero(np.diff(minutes)) + 1
    if len(change) > 2 + 4 * (stamps[-1] - stamps[0]) / (365 * 86_400e9):
        return None
    ends = np.unique(np.concatenate([[0, len(stamps) - 1], change - 1, change]))
    instants = pd.DatetimeIndex(stamps[ends], tz="UTC")
    wanted = (minutes[ends] * 60 * 1_000_000_000).astype(np.int64)
    others = sorted(name for name in zoneinfo.available_timezones() if "/" in name and not name.startswith(("Etc/", "posix", "right")))
    for name in (*_USUAL_ZONES, *others):
        local = instants.tz_convert(name)
        if np.array_equal(local.tz_localize(None).asi8 - instants.asi8, wanted):
            return local.tz
    return None

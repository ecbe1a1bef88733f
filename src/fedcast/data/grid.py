"""Regular grids of time stamps: frequencies as steps over whole numbers, and gaps laid open.

Every frequency is a rule over whole numbers ("units"): whole numbers themselves, nanoseconds, months, or positions in a calendar
(business days and the like). On units, gaps and strays are the same arithmetic for all of them, for all series at once.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, tzinfo
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from fedcast.data.problems import BoolArray, IntArray

SECOND, MINUTE, HOUR, DAY = 1_000_000_000, 60_000_000_000, 3_600_000_000_000, 86_400_000_000_000
NATURAL = (SECOND, MINUTE, HOUR, DAY, 7 * DAY)
_MONTHS = {"MS": 1, "ME": 1, "QS": 3, "QE": 3, "YS": 12, "YE": 12}
MONTH_NAMES = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
_OLD = {
    "H": "h",
    "T": "min",
    "S": "s",
    "L": "ms",
    "U": "us",
    "N": "ns",
    "d": "D",
    "w": "W",
    "b": "B",
    "M": "ME",
    "Q": "QE",
    "A": "YE",
    "Y": "YE",
    "AS": "YS",
    "BM": "BME",
    "BQ": "BQE",
    "BA": "BYE",
    "BY": "BYE",
    "BAS": "BYS",
}


@dataclass(frozen=True)
class Axis:
    """All stamps of a frame without duplicates, sorted by series and time.

    Attributes
    ----------
    codes
        int64 [n], series of each row, ascending.
    stamps
        int64 [n], nanoseconds since 1970 in UTC, or whole numbers.
    zone
        Time zone; ``None`` for naive stamps.
    wall
        int64 [n], the same on the wall clock of the zone.
    integer
        True where stamps are whole numbers.
    """

    codes: IntArray
    stamps: IntArray
    zone: tzinfo | None
    wall: IntArray
    integer: bool = False

    def local(self) -> pd.DatetimeIndex:
        """Return the stamps as naive wall-clock times, [n]."""
        return pd.DatetimeIndex(self.wall)

    def take(self, rows: IntArray | BoolArray) -> Axis:
        """Return the chosen rows."""
        return replace(self, codes=self.codes[rows], stamps=self.stamps[rows], wall=self.wall[rows])


def make_axis(codes: IntArray, stamps: IntArray, zone: tzinfo | None, *, integer: bool) -> Axis:
    """Return the axis of sorted stamps; the arguments are those of :class:`Axis`."""
    if zone is None or not len(stamps):
        return Axis(codes, stamps, zone, stamps, integer)
    wall = pd.DatetimeIndex(stamps, tz="UTC").tz_convert(zone).tz_localize(None).asi8
    clock = wall % DAY
    usual, _ = most_common(codes, clock, int(codes[-1]) + 1)
    late = np.flatnonzero(clock != usual[codes])
    if len(late):
        # Where summer time begins at midnight, that midnight is 01:00: such a stamp still stands for its day.
        meant = wall[late] - clock[late] + usual[codes[late]]
        same = _to_utc(meant, zone) == stamps[late]
        wall = wall.copy()
        wall[late[same]] = meant[same]
    return Axis(codes, stamps, zone, wall, integer)


def _to_utc(wall: IntArray, zone: tzinfo) -> IntArray:
    index = pd.DatetimeIndex(wall)
    return index.tz_localize(zone, ambiguous=np.ones(len(index), dtype=bool), nonexistent="shift_forward").asi8


@dataclass(frozen=True)
class Rule:
    """One frequency as a step over units.

    Attributes
    ----------
    unit
        What a unit is: a whole number, a nanosecond, a month or a position in a calendar.
    step
        Units between neighbours.
    edge
        For months ``"S"`` (first day) or ``"E"`` (last day), for calendars the pandas alias.
    anchor
        Month (0 to 11) modulo the step, or weekday (0 to 6), that every stamp must have; ``None``: any.
    """

    unit: Literal["integer", "tick", "month", "calendar"]
    step: int
    edge: str = ""
    anchor: int | None = None


def modern_alias(freq: str) -> str:
    """Return a pandas alias in today's spelling: ``H`` becomes ``h``, ``15T`` ``15min``, ``M`` ``ME``."""
    match = re.fullmatch(r"(-?\d*)([A-Za-z]+)(-[A-Za-z]{3})?", freq.strip())
    if match is None:
        return freq.strip()
    count, name, anchor = match.groups()
    return f"{count}{_OLD.get(name, name)}{(anchor or '').upper()}"


def parse_freq(freq: str | int, *, integer: bool = False) -> Rule:
    """Turn a frequency into a rule.

    Unanchored weeks, quarters and years ("W", "QS", "YE") mean any weekday or month, as long as each series keeps to its own.

    Parameters
    ----------
    freq
        pandas alias, old or new spelling, or a whole number.
    integer
        Whether the stamps are whole numbers.

    Raises
    ------
    ValueError
        If it is no frequency for such stamps.
    """
    if isinstance(freq, int) or freq.strip().isdigit():
        if not integer or int(freq) < 1:
            raise ValueError(f"{freq!r} is a frequency of whole-number times" if int(freq) > 0 else "a step must be at least 1")
        return Rule("integer", int(freq))
    if integer:
        raise ValueError(f"{freq!r} is a frequency of dates, but the times are whole numbers")
    alias = modern_alias(freq)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # spellings on their way out are still read
        offset = pd.tseries.frequencies.to_offset(alias)
    if offset is None or offset.n < 1:
        raise ValueError(f"{freq!r} is no frequency")
    name, _, anchor = offset.rule_code.partition("-")
    anchored = "-" in alias
    if isinstance(offset, pd.offsets.Day):
        return Rule("tick", offset.n * DAY)
    if isinstance(offset, pd.offsets.Tick):
        return Rule("tick", int(pd.Timedelta(offset).value))
    if name == "W":
        return Rule("tick", offset.n * 7 * DAY, anchor=_WEEKDAYS.index(anchor) if anchored else None)
    if name in _MONTHS:
        family = _MONTHS[name]
        return Rule("month", offset.n * family, name[1], MONTH_NAMES.index(anchor) % family if anchored else None)
    if offset.n != 1 or name.lower() in ("bh", "cbh"):
        raise ValueError(f"{freq!r} is not supported")
    return Rule("calendar", 1, offset.freqstr)


def alias_of(rule: Rule, axis: Axis) -> str | int:
    """Return the pandas alias of a rule over these stamps, anchored where all series agree."""
    if rule.unit == "integer":
        return rule.step
    if rule.unit == "calendar":
        return rule.edge
    if rule.unit == "tick":
        if rule.step % (7 * DAY):
            return str(pd.tseries.frequencies.to_offset(pd.Timedelta(rule.step)).freqstr)
        days = np.unique(axis.local().weekday)
        weeks = rule.step // (7 * DAY)
        return _counted(weeks, f"W-{_WEEKDAYS[int(days[0])]}") if len(days) == 1 else f"{7 * weeks}D"
    local = axis.local()
    family = 12 if rule.step % 12 == 0 else 3 if rule.step % 3 == 0 else 1
    phases = np.unique((local.month.to_numpy() - 1) % family)
    if family == 1 or len(phases) > 1:
        return _counted(rule.step, f"M{rule.edge}")
    month = int(phases[0])
    # Quarters are named by their first month when they begin and by December's quarter when they end, as pandas does.
    month += 9 if family == 3 and rule.edge == "E" else 0
    return _counted(rule.step // family, f"{'Y' if family == 12 else 'Q'}{rule.edge}-{MONTH_NAMES[month]}")


def _counted(count: int, name: str) -> str:
    return name if count == 1 else f"{count}{name}"


def most_common(codes: IntArray, values: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """Return the most common value of each group and how often it occurs (the smaller value on a tie), [size] each."""
    order = np.lexsort((values, codes))
    group, value = codes[order], values[order]
    first = np.flatnonzero(np.append(True, (group[1:] != group[:-1]) | (value[1:] != value[:-1])) if len(group) else [])
    counts = np.diff(np.append(first, len(group)))
    rank = np.lexsort((-value[first], counts, group[first]))
    winner, best = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    winner[group[first][rank]] = value[first][rank]
    best[group[first][rank]] = counts[rank]
    return winner, best


class Grid:
    """A rule over a zone: stamps to units and back.

    Parameters
    ----------
    rule
        The frequency.
    zone
        Time zone of the stamps.
    span
        First and last wall-clock stamp that a calendar must hold.
    """

    def __init__(self, rule: Rule, zone: tzinfo | None, span: tuple[pd.Timestamp, pd.Timestamp] | None = None) -> None:
        self.rule = rule
        self.zone = zone
        self._table: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        if rule.unit == "calendar" and span is not None:
            self._table = pd.date_range(span[0].normalize(), span[1].normalize(), freq=rule.edge, unit="ns").asi8

    @property
    def wall(self) -> bool:
        """Whether steps count on the wall clock (days and longer) instead of in UTC."""
        return self.rule.unit in ("month", "calendar") or (self.rule.unit == "tick" and self.rule.step % DAY == 0)

    def units(self, axis: Axis) -> tuple[IntArray, IntArray, BoolArray]:
        """Return units [n], nanoseconds of the day [n] (0 for ticks) and whether each stamp can lie on the grid [n]."""
        fits = np.ones(len(axis.stamps), dtype=bool)
        clock = np.zeros(len(axis.stamps), dtype=np.int64)
        if self.rule.unit == "integer" or not self.wall:
            return axis.stamps, clock, fits
        local = axis.local()
        nanoseconds = local.asi8
        if self.rule.unit == "tick":
            if self.rule.anchor is not None:
                fits = local.weekday.to_numpy() == self.rule.anchor
            return nanoseconds, clock, fits
        clock = nanoseconds % DAY
        if self.rule.unit == "calendar":
            place = np.searchsorted(self._table, nanoseconds - clock)
            fits = np.append(self._table, -1)[place] == nanoseconds - clock
            return place.astype(np.int64), clock, fits
        units = (local.year.to_numpy().astype(np.int64) * 12) + local.month.to_numpy() - 1
        fits = local.is_month_start if self.rule.edge == "S" else local.is_month_end
        if self.rule.anchor is not None:
            family = 12 if self.rule.step % 12 == 0 else 3
            fits = fits & (units % family == self.rule.anchor % family)
        return units, clock, fits

    def stamps(self, units: IntArray, clock: IntArray) -> IntArray:
        """Return the stamps (int64 [n], UTC nanoseconds or whole numbers) of units and nanoseconds of the day."""
        if self.rule.unit == "integer" or not self.wall:
            return units
        if self.rule.unit == "tick":
            nanoseconds = units
        elif self.rule.unit == "calendar":
            nanoseconds = self._table[units] + clock
        else:
            month = (units + (self.rule.edge == "E") - 1970 * 12).astype("datetime64[M]").astype("datetime64[D]")
            nanoseconds = (month - np.timedelta64(int(self.rule.edge == "E"), "D")).astype("datetime64[ns]").astype(np.int64) + clock
        if self.zone is None:
            return nanoseconds
        return _to_utc(nanoseconds, self.zone)


def same_clock(axis: Axis, size: int) -> bool:
    """Say whether each series has one time of day, on the wall clock."""
    clock = axis.local().asi8 % DAY
    first = np.zeros(size, dtype=np.int64)
    first[axis.codes[::-1]] = clock[::-1]
    return bool((clock == first[axis.codes]).all())


def ends(codes: IntArray, units: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """Return the first and last unit of each series, [size] each; rows are sorted."""
    first, last = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    first[codes[::-1]] = units[::-1]
    last[codes] = units
    return first, last


@dataclass(frozen=True)
class Filled:
    """Rows of a frame laid on its grid, gaps included.

    Attributes
    ----------
    codes
        int64 [m], series of each row.
    stamps
        int64 [m], as in :class:`Axis`.
    take
        int64 [m], the row of the axis; -1 where the grid has a gap.
    """

    codes: IntArray
    stamps: IntArray
    take: IntArray


def settle(axis: Axis, rule: Rule, size: int) -> Axis:
    """Return the axis in the zone its days are counted in: UTC where days of the wall clock do not fit."""
    days = rule.unit == "tick" and rule.step % DAY == 0
    return replace(axis, zone=UTC, wall=axis.stamps) if days and axis.zone is not None and not same_clock(axis, size) else axis


def make_grid(axis: Axis, rule: Rule) -> Grid:
    """Return the grid of a rule that covers all stamps of the axis."""
    if rule.unit != "calendar":
        return Grid(rule, axis.zone)
    local = axis.local()
    return Grid(rule, axis.zone, (local.min(), local.max()))


def off_grid(axis: Axis, grid: Grid, size: int) -> BoolArray:
    """Return which rows do not lie on the grid of their series, [n]."""
    units, clock, fits = grid.units(axis)
    phases, _ = most_common(axis.codes, units % grid.rule.step, size)
    clocks, _ = most_common(axis.codes, clock, size)
    off: BoolArray = ~fits | (units % grid.rule.step != phases[axis.codes]) | (clock != clocks[axis.codes])
    return off


def fill(axis: Axis, grid: Grid, size: int, limit: int) -> Filled | int:
    """Lay all rows on the grid; every series reaches from its first to its last stamp.

    Parameters
    ----------
    axis
        The stamps, all of them on the grid.
    grid
        The grid.
    size
        Number of series, each with at least one row.
    limit
        Largest number of rows.

    Returns
    -------
    Filled or int
        The rows; or, where they would be over ``limit``, how many they would be.
    """
    units, clock, _ = grid.units(axis)
    step = grid.rule.step
    first, last = ends(axis.codes, units, size)
    lengths = (last - first) // step + 1
    total = int(lengths.sum(dtype=np.float64))
    if total > limit:
        return total
    if total == len(units):
        return Filled(axis.codes, axis.stamps, np.arange(total, dtype=np.int64))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    place = starts[axis.codes] + (units - first[axis.codes]) // step
    take = np.full(total, -1, dtype=np.int64)
    take[place] = np.arange(len(units))
    codes = np.repeat(np.arange(size, dtype=np.int64), lengths)
    stamps = np.zeros(total, dtype=np.int64)
    stamps[place] = axis.stamps
    gaps = np.flatnonzero(take < 0)
    owner = codes[gaps]
    clocks, _ = ends(axis.codes, clock, size)
    stamps[gaps] = grid.stamps(first[owner] + step * (gaps - starts[owner]), clocks[owner])
    return Filled(codes, stamps, take)

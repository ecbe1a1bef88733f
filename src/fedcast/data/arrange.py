"""From rows in any order to rows on a grid: sorting, duplicates, frequency and gaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fedcast.data.frequency import infer
from fedcast.data.grid import NATURAL, Axis, Rule, alias_of, fill, make_axis, make_grid, off_grid, parse_freq, settle
from fedcast.data.layout import Layout
from fedcast.data.problems import BoolArray, Findings, IntArray, Series
from fedcast.data.times import Stamps

SameValues = Callable[[IntArray, IntArray], BoolArray]

_SPARSE_ROWS = 5_000_000
_SPARSE_SHARE = 200


def as_times(stamps: IntArray, axis: Axis) -> IntArray | pd.DatetimeIndex:
    """Return stamps of an axis as datetimes in its zone, or as the whole numbers that they are."""
    if axis.integer:
        return stamps
    index = pd.DatetimeIndex(stamps)
    return index if axis.zone is None else index.tz_localize("UTC").tz_convert(axis.zone)


@dataclass(frozen=True)
class Arranged:
    """Rows of a frame on the grid of their frequency.

    Attributes
    ----------
    times
        [m] stamps, gaps included: int64 or datetimes in their zone.
    codes
        int64 [m], series of each row.
    take
        int64 [m], the input row; -1 where the grid has a gap.
    freq
        pandas alias, or whole-number step.
    """

    times: IntArray | pd.DatetimeIndex
    codes: IntArray
    take: IntArray
    freq: str | int


def arrange(
    series: Series, stamps: Stamps, equal: SameValues, layout: Layout, freq: str | int | None, findings: Findings
) -> Arranged | None:
    """Sort, refuse duplicates, find the frequency and open the gaps; works on the rows whose id and time are readable.

    Parameters
    ----------
    series, stamps
        The series and the time of each input row.
    equal
        Says, for two lists of input rows, which pairs hold the same values.
    layout
        Names for the messages.
    freq
        The frequency, where it is known.
    findings
        Where problems go.

    Returns
    -------
    Arranged or None
        ``None`` where a problem that was noted leaves no grid.
    """
    rows = len(stamps.values)
    order = _sorted_rows(series.codes, stamps)
    axis = make_axis(series.codes[order], stamps.values[order], stamps.zone, integer=stamps.integer)
    repeated = _note_duplicates(axis, equal, order, layout, rows, findings)
    if repeated.any():
        order, axis = order[~repeated], axis.take(~repeated)
    if not len(order):
        return None
    counts = np.bincount(axis.codes, minlength=len(series.names))
    # Series without one readable row have been noted; the others are checked all the same.
    present = np.flatnonzero(counts)
    if len(present) < len(series.names):
        axis = replace(axis, codes=np.searchsorted(present, axis.codes))
    names = [series.names[place] for place in present]
    if counts.max() < 2:
        if rows == len(order):
            mask = np.ones(rows, dtype=bool)
            findings.add(
                "one-point",
                "no series has more than one point",
                "add rows: a series needs at least two stamps",
                column=layout.time,
                mask=mask,
            )
        return None
    return _onto_grid(axis, names, order, layout, freq, rows, findings)


def _onto_grid(
    axis: Axis, names: list[str], order: IntArray, layout: Layout, freq: str | int | None, rows: int, findings: Findings
) -> Arranged | None:
    size = len(names)
    rule = _find_rule(axis, names, order, layout, freq, rows, findings)
    if rule is None:
        return None
    axis = settle(axis, rule, size)
    grid = make_grid(axis, rule)
    off = off_grid(axis, grid, size)
    alias = freq if freq is not None and off.all() else alias_of(rule, axis if not off.any() else axis.take(~off))
    if off.any():
        note_off_grid(axis, off, order, layout, alias, freq is not None, rows, findings)
        return None
    filled = fill(axis, grid, size, max(_SPARSE_ROWS, _SPARSE_SHARE * len(order)))
    if isinstance(filled, int):
        findings.add(
            "too-sparse",
            f"frequency {alias!r} would make {filled:,} rows of {len(order):,}",
            f"look for stamps far from the others: frame[{layout.time!r}].agg(['min', 'max']), or pass a longer freq=...",
            column=layout.time,
            count=filled,
        )
        return None
    take = np.where(filled.take < 0, -1, order[filled.take])
    return Arranged(as_times(filled.stamps, axis), filled.codes, take, alias)


def _sorted_rows(codes: IntArray, stamps: Stamps) -> IntArray:
    """Return the readable rows in the order of series and time; rows that are already in order are not sorted again."""
    rows = np.flatnonzero((codes >= 0) & stamps.good)
    group, time = codes[rows], stamps.values[rows]
    ahead = (group[1:] > group[:-1]) | ((group[1:] == group[:-1]) & (time[1:] >= time[:-1]))
    return rows if bool(ahead.all()) else rows[np.lexsort((time, group))]


def _spread(mask: BoolArray, order: IntArray, size: int) -> BoolArray:
    """Carry a mask over axis rows back to input rows."""
    rows = np.zeros(size, dtype=bool)
    rows[order[mask]] = True
    return rows


def _note_duplicates(axis: Axis, same: SameValues, order: IntArray, layout: Layout, size: int, findings: Findings) -> BoolArray:
    repeated = (
        np.append(False, (axis.codes[1:] == axis.codes[:-1]) & (axis.stamps[1:] == axis.stamps[:-1]))
        if len(order)
        else np.zeros(0, dtype=bool)
    )
    if not repeated.any():
        return repeated
    places = np.flatnonzero(repeated)
    equal = np.zeros(len(order), dtype=bool)
    equal[places] = same(order[places], order[places - 1])
    different = repeated & ~equal
    subset = layout.subset
    if equal.any():
        findings.add(
            "duplicate-rows",
            f"{int(equal.sum())} rows repeat another one",
            f"frame = frame.drop_duplicates({[*subset, *layout.targets[:1]] if not layout.wide else None})".replace("(None)", "()"),
            column=layout.time,
            mask=_spread(equal, order, size),
        )
    if different.any():
        keys = repr(subset if len(subset) > 1 else subset[0])
        findings.add(
            "duplicate-stamps",
            f"{int(different.sum())} rows have the stamp of another row but another value"
            + ("" if layout.id else "; where a column names the series, pass it as id=..."),
            f"frame = frame.groupby({keys}, as_index=False).mean(numeric_only=True)  # or frame.drop_duplicates({subset!r}, keep='last')",
            column=layout.time,
            mask=_spread(different, order, size),
        )
    return repeated


def _find_rule(
    axis: Axis, names: list[str], order: IntArray, layout: Layout, freq: str | int | None, rows: int, findings: Findings
) -> Rule | None:
    size = len(names)
    if freq is not None:
        try:
            return parse_freq(freq, integer=axis.integer)
        except ValueError as error:
            findings.add(
                "unknown-frequency",
                f"frequency {freq!r}: {error}",
                "leave freq out, or name a pandas frequency such as 'h', '15min', 'D', 'W-SUN', 'MS'",
            )
            return None
    found = infer(axis, size)
    if found.mixed.any():
        name = names[int(np.argmax(found.mixed))]
        other = found.mixed[axis.codes]
        one, most = _own_frequency(axis, found.mixed), _own_frequency(axis, ~found.mixed)
        findings.add(
            "mixed-frequencies",
            f"{int(found.mixed.sum())} of {size} series step {one!r}, such as {name!r}, the others {most!r}",
            f"put each frequency in a file of its own, frame[frame[{layout.id!r}] == {name!r}] first, or pass freq={most!r}",
            column=layout.time,
            mask=_spread(other, order, rows),
            series=name,
            count=int(found.mixed.sum()),
        )
        return None
    if found.rule is None:
        rule = parse_freq(found.guess, integer=axis.integer)
        settled = settle(axis, rule, size)
        off = off_grid(settled, make_grid(settled, rule), size)
        note_off_grid(axis, off if off.any() else np.ones(len(off), dtype=bool), order, layout, found.guess, False, rows, findings)
    return found.rule


def _own_frequency(axis: Axis, chosen: BoolArray) -> str | int:
    """Return the frequency of the longest of the chosen series."""
    rows = np.flatnonzero(chosen[axis.codes])
    longest = int(np.argmax(np.bincount(axis.codes[rows])))
    one = axis.take(axis.codes == longest)
    return infer(replace(one, codes=np.zeros(len(one.codes), dtype=np.int64)), 1).guess


def note_off_grid(
    axis: Axis, off: BoolArray, order: IntArray, layout: Layout, alias: str | int, given: bool, size: int, findings: Findings
) -> None:
    """Note the rows that leave the grid; ``alias`` is the grid's frequency, ``given`` where a person named it."""
    mask = _spread(off, order, size)
    count = int(off.sum())
    stamp = as_times(axis.stamps[off][:1], axis)[0]
    if given:
        message, kind = f"{count} stamps do not lie on frequency {alias!r}, such as {stamp}", "off-frequency"
    else:
        message, kind = f"{count} stamps leave the step {alias!r} of most, such as {stamp}", "irregular-steps"
    groups = f".groupby({layout.id!r})" if layout.id else ""
    target = "" if layout.wide else f"[{layout.targets[0]!r}]"
    repair = f"frame = frame.set_index({layout.time!r}){groups}{target}.resample({alias!r}).mean().reset_index()"
    if axis.integer:
        repair = f"frame = frame[frame[{layout.time!r}] % {alias} == 0]  # or number the rows"
    found = infer(axis, int(axis.codes[-1]) + 1)
    if given and found.rule is not None and not found.mixed.any():
        repair = f"pass freq={found.guess!r}, or leave freq out"
    divisor = int(np.gcd.reduce(np.diff(axis.stamps)[axis.codes[1:] == axis.codes[:-1]]))
    if not given and found.rule is None and not axis.integer and divisor in NATURAL:
        repair += f"  # or, where only rows are missing, pass freq={alias_of(Rule('tick', divisor), axis)!r}"
    findings.add(kind, message, repair, column=layout.time, mask=mask)

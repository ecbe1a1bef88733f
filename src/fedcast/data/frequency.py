"""Inference of frequencies: which step the stamps of many series share, and which series step differently."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedcast.data.grid import DAY, HOUR, MINUTE, MONTH_NAMES, NATURAL, SECOND, Axis, Rule, alias_of, ends, most_common, same_clock
from fedcast.data.problems import BoolArray, IntArray

_EVERYDAY = (
    *(count * SECOND // 1000 for count in (1, 2, 4, 5, 10, 16, 20, 40, 50, 100, 200, 250, 500)),
    *(count * unit for unit in (SECOND, MINUTE) for count in (1, 2, 5, 10, 15, 20, 30)),
    *(count * HOUR for count in (1, 2, 3, 4, 6, 8, 12)),
    DAY,
    7 * DAY,
)


@dataclass(frozen=True)
class Inference:
    """The rule that was inferred, or why there is none.

    Attributes
    ----------
    rule
        The rule; where ``mixed`` is set, that of most series; ``None`` where no step fits.
    mixed
        bool [series], True where a series steps differently from most.
    guess
        The most common step in words pandas understands, for repairs.
    """

    rule: Rule | None
    mixed: BoolArray
    guess: str | int


@dataclass(frozen=True)
class _Steps:
    """Steps within each series, over units; all arrays are [series]."""

    count: IntArray  # steps
    common: IntArray  # the most common step
    support: IntArray  # how often it occurs
    divisor: IntArray  # greatest common divisor of all steps


def _steps(codes: IntArray, units: IntArray, size: int) -> tuple[_Steps, IntArray]:
    inside = codes[1:] == codes[:-1]
    steps, owner = np.diff(units)[inside], codes[1:][inside]
    count = np.bincount(owner, minlength=size).astype(np.int64)
    common, support = most_common(owner, steps, size)
    divisor = np.zeros(size, dtype=np.int64)
    if len(steps):
        starts = np.concatenate([[0], np.cumsum(count)[:-1]])[count > 0]
        divisor[count > 0] = np.gcd.reduceat(steps, starts)
    return _Steps(count, common, support, divisor), steps


def infer(axis: Axis, size: int) -> Inference:
    """Infer the step that all series share.

    Series whose most common step divides all their other steps vote; a series that has every step a multiple of a longer one, three
    times or more, counts as another frequency, fewer as gaps.

    Parameters
    ----------
    axis
        The stamps; at least one series has two.
    size
        Number of series.
    """
    if axis.integer:
        return _infer_units(axis, axis.stamps, size, Rule("integer", 1), (1,))
    months, sides = _month_sides(axis, size)
    several = np.bincount(axis.codes, minlength=size) > 1
    for edge, side in sides.items():
        if side[several].all():
            found = _infer_units(axis, months, size, Rule("month", 1, edge[-1]), (1, 3, 12))
            return found if edge in ("S", "E") else _business_months(found, months, edge)
    ticks = axis.local().asi8 if same_clock(axis, size) else axis.stamps
    found = _infer_units(axis, ticks, size, Rule("tick", 1), NATURAL)
    monthly = np.logical_or.reduce(list(sides.values())) if sides else np.zeros(size, dtype=bool)
    if monthly[several].all():
        begins, ends = sides["S"] & several, sides["E"] & several
        edge = "S" if begins.sum() >= ends.sum() else "E"
        return Inference(Rule("month", 1, edge), several & ~sides[edge], f"M{edge}")
    regular = monthly & (np.bincount(axis.codes, minlength=size) > 2)
    if regular.any() and found.rule is not None:
        return replace(found, mixed=found.mixed | (regular & (_steps(axis.codes, ticks, size)[0].common != found.rule.step)))
    if found.rule == Rule("tick", DAY) and not found.mixed.any() and _skips_weekends(axis):
        return replace(found, rule=Rule("calendar", 1, "B"), guess="B")
    return found


def _month_sides(axis: Axis, size: int) -> tuple[IntArray, dict[str, BoolArray]]:
    """Return month numbers [n] and, for each side of the month, which series keep to it, one stamp a month, at one time of day."""
    local = axis.local()
    if not _sparse(axis, size).any():
        return np.zeros(0, dtype=np.int64), {}
    months = local.year.to_numpy().astype(np.int64) * 12 + local.month.to_numpy() - 1
    days = local.asi8 // DAY
    start = months - 1970 * 12
    first = start.astype("datetime64[M]").astype("datetime64[D]")
    last = (start + 1).astype("datetime64[M]").astype("datetime64[D]") - np.timedelta64(1, "D")
    date = days.astype("datetime64[D]")
    inside = axis.codes[1:] == axis.codes[:-1]
    clock = local.asi8 % DAY
    steady = ~np.append(False, inside & ((np.diff(months) < 1) | (np.diff(clock) != 0)))
    sides: dict[str, BoolArray] = {}
    checks = {"S": date == first, "E": date == last}
    if np.is_busday(date).all():
        checks["BS"] = date == np.busday_offset(first, 0, roll="forward")
        checks["BE"] = date == np.busday_offset(last, 0, roll="backward")
    for edge, on in checks.items():
        bad = np.bincount(axis.codes, weights=~(on & steady), minlength=size)
        sides[edge] = bad == 0
    return months, sides


def _sparse(axis: Axis, size: int) -> BoolArray:
    """Return which series have at least 25 days between any two stamps, as months have."""
    inside = axis.codes[1:] == axis.codes[:-1]
    close = inside & (np.diff(axis.stamps) < 25 * DAY)
    sparse: BoolArray = np.bincount(axis.codes[1:][close], minlength=size) == 0
    return sparse


def _business_months(found: Inference, months: IntArray, edge: str) -> Inference:
    """Name business month, quarter or year begins and ends."""
    if found.rule is None or found.mixed.any():
        return found
    step = found.rule.step
    if step % 12 == 0:
        name = f"BY{edge[1]}-{MONTH_NAMES[int(months[0] % 12)]}"
    elif step % 3 == 0:
        month = int(months[0] % 3) + (9 if edge == "BE" else 0)
        name = f"BQ{edge[1]}-{MONTH_NAMES[month]}"
    else:
        name = f"BM{edge[1]}"
    return replace(found, rule=Rule("calendar", 1, name), guess=name)


def _skips_weekends(axis: Axis) -> bool:
    days = axis.local().asi8 // DAY
    inside = axis.codes[1:] == axis.codes[:-1]
    weeks = (days + 3) // 7
    return bool(((days + 3) % 7 < 5).all() and (np.diff(weeks)[inside] > 0).any())


def _infer_units(axis: Axis, units: IntArray, size: int, rule: Rule, natural: tuple[int, ...]) -> Inference:
    steps, pooled = _steps(axis.codes, units, size)
    nobody = np.zeros(size, dtype=bool)
    several = steps.count > (1 if (steps.count > 1).any() else 0)
    strong = several & (steps.common == steps.divisor) & (2 * steps.support >= steps.count)
    if strong.any():
        choices, votes = np.unique(steps.divisor[strong], return_inverse=True)
        base = int(choices[np.argmax(np.bincount(votes, weights=steps.count[strong]))])
        # Where every series is regular, a longer step is another frequency; in a panel with gaps it takes more of them to say so.
        gaps = several & ~strong
        enough = (steps.support >= 5) if gaps.any() else (steps.support >= 3) | ((steps.count == 2) & (steps.divisor >= 6 * base))
        mixed = strong & (steps.divisor != base) & ((steps.divisor % base != 0) | enough)
        strays = gaps & (steps.divisor % base != 0)
        if not strays.any() or not _divides(axis, units, steps, pooled, natural):
            return Inference(replace(rule, step=base), mixed, _guess(rule, base, axis))
    elif not _divides(axis, units, steps, pooled, natural):
        usual = _usual(pooled)
        return Inference(None, nobody, _guess(rule, _round_step(usual) if rule.unit == "tick" else usual, axis))
    return Inference(replace(rule, step=int(pooled.min())), nobody, _guess(rule, int(pooled.min()), axis))


def _guess(rule: Rule, step: int, axis: Axis) -> str | int:
    return alias_of(replace(rule, step=step), axis)


def _round_step(step: int) -> int:
    """Return the everyday step nearest to one in nanoseconds, for repairs of irregular stamps."""
    steps = np.array(_EVERYDAY, dtype=np.float64)
    return _EVERYDAY[int(np.argmin(np.abs(np.log(steps / step))))]


def _usual(pooled: IntArray) -> int:
    values, counts = np.unique(pooled, return_counts=True)
    return int(values[np.argmax(counts)])


def _divides(axis: Axis, units: IntArray, steps: _Steps, pooled: IntArray, natural: tuple[int, ...]) -> bool:
    """Say whether the shortest step is the true one, not the distance of a stray stamp from a coarser grid."""
    usual, smallest = _usual(pooled), int(pooled.min())
    if (pooled % smallest).any():
        return False
    size = len(steps.count)
    first, last = ends(axis.codes, units, size)
    cells = float(((last - first)[steps.count > 0] / smallest + 1).sum())
    dense = len(units) / cells
    if usual == smallest:
        return dense > 0.02
    phase, _ = most_common(axis.codes, units % usual, size)
    off = int((units % usual != phase[axis.codes]).sum())
    return (off >= max(2, 0.1 * len(units)) and dense > 0.1) or (smallest in natural and dense > 1 / 3)

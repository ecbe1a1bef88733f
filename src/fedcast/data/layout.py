"""Which column of a table is what: the dialects of long frames, and wide tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

import pandas as pd

from fedcast.data.problems import Findings
from fedcast.data.times import looks_like_time

ID_NAMES = ("unique_id", "item_id", "series_id", "id")
TIME_NAMES = ("ds", "timestamp", "datetime", "date_time", "date", "time", "ts")
TARGET_NAMES = ("y", "target", "value")


@dataclass(frozen=True)
class Layout:
    """Which column is what."""

    time: str
    id: str | None
    targets: tuple[str, ...]  # one for long frames, one a series for wide ones
    wide: bool

    @property
    def subset(self) -> list[str]:
        """Columns that together name a row."""
        return [self.time] if self.id is None else [self.id, self.time]


def flatten(frame: pd.DataFrame, time: str | None) -> pd.DataFrame:
    """Turn an index that holds times or ids into columns, and column names into text."""
    index = frame.index
    dated = isinstance(index, pd.DatetimeIndex | pd.PeriodIndex)
    known = {str(name).lower() for name in index.names if name is not None} & {*ID_NAMES, *TIME_NAMES, (time or "").lower()}
    columns = [str(column) for column in frame.columns]
    if (dated and not any(column.lower() in TIME_NAMES or column == time for column in columns)) or (
        known and not known & {column.lower() for column in columns}
    ):
        frame = frame.rename_axis("ds").reset_index() if dated and index.names == [None] else frame.reset_index()
        columns = [str(column) for column in frame.columns]
    if not all(isinstance(column, str) for column in frame.columns):
        frame = frame.set_axis(pd.Index(columns, dtype=object), axis=1)
    return _join_clock(frame, columns, time)


def _join_clock(frame: pd.DataFrame, columns: list[str], time: str | None) -> pd.DataFrame:
    """Join a column of dates and one of clock times, as loggers write them, into the column of dates."""
    pair = [[column for column in columns if column.lower() == name] for name in ("date", "time")]
    if [len(found) for found in pair] != [1, 1] or time not in (None, pair[0][0]):
        return frame
    date, clock = pair[0][0], pair[1][0]
    if frame[date].dtype != object or frame[clock].dtype != object:
        return frame
    if not frame[clock].dropna().iloc[:20].astype(str).str.match(r"\d{1,2}:\d{2}").all():
        return frame
    return frame.drop(columns=clock).assign(**{date: frame[date].astype(str) + " " + frame[clock].astype(str)})


def long_columns(columns: list[str], time: str | None, id: str | None, target: str | None) -> list[str] | None:
    """Return the columns that a long table needs, or ``None`` where names alone do not tell that it is long."""
    if any(name not in columns for name in (time, id, target) if name is not None) or len(set(columns)) < len(columns):
        return None
    found_time = time or _known(columns, TIME_NAMES, taken=(id, target))
    found_id = id or _known(columns, ID_NAMES, taken=(found_time, target))
    found_target = target or _known(columns, TARGET_NAMES, taken=(found_time, found_id))
    if found_time is None or found_target is None:
        return None
    clock = [column for column in columns if column.lower() == "time" and found_time.lower() == "date"]
    return [name for name in columns if name in (found_time, found_id, found_target, *clock)]


def find_layout(frame: pd.DataFrame, time: str | None, id: str | None, target: str | None, findings: Findings) -> Layout | None:
    """Decide which column is what; problems that leave no table to look at are noted and give ``None``."""
    columns = list(frame.columns)
    if not len(frame) or not columns:
        what = "no rows" if columns else "no rows and no columns"
        findings.add("empty", f"there are {what}", "write at least two rows under a header such as unique_id,ds,y", count=0)
        return None
    named = [column for column in columns if column and not re.fullmatch(r"Unnamed: \d+", column)]
    twice = sorted({column for column in named if named.count(column) > 1})
    if twice:
        findings.add(
            "duplicate-columns",
            f"{len(twice)} column names occur more than once: {', '.join(map(repr, twice[:5]))}",
            "rename them, or keep the first of each: frame = frame.loc[:, ~frame.columns.duplicated()]",
            column=twice[0],
            count=sum(named.count(column) for column in twice),
        )
        return None
    absent = [(role, name) for role, name in (("time", time), ("id", id), ("target", target)) if name is not None and name not in columns]
    for role, name in absent:
        close = get_close_matches(name, named, n=1)
        repair = f"pass {role}={close[0]!r}" if close else f"pass {role}= one of {', '.join(map(repr, named[:12]))}"
        findings.add("missing-columns", f"there is no column {name!r}", repair, column=name, count=1)
    if absent:
        return None
    found_time = time or _known(named, TIME_NAMES, taken=(id, target)) or _time_by_content(frame, columns, taken=(id, target))
    found_id = id or _known(named, ID_NAMES, taken=(found_time, target))
    found_target = target or _known(named, TARGET_NAMES, taken=(found_time, found_id))
    return _decide(frame, named, found_time, found_id, found_target, findings)


def _known(columns: list[str], names: tuple[str, ...], taken: tuple[str | None, ...]) -> str | None:
    lower = {column.lower(): column for column in reversed(columns) if column not in taken}
    exact = [name for name in names if name in columns and name not in taken]
    return exact[0] if exact else next((lower[name] for name in names if name in lower), None)


def _time_by_content(frame: pd.DataFrame, columns: list[str], taken: tuple[str | None, ...]) -> str | None:
    dated = [column for column in columns if column not in taken and columns.count(column) == 1 and looks_like_time(frame[column])]
    return dated[0] if len(dated) == 1 else None


def _decide(
    frame: pd.DataFrame, named: list[str], time: str | None, id: str | None, target: str | None, findings: Findings
) -> Layout | None:
    rest = [column for column in named if column not in (time, id, target)]
    numeric = [column for column in rest if pd.api.types.is_numeric_dtype(frame[column].dtype)]
    if id is not None and target is None and len(numeric) == 1:
        target = numeric[0]
    if time is None:
        findings.add(
            "missing-columns",
            f"no time column among {', '.join(map(repr, named[:12]))}",
            "name it: time=..., or number the rows: frame.insert(0, 'ds', range(len(frame)))",
            column="ds",
            count=1,
        )
    if target is None and (id is not None or not rest):
        choice = ", ".join(map(repr, (numeric or rest)[:12]))
        findings.add(
            "missing-columns",
            "no target column",
            f"name it: target= one of {choice}" if choice else "add the column of values, y",
            column="y",
            count=1,
        )
    if findings.problems or time is None:
        return None
    if target is not None:
        return Layout(time, id, (target,), wide=False)
    texts = [column for column in rest if column not in numeric and pd.to_numeric(frame[column], errors="coerce").isna().all()]
    if texts and frame[time].duplicated().any():
        values = next((column for column in rest if column not in texts), None)
        findings.add(
            "missing-columns",
            f"times repeat and column {texts[0]!r} is text: which column names the series, and which holds the values, is not known",
            f"name them: id={texts[0]!r}, target={values or '...'!r}; on the command line --id and --target",
            column=texts[0],
            count=1,
        )
        return None
    return Layout(time, None, tuple(rest), wide=True)

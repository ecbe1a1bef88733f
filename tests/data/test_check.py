"""Every kind of malformed frame is named with its place and its repair; no valid frame is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcast.data.check import check_frame, describe
from fedcast.data.frames import read_frame
from fedcast.errors import FrameError


def two_series(rows: int = 10, freq: str = "D") -> pd.DataFrame:
    """Series ``a`` (rows 0 to ``rows`` - 1) and ``b`` (the rest)."""
    stamps = pd.date_range("2024-01-01", periods=rows, freq=freq)
    return pd.DataFrame({"unique_id": np.repeat(["a", "b"], rows), "ds": np.tile(stamps, 2), "y": np.arange(2.0 * rows)})


def with_value(column: str, row: int, value: object) -> pd.DataFrame:
    frame = two_series()
    frame[column] = frame[column].astype(object)
    frame.loc[row, column] = value
    return frame


def with_number(row: int, value: float) -> pd.DataFrame:
    frame = two_series()
    frame.loc[row, "y"] = value
    return frame


def with_repeat(row: int, y: float | None = None) -> pd.DataFrame:
    frame = two_series()
    copy = frame.iloc[[row]].copy()
    if y is not None:
        copy["y"] = y
    return pd.concat([frame, copy], ignore_index=True)


def two_freqs(first: str, second: str, rows: int = 10) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"unique_id": name, "ds": pd.date_range("2024-01-01", periods=rows, freq=freq), "y": 1.0})
        for name, freq in (("a", first), ("b", second))
    ]
    return pd.concat(parts, ignore_index=True)


def all_missing(series: str | None) -> pd.DataFrame:
    frame = two_series()
    frame.loc[frame["unique_id"] == series if series else slice(None), "y"] = np.nan
    return frame


def stamps(values: list[Any], **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"unique_id": "a", "ds": values, "y": np.arange(float(len(values))), **columns})


def mixed_zones() -> pd.DataFrame:
    paris = pd.date_range("2024-01-01", periods=10, freq="D", tz="Europe/Paris")
    utc = pd.date_range("2024-01-01", periods=10, freq="D", tz="UTC")
    return two_series().assign(ds=[*utc, *paris])


def no_frequency() -> pd.DataFrame:
    frame = two_series(30, "h")
    frame.loc[[35, 44], "ds"] += pd.Timedelta("17min")
    return frame


@dataclass(frozen=True)
class Case:
    """One malformed input and where its problem must be found."""

    kind: str
    make: Callable[[], object]
    column: str | None = None
    series: str | None = None
    row: int | None = None
    count: int | None = None


MALFORMED = {
    "empty": Case("empty", lambda: two_series().iloc[:0], count=0),
    "empty without columns": Case("empty", pd.DataFrame, count=0),
    "missing target": Case("missing-columns", lambda: two_series()[["unique_id", "ds"]], "y"),
    "missing time": Case("missing-columns", lambda: two_series()[["unique_id", "y"]], "ds"),
    "text target": Case("text-target", lambda: two_series().assign(y="high"), "y", "a", 0, 20),
    "numbers as text": Case("text-target", lambda: two_series().assign(y=two_series()["y"].astype(str)), "y", "a", 0, 20),
    "decimal commas": Case("text-target", lambda: two_series().assign(y="1,5"), "y", "a", 0, 20),
    "mixed target": Case("mixed-target", lambda: with_value("y", 13, "low"), "y", "b", 13, 1),
    "list in target": Case("mixed-target", lambda: with_value("y", 3, [1.0]), "y", "a", 3, 1),
    "complex target": Case("complex-target", lambda: two_series().assign(y=np.arange(20) + 0j).assign(y=with_imaginary), "y", "a", 4, 16),
    "complex in objects": Case("complex-target", lambda: with_value("y", 12, 1 + 2j), "y", "b", 12, 1),
    "dates as target": Case("non-numeric-target", lambda: two_series().assign(y=pd.Timestamp("2024-01-01")), "y", "a", 0, 20),
    "all-missing target": Case("all-missing-target", lambda: all_missing(None), "y", "a", 0, 20),
    "one all-missing series": Case("all-missing-target", lambda: all_missing("b"), "y", "b", 10, 10),
    "inf": Case("infinite-target", lambda: with_number(11, np.inf), "y", "b", 11, 1),
    "1e300": Case("huge-target", lambda: with_number(7, 1e300), "y", "a", 7, 1),
    "NaT": Case("missing-times", lambda: with_value("ds", 15, pd.NaT), "ds", "b", 15, 1),
    "unparsable times": Case("unparsable-times", lambda: with_value("ds", 2, "soon"), "ds", "a", 2, 1),
    "times out of range": Case("unparsable-times", lambda: with_value("ds", 2, "3024-01-01"), "ds", "a", 2, 1),
    "broken numbers as times": Case("unparsable-times", lambda: stamps([0.0, 1.0, 2.5, 3.0]), "ds", "a", 2, 1),
    "ambiguous dates": Case("ambiguous-times", lambda: stamps([f"0{day}/02/2024" for day in range(1, 9)]), "ds", "a", 0, 8),
    "duplicate stamps": Case("duplicate-stamps", lambda: with_repeat(16, -1.0), "ds", "b", 20, 1),
    "duplicate rows": Case("duplicate-rows", lambda: with_repeat(16), "ds", "b", 20, 1),
    "off-step stamps": Case("irregular-steps", no_frequency, "ds", "b", 35, 2),
    "shifted stamp": Case(
        "irregular-steps",
        lambda: stamps([*pd.date_range("2024-01-01", periods=20, freq="h"), pd.Timestamp("2024-01-01 20:30")]),
        "ds",
        "a",
        20,
    ),
    "no step at all": Case("irregular-steps", lambda: stamps([0, 7, 9, 22, 23, 41, 60, 61, 97, 1000]), "ds", "a"),
    "middle of the month": Case(
        "irregular-steps", lambda: stamps(list(pd.date_range("2024-01-01", periods=9, freq="MS") + pd.Timedelta("14D"))), "ds", "a"
    ),
    "mixed frequencies h D": Case("mixed-frequencies", lambda: two_freqs("h", "D"), "ds", count=1),
    "mixed frequencies D W": Case("mixed-frequencies", lambda: two_freqs("D", "W", 3), "ds", count=1),
    "mixed frequencies D MS": Case("mixed-frequencies", lambda: two_freqs("D", "MS"), "ds", "b", 10, 1),
    "mixed frequencies MS ME": Case("mixed-frequencies", lambda: two_freqs("MS", "ME"), "ds", "b", 10, 1),
    "mixed frequencies MS QS": Case("mixed-frequencies", lambda: two_freqs("MS", "QS"), "ds", count=1),
    "mixed frequencies 30min h": Case("mixed-frequencies", lambda: two_freqs("30min", "h", 5), "ds", count=1),
    "mixed time zones": Case("mixed-time-zones", mixed_zones, "ds", "b", 10, 10),
    "zone and no zone": Case(
        "mixed-time-zones",
        lambda: stamps(["2024-01-01T00:00Z", "2024-01-02T00:00Z", "2024-01-03T00:00", "2024-01-04T00:00Z"]),
        "ds",
        "a",
        2,
        1,
    ),
    "null id": Case("null-ids", lambda: with_value("unique_id", 5, None), "unique_id", None, 5, 1),
    "empty id": Case("null-ids", lambda: with_value("unique_id", 5, ""), "unique_id", None, 5, 1),
    "one point": Case("one-point", lambda: two_series().iloc[[4]], "ds", "a", 0, 1),
    "duplicate columns": Case("duplicate-columns", lambda: two_series().set_axis(["ds", "ds", "y"], axis=1), "ds", count=2),
    "stamps centuries apart": Case(
        "too-sparse", lambda: stamps([*pd.date_range("1900-01-01", periods=50, freq="s"), pd.Timestamp("2100-01-01")]), "ds"
    ),
    "dict": Case("not-a-frame", lambda: {"y": [1.0, 2.0]}),
    "list": Case("not-a-frame", lambda: [1.0, 2.0]),
    "array": Case("not-a-frame", lambda: np.ones(4)),
    "series": Case("not-a-frame", lambda: pd.Series([1.0, 2.0])),
    "none": Case("not-a-frame", lambda: None),
}


def with_imaginary(frame: pd.DataFrame) -> pd.Series:
    return frame["y"] + 1j * (np.arange(len(frame)) >= 4)


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_when_a_frame_is_malformed_then_kind_place_and_repair_are_named(case: Case) -> None:
    problems = check_frame(case.make())

    assert [problem.kind for problem in problems] == [case.kind]
    problem = problems[0]
    assert problem.column == case.column
    if case.series is not None:
        assert problem.series == case.series
    if case.row is not None:
        assert problem.row == case.row
    if case.count is not None:
        assert problem.count == case.count
    assert problem.message
    assert problem.repair


def test_when_the_table_is_counted_then_it_covers_twenty_kinds() -> None:
    assert len({case.kind for case in MALFORMED.values()}) >= 20


REPAIRABLE = [
    name
    for name, case in MALFORMED.items()
    if case.kind
    in {
        *("mixed-target", "complex-target", "infinite-target", "huge-target", "missing-times", "duplicate-stamps", "duplicate-rows"),
        *("mixed-time-zones", "null-ids", "irregular-steps", "unparsable-times"),
    }
    and name not in {"complex in objects", "no step at all", "middle of the month"}
]


@pytest.mark.parametrize("name", [*REPAIRABLE, "numbers as text", "decimal commas", "one all-missing series"])
def test_when_the_repair_is_run_then_the_frame_is_usable(name: str) -> None:
    frame = MALFORMED[name].make()
    scope: dict[str, Any] = {"frame": frame, "pd": pd, "np": np}

    exec(check_frame(frame)[0].repair, scope)  # noqa: S102

    assert check_frame(scope["frame"]) == []


def with_gaps() -> pd.DataFrame:
    return two_series(40).drop(index=[1, 2, 17, 20, 45, 46, 47]).sample(frac=1, random_state=0)


VALID: dict[str, tuple[Callable[[], pd.DataFrame], str | int]] = {
    **{
        f"every {freq}": (lambda freq=freq: two_series(9, freq), freq)
        for freq in ("s", "5min", "15min", "30min", "h", "6h", "D", "B", "W-SUN", "W-WED", "2W-MON", "MS", "ME", "2MS", "BME", "YS-JAN")
    },
    "quarter begins": (lambda: two_series(9, "QS"), "QS-JAN"),
    "fiscal quarter ends": (lambda: two_series(9, "QE-NOV"), "QE-NOV"),
    "quarter ends": (lambda: two_series(9, "QE-DEC"), "QE-DEC"),
    "fiscal years": (lambda: two_series(9, "YE-JUN"), "YE-JUN"),
    "business quarter ends": (lambda: two_series(12, "BQE-DEC"), "BQE-DEC"),
    "gaps and shuffled": (with_gaps, "D"),
    "hours in a zone over summer time": (lambda: zoned("2024-03-30", 60, "h"), "h"),
    "days in a zone over summer time": (lambda: zoned("2024-03-20", 30, "D"), "D"),
    "days in a zone over winter time": (lambda: zoned("2024-10-20", 30, "D"), "D"),
    "months in a zone": (lambda: zoned("2024-01-01", 14, "MS"), "MS"),
    "utc days seen in a zone": (lambda: two_series().assign(ds=utc_days_in_paris), "D"),
    "constant": (lambda: two_series().assign(y=3.0), "D"),
    "booleans": (lambda: two_series().assign(y=two_series()["y"] > 5), "D"),
    "some missing": (lambda: two_series().assign(y=lambda frame: frame["y"].where(frame["y"] % 3 > 0)), "D"),
    "decimals": (lambda: two_series().assign(y=[Decimal(value) for value in range(20)]), "D"),
    "nullable integers": (lambda: two_series().assign(y=pd.array([*range(19), None], dtype="Int64")), "D"),
    "nones among floats": (lambda: with_value("y", 4, None), "D"),
    "small floats": (lambda: two_series().astype({"y": "float16"}), "D"),
    "categorical ids": (lambda: two_series().astype({"unique_id": "category"}), "D"),
    "whole-number ids": (lambda: two_series().assign(unique_id=np.repeat([1, 2], 10)), "D"),
    "whole-number times": (lambda: two_series().assign(ds=np.tile(np.arange(10), 2)), 1),
    "whole-number times by five with a gap": (lambda: two_series().assign(ds=np.tile(np.arange(10) * 5, 2)).drop(index=[3]), 5),
    "float times": (lambda: two_series().assign(ds=np.tile(np.arange(10.0), 2)), 1),
    "years as numbers": (lambda: two_series().assign(ds=np.tile(np.arange(1990, 2000), 2)), 1),
    "dates as numbers": (lambda: two_series().assign(ds=lambda frame: frame["ds"].dt.strftime("%Y%m%d").astype(int)), "D"),
    "dates as text": (lambda: two_series().assign(ds=lambda frame: frame["ds"].astype(str)), "D"),
    "day-first text": (lambda: two_series(20).assign(ds=lambda frame: frame["ds"].dt.strftime("%d/%m/%Y %H:%M")), "D"),
    "month-first text": (lambda: two_series(20).assign(ds=lambda frame: frame["ds"].dt.strftime("%m/%d/%Y")), "D"),
    "month names": (lambda: two_series(9, "MS").assign(ds=lambda frame: frame["ds"].dt.strftime("%b %Y")), "MS"),
    "quarters as text": (lambda: two_series(8, "QS").assign(ds=lambda frame: frame["ds"].dt.strftime("%Y-%m")), "QS-JAN"),
    "text with summer time": (lambda: zoned("2024-03-20", 30, "D").assign(ds=lambda frame: frame["ds"].astype(str)), "D"),
    "python dates": (lambda: two_series().assign(ds=lambda frame: frame["ds"].dt.date), "D"),
    "periods": (lambda: two_series(9, "MS").assign(ds=lambda frame: frame["ds"].dt.to_period("M")), "MS"),
    "seconds resolution": (lambda: two_series().assign(ds=lambda frame: frame["ds"].dt.as_unit("s")), "D"),
    "two points": (lambda: two_series(2), "D"),
    "one point beside a longer series": (lambda: two_series().iloc[:11], "D"),
    "different starts": (lambda: two_series(30).drop(index=[*range(7), *range(50, 60)]), "D"),
    "weeks on different weekdays": (
        lambda: pd.concat([two_series(8, "W-MON"), two_series(8, "W-THU").iloc[:8].assign(unique_id="c")]),
        "7D",
    ),
    "months and quarters of different phase": (lambda: shifted_quarters(), "3MS"),
    "a sparse series beside a dense one": (lambda: two_series(40).drop(index=[*range(41, 60), *range(61, 75)]), "D"),
    "every second row missing at times": (
        lambda: stamps(list(pd.to_datetime([f"2024-01-{day:02}" for day in (1, 3, 5, 6, 8, 10, 11, 12)]))),
        "D",
    ),
    "quarter names": (
        lambda: two_series(8, "QS").assign(ds=np.tile([f"{year}-Q{q}" for year in (2023, 2024) for q in range(1, 5)], 2)),
        "QS-JAN",
    ),
    "midnights that summer time skips": (lambda: two_series(12).assign(ds=sao_paulo_days), "D"),
    "lists as ids": (lambda: two_series().assign(unique_id=[[place // 10] for place in range(20)]), "D"),
    "other columns": (lambda: two_series().assign(note="text", price=1.0), "D"),
}


def zoned(start: str, rows: int, freq: str) -> pd.DataFrame:
    return two_series(rows).assign(ds=lambda _: np.tile(pd.date_range(start, periods=rows, freq=freq, tz="Europe/Paris").astype(object), 2))


def utc_days_in_paris(frame: pd.DataFrame) -> pd.Series:
    return (frame["ds"] + pd.Timedelta("85D")).dt.tz_localize("UTC").dt.tz_convert("Europe/Paris")


def sao_paulo_days(frame: pd.DataFrame) -> pd.Series:
    return (frame["ds"] + (pd.Timestamp("2018-10-30") - frame["ds"].min())).dt.tz_localize("America/Sao_Paulo", nonexistent="shift_forward")


def shifted_quarters() -> pd.DataFrame:
    frame = two_series(9, "QS")
    frame.loc[9:, "ds"] = pd.date_range("2024-02-01", periods=9, freq="3MS").to_numpy()
    return frame


@pytest.mark.parametrize(("make", "freq"), VALID.values(), ids=VALID.keys())
def test_when_a_frame_is_valid_then_nothing_is_found_and_its_frequency_is_right(make: Callable[[], pd.DataFrame], freq: str | int) -> None:
    frame = make()
    before = frame.copy(deep=True)

    assert check_frame(frame) == []
    assert read_frame(frame).freq == freq
    pd.testing.assert_frame_equal(frame, before)


def test_when_several_things_are_wrong_then_all_are_reported() -> None:
    frame = with_value("unique_id", 2, None)
    frame.loc[5, "ds"] = pd.NaT
    frame.loc[12, "y"] = np.inf
    frame.loc[14, "y"] = 1e200
    frame = pd.concat([frame, frame.iloc[[17]]], ignore_index=True)

    kinds = {problem.kind for problem in check_frame(frame)}

    assert kinds == {"null-ids", "missing-times", "infinite-target", "huge-target", "duplicate-rows"}


def test_when_a_file_is_malformed_then_the_error_names_file_and_place(tmp_path: Path) -> None:
    path = tmp_path / "sales.csv"
    path.write_text("unique_id,ds,y\na,2024-01-01,1\na,2024-01-02,x7\na,2024-01-03,3\n")

    with pytest.raises(FrameError) as caught:
        read_frame(path)

    assert "sales.csv" in str(caught.value)
    assert "column 'y', series 'a', row 1" in str(caught.value)
    assert "pd.to_numeric" in caught.value.hint


@pytest.mark.parametrize(
    ("freq", "kind", "repair"),
    [
        ("ME", "off-frequency", "'MS'"),
        ("h", None, ""),
        ("fortnight", "unknown-frequency", "pandas"),
        (1, "unknown-frequency", ""),
        ("W-TUE", "off-frequency", "'MS'"),
    ],
)
def test_when_a_frequency_is_given_then_it_is_held_against_the_stamps(freq: str | int, kind: str | None, repair: str) -> None:
    problems = check_frame(two_series(6, "MS"), freq=freq)

    assert [problem.kind for problem in problems] == ([kind] if kind else [])
    assert not problems or repair in problems[0].repair


def test_when_no_two_stamps_are_one_step_apart_then_the_likely_frequency_is_offered() -> None:
    frame = stamps(list(pd.Timestamp("2024-01-01") + pd.to_timedelta(np.cumsum([0, 2, 3, 2, 2, 2, 3, 2]), "h")))

    assert "pass freq='h'" in check_frame(frame)[0].repair
    assert check_frame(frame, freq="h") == []


CELLS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.datetimes(timezones=st.none() | st.timezones()),
    st.dates(),
    st.lists(st.integers(), max_size=2),
    st.sampled_from(["2024-01-01", "2024-01-02T00:00Z", "2024-01-03 00:00+05:30", "1/2/2024", pd.NaT, pd.NA, Decimal("1.5")]),
)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=6))
def test_when_cells_hold_anything_then_problems_come_back_and_nothing_is_raised(rows: list[tuple[object, object, object]]) -> None:
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    frame = pd.DataFrame(
        {name: pd.Series(list(cells), dtype=object) for name, cells in zip(("unique_id", "ds", "y"), columns, strict=True)}
    )

    problems = check_frame(frame)

    assert all(problem.repair and problem.message for problem in problems)
    if not problems:
        assert read_frame(frame).frame["y"].notna().any()


def test_when_mixed_frequencies_are_given_a_frequency_then_they_are_read_at_it() -> None:
    frame = two_freqs("h", "D")

    assert read_frame(frame, freq="H").frame.groupby("unique_id").size().to_dict() == {"a": 10, "b": 217}


def test_when_a_frame_is_described_then_counts_span_and_gaps_are_there() -> None:
    frame = two_series().drop(index=[3]).astype({"y": float})
    frame.loc[15, "y"] = np.nan

    facts = describe(read_frame(frame))

    assert json.loads(json.dumps(facts)) == facts
    assert facts | {
        "series": 2, "rows": 20, "points": 18, "missing": pytest.approx(0.1), "freq": "D", "start": "2024-01-01T00:00:00",
        "end": "2024-01-10T00:00:00", "shortest": 10, "longest": 10, "minimum": 0.0, "maximum": 19.0, "time_zone": None,
    } == facts  # fmt: skip


def test_when_times_are_whole_numbers_then_the_description_has_whole_numbers() -> None:
    facts = describe(read_frame(two_series().assign(ds=np.tile(np.arange(10), 2))))

    assert (facts["start"], facts["end"], facts["freq"]) == (0, 9, 1)

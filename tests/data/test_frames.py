"""Frames in memory and folders: dialects, wide tables, gaps and whole round trips."""

from __future__ import annotations

import time as clock
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcast.data.frames import Columns, domain_files, examine, read_frame
from fedcast.errors import FrameError, SourceError

FREQS = [
    "s",
    "7min",
    "15min",
    "h",
    "6h",
    "D",
    "W-SUN",
    "W-WED",
    "2W-MON",
    "MS",
    "ME",
    "2MS",
    "QS-FEB",
    "QE-DEC",
    "YS-JAN",
    "YE-JUN",
    "B",
    "BME",
]


def long(ids: list[str], ds: Any, y: Any, names: tuple[str, str, str] = ("unique_id", "ds", "y")) -> pd.DataFrame:
    return pd.DataFrame(dict(zip(names, (ids, ds, y), strict=True)))


@st.composite
def regular_frames(draw: st.DrawFn) -> tuple[pd.DataFrame, str | int]:
    """A sorted long frame without gaps, some values missing, and its frequency."""
    freq = draw(st.sampled_from([*FREQS, 1, 10]))
    zone = draw(st.sampled_from([None, None, "UTC", "America/New_York", "Asia/Kolkata"]))
    names = draw(st.lists(st.text("abcXYZ019 -_", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=4, unique=True))
    parts = []
    for name in sorted(names):
        rows = draw(st.integers(8, 40))
        skipped = draw(st.integers(0, 5))
        if isinstance(freq, int):
            stamps: Any = np.arange(rows) * freq + skipped * freq
        else:
            # Enough stamps that months, quarters and business days show what they are.
            stamps = pd.date_range("2023-03-01", periods=rows + 5, freq=freq, tz=zone)[skipped : skipped + rows]
        values = draw(
            st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.just(float("nan")), min_size=rows, max_size=rows)
        )
        values[0] = 1.0
        parts.append(pd.DataFrame({"unique_id": name, "ds": stamps, "y": np.array(values, dtype=np.float64)}))
    return pd.concat(parts, ignore_index=True), freq


@settings(max_examples=60)
@given(regular_frames(), st.integers(0, 2**31))
def test_when_a_regular_frame_is_shuffled_then_it_comes_back_unchanged(case: tuple[pd.DataFrame, str | int], seed: int) -> None:
    frame, freq = case

    result = read_frame(frame.sample(frac=1, random_state=seed))

    pd.testing.assert_frame_equal(result.frame, frame)
    assert result.freq == freq


@settings(max_examples=60)
@given(regular_frames(), st.integers(0, 2**31))
def test_when_rows_are_missing_and_the_frequency_is_given_then_they_come_back_as_nan(
    case: tuple[pd.DataFrame, str | int], seed: int
) -> None:
    frame, freq = case
    ends = ~frame["unique_id"].duplicated() | ~frame["unique_id"].duplicated(keep="last")
    kept = ends | (np.random.default_rng(seed).random(len(frame)) < 0.6)

    result = read_frame(frame[kept].sample(frac=1, random_state=seed), freq=freq)

    pd.testing.assert_frame_equal(result.frame, frame.assign(y=frame["y"].where(kept)))


@settings(max_examples=40)
@given(regular_frames(), st.integers(0, 2**31))
def test_when_few_rows_are_missing_then_the_frequency_is_still_inferred(case: tuple[pd.DataFrame, str | int], seed: int) -> None:
    frame, freq = case
    ends = ~frame["unique_id"].duplicated() | ~frame["unique_id"].duplicated(keep="last")
    kept = ends | (np.arange(len(frame)) % 5 > 0)

    result = read_frame(frame[kept].sample(frac=1, random_state=seed))

    assert result.freq == freq
    pd.testing.assert_frame_equal(result.frame, frame.assign(y=frame["y"].where(kept)))


@settings(max_examples=25, deadline=None)
@given(regular_frames())
def test_when_a_frame_goes_through_a_file_then_it_comes_back(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[pd.DataFrame, str | int]
) -> None:
    frame, freq = case
    frame["unique_id"] = frame["unique_id"].str.strip()
    frame = frame[~frame.duplicated(["unique_id", "ds"])].sort_values(["unique_id", "ds"], ignore_index=True)
    folder = tmp_path_factory.mktemp("files")
    frame.to_parquet(folder / "a.parquet")
    frame.to_csv(folder / "a.csv.gz", index=False)

    parquet, text = read_frame(folder / "a.parquet"), read_frame(folder / "a.csv.gz")

    pd.testing.assert_frame_equal(parquet.frame, read_frame(frame).frame)
    np.testing.assert_array_equal(text.frame["y"], parquet.frame["y"])
    assert parquet.freq == text.freq == freq
    if isinstance(freq, str):
        assert (pd.to_datetime(text.frame["ds"], utc=True) == pd.to_datetime(parquet.frame["ds"], utc=True)).all()


@pytest.mark.parametrize(
    "names", [("unique_id", "ds", "y"), ("item_id", "timestamp", "target"), ("id", "timestamp", "target"), ("ID", "Date", "Value")]
)
def test_when_the_dialect_is_known_then_columns_are_recognised(names: tuple[str, str, str]) -> None:
    frame = long(["b"] * 5, pd.date_range("2024-01-01", periods=5), np.arange(5.0), names)

    result = read_frame(frame)

    assert result.columns == Columns(*names)
    assert list(result.frame.columns) == ["unique_id", "ds", "y"]
    assert result.source == "frame"


def test_when_columns_are_named_then_they_go_before_known_ones() -> None:
    frame = long(["b"] * 5, pd.date_range("2024-01-01", periods=5), np.arange(5.0)).assign(
        shop="s", day=pd.date_range("2020-01-01", periods=5), sold=7
    )

    result = read_frame(frame, id="shop", time="day", target="sold")

    assert result.columns == Columns("shop", "day", "sold")
    assert result.frame["unique_id"].unique().tolist() == ["s"]
    assert result.frame["y"].tolist() == [7.0] * 5


def test_when_a_name_is_absent_then_the_closest_is_offered() -> None:
    with pytest.raises(FrameError) as caught:
        read_frame(
            long(["a"] * 3, pd.date_range("2024-01-01", periods=3), 1.0, ("shop", "day", "sold")), id="shops", time="day", target="sold"
        )

    assert caught.value.problems[0].column == "shops"
    assert caught.value.hint == "pass id='shop'"


def test_when_there_is_no_id_then_time_and_target_are_one_series(tmp_path: Path) -> None:
    frame = pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=4), "y": 1.0, "price": 2.0})
    frame.to_csv(tmp_path / "shop.csv", index=False)

    assert read_frame(frame).frame["unique_id"].unique().tolist() == ["y"]
    assert read_frame(tmp_path / "shop.csv").frame["unique_id"].unique().tolist() == ["shop"]


def test_when_only_a_time_is_found_then_every_other_column_is_a_series() -> None:
    frame = pd.DataFrame(
        {"date": pd.date_range("2024-01-01", periods=4, freq="h"), "OT": [1.0, np.nan, 3.0, 4.0], "HUFL": [4, 3, 2, 1]}
    ).drop(index=2)

    result = read_frame(frame)

    assert result.columns == Columns("unique_id", "date", "y")
    assert result.frame["unique_id"].tolist() == ["HUFL"] * 4 + ["OT"] * 4
    np.testing.assert_array_equal(result.frame["y"], [4, 3, np.nan, 1, 1, np.nan, np.nan, 4])
    assert result.frame["ds"].tolist() == pd.date_range("2024-01-01", periods=4, freq="h").tolist() * 2


def test_when_the_index_holds_the_times_then_it_is_the_time_column() -> None:
    wide = pd.DataFrame({"a": np.arange(4.0), "b": 1.0}, index=pd.date_range("2024-01-01", periods=4))
    many = long(["a"] * 4, pd.date_range("2024-01-01", periods=4), 1.0).set_index(["unique_id", "ds"])

    assert read_frame(wide).frame["unique_id"].nunique() == 2
    assert read_frame(wide.rename_axis("when")).columns.time == "when"
    assert len(read_frame(many).frame) == 4


def test_when_a_wide_table_holds_text_or_odd_values_then_the_column_is_named() -> None:
    frame = pd.DataFrame(
        {"date": pd.date_range("2024-01-01", periods=4), "shop": list("abcd"), "x": [1.0, np.inf, 1e300, 4.0], "void": np.nan}
    )

    with pytest.raises(FrameError) as caught:
        read_frame(frame)

    found = {(problem.kind, problem.series, problem.row) for problem in caught.value.problems}
    assert found == {("text-target", "shop", 0), ("infinite-target", "x", 1), ("huge-target", "x", 2), ("all-missing-target", "void", 0)}


def test_when_dates_and_clock_times_are_two_columns_then_they_are_joined() -> None:
    stamps = pd.date_range("2024-01-30", periods=60, freq="h")
    frame = pd.DataFrame({"Date": stamps.strftime("%d/%m/%Y"), "Time": stamps.strftime("%H:%M:%S"), "power": 1.0})

    assert read_frame(frame).frame["ds"].tolist() == stamps.tolist()


def test_when_a_wide_table_repeats_a_stamp_then_equal_and_different_rows_are_told_apart() -> None:
    frame = pd.DataFrame(
        {"date": pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-02", "2024-01-03", "2024-01-03"]), "x": [1, 2, 2, 3, 4], "z": np.nan}
    )
    frame.loc[0, "z"] = 1.0

    with pytest.raises(FrameError) as caught:
        read_frame(frame)

    assert [(problem.kind, problem.row) for problem in caught.value.problems] == [("duplicate-rows", 2), ("duplicate-stamps", 4)]


def test_when_a_thousand_series_are_read_then_it_takes_about_a_second() -> None:
    rng = np.random.default_rng(0)
    ids = np.repeat([f"series {place}" for place in range(1000)], 1000)
    frame = long(ids, np.tile(pd.date_range("2020-01-01", periods=1000, freq="h"), 1000), rng.normal(size=1_000_000))
    frame = frame[rng.random(len(frame)) < 0.9].sample(frac=1, random_state=0)

    start = clock.process_time()
    result = read_frame(frame)

    assert clock.process_time() - start < 8
    assert result.freq == "h"


def test_when_a_folder_is_read_then_files_and_sub_folders_are_domains(tmp_path: Path) -> None:
    frame = long(["a"] * 5, pd.date_range("2024-01-01", periods=5), np.arange(5.0))
    (tmp_path / "shops").mkdir()
    (tmp_path / "empty").mkdir()
    frame.to_parquet(tmp_path / "shops" / "north.parquet")
    frame.to_csv(tmp_path / "shops" / "south.csv.xz", index=False)
    frame.to_csv(tmp_path / "power.v2.csv", index=False)
    for name in ("README.md", ".hidden.csv", "shops/notes.txt", "LICENSE"):
        (tmp_path / name).write_text("not data")

    domains = domain_files(tmp_path)

    assert {domain: list(datasets) for domain, datasets in domains.items()} == {"power.v2": ["power.v2"], "shops": ["north", "south"]}
    assert domains["shops"]["south"] == tmp_path / "shops" / "south.csv.xz"
    pd.testing.assert_frame_equal(read_frame(domains["shops"]["south"]).frame, frame)


def test_when_a_file_is_malformed_then_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("ds,y\n2024-01-01,1\n2024-01-02,inf\n")

    with pytest.raises(FrameError, match=r"bad\.csv"):
        read_frame(tmp_path / "bad.csv")


def test_when_a_folder_holds_nothing_or_one_name_twice_then_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no"):
        domain_files(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        domain_files(tmp_path / "absent")
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text("ds,y\n2024-01-01,1\n2024-01-02,2\n")
    with pytest.raises(SourceError, match="second time"):
        domain_files(tmp_path)


def test_when_times_repeat_beside_a_column_of_text_then_one_problem_asks_which_columns_they_are() -> None:
    days = pd.date_range("2024-01-01", periods=5)
    frame = pd.DataFrame({"date": [*days, *days], "shop": ["a"] * 5 + ["b"] * 5, "sales": np.arange(10.0)})
    (problem,) = examine(frame)[1]
    assert (problem.kind, problem.column) == ("missing-columns", "shop")
    assert "id='shop', target='sales'" in problem.repair
    assert examine(frame, id="shop", target="sales")[1] == []

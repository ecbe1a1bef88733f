"""Files: CSV dialects, compression, the Monash format, damaged files, and real recordings."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedcast.data.check import check_frame, describe
from fedcast.data.frames import Columns, read_frame
from fedcast.data.readers import data_suffix, stem
from fedcast.errors import FrameError, SourceError

TSF = """# comment
@relation demo
@attribute series_name string
@attribute state string
@attribute start_timestamp date
@frequency {freq}
@horizon 8
@missing true
@equallength false
@data
T1:NSW:2020-01-01 00-00-00:1,2.5,?,4
T2:VIC:{second}:7,8
"""


def tsf(tmp_path: Path, freq: str, second: str = "2020-01-02 00-00-00") -> Path:
    path = tmp_path / "demo.tsf"
    path.write_text(TSF.format(freq=freq, second=second))
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_when_a_csv_is_packed_or_separated_otherwise_then_it_reads_the_same(tmp_path: Path, suffix: str, pack: Any, separator: str) -> None:
    text = "\ufeffunique_id,ds,y\r\nÉ1,2024-01-01,1\r\nÉ1,2024-01-02,\r\nÉ1,2024-01-03,3\r\n".replace(",", separator)
    path = tmp_path / f"demo.csv{suffix}"
    path.write_bytes(pack(text.encode()))

    result = read_frame(path)

    assert result.frame["unique_id"].unique().tolist() == ["É1"]
    np.testing.assert_array_equal(result.frame["y"], [1, np.nan, 3])
    assert result.source == str(path)


def test_when_a_csv_is_latin_one_then_its_names_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "demo.csv"
    path.write_bytes("unique_id,ds,y\nÎle,2024-01-01,1\nÎle,2024-01-02,2\n".encode("latin-1"))

    assert read_frame(path).frame["unique_id"].unique().tolist() == ["Île"]


def test_when_ids_look_like_numbers_or_missing_marks_then_they_stay_text(tmp_path: Path) -> None:
    path = write(tmp_path / "demo.csv", "region,ds,y\nNA,2024-01-01,1\nNA,2024-01-02,NA\n007,2024-01-01,1\n007,2024-01-02,.\n")

    result = read_frame(path, id="region")

    assert result.frame["unique_id"].unique().tolist() == ["007", "NA"]
    assert result.frame["y"].isna().sum() == 2


def test_when_a_csv_keeps_its_index_then_the_blank_column_is_no_series(tmp_path: Path) -> None:
    wide = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=4), "x": 1.0})
    wide.to_csv(tmp_path / "numbered.csv")
    wide.set_index("date").rename_axis(None).to_csv(tmp_path / "dated.csv")

    for name in ("numbered.csv", "dated.csv"):
        assert read_frame(tmp_path / name).frame["unique_id"].unique().tolist() == ["x"]


def test_when_a_csv_has_text_or_repeated_names_then_row_and_column_are_named(tmp_path: Path) -> None:
    mixed = check_frame(write(tmp_path / "mixed.csv", "unique_id,ds,y\na,2024-01-01,1\na,2024-01-02,high\na,2024-01-03,3\n"))
    twice = check_frame(write(tmp_path / "twice.csv", "unique_id,ds,y,y\na,2024-01-01,1,1\na,2024-01-02,2,2\n"))

    assert [(problem.kind, problem.column, problem.series, problem.row, problem.count) for problem in mixed] == [
        ("mixed-target", "y", "a", 1, 1)
    ]
    assert [(problem.kind, problem.column) for problem in twice] == [("duplicate-columns", "y")]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("empty.csv", b"", "empty"),
        ("header.csv", b"unique_id,ds,y\n", "empty"),
        ("ragged.csv", b"ds,y\n2024-01-01,1\n\n2024-01-02,2,3,4\n", "ragged-rows"),
        ("ragged quotes.csv", b'ds,y\n"2024-01-01",1\n2024-01-02,2,3,4\n', "ragged-rows"),
        ("picture.csv", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "not-a-frame"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "not-a-frame"),
        ("text.parquet", b"unique_id,ds,y\n", "not-a-frame"),
        ("text.tsf", b"unique_id,ds,y\n", "not-a-frame"),
        ("odd.tsf", b"@frequency fortnightly\n@data\nT1:1,2\n", "unknown-frequency"),
        ("words.tsf", b"@attribute series_name string\n@data\nT1:1,2\nT2:1,two\n", "mixed-target"),
        ("start.tsf", b"@attribute start_timestamp date\n@frequency daily\n@data\nsoon:1,2\n", "unparsable-times"),
        ("short.tsf", b"@attribute series_name string\n@attribute state string\n@data\n1,2\n", "missing-columns"),
        ("nothing.tsf", b"@attribute series_name string\n@data\n", "empty"),
    ],
)
def test_when_a_file_holds_no_usable_table_then_the_kind_is_named(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(content)

    problems = check_frame(tmp_path / name)

    assert [problem.kind for problem in problems] == [kind]
    assert problems[0].repair


def test_when_a_file_cannot_be_read_then_it_is_a_source_error(tmp_path: Path) -> None:
    (tmp_path / "damaged.csv.gz").write_bytes(gzip.compress(b"ds,y\n" * 1000)[:40])
    (tmp_path / "plain.csv.xz").write_text("ds,y\n")

    for name, words in (("absent.csv", "does not exist"), ("", "is a folder"), ("damaged.csv.gz", "damaged"), ("plain.csv.xz", "damaged")):
        with pytest.raises(SourceError, match=words):
            read_frame(tmp_path / name)


@pytest.mark.parametrize(
    ("freq", "alias", "last"),
    [
        ("daily", "D", "2020-01-04"),
        ("hourly", "h", "2020-01-02 01:00"),
        ("half_hourly", "30min", "2020-01-02 00:30"),
        ("10_minutes", "10min", "2020-01-02 00:10"),
        ("4_seconds", "4s", "2020-01-02 00:00:04"),
        ("minutely", "min", "2020-01-02 00:01"),
        ("weekly", "7D", "2020-01-22"),
        ("monthly", "MS", "2020-04-01"),
        ("quarterly", "QS-JAN", "2020-10-01"),
        ("yearly", "YS-JAN", "2023-01-01"),
    ],
)
def test_when_a_tsf_file_is_read_then_frequency_starts_and_missing_values_are_its_own(
    tmp_path: Path, freq: str, alias: str, last: str
) -> None:
    result = read_frame(tsf(tmp_path, freq))

    assert result.freq == alias
    assert result.columns == Columns("unique_id", "ds", "y")
    np.testing.assert_array_equal(result.frame["y"], [1, 2.5, np.nan, 4, 7, 8])
    assert result.frame["unique_id"].tolist() == ["T1"] * 4 + ["T2"] * 2
    assert result.frame["ds"].iloc[0] == pd.Timestamp("2020-01-01")
    assert result.frame["ds"].max() == pd.Timestamp(last)


def test_when_tsf_quarters_begin_in_different_months_then_every_series_keeps_its_own(tmp_path: Path) -> None:
    result = read_frame(tsf(tmp_path, "quarterly", second="2020-02-01 00-00-00"))

    assert result.freq == "3MS"
    assert result.frame["ds"].dt.month.tolist() == [1, 4, 7, 10, 2, 5]


def test_when_tsf_series_have_no_start_or_leave_the_calendar_then_times_are_whole_numbers(tmp_path: Path) -> None:
    bare = read_frame(write(tmp_path / "bare.tsf", "@frequency hourly\n@data\n1,2,3\n4,5\n"))
    late = read_frame(tsf(tmp_path, "yearly", second="2261-01-01 00-00-00"))

    assert bare.frame.to_dict("list") == {"unique_id": ["T1"] * 3 + ["T2"] * 2, "ds": [0, 1, 2, 0, 1], "y": [1.0, 2.0, 3.0, 4.0, 5.0]}
    assert (bare.freq, late.freq) == (1, 1)


def test_when_a_tsf_series_is_malformed_then_its_line_is_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "demo.tsf", "@attribute series_name string\n@data\nA:1,2\nB:1,inf\nC:?,?\n")

    problems = check_frame(path)

    assert [(problem.kind, problem.series, problem.row) for problem in problems] == [
        ("infinite-target", "B", 1),
        ("all-missing-target", "C", 2),
    ]


def test_when_names_have_suffixes_then_stem_and_kind_are_told() -> None:
    assert [stem(Path(name)) for name in ("a.csv", "a.b.csv.gz", "a.TSF.xz", "v1.2.parquet")] == ["a", "a.b", "a", "v1.2"]
    assert [data_suffix(Path(name)) for name in ("a.csv.gz", "a.PQ", "a.gz", "a.md", "csv")] == [".csv", ".pq", None, None, None]


REAL = [
    ("energy/ETTh1.csv.gz", {}, {"series": 7, "freq": "h", "rows": 7 * 17420, "missing": 0.0, "time_zone": None}),
    ("energy/ETTm2.csv.gz", {"time": "date"}, {"series": 7, "freq": "15min", "rows": 7 * 69680}),
    ("energy/france_regional_demand_hourly.csv.gz", {}, {"series": 12, "freq": "h", "rows": 12 * 70128, "time_zone": "UTC"}),
    ("energy/hourly_electricity.csv.gz", {}, {"series": 1, "freq": "h", "rows": 26304}),
    ("health/hospital_dataset.tsf.gz", {}, {"series": 767, "freq": "MS", "shortest": 84, "longest": 84}),
    ("health/national_illness_weekly.csv.gz", {}, {"series": 7, "freq": "W-TUE"}),
    ("mixed_m4/m4_weekly_dataset.tsf.gz", {}, {"series": 359, "freq": "7D", "rows": 371579}),
    ("economics/m3_quarterly_dataset.tsf.gz", {}, {"series": 756, "freq": "QS-JAN", "rows": 37004}),
    ("tourism/tourism_yearly_dataset.tsf.gz", {}, {"series": 518, "freq": "YS-JAN"}),
    ("finance/stocks_ohlcv_daily.csv.gz", {"id": "Ticker", "target": "Close"}, {"series": 5, "freq": "B"}),
    ("finance/vix_daily.csv.gz", {}, {"series": 1, "freq": "B"}),
    ("retail/online_retail_ii_daily_qty_top200.csv.gz", {}, {"series": 200, "freq": "D"}),
    ("transport/nyc_flights_hourly_counts.csv.gz", {}, {"series": 22, "freq": "h"}),
    ("web/wikipedia_traffic_daily.csv.gz", {"id": "Page"}, {"series": 10, "freq": "D", "rows": 5500}),
]


@pytest.mark.parametrize(("file", "names", "expected"), REAL, ids=[file for file, _, _ in REAL])
def test_when_a_real_file_is_read_then_series_frequency_and_span_are_right(
    real_data: Path, file: str, names: dict[str, str], expected: dict[str, object]
) -> None:
    facts = describe(read_frame(real_data / file, **names))

    assert {key: facts[key] for key in expected} == expected


def test_when_real_weeks_are_irregular_then_the_repair_makes_them_usable(real_data: Path) -> None:
    path = real_data / "health" / "ili_by_state_weekly.csv.gz"
    with pytest.raises(FrameError) as caught:
        read_frame(path, id="region", target="OT")
    problem = caught.value.problems[0]
    assert (problem.kind, problem.column, problem.series, problem.row) == ("irregular-steps", "date", "ak", 13)

    frame = pd.read_csv(path)
    frame["date"] = pd.to_datetime(frame["date"], format="mixed")
    scope: dict[str, Any] = {"frame": frame}
    exec(problem.repair, scope)  # noqa: S102

    assert read_frame(scope["frame"], id="region", target="OT").freq == "W-MON"


def test_when_real_stamps_change_offset_with_summer_time_then_they_are_one_zone(real_data: Path) -> None:
    path = real_data / "wind" / "la_haute_borne_scada_2014_2015.csv.gz"
    frame = pd.read_csv(path, usecols=["Wind_turbine_name", "Date_time", "P_avg"]).drop_duplicates(["Wind_turbine_name", "Date_time"])

    facts = describe(read_frame(frame, id="Wind_turbine_name", target="P_avg"))

    assert (facts["series"], facts["freq"], facts["time_zone"]) == (4, "10min", "Europe/Paris")


def test_when_a_row_has_a_decimal_comma_too_many_then_its_row_is_named(tmp_path: Path) -> None:
    problems = check_frame(write(tmp_path / "demo.csv", "unique_id,ds,y\r\na,2024-01-01,1\r\n\r\na,2024-01-02,2,5\r\na,2024-01-03,3,5\r\n"))

    assert [(problem.kind, problem.row, problem.count) for problem in problems] == [("ragged-rows", 1, 2)]


def test_when_cells_are_quoted_then_separators_inside_them_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "demo.csv", 'unique_id,ds,y\n"a,b",2024-01-01,1\n"a,b",2024-01-02,2\n')

    assert read_frame(path).frame["unique_id"].unique().tolist() == ["a,b"]

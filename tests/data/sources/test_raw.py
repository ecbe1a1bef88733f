"""Readers of raw recordings."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcast.data.sources.raw import Series, anchor, long_frame, on_grid, read_tsf, read_wfdb, resampled
from fedcast.errors import SourceError

needs_data = pytest.mark.skipif(not os.environ.get("FEDCAST_DATA"), reason="FEDCAST_DATA is not set: no raw recordings")


@given(st.sets(st.integers(0, 300), min_size=1, max_size=40), st.randoms())
def test_when_stamps_have_holes_in_any_order_then_each_value_is_at_its_place_and_holes_are_missing(steps: set[int], random: object) -> None:
    order = list(steps)
    random.shuffle(order)  # type: ignore[attr-defined]
    start = pd.Timestamp("2024-03-01 00:07:53")
    times = [start + pd.Timedelta(minutes=5 * step) for step in order]
    series = on_grid("s", times, [float(step) for step in order], "5min")
    first = min(steps)
    assert series.start == start + pd.Timedelta(minutes=5 * first)
    assert len(series.values) == max(steps) - first + 1
    present = np.flatnonzero(np.isfinite(series.values))
    assert [int(i) + first for i in present] == sorted(steps)
    assert np.array_equal(series.values[present], present + float(first))


def test_when_a_stamp_is_repeated_then_the_first_value_stays() -> None:
    series = on_grid("s", pd.to_datetime(["2024-01-01", "2024-01-02", "2024-01-02", "2024-01-03"]), [1, 2, 9, 3], "1D")
    assert series.values.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("freq", "expected"),
    [
        ("W-SUN", "2024-05-12"),
        ("W-MON", "2024-05-13"),
        ("MS", "2024-05-01"),
        ("QS", "2024-04-01"),
        ("YS", "2024-01-01"),
        ("D", "2024-05-15"),
    ],
)
def test_when_a_start_is_anchored_then_it_is_the_first_stamp_of_its_period(freq: str, expected: str) -> None:
    assert anchor(pd.Timestamp("2024-05-15"), freq) == pd.Timestamp(expected)
    assert anchor(pd.Timestamp(expected), freq) == pd.Timestamp(expected)


def test_when_series_are_joined_then_they_are_sorted_and_outer_holes_are_cut() -> None:
    start = pd.Timestamp("2024-01-01")
    series = [
        Series("b", start, np.array([np.nan, 1.0, np.nan, 2.0, np.nan])),
        Series("a", start, np.array([3.0])),
        Series("none", start, np.array([np.nan])),
    ]
    frame = long_frame(series, "MS", "test").frame
    assert frame["unique_id"].tolist() == ["a", "b", "b", "b"]
    assert frame["ds"].tolist() == [start, *pd.date_range("2024-02-01", periods=3, freq="MS")]
    np.testing.assert_array_equal(frame["y"], [3, 1, np.nan, 2])


def test_when_two_series_have_one_name_then_the_source_is_refused() -> None:
    twice = [Series("a", 0, np.arange(3.0))] * 2
    with pytest.raises(SourceError, match="two series of test"):
        long_frame(twice, 1, "test")


def test_when_steps_are_integers_then_they_count_from_the_start() -> None:
    assert long_frame([Series("a", 5, np.array([np.nan, 1.0, 2.0]))], 2, "test").frame["ds"].tolist() == [7, 9]


def test_when_a_tsf_is_read_then_starts_are_anchored_and_missing_values_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.tsf.gz"
    header = (
        "# remark\n@relation a\n@attribute series_name string\n@attribute start_timestamp date\n@frequency weekly\n@missing true\n@data\n"
    )
    with gzip.open(path, "wt", encoding="latin1") as file:
        file.write(header + "T1:2024-05-15 00-00-00:1,?,2.5\nT2:2024-05-11 00-00-00:4,5\n")
    first, second = read_tsf(path, "W-SUN")
    assert (first.id, first.start) == ("T1", pd.Timestamp("2024-05-12"))
    np.testing.assert_array_equal(first.values, [1, np.nan, 2.5])
    assert (second.id, second.start) == ("T2", pd.Timestamp("2024-05-05"))
    assert second.values.tolist() == [4, 5]


@given(st.lists(st.integers(-2048, 2047), min_size=2, max_size=30).filter(lambda x: len(x) % 2 == 0))
def test_when_samples_are_packed_in_format_212_then_they_come_back(tmp_path_factory: pytest.TempPathFactory, samples: list[int]) -> None:
    folder = tmp_path_factory.mktemp("wfdb")
    pairs = np.array(samples).reshape(-1, 2) & 0xFFF
    packed = np.stack([pairs[:, 0] & 0xFF, (pairs[:, 0] >> 8) | ((pairs[:, 1] >> 8) << 4), pairs[:, 1] & 0xFF], axis=1)
    (folder / "r.dat").write_bytes(packed.astype(np.uint8).tobytes())
    (folder / "r.hea").write_text(f"r 2 360 {len(pairs)}\nr.dat 212 200 11 1024 0 0 0 I\nr.dat 212 100(7)/mV 11 0 0 0 0 II\n# remark\n")
    rate, signals = read_wfdb(folder, "r")
    assert rate == 360
    np.testing.assert_allclose(signals["I"] * 200 + 1024, samples[::2], atol=1e-9)
    np.testing.assert_allclose(signals["II"] * 100 + 7, samples[1::2], atol=1e-9)


def test_when_the_format_is_another_one_then_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.hea").write_text("r 1 100 4\nr.dat 80 1 8 0 0 0 0 I\n")
    (tmp_path / "r.dat").write_bytes(b"abcd")
    with pytest.raises(SourceError, match="format 80"):
        read_wfdb(tmp_path, "r")


def test_when_a_slow_wave_is_resampled_then_its_shape_and_duration_stay() -> None:
    seconds = np.arange(3600) / 360
    wave = 2 + np.sin(2 * np.pi * seconds)
    values = resampled(wave, 360.0)
    assert len(values) == 1250
    np.testing.assert_allclose(values[50:-50], (2 + np.sin(2 * np.pi * np.arange(1250) / 125))[50:-50], atol=5e-3)


@needs_data
@pytest.mark.parametrize("record", ["100", "105", "200m", "I06", "v102s", "a103l"])
def test_when_a_real_record_is_read_then_first_samples_and_checksums_are_those_of_its_header(record: str) -> None:
    folder = Path(os.environ["FEDCAST_DATA"]) / "medical"
    lines = [line for line in (folder / f"{record}.hea").read_text().splitlines() if line.strip() and not line.startswith("#")][1:]
    _, signals = read_wfdb(folder, record)
    assert len(signals) == len(lines)
    for line in lines:
        _, _, gain, _, zero, first, checksum, _, name = line.split()
        digital = np.rint(signals[name] * float(gain.partition("/")[0]) + float(zero)).astype(np.int64)
        assert digital[0] == int(first)
        assert (digital.sum() - int(checksum)) % 65536 == 0

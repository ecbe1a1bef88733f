from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcast.data import readers
from fedcast.data.frames import examine
from fedcast.data.plain import read_plain_csv
from fedcast.data.readers import read_table

CELLS = [
    "",
    " ",
    "NA",
    "nan",
    ".",
    "?",
    "null",
    "inf",
    "-1e400",
    "1e5",
    "+3",
    " 4.5",
    "0.1",
    "9007199254740993",
    "7,5",
    "1_0",
    "true",
    "x",
    "é",
]
IDS = ["a", "b", "", "NA", "7", "07", " a", "né", "true"]
TIMES = ["", "NA", ".", "2024-01-09", "2024-02-30", "2024-01-01T05", "Jan 2024", "20240105", "5", "1.5", " 2024-01-11", "2024-01-12Z"]
DAYS = [f"2024-01-0{day}" for day in range(1, 8)]


def examined(text: str, *, plain: bool) -> Any:
    """What a file is read as: its long frame, or what is wrong with it."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if not plain:
            patch.setattr(readers, "read_plain_csv", lambda *arguments: None)
        path = Path(folder) / "data.csv"
        path.write_bytes(text.encode())
        long, problems = examine(path)
        return None if long is None else (long.frame.to_dict("list"), long.frame.dtypes.to_dict(), long.freq), [
            (p.kind, p.message, p.repair, p.column, p.series, p.row, p.count) for p in problems
        ]


@st.composite
def tables(draw: st.DrawFn) -> str:
    """A long CSV of two series over a week, with odd cells, rows and line ends at a few places."""
    rows = [[name, day, str(draw(st.integers(-3, 99)) / 4)] for name in "ab" for day in DAYS]
    for _ in range(draw(st.integers(0, 3))):
        column = draw(st.integers(0, 2))
        draw(st.sampled_from(rows))[column] = draw(st.sampled_from([IDS, TIMES, CELLS][column]))
    mark = draw(st.sampled_from([",", ";", "\t"]))
    lines = [mark.join(row) for row in rows]
    odd = draw(
        st.sampled_from(
            [None, None, "", "  ", mark, f"c{mark}2024-01-01", f'"a"{mark}2024-01-08{mark}1', f"a{mark}2024-01-08{mark}1{mark}2"]
        )
    )
    if odd is not None:
        lines.insert(draw(st.integers(0, len(lines))), odd)
    end = draw(st.sampled_from(["\n", "\r\n"]))
    return end.join([mark.join(["unique_id", "ds", "y"]), *lines]) + draw(st.sampled_from(["", end]))


@settings(max_examples=150, deadline=None)
@given(tables())
def test_when_a_csv_is_read_fast_then_series_and_problems_are_those_of_the_careful_way(text: str) -> None:
    np.testing.assert_equal(examined(text, plain=True), examined(text, plain=False))


@pytest.mark.parametrize("text", ["0,1\n1,2\n2,4\n", "20240101,1\n20240102,2\n20240103,4\n", "2024,1\n2025,NA\n2026,3\n", "5.0,1\n6.0,2\n"])
def test_when_times_are_numbers_then_they_mean_the_same_in_both_ways(text: str) -> None:
    np.testing.assert_equal(examined("ds,y\n" + text, plain=True), examined("ds,y\n" + text, plain=False))


def test_when_cells_are_plain_then_numbers_are_read_to_the_last_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=500) * 10.0 ** np.random.default_rng(1).integers(-300, 15, 500)
    frame = pd.DataFrame({"unique_id": "a", "ds": np.arange(500), "y": values})
    frame.to_csv(tmp_path / "data.csv", index=False)
    text = (tmp_path / "data.csv").read_bytes()
    plain = read_plain_csv(text, ",", ["unique_id", "ds", "y"], ["unique_id", "ds", "y"], {"unique_id"}, ["", "NA"])
    assert plain is not None
    np.testing.assert_array_equal(plain["y"], values)
    np.testing.assert_array_equal(read_table(tmp_path / "data.csv", "data.csv").frame["y"], values)


@pytest.mark.parametrize(
    "text", ['i,d,y\n"a",2024-01-01,1\n', "i,d,y\na,2024-01-01\n", "i,d,y\n", "i,d,y", "i,d,y\na,x,1\n", "i,d,y\na,2024-01-01,1e300\n"]
)
def test_when_cells_are_not_plain_then_the_file_is_left_to_the_careful_way(text: str) -> None:
    names = ["i", "d", "y"]
    assert read_plain_csv(text.encode(), ",", names, names, {"i"}, [""]) is None

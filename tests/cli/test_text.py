from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcast.cli import text
from fedcast.cli.text import csv_pieces

DAYS = pd.date_range("2024-03-29", periods=6, freq="D")


def as_pandas_writes(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, lineterminator="\n").encode()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(), min_size=6, max_size=6),
    st.lists(st.text(st.sampled_from('a é,"\n;'), max_size=4), min_size=6, max_size=6),
    st.sampled_from([1.0, 1e-3, 1e20]),
)
def test_when_a_frame_is_written_then_the_text_is_that_of_pandas(numbers: list[float], names: list[str], scale: float) -> None:
    frame = pd.DataFrame({"a,b": names, "ds": DAYS, "y": numbers, "z": np.arange(-2, 4) * scale})
    assert b"".join(csv_pieces(frame)) == as_pandas_writes(frame)


@pytest.mark.parametrize(
    "column",
    [
        DAYS,
        DAYS + pd.Timedelta("1h"),
        DAYS + pd.Timedelta("1ns"),
        DAYS.tz_localize("Europe/Berlin"),
        DAYS.as_unit("s"),
        np.arange(6) * 2**60,
        [True, False] * 3,
        ["a", None] * 3,
        [1, "a"] * 3,
        pd.Categorical(["a", "b"] * 3),
        np.ones(6, dtype=np.float32),
        DAYS.where(DAYS.day > 3),
    ],
    ids=str,
)
def test_when_columns_are_of_other_kinds_then_the_text_is_that_of_pandas(column: object) -> None:
    frame = pd.DataFrame({"unique_id": ["a", "b"] * 3, "other": column})
    assert b"".join(csv_pieces(frame)) == as_pandas_writes(frame)


@pytest.mark.parametrize("frame", [pd.DataFrame({"y": [1.0, np.nan]}), pd.DataFrame({"a": ["x"], "y": [1.0]}).iloc[:0], pd.DataFrame()])
def test_when_a_frame_has_little_in_it_then_the_text_is_that_of_pandas(frame: pd.DataFrame) -> None:
    assert b"".join(csv_pieces(frame)) == as_pandas_writes(frame)


def test_when_a_frame_is_long_then_its_pieces_are_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_ROWS", 4)
    frame = pd.DataFrame({"unique_id": list("abcdefghij"), "y": np.linspace(0, 1, 10)})
    pieces = list(csv_pieces(frame))
    assert len(pieces) == 4
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert b"".join(pieces) == as_pandas_writes(frame)

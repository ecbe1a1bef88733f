from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import growth


def test_when_growth_is_measured_quickly_then_every_quantity_of_every_study_has_a_row(tmp_path: Path, capsys) -> None:
    path = tmp_path / "out.json"

    growth.main(["--quick", "--output", str(path)])

    rows = json.loads(path.read_text())["rows"]
    assert {row["study"] for row in rows} == set(growth.STUDIES)
    assert all(len(row["values"]) == len(row["sizes"]) for row in rows)
    assert min(value for row in rows if "seconds" in row["quantity"] for value in row["values"]) > 0
    messages = next(row for row in rows if row["study"] == "server" and row["quantity"] == "bytes of messages")
    assert messages["exponent"] == pytest.approx(1)
    assert "Above linear:" in capsys.readouterr().out


@pytest.mark.slow
def test_when_a_point_is_measured_apart_then_it_has_the_quantities_of_one_measured_here() -> None:
    apart = growth.measured("series", 100, 1, apart=True)

    assert set(apart) == set(growth.series_point(100, 1))
    assert apart["CPU seconds a batch of 32"] > 0


@given(st.floats(-1, 3), st.floats(1e-3, 1e3))
def test_when_values_follow_a_power_law_then_its_exponent_is_found(exponent: float, factor: float) -> None:
    sizes = [10, 30, 100, 1000]

    fitted = growth.fit(sizes, [factor * size**exponent for size in sizes])

    assert fitted["exponent"] == pytest.approx(exponent, abs=1e-6)
    assert fitted["last_slope"] == pytest.approx(exponent, abs=1e-6)


def test_when_a_growth_starts_flat_and_ends_quadratic_then_it_is_above_linear() -> None:
    sizes = [10, 100, 1000, 10000]

    fitted = growth.fit(sizes, [1e5 + size**2 for size in sizes])

    assert growth.is_above(fitted)
    assert not growth.is_above(growth.fit(sizes, [1e5 + size for size in sizes]))
    assert growth.fit(sizes, [0, 1, 2, 3])["exponent"] is None


def test_when_memory_is_taken_and_given_back_then_its_peak_counts() -> None:
    def work() -> None:
        np.ones(2**23)  # 64 MiB

    assert growth.peak_growth(work) > 50e6

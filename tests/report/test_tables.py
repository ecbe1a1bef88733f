"""Score tables and the words for numbers."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcast.methods.base import METHODS
from fedcast.report.tables import (
    format_bytes,
    format_count,
    format_score,
    format_seconds,
    held_out_mask,
    is_number,
    own_models,
    pretty_key,
    pretty_name,
    score_table,
)


def frame(**scores: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame([{"model": m, "domain": d, "mse": v, "coverage80": v} for m, row in scores.items() for d, v in row.items()])


positive = st.floats(0.01, 100)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6))
def test_when_scores_are_divided_by_the_naive_then_the_mean_is_geometric(pairs: list[tuple[float, float]]) -> None:
    results = frame(ours={f"d{i}": a for i, (a, _) in enumerate(pairs)}, seasonal_naive={f"d{i}": b for i, (_, b) in enumerate(pairs)})
    table = score_table(results)
    assert table is not None
    row = table.models.index("ours")
    assert math.isclose(table.mean[row], math.exp(sum(math.log(a / b) for a, b in pairs) / len(pairs)), rel_tol=1e-9)
    assert table.mean[table.models.index("seasonal_naive")] == 1
    assert list(table.mean) == sorted(table.mean)
    assert table.relative


def test_when_a_model_lacks_a_domain_then_the_mean_is_over_the_shared_ones() -> None:
    table = score_table(frame(seasonal_naive={"a": 1.0, "b": 2.0}, ours={"a": 0.5, "b": 4.0}, other={"a": 0.8}))
    assert table is not None
    assert table.shared == 1
    assert table.models == ("ours", "other", "seasonal_naive")
    assert table.mean.tolist() == pytest.approx([0.5, 0.8, 1.0])
    assert table.best() == {0}
    assert table.beats_naive(0) == (1, 2)


def test_when_the_naive_is_perfect_somewhere_then_that_domain_has_no_ratio() -> None:
    table = score_table(frame(seasonal_naive={"a": 0.0, "b": 2.0}, ours={"a": 0.5, "b": 1.0}))
    assert table is not None
    assert np.isnan(table.values[:, 0]).all()
    assert table.mean.tolist() == pytest.approx([0.5, 1.0])
    assert format_score(float(table.values[0, 0]), table) == "–"


def test_when_no_naive_was_scored_then_scores_stay_as_they_are() -> None:
    table = score_table(frame(ours={"a": 0.25}, other={"a": 4.0}))
    assert table is not None
    assert not table.relative
    assert table.values[:, 0].tolist() == [0.25, 4.0]


def test_when_coverage_is_compared_then_the_nearest_to_its_level_is_best() -> None:
    table = score_table(frame(seasonal_naive={"a": 0.99}, ours={"a": 0.78}, other={"a": 0.6}), "coverage80")
    assert table is not None
    assert table.models[0] == "ours"
    assert table.best() == {0}
    assert format_score(0.78, table) == "78 %"


def test_when_a_reconstruction_is_scored_then_its_error_is_a_number_and_the_lowest_is_best() -> None:
    rows = [{"model": m, "domain": "a", "reconstruction_mse": v} for m, v in {"ours": 0.5, "other": 1.25, "seasonal_naive": None}.items()]
    table = score_table(pd.DataFrame(rows), "reconstruction_mse")
    assert table is not None
    assert table.models == ("ours", "other")
    assert table.best() == {0}
    assert [format_score(float(value), table) for value in table.mean] == ["0.5", "1.25"]


def test_when_a_model_stands_alone_then_nothing_is_called_best() -> None:
    table = score_table(frame(ours={"a": 0.25}))
    assert table is not None
    assert table.best() == set()
    assert table.best_in(0) == set()


def test_when_there_is_nothing_to_score_then_there_is_no_table() -> None:
    assert score_table(pd.DataFrame()) is None
    assert score_table(frame(ours={"a": math.nan})) is None
    assert score_table(frame(ours={"a": 1.0}), held_out=True) is None
    assert score_table(frame(ours={"a": 1.0}), "wql") is None


def test_when_held_out_is_missing_in_some_rows_then_they_count_as_training() -> None:
    assert held_out_mask(pd.DataFrame({"held_out": [True, None, math.nan, False]})).tolist() == [True, False, False, False]


def test_when_several_models_were_trained_then_the_method_of_the_run_comes_first() -> None:
    results = pd.DataFrame({"model": ["seasonal_naive", "central", "fedtrl"], "method": ["fedtrl"] * 3})
    assert own_models(results) == ("fedtrl", "central")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (999_600, "1 MB"), (342_000_000, "342 MB"), (5e15, "5000 TB")],
)
def test_when_bytes_are_written_then_the_unit_fits(count: float, text: str) -> None:
    assert format_bytes(count) == text
    assert format_count(count) == text.removesuffix("B").replace(" ", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1234, "0.123 s"), (59, "59 s"), (60, "1 min"), (252, "4 min 12 s"), (3600, "1 h"), (5400, "1 h 30 min")]
)
def test_when_seconds_are_written_then_they_read_as_a_person_says_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_when_names_are_shown_then_they_are_words() -> None:
    assert pretty_name("fedavg_encoder") == "FedAvg, encoder only"
    assert [name for name in METHODS if pretty_name(name) == name] == []
    assert pretty_name("my_method") == "my_method"
    assert pretty_key("feature_variance") == "Feature variance"


@pytest.mark.parametrize(
    ("value", "is_one"), [(1, True), (1.5, True), (True, False), (math.nan, False), ("1", False), (None, False), (10**400, False)]
)
def test_when_a_value_is_no_finite_number_then_it_is_not_taken_for_one(value: object, is_one: bool) -> None:
    assert is_number(value) is is_one

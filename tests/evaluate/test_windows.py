from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from statsforecast.utils import AirPassengers

from fedcast.data.splits import split_by_time, train_scale
from fedcast.data.store import SeriesStore
from fedcast.evaluate.baselines import baseline_forecast
from fedcast.evaluate.metrics import METRICS, score
from fedcast.evaluate.windows import evaluation_set, seasonal_error

SERIES = np.asarray(AirPassengers, dtype=np.float64)


def test_when_train_is_monthly_then_the_seasonal_error_is_the_mean_yearly_change() -> None:
    expected = np.mean([abs(SERIES[t] - SERIES[t - 12]) for t in range(12, 100)])
    assert seasonal_error(SERIES[:100], 12) == pytest.approx(expected, rel=1e-12)


def test_when_values_are_missing_then_only_observed_pairs_count() -> None:
    values = np.array([1.0, 2.0, np.nan, 5.0, 4.0, 10.0])
    assert seasonal_error(values, 2) == pytest.approx((3.0 + 5.0) / 2)


def test_when_train_is_no_longer_than_a_season_then_lag_one_is_used() -> None:
    assert seasonal_error(np.array([1.0, 3.0, 2.0]), 3) == pytest.approx(1.5)


@pytest.mark.parametrize("values", [np.full(30, 7.0), np.full(30, np.nan), np.tile([1.0, 2.0, 3.0], 9), np.array([1.0]), np.array([])])
def test_when_the_seasonal_error_is_zero_or_undefined_then_it_is_nan(values: NDArray[np.float64]) -> None:
    assert np.isnan(seasonal_error(values, 3))


def test_when_windows_are_cut_then_they_hold_the_series_and_its_train_statistics(make_store: Callable[..., SeriesStore]) -> None:
    second = SERIES.copy()
    second[[5, 130, 140]] = np.nan
    store = make_store([SERIES, second], seasons=[12], datasets=[0, 0])
    splits = split_by_time(store, horizon=12, validation=0.1, test=0.25)
    made = evaluation_set(store, splits, "test", context=140, horizon=12, limit=9)
    loc, scale = train_scale(store, splits)

    assert len(made) == len(made.ids) == len(made.dataset) <= 9
    assert made.horizon == 12
    assert made.context.dtype == made.target.dtype == np.float32
    assert set(made.dataset) == {"d0"}
    assert (made.season == 12).all()
    for row, name in enumerate(made.ids):
        index = store.ids.index(name)
        series, end = store.series(index), int(made.end[row])
        np.testing.assert_array_equal(made.target[row], series[end : end + 12])
        np.testing.assert_array_equal(made.context[row, 140 - min(end, 140) :], series[max(end - 140, 0) : end])
        assert np.isnan(made.context[row, : 140 - min(end, 140)]).all()
        assert made.loc[row] == pytest.approx(loc[index])
        assert made.scale[row] == pytest.approx(scale[index])
        assert made.mase_scale[row] == pytest.approx(seasonal_error(series[: splits.train_end[index]], 12))
        assert end >= splits.validation_end[index]


def test_when_values_after_the_train_part_change_then_the_scales_do_not(make_store: Callable[..., SeriesStore]) -> None:
    changed = SERIES.copy()
    changed[100:] *= 50
    made = []
    for series in (SERIES, changed):
        store = make_store([series], seasons=[12])
        splits = split_by_time(store, horizon=12, validation=0.1, test=0.25)
        assert splits.train_end[0] <= 100
        made.append(evaluation_set(store, splits, "test", context=48, horizon=12, limit=8))
    for name in ("loc", "scale", "mase_scale"):
        np.testing.assert_array_equal(getattr(made[0], name), getattr(made[1], name))


def test_when_a_part_has_no_window_then_the_set_is_empty_and_its_scores_are_nan(make_store: Callable[..., SeriesStore]) -> None:
    series = SERIES.copy()
    series[108:] = np.nan
    store = make_store([series], seasons=[12])
    splits = split_by_time(store, horizon=12, validation=0.1, test=0.25)
    made = evaluation_set(store, splits, "test", context=48, horizon=12, limit=8)
    assert len(made) == 0
    for name in ("seasonal_naive", "auto_ets"):
        scores = score(made, *baseline_forecast(name, made))
        assert all(np.isnan(scores[metric]) for metric in METRICS)


@pytest.mark.skipif("FEDCAST_DATA" not in os.environ, reason="FEDCAST_DATA is not set")
def test_when_hourly_electricity_is_scored_then_its_seasonal_naive_is_plausible(make_store: Callable[..., SeriesStore]) -> None:
    values = pd.read_csv(Path(os.environ["FEDCAST_DATA"]) / "energy" / "hourly_electricity.csv.gz")["y"].to_numpy()
    store = make_store([values], seasons=[24])
    splits = split_by_time(store, horizon=64, validation=0.1, test=0.2)
    made = evaluation_set(store, splits, "test", context=256, horizon=64, limit=64)
    scores = score(made, *baseline_forecast("seasonal_naive", made))
    assert len(made) == 64
    assert 0.01 < scores["mse"] < 1.0
    assert 0.5 < scores["mase"] < 3.0
    assert 0.5 < scores["coverage80"] <= 1.0

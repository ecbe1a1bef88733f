"""Scores of the federated Chronos paper, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedcast.data.splits import Splits
from fedcast.errors import ModelError
from fedcast.evaluate.medical import SCORES, across_clients, available_windows, client_scores

# two batches of one window: errors (0.1, 0.3) and (0.5, 0.5)
TARGET = np.array([[0.2, 0.4], [0.5, 0.0]])
FORECAST = np.array([[0.3, 0.1], [1.0, 0.5]])


def test_when_batches_are_scored_then_scores_are_means_over_batches() -> None:
    scores = client_scores(TARGET, FORECAST, batch=1)

    assert list(scores) == list(SCORES)
    assert scores["mse"] == pytest.approx((0.05 + 0.25) / 2)
    assert scores["rmse"] == pytest.approx((np.sqrt(0.05) + 0.5) / 2)
    assert scores["rmse_of_mean"] == pytest.approx(np.sqrt(0.15))
    assert scores["mae"] == pytest.approx((0.2 + 0.5) / 2)
    # 200 * (0.1/0.5, 0.3/0.5) -> 80; 200 * (0.5/1.5, 0.5/0.5) -> 133.33
    assert scores["smape"] == pytest.approx((80 + 400 / 3) / 2, rel=1e-6)


def test_when_all_windows_are_one_batch_then_both_roots_agree() -> None:
    scores = client_scores(TARGET, FORECAST)
    assert scores["rmse"] == scores["rmse_of_mean"] == pytest.approx(np.sqrt(0.15))


def test_when_the_last_batch_is_smaller_then_it_counts_as_the_others() -> None:
    target, forecast = np.zeros((3, 1)), np.array([[1.0], [1.0], [4.0]])
    assert client_scores(target, forecast, batch=2)["mae"] == pytest.approx((1 + 4) / 2)


def test_when_truth_and_forecast_are_zero_then_smape_is_zero() -> None:
    assert client_scores(np.zeros((1, 2)), np.zeros((1, 2)))["smape"] == 0


def test_when_targets_are_missing_then_only_the_observed_ones_count() -> None:
    target = np.array([[np.nan, 1.0], [np.nan, np.nan]])
    forecast = np.array([[np.nan, 0.5], [9.0, 9.0]])
    assert client_scores(target, forecast, batch=1)["mse"] == pytest.approx(0.25)
    assert np.isnan(client_scores(np.full((1, 2), np.nan), np.zeros((1, 2)))["mse"])


def test_when_a_forecast_is_not_finite_then_every_score_is_nan() -> None:
    broken = FORECAST.copy()
    broken[0, 0] = np.inf
    assert all(np.isnan(value) for value in client_scores(TARGET, broken, batch=1).values())


def test_when_shapes_differ_then_both_are_named() -> None:
    with pytest.raises(ModelError, match=r"\(2, 1\).*\(2, 2\)"):
        client_scores(TARGET, FORECAST[:, :1])
    with pytest.raises(ValueError, match="batch of 0"):
        client_scores(TARGET, FORECAST, batch=0)


def test_when_clients_are_joined_then_they_weigh_as_many_windows_as_they_have() -> None:
    scores = {"a": {"rmse": 0.1, "mae": 1.0}, "b": {"rmse": 0.4, "mae": 0.0}}
    assert across_clients(scores, {"a": 300, "b": 100, "c": 5}) == pytest.approx({"rmse": 0.175, "mae": 0.75})
    with pytest.raises(ValueError, match="no test window"):
        across_clients(scores, {"a": 0, "b": 0})


def test_when_windows_are_counted_then_every_place_of_a_kept_test_part_counts() -> None:
    lengths = np.array([1000, 600, 700, 50])
    splits = Splits(
        train_end=np.array([900, 0, 0, 0]),
        validation_end=np.array([1000, 0, 0, 0]),
        kept=np.array([True, True, True, False]),
        test_start=np.array([1000, 512, 512, 0]),
    )
    assert available_windows(lengths, splits, 64) == (600 - 512 - 64 + 1) + (700 - 512 - 64 + 1)

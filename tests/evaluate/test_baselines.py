from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from statsforecast.models import AutoETS, AutoTheta, SeasonalNaive

from fedcast.errors import UnknownNameError
from fedcast.evaluate.baselines import BASELINES, baseline_forecast
from fedcast.evaluate.metrics import score
from fedcast.evaluate.windows import EvaluationSet

Make = Callable[..., EvaluationSet]
Array = NDArray[np.float64]
INTERVALS = [20, 40, 60, 80]


def _fan(answer: dict[str, Array]) -> Array:
    columns = [*(f"lo-{level}" for level in reversed(INTERVALS)), "mean", *(f"hi-{level}" for level in INTERVALS)]
    return np.stack([answer[column] for column in columns], axis=-1)


def _seasonal(season: int, windows: int, length: int = 120, horizon: int = 30) -> tuple[Array, Array]:
    rng = np.random.default_rng(season)
    steps = np.arange(length + horizon)
    values = 50 + 8 * np.sin(2 * np.pi * steps / season) + rng.normal(size=(windows, length + horizon))
    return values[:, :length], values[:, length:]


def test_when_contexts_are_complete_then_seasonal_naive_equals_statsforecast(passengers: EvaluationSet) -> None:
    made = baseline_forecast("seasonal_naive", passengers)
    for row in range(len(passengers)):
        history = passengers.context[row].astype(np.float64)
        expected = SeasonalNaive(season_length=12).forecast(y=history, h=passengers.horizon, level=INTERVALS)
        np.testing.assert_allclose(made.point[row], expected["mean"], rtol=1e-6)
        np.testing.assert_allclose(made.quantiles[row], _fan(expected), rtol=1e-6)
    assert (made.fallbacks, made.unseasoned) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), season=st.integers(1, 20), length=st.integers(20, 60), horizon=st.integers(1, 50))
def test_when_numbers_are_random_then_seasonal_naive_equals_statsforecast(
    seed: int, season: int, length: int, horizon: int, make_evaluation: Make
) -> None:
    context = np.random.default_rng(seed).normal(size=(2, length)).astype(np.float32)
    made = baseline_forecast("seasonal_naive", make_evaluation(context, np.zeros((2, horizon)), season=season))
    if length == season:  # statsforecast gives no width there
        return
    for row in range(2):
        expected = SeasonalNaive(season_length=season).forecast(y=context[row].astype(np.float64), h=horizon, level=INTERVALS)
        np.testing.assert_allclose(made.quantiles[row], _fan(expected), rtol=1e-6, atol=1e-9)


def test_when_seasons_differ_then_each_window_follows_its_own(make_evaluation: Make) -> None:
    context = np.tile(np.arange(12.0), (2, 1))
    made = baseline_forecast("seasonal_naive", make_evaluation(context, np.zeros((2, 5)), season=[3, 4]))
    np.testing.assert_array_equal(made.point, [[9, 10, 11, 9, 10], [8, 9, 10, 11, 8]])


def test_when_values_are_missing_then_they_are_filled_forward(make_evaluation: Make) -> None:
    context = [[np.nan, np.nan, 1.0, 2.0, 3.0, 4.0, np.nan, 6.0]]
    made = baseline_forecast("seasonal_naive", make_evaluation(context, np.zeros((1, 4)), season=3))
    np.testing.assert_array_equal(made.point, [[4, 4, 6, 4]])
    # observed seasonal pairs: (1, 4) and (3, 6)
    width = 3.0 * np.sqrt([1, 1, 1, 2])
    np.testing.assert_allclose(made.quantiles[0, :, 8], made.point[0] + 1.2815515655446004 * width)


def test_when_the_context_is_shorter_than_a_season_then_the_last_value_is_repeated_and_counted(make_evaluation: Make) -> None:
    context = [[np.nan] * 3 + [1.0, 2.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    made = baseline_forecast("seasonal_naive", make_evaluation(context, np.zeros((2, 2)), season=4))
    np.testing.assert_array_equal(made.point, [[5, 5], [3, 4]])
    assert (made.fallbacks, made.unseasoned) == (0, 1)


@pytest.mark.parametrize("name", BASELINES)
def test_when_a_context_is_wholly_missing_then_the_train_mean_is_forecast_and_counted(name: str, make_evaluation: Make) -> None:
    context, target = _seasonal(4, 2, length=40, horizon=3)
    context[0] = np.nan
    made = baseline_forecast(name, make_evaluation(context, target, season=4, loc=50.0, scale=6.0))
    np.testing.assert_array_equal(made.point[0], np.full(3, 50.0))
    assert np.isfinite(made.quantiles).all()
    assert made.fallbacks == 1


@pytest.mark.parametrize(("name", "model"), [("auto_ets", AutoETS), ("auto_theta", AutoTheta)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_when_a_model_is_fitted_then_it_equals_statsforecast_on_the_same_history(
    name: str, model: Callable[..., AutoETS | AutoTheta], passengers: EvaluationSet
) -> None:
    made = baseline_forecast(name, passengers)
    assert (made.fallbacks, made.unseasoned) == (0, 0)
    for row in (0, len(passengers) - 1):
        history = passengers.context[row].astype(np.float64)
        expected = model(season_length=12).forecast(y=history, h=passengers.horizon, level=INTERVALS)
        np.testing.assert_allclose(made.point[row], expected["mean"], rtol=1e-6)
        np.testing.assert_allclose(made.quantiles[row], np.sort(_fan(expected), axis=-1), rtol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_when_airline_passengers_are_forecast_then_the_scores_are_plausible(name: str, passengers: EvaluationSet) -> None:
    made = baseline_forecast(name, passengers)
    scores = score(passengers, *made)
    assert 0.2 < scores["mase"] < 3
    assert 0.3 < scores["coverage80"] <= 1
    assert (np.diff(made.quantiles, axis=-1) >= 0).all()


@pytest.mark.parametrize(("name", "season"), [("auto_ets", 30), ("auto_theta", 30)])
def test_when_the_season_is_long_then_it_is_still_followed(name: str, season: int, make_evaluation: Make) -> None:
    context, target = _seasonal(season, 3)
    made = baseline_forecast(name, make_evaluation(context, target, season=season))
    assert np.abs(made.point - target).mean() < 2.0  # the season's amplitude is 8
    assert (made.fallbacks, made.unseasoned) == (0, 0)


@pytest.mark.parametrize("name", ["auto_ets", "auto_theta"])
def test_when_the_context_has_under_two_seasons_then_no_season_is_fitted_and_counted(name: str, make_evaluation: Make) -> None:
    context, target = _seasonal(100, 2)
    made = baseline_forecast(name, make_evaluation(context, target, season=100))
    assert (made.fallbacks, made.unseasoned) == (0, 2)


def test_when_a_fit_fails_then_seasonal_naive_takes_over_and_is_counted(make_evaluation: Make) -> None:
    context, target = _seasonal(4, 3, length=40, horizon=6)
    context[1, :-3] = np.nan  # three points are too few for ETS
    made = make_evaluation(context, target, season=4)
    fitted, naive = baseline_forecast("auto_ets", made), baseline_forecast("seasonal_naive", made)
    assert fitted.fallbacks == 1
    np.testing.assert_array_equal(fitted.point[1], naive.point[1])
    np.testing.assert_array_equal(fitted.quantiles[1], naive.quantiles[1])
    assert (fitted.point[0] != naive.point[0]).any()


def test_when_fitted_in_worker_processes_then_the_bytes_and_the_counts_are_the_same(make_evaluation: Make) -> None:
    context, target = _seasonal(4, 4, length=40, horizon=6)
    context[1, :-3] = np.nan
    made = make_evaluation(context, target, season=4)
    alone, together = baseline_forecast("auto_ets", made, jobs=1), baseline_forecast("auto_ets", made, jobs=2)
    assert alone.quantiles.tobytes() == together.quantiles.tobytes()
    assert alone.fallbacks == together.fallbacks == 1


def test_when_asked_twice_then_the_forecasts_are_the_same_bytes(passengers: EvaluationSet) -> None:
    for name in BASELINES:
        first, second = baseline_forecast(name, passengers), baseline_forecast(name, passengers)
        assert first.quantiles.tobytes() == second.quantiles.tobytes()


def test_when_the_series_is_constant_then_every_baseline_repeats_it(make_evaluation: Make) -> None:
    made = make_evaluation(np.full((2, 60), 3.0), np.full((2, 5), 3.0), season=7, loc=3.0)
    for name in BASELINES:
        point, quantiles = baseline_forecast(name, made)
        np.testing.assert_allclose(point, 3.0, atol=1e-3)
        assert np.isfinite(quantiles).all()


def test_when_the_name_is_unknown_then_the_nearest_is_suggested(passengers: EvaluationSet) -> None:
    with pytest.raises(UnknownNameError, match="seasonal_naiv") as caught:
        baseline_forecast("seasonal_naiv", passengers)
    assert "seasonal_naive" in caught.value.hint

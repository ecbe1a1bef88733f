from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcast.errors import ModelError
from fedcast.evaluate.baselines import baseline_forecast
from fedcast.evaluate.metrics import COUNTS, LEVELS, METRICS, score
from fedcast.evaluate.windows import EvaluationSet

Make = Callable[..., EvaluationSet]
Array = NDArray[np.float64]
CASES = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 9))


def _random(make: Make, seed: int, windows: int, horizon: int) -> tuple[EvaluationSet, Array, Array]:
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(windows, horizon)) * 10.0 ** rng.integers(-3, 5, size=(windows, 1))
    target[rng.random(target.shape) < 0.2] = np.nan
    target[rng.random(target.shape) < 0.1] = 0.0
    made = make(
        rng.normal(size=(windows, 16)),
        target,
        dataset=[f"d{i}" for i in rng.integers(0, 3, size=windows)],
        loc=rng.normal(size=windows),
        scale=rng.uniform(0.1, 100, size=windows),
        mase_scale=np.where(rng.random(windows) < 0.2, np.nan, rng.uniform(0.1, 10, size=windows)),
    )
    near = np.nan_to_num(target)[..., None] + rng.normal(size=(windows, horizon, 9)) * made.scale[:, None, None]
    quantiles = np.sort(near, axis=-1)
    return made, quantiles.mean(axis=-1), quantiles


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _by_hand(made: EvaluationSet, point: Array, quantiles: Array) -> dict[str, float]:
    """The same scores in plain loops over windows and steps."""
    squares, absolutes, scaled, symmetric, covered = [], [], [], [], []
    losses: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    for w in range(len(made)):
        for h in range(made.horizon):
            y = float(made.target[w, h])
            if np.isnan(y):
                continue
            fan = quantiles[w, h]
            squares.append(((y - point[w, h]) / made.scale[w]) ** 2)
            absolutes.append(abs((y - point[w, h]) / made.scale[w]))
            if np.isfinite(made.mase_scale[w]):
                scaled.append(abs(y - fan[4]) / made.mase_scale[w])
            both = abs(y) + abs(fan[4])
            symmetric.append(200 * abs(y - fan[4]) / both if both > 0 else 0.0)
            covered.append(float(fan[0] <= y <= fan[8]))
            name = made.dataset[w]
            losses.setdefault(name, []).extend(max(q * (y - f), (q - 1) * (y - f)) for q, f in zip(LEVELS, fan, strict=True))
            sizes[name] = sizes.get(name, 0.0) + abs(y)
    return {
        "mse": _mean(squares),
        "mae": _mean(absolutes),
        "mase": _mean(scaled),
        "smape": _mean(symmetric),
        "wql": _mean([2 * sum(losses[name]) / (9 * size) for name, size in sizes.items() if size > 0]),
        "coverage80": _mean(covered),
    }


def _assert_same(a: dict[str, float], b: dict[str, float], names: tuple[str, ...] = METRICS, rel: float = 1e-6) -> None:
    for name in names:
        assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-12, nan_ok=True), name


@settings(max_examples=40, deadline=None)
@given(case=CASES)
def test_when_scored_then_every_score_equals_a_plain_loop(case: tuple[int, int, int], make_evaluation: Make) -> None:
    made, point, quantiles = _random(make_evaluation, *case)
    _assert_same(score(made, point, quantiles), _by_hand(made, point, quantiles))


def test_when_real_forecasts_are_scored_then_every_score_equals_a_plain_loop(passengers: EvaluationSet) -> None:
    point, quantiles = baseline_forecast("seasonal_naive", passengers)
    scores = score(passengers, point, quantiles)
    _assert_same(scores, _by_hand(passengers, point, quantiles))
    assert all(np.isfinite(scores[name]) for name in METRICS)
    assert all(scores[name] == 0 for name in COUNTS)


@settings(max_examples=20, deadline=None)
@given(case=CASES, data=st.data())
def test_when_windows_are_permuted_then_no_score_changes(case: tuple[int, int, int], data: st.DataObject, make_evaluation: Make) -> None:
    made, point, quantiles = _random(make_evaluation, *case)
    order = np.asarray(data.draw(st.permutations(range(len(made)))))
    arrays: dict[str, Any] = {
        name: getattr(made, name)[order] for name in ("context", "target", "loc", "scale", "mase_scale", "season", "end")
    }
    permuted = replace(made, dataset=[made.dataset[i] for i in order], ids=[made.ids[i] for i in order], **arrays)
    _assert_same(score(made, point, quantiles), score(permuted, point[order], quantiles[order]), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(case=CASES)
def test_when_the_forecast_is_perfect_then_every_error_is_zero(case: tuple[int, int, int], make_evaluation: Make) -> None:
    made, _, _ = _random(make_evaluation, *case)
    truth = np.nan_to_num(made.target)
    scores = score(made, truth, np.repeat(truth[..., None], 9, axis=-1))
    for name in ("mse", "mae", "mase", "smape", "wql"):
        assert scores[name] == 0 or np.isnan(scores[name])
    assert scores["coverage80"] == 1 or np.isnan(scores["coverage80"])


@settings(max_examples=20, deadline=None)
@given(case=CASES, power=st.integers(-30, 30))
def test_when_the_unit_changes_then_no_score_changes(case: tuple[int, int, int], power: int, make_evaluation: Make) -> None:
    made, point, quantiles = _random(make_evaluation, *case)
    unit = 2.0**power  # a power of two is exact in float32
    scaled = replace(
        made,
        target=(made.target * np.float32(unit)).astype(np.float32),
        loc=made.loc * unit,
        scale=made.scale * unit,
        mase_scale=made.mase_scale * unit,
    )
    _assert_same(score(made, point, quantiles), score(scaled, point * unit, quantiles * unit), rel=1e-9)


def test_when_one_dataset_has_large_units_then_it_does_not_dominate_the_weighted_quantile_loss(make_evaluation: Make) -> None:
    made = make_evaluation(np.zeros((2, 16)), [[1e6, 1e6], [1.0, 1.0]], dataset=["large", "small"])
    fan = np.repeat(np.array([[1e6, 1e6], [0.5, 0.5]])[..., None], 9, axis=-1)
    # The small dataset is 50 % off at every level: 2 * sum(q * 0.5) / 9 = 0.5; the large one is exact.
    assert score(made, fan[..., 4], fan)["wql"] == pytest.approx(0.25)


def test_when_a_series_has_no_mase_scale_then_its_windows_are_left_out_and_counted(make_evaluation: Make) -> None:
    made = make_evaluation(np.zeros((3, 16)), [[1.0], [2.0], [np.nan]], mase_scale=[np.nan, 4.0, np.nan])
    fan = np.zeros((3, 1, 9))
    scores = score(made, fan[..., 4], fan)
    assert scores["mase"] == pytest.approx(0.5)
    assert scores["mase_left_out"] == 1  # the third window has no observed target


def test_when_every_target_is_zero_then_wql_is_nan_and_counted(make_evaluation: Make) -> None:
    made = make_evaluation(np.zeros((2, 16)), [[0.0], [0.0]], dataset=["a", "b"])
    fan = np.ones((2, 1, 9))
    scores = score(made, fan[..., 4], fan)
    assert np.isnan(scores["wql"])
    assert scores["wql_left_out"] == 2
    assert scores["smape"] == pytest.approx(200.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_when_one_forecast_is_not_finite_then_every_score_is_nan_and_the_window_counted(bad: float, make_evaluation: Make) -> None:
    made = make_evaluation(np.zeros((3, 16)), [[1.0, np.nan], [2.0, 3.0], [4.0, 5.0]])
    fan = np.ones((3, 2, 9))
    fan[1, 0, 8] = bad
    scores = score(made, np.ones((3, 2)), fan)
    assert all(np.isnan(scores[name]) for name in METRICS)
    assert scores["not_finite"] == 1


def test_when_a_broken_forecast_lies_where_the_target_is_missing_then_it_does_not_matter(make_evaluation: Make) -> None:
    made = make_evaluation(np.zeros((1, 16)), [[1.0, np.nan]])
    point = np.array([[1.0, np.nan]])
    scores = score(made, point, np.repeat(point[..., None], 9, axis=-1))
    assert scores["mse"] == 0
    assert scores["not_finite"] == 0


def test_when_no_target_is_observed_then_every_score_is_nan(make_evaluation: Make) -> None:
    made = make_evaluation(np.zeros((2, 16)), np.full((2, 3), np.nan))
    scores = score(made, np.zeros((2, 3)), np.zeros((2, 3, 9)))
    assert all(np.isnan(scores[name]) for name in METRICS)


def test_when_shapes_do_not_fit_then_both_are_named(make_evaluation: Make) -> None:
    made = make_evaluation(np.zeros((2, 16)), np.zeros((2, 3)))
    with pytest.raises(ModelError, match=r"\(2, 4\)") as caught:
        score(made, np.zeros((2, 4)), np.zeros((2, 3, 9)))
    assert "(2, 3, 9)" in caught.value.hint

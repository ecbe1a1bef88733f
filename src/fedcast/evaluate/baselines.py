"""Forecasters that learn nothing, on the same windows as the models: they see the context of a window and nothing else.

==================  ======================================================================================================
``seasonal_naive``  repeats the last season of the context; our own, vectorised, equal to statsforecast's
``auto_ets``        statsforecast's AutoETS; for seasons over 24 steps MSTL with a non-seasonal AutoETS
``auto_theta``      statsforecast's AutoTheta
==================  ======================================================================================================

Seasons. ETS keeps one state a season step and statsforecast's likelihood stops at 24 of them (as R's ``ets`` does): from 25 steps on,
every seasonal ETS fails and the search takes seconds a series for a non-seasonal result. So longer seasons are taken out by an STL
decomposition first (MSTL, the way R's ``stlf`` goes). A context of less than two seasons cannot show a season: ETS and theta
are then fitted without one. AutoETS takes 0.1 to 0.25 s a window, theta and MSTL 0.02 to 0.04 s.

Missing values. Steps before the first observation are dropped. The seasonal naive fills gaps forward, and its residuals leave pairs
with a missing value out; for ETS and theta gaps are interpolated, and a gap at the end is filled forward.

Nothing is replaced silently: :class:`Baseline` counts the windows that a simpler forecaster took over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fedcast.errors import UnknownNameError
from fedcast.evaluate.metrics import LEVELS
from fedcast.evaluate.windows import EvaluationSet

Array = NDArray[np.float64]

BASELINES = ("seasonal_naive", "auto_ets", "auto_theta")

_NORMAL = np.asarray([NormalDist().inv_cdf(level) for level in LEVELS])


@dataclass(frozen=True)
class Baseline:
    """A baseline's forecasts; unpacks to ``point, quantiles``.

    Attributes
    ----------
    point
        float64 ``[W, H]`` in data units.
    quantiles
        float64 ``[W, H, 9]`` in data units, monotone.
    fallbacks
        Windows that another forecaster took over: the seasonal naive where ETS or theta could not be fitted or gave a value that is
        not finite; the train mean where no step of the context is observed.
    unseasoned
        Windows forecast without their season because the context is too short to show it.
    """

    point: Array
    quantiles: Array
    fallbacks: int
    unseasoned: int

    def __iter__(self) -> Iterator[Array]:
        return iter((self.point, self.quantiles))


def baseline_forecast(name: str, evaluation: EvaluationSet, jobs: int = 1) -> Baseline:
    """Forecast the evaluation windows with a baseline.

    Parameters
    ----------
    name
        One of :data:`BASELINES`.
    evaluation
        The windows.
    jobs
        Processes that fit; the seasonal naive needs none.

    Returns
    -------
    Baseline
        ``point, quantiles = baseline_forecast(...)`` works; the counts are attributes.

    Raises
    ------
    UnknownNameError
        When no baseline has that name.
    """
    if name not in BASELINES:
        raise UnknownNameError.of("baseline", name, BASELINES)
    naive = _seasonal_naive(evaluation)
    if name == "seasonal_naive" or not len(evaluation):
        return naive
    return _fitted(name, evaluation, naive, jobs)


def _seasonal_naive(evaluation: EvaluationSet) -> Baseline:
    """Repeat the last season, or the last value where the context is shorter than a season.

    The quantiles are Gaussian as statsforecast's: ``point + z * sigma * sqrt(1 + k)`` with sigma the root mean square of the seasonal
    differences in the context and k the whole seasons passed. Where no such difference is observed, sigma comes from lag 1.
    """
    context = evaluation.context.astype(np.float64)  # [W, L]
    windows, length = context.shape
    steps = np.arange(evaluation.horizon)
    known = _lengths(context)
    season = np.maximum(evaluation.season, 1)
    period = np.where(known >= season, season, 1)
    filled = _forward_fill(context)
    source = length - period[:, None] + steps % period[:, None]  # [W, H]
    point = np.take_along_axis(filled, source, axis=1)
    sigma = np.zeros(windows)
    for lag in np.unique(period):
        rows = period == lag
        sigma[rows] = _residual_deviation(context[rows], int(lag))
    empty = known == 0
    point[empty] = np.nan_to_num(evaluation.loc[empty, None])
    sigma[empty] = np.nan_to_num(evaluation.scale[empty])
    width = sigma[:, None] * np.sqrt(1 + steps // period[:, None])  # [W, H]
    quantiles = point[..., None] + width[..., None] * _NORMAL  # [W, H, 9]
    return Baseline(point, quantiles, fallbacks=int(empty.sum()), unseasoned=int((period < season).sum()))


def _lengths(context: Array) -> NDArray[np.int64]:
    observed = np.isfinite(context)
    return np.where(observed.any(axis=1), context.shape[1] - observed.argmax(axis=1), 0).astype(np.int64)


def _forward_fill(context: Array) -> Array:
    position = np.where(np.isfinite(context), np.arange(context.shape[1]), 0)
    return np.take_along_axis(context, np.maximum.accumulate(position, axis=1), axis=1)


def _residual_deviation(context: Array, lag: int) -> Array:
    squares = (context[:, lag:] - context[:, :-lag]) ** 2
    observed = np.isfinite(squares)
    pairs = observed.sum(axis=1)
    deviation = np.sqrt(np.where(observed, squares, 0.0).sum(axis=1) / np.maximum(pairs, 1))
    if lag > 1 and (pairs == 0).any():
        deviation[pairs == 0] = _residual_deviation(context[pairs == 0], 1)
    return np.asarray(deviation)


def _fitted(name: str, evaluation: EvaluationSet, naive: Baseline, jobs: int) -> Baseline:
    # Loaded only here: statsforecast and what it imports take seconds.
    from fedcast.evaluate.fitted import fit_and_forecast

    known = _lengths(evaluation.context.astype(np.float64))
    season = np.maximum(evaluation.season, 1)
    usable = np.where(known >= 2 * season, season, 1)
    fan = np.full((*evaluation.target.shape, len(LEVELS)), np.nan)  # [W, H, 9]
    for length in np.unique(usable[known > 0]):
        rows = np.flatnonzero((usable == length) & (known > 0))
        histories = [_interpolated(evaluation.context[row, -known[row] :]) for row in rows]
        fan[rows] = fit_and_forecast(name, int(length), histories, evaluation.horizon, jobs)
    failed: NDArray[np.bool_] = np.asarray(~np.isfinite(fan).all(axis=(1, 2)))
    fan[failed] = naive.quantiles[failed]
    point = np.where(failed[:, None], naive.point, fan[..., LEVELS.index(0.5)])
    unseasoned = (usable < season) & ~failed
    return Baseline(point, np.sort(fan, axis=-1), fallbacks=int(failed.sum()), unseasoned=int(unseasoned.sum()))


def _interpolated(values: NDArray[np.float32]) -> Array:
    steps = np.arange(len(values))
    observed = np.isfinite(values)
    return np.interp(steps, steps[observed], values[observed].astype(np.float64))

"""Scores of a point and quantile forecast over the evaluation windows of one domain.

======================  ==================================================================================================
``mse``, ``mae``        of the point forecast, both sides standardised by the train mean and deviation of their series
``mase``                mean absolute error of the median over the in-sample seasonal naive error of the series
``smape``               of the median, 0 to 200 %: ``200 |y - f| / (|y| + |f|)``, 0 where both are 0
``wql``                 ``2 * sum of pinball losses over 9 levels / (9 * sum of |y|)`` of each dataset, averaged over the
                        datasets, so that a dataset in large units does not dominate its domain
``coverage80``          share of targets within the 0.1 and 0.9 quantiles, bounds included; 0.8 is ideal
======================  ==================================================================================================

Every score pools all observed targets of the domain, as GluonTS and GIFT-Eval do (``wql``: of each dataset); missing targets are
left out. The median (level 0.5) is scored where the field scores it (GIFT-Eval: MASE, sMAPE), the point head elsewhere.
The formulas are those of ``utilsforecast.losses``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from utilsforecast import losses

from fedcast.errors import ModelError
from fedcast.evaluate.windows import EvaluationSet

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
METRICS = ("mse", "mae", "mase", "smape", "wql", "coverage80")
COUNTS = ("mase_left_out", "wql_left_out", "not_finite")

_COLUMNS = [f"q{level}" for level in LEVELS]
# A forecast beyond this many train deviations is as good as infinite: its square leaves float64.
_LARGEST = 1e150


def score(evaluation: EvaluationSet, point: ArrayLike, quantiles: ArrayLike) -> dict[str, float]:
    """Score a forecast of the evaluation windows.

    Parameters
    ----------
    evaluation
        The windows of one domain.
    point
        ``[W, H]`` in data units.
    quantiles
        ``[W, H, 9]`` in data units, at :data:`LEVELS`.

    Returns
    -------
    dict
        The scores of :data:`METRICS`, each finite or NaN, and how many windows or datasets were left out (:data:`COUNTS`):
        ``mase_left_out``, windows with observed targets whose series has no MASE scale; ``wql_left_out``, datasets whose
        observed targets are all 0; ``not_finite``, windows with a forecast that is not finite at an observed target. One such
        window makes every score NaN: a forecaster must not gain from the windows in which it broke.

    Raises
    ------
    ModelError
        When a forecast has another shape than the windows.
    """
    forecast = np.asarray(point, dtype=np.float64)
    fan = np.asarray(quantiles, dtype=np.float64)
    shape = evaluation.target.shape
    if forecast.shape != shape or fan.shape != (*shape, len(LEVELS)):
        raise ModelError(
            f"forecasts of shape {forecast.shape} and {fan.shape} do not fit {shape[0]} windows of {shape[1]} steps",
            hint=f"give point {shape} and quantiles {(*shape, len(LEVELS))}",
        )
    observed = np.isfinite(evaluation.target)
    broken = _broken(evaluation, forecast, fan, observed)
    unscaled = observed.any(axis=1) & ~np.isfinite(evaluation.mase_scale)
    scores: dict[str, float] = dict.fromkeys(METRICS, float("nan"))
    scores |= {"mase_left_out": float(unscaled.sum()), "wql_left_out": 0.0, "not_finite": float(broken.sum())}
    if broken.any() or not observed.any():
        return scores
    frame, zero_datasets = _long_frame(evaluation, forecast, fan, observed)
    scores["wql_left_out"] = float(zero_datasets)
    return scores | _scores(frame)


def _broken(
    evaluation: EvaluationSet, point: NDArray[np.float64], quantiles: NDArray[np.float64], observed: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    everything = np.concatenate([point[..., None], quantiles], axis=-1)  # [W, H, 10]
    limit = _LARGEST * np.minimum(evaluation.scale, 1.0)[:, None, None]
    fine = (np.abs(everything) < limit).all(axis=-1)  # NaN is not fine either
    return np.asarray((observed & ~fine).any(axis=1))


def _long_frame(
    evaluation: EvaluationSet, point: NDArray[np.float64], quantiles: NDArray[np.float64], observed: NDArray[np.bool_]
) -> tuple[pd.DataFrame, int]:
    """Return one row for each observed target, and the number of datasets whose targets are all 0.

    Columns ``*_std`` are standardised, ``*_mase`` divided by the scale of MASE; ``y`` and the quantiles are divided by the mean
    |y| of their dataset, which changes none of the relative scores and keeps them accurate in any unit.
    """
    window, _ = np.nonzero(observed)
    target = evaluation.target[observed].astype(np.float64)  # [N]
    fan = quantiles[observed]  # [N, 9]
    codes, _ = pd.factorize(np.asarray(evaluation.dataset, dtype=object)[window])
    size = np.bincount(codes, np.abs(target)) / np.bincount(codes)
    unit = np.where(size > 0, size, 1.0)[codes]
    loc, scale, mase_scale = evaluation.loc[window], evaluation.scale[window], evaluation.mase_scale[window]
    columns: dict[str, Any] = {
        "unique_id": np.zeros(len(target), dtype=np.int64),
        "dataset": codes,
        "counts": size[codes] > 0,
        "y": target / unit,
        "y_std": (target - loc) / scale,
        "point_std": (point[observed] - loc) / scale,
        "y_mase": target / mase_scale,
        "median_mase": fan[:, LEVELS.index(0.5)] / mase_scale,
    }
    columns |= {name: fan[:, position] / unit for position, name in enumerate(_COLUMNS)}
    frame = pd.DataFrame(columns)
    frame["forecast-lo-80"], frame["forecast-hi-80"] = frame["q0.1"], frame["q0.9"]
    return frame, int((size == 0).sum())


def _scores(frame: pd.DataFrame) -> dict[str, float]:
    with_scale = frame[frame["y_mase"].notna()]
    with_norm = frame[frame["counts"]]
    values = {
        "mse": losses.mse(frame, models=["point_std"], target_col="y_std")["point_std"],
        "mae": losses.mae(frame, models=["point_std"], target_col="y_std")["point_std"],
        "mase": losses.mae(with_scale, models=["median_mase"], target_col="y_mase")["median_mase"],
        "smape": 200.0 * losses.smape(frame, models=["q0.5"])["q0.5"],
        "coverage80": losses.coverage(frame, models=["forecast"], level=80)["forecast"],
    }
    if len(with_norm):
        levels = np.asarray(LEVELS)
        crps = losses.scaled_crps(with_norm, models={"forecast": _COLUMNS}, quantiles=levels, id_col="dataset")
        values["wql"] = crps["forecast"]
    means = {name: float(value.mean()) for name, value in values.items()}
    return {name: value if np.isfinite(value) else float("nan") for name, value in means.items()}

"""ETS and theta forecasts through statsforecast, kept apart because that library takes seconds to import."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from statsforecast import StatsForecast
from statsforecast.models import MSTL, AutoETS, AutoTheta, SeasonalNaive

from fedcast.evaluate.metrics import LEVELS

Array = NDArray[np.float64]

LONGEST_ETS_SEASON = 24

_INTERVALS = [20, 40, 60, 80]
_COLUMNS = [*(f"model-lo-{level}" for level in reversed(_INTERVALS)), "model", *(f"model-hi-{level}" for level in _INTERVALS)]


class _Unfit(SeasonalNaive):  # type: ignore[misc, unused-ignore]
    """Fallback that answers NaN, so that a failed fit is seen here even when it happened in a worker process."""

    def forecast(self, y: Any, h: int, *args: Any, level: list[int] | None = None, **kwargs: Any) -> dict[str, Array]:
        nothing = np.full(h, np.nan)
        return {"mean": nothing} | {f"{side}-{value}": nothing for side in ("lo", "hi") for value in sorted(level or [])}


def _ets(season: int) -> Any:
    if season > LONGEST_ETS_SEASON:
        return MSTL(season_length=season, trend_forecaster=AutoETS(model="ZZN"), alias="model")
    return AutoETS(season_length=season, alias="model")


def _theta(season: int) -> Any:
    return AutoTheta(season_length=season, alias="model")


def fit_and_forecast(name: str, season: int, histories: list[Array], horizon: int, jobs: int) -> Array:
    """Fit one model a history and forecast.

    Parameters
    ----------
    name
        ``"auto_ets"`` or ``"auto_theta"``.
    season
        Season in steps; 1 for none.
    histories
        Histories without missing values, of any lengths.
    horizon
        Steps ``H``.
    jobs
        Processes that fit.

    Returns
    -------
    ndarray
        The nine quantiles ``[W, H, 9]``; NaN where a fit failed.
    """
    model = _ets(season) if name == "auto_ets" else _theta(season)
    lengths = [len(history) for history in histories]
    frame = pd.DataFrame(
        {
            "unique_id": np.repeat(np.arange(len(histories)), lengths),
            "ds": np.concatenate([np.arange(length) for length in lengths]),
            "y": np.concatenate(histories),
        }
    )
    forecaster = StatsForecast(models=[model], freq=1, n_jobs=min(jobs, len(histories)), fallback_model=_Unfit(season_length=1))
    with warnings.catch_warnings():
        # Overflow in a candidate model that the search then discards, and deprecations inside the library.
        warnings.simplefilter("ignore")
        forecast = forecaster.forecast(df=frame, h=horizon, level=_INTERVALS)
    values = forecast.sort_values(["unique_id", "ds"])[_COLUMNS].to_numpy(dtype=np.float64)
    return np.asarray(values.reshape(len(histories), horizon, len(LEVELS)))

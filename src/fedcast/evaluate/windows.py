"""Fixed evaluation windows of one domain, as arrays that models, baselines and scores all read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedcast.data.splits import Splits, train_scale
from fedcast.data.store import SeriesStore
from fedcast.data.windows import WindowSampler


@dataclass
class EvaluationSet:
    """Evaluation windows of one domain, with what is needed to score a forecast of them.

    Attributes
    ----------
    domain
        Name of the domain.
    dataset, ids
        Dataset and series of each window, ``W`` names each.
    context
        float32 ``[W, L]`` in data units; missing values, and steps before a series begins, are NaN.
    target
        float32 ``[W, H]`` in data units, NaN where missing.
    loc, scale
        float64 ``[W]``: mean and standard deviation of the train part of each window's series.
    mase_scale
        float64 ``[W]``: see :func:`seasonal_error`; NaN where MASE is undefined.
    season
        int64 ``[W]``: steps in a season.
    end
        int64 ``[W]``: position of the first target in its series.
    """

    domain: str
    dataset: list[str]
    ids: list[str]
    context: NDArray[np.float32]
    target: NDArray[np.float32]
    loc: NDArray[np.float64]
    scale: NDArray[np.float64]
    mase_scale: NDArray[np.float64]
    season: NDArray[np.int64]
    end: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of windows."""
        return int(self.target.shape[0])

    @property
    def horizon(self) -> int:
        """Steps to forecast."""
        return int(self.target.shape[1])


def seasonal_error(train: NDArray[np.floating], season: int) -> float:
    """Return the in-sample mean absolute error of the seasonal naive forecast, the scale of MASE.

    Parameters
    ----------
    train
        ``[T]``, the train part of one series, NaN where missing; pairs with a missing value are left out.
    season
        Steps in a season; 1 is used where the train part is no longer than one season.

    Returns
    -------
    float
        NaN where the error is 0 (a constant or perfectly seasonal series) or where no pair is observed: MASE is then undefined.

    References
    ----------
    Hyndman and Koehler (2006), "Another look at measures of forecast accuracy".
    """
    lag = season if len(train) > season else 1
    values = np.asarray(train, dtype=np.float64)
    errors = np.abs(values[lag:] - values[:-lag])
    errors = errors[np.isfinite(errors)]
    error = float(errors.mean()) if errors.size else 0.0
    return error if error > 0 else float("nan")


def evaluation_set(
    store: SeriesStore, splits: Splits, part: Literal["validation", "test"], *, context: int, horizon: int, limit: int
) -> EvaluationSet:
    """Cut the evaluation windows of a domain; the same arguments always give the same windows.

    Parameters
    ----------
    store
        The domain's series; several domain names in one store are joined by ``+``.
    splits
        The split by time; scales are fitted on the train part alone.
    part
        The part in which the targets lie.
    context, horizon
        Steps seen and steps to forecast.
    limit
        Windows at most.

    Returns
    -------
    EvaluationSet
        ``W <= limit`` windows, in the order of the sampler.
    """
    sampler = WindowSampler(store, splits, context=context, horizon=horizon)
    windows = sampler.evaluation(part, limit)
    batch = sampler.gather(windows)
    loc, scale = train_scale(store, splits)
    datasets = store.dataset[windows.series]
    season = np.asarray(store.season_lengths, dtype=np.int64)[datasets]
    return EvaluationSet(
        domain="+".join(store.domain_names),
        dataset=[store.dataset_names[index] for index in datasets],
        ids=[store.ids[index] for index in windows.series],
        context=np.where(batch.mask.numpy(), batch.context.numpy(), np.float32(np.nan)),
        target=np.where(batch.target_mask.numpy(), batch.target.numpy(), np.float32(np.nan)),
        loc=np.asarray(loc, dtype=np.float64)[windows.series],
        scale=np.asarray(scale, dtype=np.float64)[windows.series],
        mase_scale=_mase_scales(store, splits, windows.series, season),
        season=season,
        end=np.asarray(windows.end, dtype=np.int64),
    )


def _mase_scales(store: SeriesStore, splits: Splits, series: NDArray[np.int64], season: NDArray[np.int64]) -> NDArray[np.float64]:
    unique, first, inverse = np.unique(series, return_index=True, return_inverse=True)
    errors = [
        seasonal_error(store.series(int(index))[: int(splits.train_end[index])], int(season[position]))
        for index, position in zip(unique, first, strict=True)
    ]
    return np.asarray(errors, dtype=np.float64)[inverse]

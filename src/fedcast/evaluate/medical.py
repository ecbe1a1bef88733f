"""Scores of the federated Chronos paper (Ali et al. 2025, arXiv 2502.09744): means over batches, on the data's own scale.

========  ==========================================================================
``mse``   mean of the batches' mean squared errors
``rmse``  mean of the batches' root mean squared errors
``mae``   mean of the batches' mean absolute errors
``smape`` mean of the batches' mean of ``200 |f - y| / (|f| + |y| + 1e-8)``, per cent
``rmse_of_mean``  square root of ``mse``: what the paper's zero-shot script calls RMSE; never below ``rmse``
========  ==========================================================================

A batch is 64 windows. A client's score is the mean over its batches, that of all clients the mean weighted by how many test windows each
of them has (:func:`available_windows`), of which it may have scored a part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedcast.data.splits import Splits
from fedcast.errors import ModelError

BATCH = 64
SCORES = ("mse", "rmse", "mae", "smape", "rmse_of_mean")
_SMALL = 1e-8


def client_scores(target: ArrayLike, forecast: ArrayLike, *, batch: int = BATCH) -> dict[str, float]:
    """Score the point forecasts of one client's test windows.

    Parameters
    ----------
    target
        ``[W, H]`` in data units, [0, 1] in the paper; NaN where missing.
    forecast
        ``[W, H]`` in data units; the median of the sampled paths in the paper.
    batch
        Windows a batch, in the order given; the last one may have fewer and counts as the others do.

    Returns
    -------
    dict
        The scores of :data:`SCORES`. Missing targets are left out, and a batch without any target is; NaN where no target is observed
        or a forecast of an observed target is not finite.

    Raises
    ------
    ModelError
        When the two are not of one shape ``[W, H]``.
    ValueError
        When a batch would hold no window.
    """
    truth, guess = np.asarray(target, dtype=np.float64), np.asarray(forecast, dtype=np.float64)
    if truth.ndim != 2 or truth.shape != guess.shape:
        raise ModelError(
            f"forecasts of shape {guess.shape} do not fit targets of shape {truth.shape}", hint="give both as [windows, steps]"
        )
    if batch < 1:
        raise ValueError(f"a batch of {batch} windows is none")
    pieces = [_batch_errors(truth[first : first + batch], guess[first : first + batch]) for first in range(0, len(truth), batch)]
    errors = np.array([piece for piece in pieces if piece is not None]).reshape(-1, 3)  # [batches, (mse, mae, smape)]
    if not len(errors) or not np.isfinite(errors).all():
        return dict.fromkeys(SCORES, float("nan"))
    mse, mae, smape = (float(value) for value in errors.mean(axis=0))
    return {"mse": mse, "rmse": float(np.sqrt(errors[:, 0]).mean()), "mae": mae, "smape": smape, "rmse_of_mean": float(np.sqrt(mse))}


def _batch_errors(target: NDArray[np.float64], forecast: NDArray[np.float64]) -> tuple[float, float, float] | None:
    observed = np.isfinite(target)
    if not observed.any():
        return None
    truth, guess = target[observed], forecast[observed]
    if not np.isfinite(guess).all():
        return (float("nan"),) * 3
    distance = np.abs(guess - truth)
    relative = 200 * distance / (np.abs(guess) + np.abs(truth) + _SMALL)
    return float((distance**2).mean()), float(distance.mean()), float(relative.mean())


def across_clients(scores: Mapping[str, Mapping[str, float]], windows: Mapping[str, int]) -> dict[str, float]:
    """Return the mean of the clients' scores, weighted by how many test windows each client has.

    Parameters
    ----------
    scores
        Client to its scores, as :func:`client_scores` gives them; all clients have the same ones.
    windows
        Client to the number of its available test windows; clients without scores may be in it.

    Raises
    ------
    KeyError
        When a scored client has no number of windows.
    ValueError
        When there is no client, or no window.
    """
    weights = np.array([windows[client] for client in scores], dtype=np.float64)
    if not weights.sum() > 0:
        raise ValueError("there is no test window to weigh clients by")
    names = next(iter(scores.values()))
    return {name: float(np.average([each[name] for each in scores.values()], weights=weights)) for name in names}


def available_windows(lengths: NDArray[np.int64], splits: Splits, horizon: int) -> int:
    """Return how many test windows a client has, one for each place where ``horizon`` target steps fit into a test part.

    Parameters
    ----------
    lengths
        int64 ``[n]``: steps of each series, as :attr:`fedcast.data.store.SeriesStore.lengths`.
    splits
        Their parts.
    horizon
        Steps of a target.
    """
    room = np.maximum(lengths - splits.test_start - horizon + 1, 0)
    return int(room[splits.kept].sum())

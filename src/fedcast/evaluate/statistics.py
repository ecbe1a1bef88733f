"""Statistics over result rows: relative scores, paired differences with intervals, and geometric means.

A result row (``kind == "result"``) has at least ``model``, ``domain``, ``seed`` and the scores; smaller scores are better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from fedcast.errors import RunError

Array = NDArray[np.float64]

ERRORS = ("mse", "mae", "mase", "smape", "wql")
REFERENCE = "seasonal_naive"
_NAN = float("nan")


@dataclass(frozen=True)
class PairedDifference:
    """How one model's score differs from another's over the same (seed, domain) pairs; negative where the first is better.

    Attributes
    ----------
    mean
        Mean over the pairs.
    low, high
        Percentile interval of a two-level bootstrap: seeds and domains are drawn with replacement, independently of each other.
    seed_low, seed_high
        Paired t interval over the seeds' means: would other seeds say the same of these domains?
    domain_low, domain_high
        Paired t interval over the domains' means: would other domains say the same?
    wins, losses, ties
        Pairs in which the first model's score is smaller, larger, equal.
    pairs, seeds, domains
        How many there are; pairs that one model lacks, or in which a score is not finite, are left out and counted in ``missing``.
    missing
        Pairs left out.

    Notes
    -----
    An interval is NaN where there is nothing to resample. With few units the bootstrap is too narrow (by about
    ``sqrt((n - 1) / n)`` for n domains) and the t intervals are the safer reading.
    """

    mean: float
    low: float
    high: float
    seed_low: float
    seed_high: float
    domain_low: float
    domain_high: float
    wins: int
    losses: int
    ties: int
    pairs: int
    seeds: int
    domains: int
    missing: int

    @property
    def ratio(self) -> float:
        """The mean of log-ratios as a ratio: 0.95 says 5 % less error."""
        return float(np.exp(self.mean))


def geometric_mean(values: ArrayLike) -> float:
    """Return the geometric mean; 0 where a value is 0, NaN where one is NaN or negative or where there is none."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not (array >= 0).all():
        return _NAN
    if (array == 0).any():
        return 0.0
    return float(np.exp(np.log(array).mean()))


def relative(rows: pd.DataFrame, *, reference: str = REFERENCE, metrics: Sequence[str] = ERRORS) -> pd.DataFrame:
    """Divide every score by the reference model's score of the same domain.

    Parameters
    ----------
    rows
        Result rows, the reference's among them.
    reference
        Name of the reference model. Its row of the same seed is used, or the mean over its seeds where it has none of that seed.
    metrics
        Columns to divide.

    Returns
    -------
    pandas.DataFrame
        The rows with their ``metrics`` divided; NaN where the reference has no row, a NaN or a 0.

    Raises
    ------
    RunError
        When the reference has different scores for one seed and domain (several horizons, say, in one frame).
    """
    result = rows.copy()
    for metric in metrics:
        cells = _cells(rows[rows["model"] == reference], metric)
        by_pair = cells.stack()
        pairs = pd.MultiIndex.from_frame(rows[["seed", "domain"]])
        own = by_pair.reindex(pairs).to_numpy(dtype=np.float64)
        general = cells.mean(axis=0).reindex(rows["domain"]).to_numpy(dtype=np.float64)
        divisor = np.where(np.isfinite(own), own, general)
        divisor[~(divisor > 0)] = _NAN
        result[metric] = rows[metric].to_numpy(dtype=np.float64) / divisor
    return result


def paired_difference(
    a: pd.DataFrame,
    b: pd.DataFrame,
    metric: str = "mse",
    *,
    kind: Literal["log_ratio", "difference"] = "log_ratio",
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two models over the (seed, domain) pairs that both have.

    Parameters
    ----------
    a, b
        Result rows of one model each.
    metric
        The score to compare.
    kind
        ``"log_ratio"``: ln(a / b), which weighs easy and hard domains alike; ``"difference"``: a - b.
    confidence
        Of the intervals.
    draws, seed
        Bootstrap draws and their seed; the same seed gives the same interval.

    Returns
    -------
    PairedDifference

    Raises
    ------
    RunError
        When one model has different scores for one seed and domain.

    References
    ----------
    Owen (2007), "The pigeonhole bootstrap": independent resampling of both factors of a crossed design.
    """
    kept, asked = _differences(_cells(a, metric), _cells(b, metric), kind)  # [S, D]
    present = np.isfinite(kept)
    pairs = int(present.sum())
    low, high = _bootstrap(kept, confidence, draws, seed)
    seed_low, seed_high = _t_interval(_means(kept, 1), confidence)
    domain_low, domain_high = _t_interval(_means(kept, 0), confidence)
    return PairedDifference(
        mean=float(kept[present].mean()) if pairs else _NAN,
        low=low,
        high=high,
        seed_low=seed_low,
        seed_high=seed_high,
        domain_low=domain_low,
        domain_high=domain_high,
        wins=int((kept < 0).sum()),
        losses=int((kept > 0).sum()),
        ties=int((kept == 0).sum()),
        pairs=pairs,
        seeds=kept.shape[0],
        domains=kept.shape[1],
        missing=asked - pairs,
    )


def _differences(a: pd.DataFrame, b: pd.DataFrame, kind: str) -> tuple[Array, int]:
    """Return seed by domain differences, NaN where a pair cannot be compared, and how many pairs either model has."""
    left, right = a.align(b, join="outer")
    first, second = left.to_numpy(dtype=np.float64), right.to_numpy(dtype=np.float64)
    usable = np.isfinite(first) & np.isfinite(second)
    if kind == "log_ratio":
        usable &= (first > 0) & (second > 0)
    x, y = np.where(usable, first, 1.0), np.where(usable, second, 1.0)
    difference = np.where(usable, np.log(x / y) if kind == "log_ratio" else x - y, _NAN)
    asked = int((left.notna() | right.notna()).to_numpy().sum())
    return difference[usable.any(axis=1)][:, usable.any(axis=0)], asked


def _means(values: Array, axis: int) -> Array:
    present = np.isfinite(values)
    return np.asarray(np.where(present, values, 0.0).sum(axis=axis) / present.sum(axis=axis))


def _t_interval(means: Array, confidence: float) -> tuple[float, float]:
    if len(means) < 2:
        return _NAN, _NAN
    half = float(stats.t.ppf(0.5 + confidence / 2, len(means) - 1)) * float(means.std(ddof=1)) / np.sqrt(len(means))
    centre = float(means.mean())
    return centre - float(half), centre + float(half)


def _bootstrap(values: Array, confidence: float, draws: int, seed: int) -> tuple[float, float]:
    seeds, domains = values.shape
    if max(seeds, domains) < 2:
        return _NAN, _NAN
    rng = np.random.default_rng(seed)
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws).astype(np.float64)  # [K, S]
    domain_weights = rng.multinomial(domains, np.full(domains, 1 / domains), size=draws).astype(np.float64)  # [K, D]
    present = np.isfinite(values)
    total = ((seed_weights @ np.where(present, values, 0.0)) * domain_weights).sum(axis=1)  # [K]
    weight = ((seed_weights @ present.astype(np.float64)) * domain_weights).sum(axis=1)
    drawn = weight > 0  # a draw can meet only missing pairs
    low, high = np.quantile(total[drawn] / weight[drawn], [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _cells(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return one model's scores as seed by domain; the same score twice (a baseline in several runs) is one score."""
    groups = rows.assign(value=rows[metric].astype(np.float64)).groupby(["seed", "domain"])["value"]
    low, high = groups.min(), groups.max()
    conflicting = high - low > 1e-6 * high.abs()
    if conflicting.any():
        seed, domain = conflicting[conflicting].index[0]
        raise RunError(
            f"{metric} has several values for seed {seed} and domain {domain!r}: {low[seed, domain]:g} to {high[seed, domain]:g}",
            hint="choose the rows of one model, part, horizon, context and run",
        )
    return groups.mean().unstack("domain").rename_axis(index="seed", columns="domain")

"""Result rows turned into comparable tables, for the page and for the terminal alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeGuard

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedcast.run.scaling import PowerLaw

NAIVE: Final = "seasonal_naive"
BASELINES: Final = (NAIVE, "auto_ets", "auto_theta")
NOMINAL_COVERAGE: Final = 0.8
PARTS: Final = {True: "held-out", False: "in-domain"}
FIT_COLUMNS: Final = ("E_inf", "a", "p", "R²", "points")

_TRAINED_NAMES: Final = {
    "central": "Central",
    "central_balanced": "Central, balanced",
    "local": "Local",
    "fedavg": "FedAvg",
    "fedavg_encoder": "FedAvg, encoder only",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "feddyn": "FedDyn",
    "fedper": "FedPer",
    "ffts": "FFTS",
    "fedal": "FeDaL",
    "fedpm": "FeDPM",
    "fedtrl": "FedTRL",
    "fedla": "Fed-LA",
    "fedgroup": "FedAvg by groups",
    "zero_shot": "Zero-shot",
    "seasonal_naive": "Seasonal naive",
    "auto_ets": "AutoETS",
    "auto_theta": "AutoTheta",
}


@dataclass(frozen=True)
class Metric:
    """One score and how it is compared.

    Attributes
    ----------
    key
        Its key in a result row.
    label
        Its short name.
    about
        One sentence on what it measures.
    relative
        Whether it is divided by the seasonal naive's score; if not, its distance to ``goal`` ranks.
    goal
        The best value of a score that is not divided.
    share
        Whether it is a share, written as a percentage.
    """

    key: str
    label: str
    about: str
    relative: bool = True
    goal: float = 0.0
    share: bool = False


METRICS: Final[tuple[Metric, ...]] = (
    Metric("mse", "MSE", "Squared error of the point forecast on series standardised by their training part."),
    Metric("mae", "MAE", "Absolute error of the point forecast on series standardised by their training part."),
    Metric("mase", "MASE", "Absolute error over the in-sample error of the seasonal naive forecast."),
    Metric("wql", "WQL", "Weighted quantile loss over the levels 0.1 to 0.9: scores the whole predictive distribution."),
    Metric("smape", "sMAPE", "Absolute error over the mean of forecast and truth."),
    Metric(
        "coverage80",
        "Coverage",
        "Share of true values inside the 80 % interval; 80 % is right.",
        relative=False,
        goal=NOMINAL_COVERAGE,
        share=True,
    ),
    Metric(
        "reconstruction_mse",
        "Reconstruction MSE",
        "Squared error at hidden points of series standardised by their training part, mean over five mask ratios; lower is better.",
        relative=False,
    ),
)
_BY_KEY: Final = {metric.key: metric for metric in METRICS}


def metric_of(key: str) -> Metric:
    """Return the metric with this key; an unlisted key gives a metric that is lower for better and divided like the others."""
    return _BY_KEY.get(key, Metric(key, key, ""))


@dataclass(frozen=True)
class ScoreTable:
    """Models by domains for one metric.

    Attributes
    ----------
    metric
        What is scored.
    relative
        Whether the values are divided by the seasonal naive's; ``False`` where that model or the metric does not allow it.
    models, domains
        Row and column names; rows are sorted from best to worst mean.
    values
        Float array [models, domains]; NaN = not scored.
    raw
        The same before any division.
    mean
        Float array [models]: over the shared domains, geometric where lower is better, else arithmetic.
    shared
        In how many domains every model is scored; the mean is over these, so that it compares like with like.
    """

    metric: Metric
    relative: bool
    models: tuple[str, ...]
    domains: tuple[str, ...]
    values: NDArray[np.float64]
    raw: NDArray[np.float64]
    mean: NDArray[np.float64]
    shared: int

    def best_in(self, domain: int) -> set[int]:
        """Return the rows that are best in one domain, ties included; empty when there is nothing to compare."""
        return _best(self.values[:, domain], self.metric) if len(self.models) > 1 else set()

    def best(self) -> set[int]:
        """Return the rows with the best mean, ties included; empty when there is nothing to compare."""
        return _best(self.mean, self.metric) if len(self.models) > 1 else set()

    def beats_naive(self, row: int) -> tuple[int, int]:
        """Return in how many domains a row is below the seasonal naive, and how many domains there are."""
        finite = self.values[row][np.isfinite(self.values[row])]
        return int((finite < 1).sum()), int(finite.size)


def score_table(results: pd.DataFrame, metric: str = "mse", *, held_out: bool | None = None) -> ScoreTable | None:
    """Arrange result rows as models by domains, relative to the seasonal naive where that is possible.

    Several rows of one model and domain (seeds, horizons) are averaged first.

    Parameters
    ----------
    results
        Result rows with at least ``model``, ``domain`` and the metric; ``held_out`` counts as ``False`` where it is missing.
    metric
        Key of the metric.
    held_out
        ``True`` for held-out domains only, ``False`` for training domains only, ``None`` for both.

    Returns
    -------
    ScoreTable or None
        ``None`` when no row has a finite score.
    """
    if results.empty or not {"model", "domain", metric} <= set(results.columns):
        return None
    rows = results
    if held_out is not None:
        rows = rows[held_out_mask(rows) == held_out]
    scores = rows.assign(
        score=pd.to_numeric(rows[metric], errors="coerce"), model=rows["model"].astype(str), domain=rows["domain"].astype(str)
    )
    scores = scores[np.isfinite(scores["score"].to_numpy(dtype=np.float64))]
    if scores.empty:
        return None
    wide = scores.pivot_table(index="model", columns="domain", values="score", aggfunc="mean")
    what = metric_of(metric)
    values = wide.to_numpy(dtype=np.float64)
    models = [str(name) for name in wide.index]
    raw = values
    relative = what.relative and NAIVE in models
    if relative:
        reference = values[models.index(NAIVE)]
        values = values / np.where(reference > 0, reference, np.nan)
    shared = _shared_domains(values)
    mean = _mean_over(values[:, shared], what)
    order = np.argsort(np.where(np.isfinite(mean), np.abs(mean - what.goal), np.inf), kind="stable")
    return ScoreTable(
        metric=what,
        relative=relative,
        models=tuple(models[i] for i in order),
        domains=tuple(str(name) for name in wide.columns),
        values=values[order],
        raw=raw[order],
        mean=mean[order],
        shared=int(shared.sum()),
    )


def held_out_mask(results: pd.DataFrame) -> pd.Series[bool]:
    """Return which result rows belong to held-out domains."""
    if "held_out" not in results.columns:
        return pd.Series(False, index=results.index)
    return results["held_out"].map(lambda value: bool(value) and value == value)


def horizons_note(results: pd.DataFrame, metric: str = "mse") -> str:
    """Say over which horizons the scores of a metric are means; empty where there is one."""
    if not {"horizon", metric} <= set(results.columns):
        return ""
    horizons = sorted(set(results.loc[pd.to_numeric(results[metric], errors="coerce").notna(), "horizon"]))
    return f"means over the horizons {', '.join(f'{horizon:g}' for horizon in horizons)}" if len(horizons) > 1 else ""


def own_models(results: pd.DataFrame) -> tuple[str, ...]:
    """Return the trained models among the result rows (no statistical baselines), the one that names its run's method first."""
    if results.empty or "model" not in results.columns:
        return ()
    methods = set(results["method"].astype(str)) if "method" in results.columns else set()
    trained = [name for name in dict.fromkeys(results["model"].astype(str)) if name not in BASELINES]
    return tuple(sorted(trained, key=lambda name: name not in methods))


def pretty_name(model: str) -> str:
    """Return a model's or method's name as it is written in prose."""
    return _TRAINED_NAMES.get(model, model)


def pretty_key(key: str) -> str:
    """Return a metric's key as words, such as ``feature_variance`` -> ``Feature variance``."""
    words = key.replace("_", " ").replace(".", " ").strip()
    return words[:1].upper() + words[1:]


def format_score(value: float, table: ScoreTable) -> str:
    """Return one cell of a score table as text; a dash where nothing was scored."""
    if not math.isfinite(value):
        return "–"
    if table.metric.share:
        return f"{100 * value:.0f} %"
    if table.relative and abs(value) < 100:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:.3g}"


def value_cells(points: pd.DataFrame, over: str, axis: str) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a scaling table: a row a value of the key, mean and deviation over seeds of each part.

    Gradient steps have a column where runs differ in them.

    Parameters
    ----------
    points
        As in :class:`fedcast.run.scaling.Scaling`.
    over, axis
        The key, and what ``x`` is where it is something else.
    """
    parts = {held_out: name for held_out, name in PARTS.items() if (points["held_out"] == held_out).any()}
    unequal = points["gradient_steps"].nunique() > 1
    columns = [over, *([axis] if axis != over else []), "seeds", *(["gradient steps"] if unequal else []), *parts.values()]
    rows = []
    for value, group in points.groupby("value"):
        cells = [f"{value:g}", *([f"{group['x'].mean():,.0f}"] if axis != over else []), str(group["seed"].nunique())]
        if unequal:
            steps = sorted(set(group["gradient_steps"]))
            cells.append(f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}")
        for held_out in parts:
            scores = group.loc[group["held_out"] == held_out, "score"]
            spread = f"\u00a0±\u00a0{scores.std(ddof=1):.3f}" if len(scores) > 1 else ""
            cells.append(f"{scores.mean():.3f}{spread}" if len(scores) else "–")
        rows.append(cells)
    return columns, rows


def fit_cells(fit: PowerLaw | None, form: str = "{} ({})") -> list[str]:
    """Return the cells of :data:`FIT_COLUMNS` for a scaling curve; ``form`` takes a value and its 95 % interval."""
    if fit is None:
        return ["no fit", "–", "–", "–", "–"]
    cells = []
    for name in ("e_inf", "a", "p"):
        value, interval = getattr(fit, name), fit.intervals[name]
        known = f"{interval[0]:.3g} to {interval[1]:.3g}" if interval is not None else "not identified"
        cells.append(form.format(f"{value:.3g}" if math.isfinite(value) else "–", known))
    return [*cells, f"{fit.r2:.3f}" if math.isfinite(fit.r2) else "–", str(fit.points)]


def format_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a decimal unit."""
    number, prefix = _scaled(count)
    return f"{number} {prefix}B"


def format_count(count: float) -> str:
    """Return a count with three digits and a decimal prefix, such as ``12.3k``."""
    return "".join(_scaled(count))


def _scaled(count: float) -> tuple[str, str]:
    power = 0
    while abs(count) >= 999.5 and power < 4:
        count /= 1000
        power += 1
    return f"{count:.0f}" if power == 0 or abs(count) >= 99.95 else f"{count:.3g}", ("", "k", "M", "G", "T")[power]


def format_seconds(seconds: float) -> str:
    """Return a duration as a person says it, such as ``4 min 12 s``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def numeric_metrics(rows: Sequence[Mapping[str, object]], known: Sequence[str]) -> list[str]:
    """Return the keys that hold a plain number in at least one row, but the known ones, in the order they were first seen."""
    keys = {key: None for row in rows for key, value in row.items() if key not in known and is_number(value)}
    return list(keys)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite int or float (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _best(values: NDArray[np.float64], metric: Metric) -> set[int]:
    distance = np.abs(values - metric.goal)
    if not np.isfinite(distance).any():
        return set()
    return {int(i) for i in np.flatnonzero(distance <= np.nanmin(distance) * (1 + 1e-12))}


def _shared_domains(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    scored = np.isfinite(values)
    return np.asarray(scored[scored.any(axis=1)].all(axis=0), dtype=np.bool_)


def _mean_over(values: NDArray[np.float64], metric: Metric) -> NDArray[np.float64]:
    if not values.size:
        return np.full(len(values), np.nan)
    if not metric.relative:
        return np.asarray(values.mean(axis=1), dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp(np.log(np.maximum(values, 0)).mean(axis=1)), dtype=np.float64)

"""Scaling curves: how the error of a federation falls with data, clients, participation or any other number of its spec.

``E = E_inf + a x^-p`` is the form of Hestness et al. (2017, arXiv:1712.00409) and Kaplan et al. (2020, arXiv:2001.08361) with an
irreducible error; FeDaL (arXiv:2508.04045) names the axes of a federation: data volume, number of clients, rate of participation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import curve_fit

import fedcast.methods  # noqa: F401 - registers the methods
from fedcast.errors import RunError, UnknownNameError
from fedcast.evaluate.statistics import ERRORS, REFERENCE, geometric_mean, relative
from fedcast.methods.base import build_method
from fedcast.run.folder import RunFolder, verb
from fedcast.spec import RunSpec

Array = NDArray[np.float64]
Interval = tuple[float, float]

SHARE = "data.share"
MIN_VALUES = 4
MIN_EXPONENT, MAX_EXPONENT = 0.01, 4.0
_EXPONENTS = 600
# In every comparison: what repeats a run, and what changes no score of its final model.
_MAY_DIFFER = (
    *("name", "seed", "federation.fleet", "federation.workers"),
    *("evaluation.every", "evaluation.samples", "evaluation.conflict"),
)
# With these axes the work of a site may change, as long as that of all sites together does not.
_BUDGET = ("federation.local_steps", "federation.participation", "federation.rounds")
_BUDGET_AXES = ("data.clients", "federation.participation")
_WORK = ("federation.local_steps", "federation.local_epochs", "federation.rounds")
_WORK_TOLERANCE = 1.1
_NUMERIC_KEY = "name a numeric key, such as data.share; `fedcast init --keys` lists all"
_PARTITIONS = {"data.clients": ("series", "iid", "dirichlet", "long_tail"), "data.imbalance": ("long_tail",)}


@dataclass(frozen=True)
class PowerLaw:
    """A fitted curve ``E = e_inf + a x^-p``.

    Attributes
    ----------
    e_inf, a, p
        Limit of the error (in the units of the error), size (error times ``x^p``) and exponent; ``p`` is NaN where the error does not
        fall with ``x``: the curve is then flat, ``a = 0``.
    intervals
        95 % interval of each of them by its name, from a bootstrap over the residuals; ``None`` where the points do not identify it.
    r2
        Share of the variance of the points that the curve explains; NaN where they have none.
    points
        Points fitted.
    """

    e_inf: float
    a: float
    p: float
    intervals: Mapping[str, Interval | None]
    r2: float
    points: int

    def __call__(self, x: Array) -> Array:
        """Return the curve at ``x``."""
        return self.e_inf + (self.a * x**-self.p if self.a else np.zeros_like(x))

    def to_dict(self) -> dict[str, Any]:
        """Return the fit as a JSON-ready dict."""
        names = ("e_inf", "a", "p", "r2", "points")
        return {name: getattr(self, name) for name in names} | {"intervals": dict(self.intervals)}


@dataclass(frozen=True)
class Scaling:
    """What runs that differ in one number say about it.

    Attributes
    ----------
    over
        The key of the spec in which they differ.
    metric
        The score, relative to the seasonal naive forecast.
    method
        Name of the method that all of them ran.
    axis
        What ``x`` is: ``"training points"`` for the share of the data, else the key.
    rows
        The runs' result rows, with columns ``run``, ``value`` (of the key) and ``x``.
    points
        One row a run and part: ``run``, ``value``, ``x``, ``seed``, ``held_out``, ``score`` (geometric mean over domains and
        horizons), ``domains`` and ``gradient_steps``.
    fits
        The curve of each part by ``held_out``; ``None`` where there are too few values, or one is not positive.
    notes
        What a reader must know: why there is no fit, domains left out, unequal work.
    """

    over: str
    metric: str
    method: str
    axis: str
    rows: pd.DataFrame
    points: pd.DataFrame
    fits: Mapping[bool, PowerLaw | None]
    notes: Sequence[str] = field(default_factory=tuple)


def scaling(runs: Sequence[str | Path], over: str, *, metric: str = "mse") -> Scaling:
    """Compare runs that differ in one number and fit ``E = E_inf + a x^-p`` to their errors.

    Parameters
    ----------
    runs
        Run folders; several seeds a value are several points.
    over
        A numeric key of the spec, such as ``"data.share"``, ``"data.clients"``, ``"federation.participation"``, ``"data.imbalance"`` or
        ``"method.alpha"``. Over clients and participation the runs may differ in local steps, rounds and participation too, if
        they take equally many gradient steps in total (within 10 %).
    metric
        The score: an error that is divided by the seasonal naive forecast's.

    Returns
    -------
    Scaling

    Raises
    ------
    UnknownNameError
        When no key or metric has that name.
    RunError
        When a run has no results, or the runs cannot be compared along that key.
    """
    if metric not in ERRORS:
        raise UnknownNameError(f"{metric} is no error relative to seasonal naive", hint=f"choose one of {', '.join(ERRORS)}")
    found = [_ScaledRun.of(path, over) for path in runs]
    if len({run.value for run in found}) < 2:
        what = f"all runs have {over} = {found[0].value:g}" if len(found) > 1 else f"a curve needs runs with at least two values of {over}"
        word = verb(found[0].spec) if found else "pretrain"
        raise RunError(what, hint=f"name runs that differ in {over}, such as those of `fedcast {word} SPEC.toml --{over} VALUE`")
    _check_alike(found, over)
    rows = pd.concat([run.rows.assign(run=str(run.path), value=run.value, x=run.x) for run in found], ignore_index=True)
    points, notes = _points(rows, metric)
    fits: dict[bool, PowerLaw | None] = {}
    for held_out, part in points.groupby("held_out"):
        usable = part["value"].nunique() >= MIN_VALUES and (part["x"] > 0).all()
        fits[bool(held_out)] = fit_power_law(part["x"].to_numpy(np.float64), part["score"].to_numpy(np.float64)) if usable else None
    outside = points.loc[points["x"] <= 0, "value"]
    if len(outside):
        notes.append(f"no curve is fitted: x^-p has no value at {over} = {outside.max():g}")
    elif None in fits.values():
        notes.append(f"{points['value'].nunique()} values of {over} are too few for a fit, which needs {MIN_VALUES}")
    steps = points["gradient_steps"]
    if over not in _WORK and steps.max() > _WORK_TOLERANCE * steps.min():
        notes.append(f"the runs differ in work: {steps.min()} to {steps.max()} gradient steps in total")
    axis = "training points" if over == SHARE else over
    return Scaling(over, metric, found[0].spec.method.name, axis, rows, points, fits, tuple(notes))


@dataclass(frozen=True)
class _ScaledRun:
    """One run: its spec by dotted keys, its value of the key, its place on the axis, and its rows."""

    path: Path
    spec: RunSpec
    keys: Mapping[str, Any]
    value: float
    x: float
    rows: pd.DataFrame

    @classmethod
    def of(cls, path: str | Path, over: str) -> _ScaledRun:
        folder = RunFolder(path)
        spec, rows = folder.spec(), folder.results()
        if rows.empty:
            raise RunError(f"{path} has no results yet", hint=f"finish it with {folder.command(spec)}")
        if REFERENCE not in set(rows["model"]):
            raise RunError(f"{path} has no scores of the seasonal naive forecast", hint="add it to evaluation.baselines and run it again")
        keys = _keys(spec)
        value = _value(keys, over)
        partitions = _PARTITIONS.get(over)
        if partitions is not None and spec.data.partition not in partitions:
            raise RunError(
                f"{path} has data.partition = {spec.data.partition!r}, for which {over} says nothing",
                hint=f"run it with data.partition = {' or '.join(map(repr, partitions))}",
            )
        x = _training_points(folder) if over == SHARE else value
        return cls(Path(path), spec, keys, value, x, rows)


def _keys(spec: RunSpec) -> dict[str, Any]:
    """Return a spec by dotted keys, the method's hyper-parameters at their defaults where it does not name them."""
    keys: dict[str, Any] = {}
    for name, section in spec.model_dump(mode="json").items():
        if name == "method":
            keys |= {"method.name": spec.method.name} | {f"method.{key}": value for key, value in asdict(build_method(spec.method)).items()}
        elif isinstance(section, Mapping):
            keys |= {f"{name}.{key}": value for key, value in section.items()}
        else:
            keys[name] = section
    return keys


def _value(keys: Mapping[str, Any], over: str) -> float:
    numeric = [
        key for key, value in keys.items() if isinstance(value, int | float) and not isinstance(value, bool) and key not in _MAY_DIFFER
    ]
    if over not in numeric:
        if over not in keys:
            raise UnknownNameError.of("key", over, numeric, otherwise=_NUMERIC_KEY)
        always = f"runs may always differ in {over}: it is no axis"
        raise RunError(always if over in _MAY_DIFFER else f"{over} is {keys[over]!r}, no number", hint=_NUMERIC_KEY)
    return float(keys[over])


def _training_points(folder: RunFolder) -> float:
    """Return the training points of all sites that took part in a round."""
    sites: dict[str, int] = {}
    for row in folder.rows("round"):
        sites |= {name: int(site["samples"]) for name, site in row["sites"].items()}
    return float(sum(sites.values()))


def _check_alike(found: Sequence[_ScaledRun], over: str) -> None:
    """Refuse runs that differ in more than the key."""
    first = found[0]
    budget = _BUDGET if over in _BUDGET_AXES else ()
    shifted = False
    for run in found[1:]:
        # `keys` of one method are the same; those of another differ in method.name first.
        names = [name for name in {**first.keys, **run.keys} if first.keys.get(name) != run.keys.get(name)]
        others = [name for name in names if name not in (*_MAY_DIFFER, *budget, over)]
        if others:
            name = others[0]
            raise RunError(
                f"{first.path} and {run.path} differ in {', '.join(others)}: {name} is {first.keys.get(name)!r} and {run.keys.get(name)!r}",
                hint=f"compare runs that differ in {over} and in their seed only",
            )
        shifted = shifted or any(name in budget and name != over for name in names)
        if set(first.rows["data_fingerprint"]) != set(run.rows["data_fingerprint"]):
            raise RunError(f"{first.path} and {run.path} differ in data_fingerprint", hint="compare runs over the same data")
    steps = [int(run.rows["gradient_steps"].iloc[0]) for run in found]
    if shifted and max(steps) > _WORK_TOLERANCE * min(steps):
        raise RunError(
            f"the runs differ in {', '.join(name for name in budget if name != over)}, and not at equal work: "
            f"{min(steps)} to {max(steps)} gradient steps in total",
            hint="keep federation.rounds x selected sites x federation.local_steps the same, within 10 %",
        )
    seen: dict[tuple[float, int], Path] = {}
    for run in found:
        other = seen.setdefault((run.value, run.spec.seed), run.path)
        if other is not run.path:
            raise RunError(
                f"{other} and {run.path} both have {over} = {run.value:g} and seed {run.spec.seed}",
                hint="name one of them, or train another seed",
            )


def _points(rows: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, list[str]]:
    """Return one row a run and part, and notes on what was left out."""
    parts = [relative(part, metrics=[metric]) for _, part in rows.groupby(["run", "horizon"], sort=False)]
    scores = pd.concat(parts, ignore_index=True)
    scores = scores[scores["model"] == scores["method"]]
    # A domain without a score in one run (a constant series has no MASE) is left out of all, so that means compare like with like.
    finite = np.isfinite(scores[metric].to_numpy(np.float64))
    runs = scores["run"].nunique()
    complete = scores[finite].groupby(["domain", "horizon"])["run"].nunique() == runs
    kept = set(complete[complete].index)
    inside = np.array([pair in kept for pair in zip(scores["domain"], scores["horizon"], strict=True)])
    left_out = sorted(set(scores["domain"][~inside]))
    notes = [f"left out, since a run has no {metric} relative to seasonal naive there: {', '.join(left_out)}"] if left_out else []
    if not inside.any():
        raise RunError(f"no domain has a finite {metric} in every run", hint="choose another --metric")
    points = [
        {
            **{name: part[name].iloc[0] for name in ("run", "value", "x", "seed")},
            "held_out": bool(held_out),
            "score": geometric_mean(part[metric]),
            "domains": part["domain"].nunique(),
            "gradient_steps": int(part["gradient_steps"].iloc[0]),
        }
        for (_, held_out), part in scores[inside & finite].groupby(["run", "held_out"])
    ]
    return pd.DataFrame(points).sort_values(["held_out", "value", "seed"], ignore_index=True), notes


def fit_power_law(x: Array, error: Array, *, draws: int = 1000, seed: int = 0) -> PowerLaw:
    """Fit ``E = E_inf + a x^-p`` by least squares, with ``E_inf >= 0``, ``a >= 0`` and ``0.01 <= p <= 4``.

    Parameters
    ----------
    x, error
        The points, ``[n]``, positive; at least four different ``x``.
    draws, seed
        Draws of the bootstrap and their seed.

    Returns
    -------
    PowerLaw
        Intervals are the percentiles of a bootstrap over the residuals: they are widened by ``sqrt(n / (n - 3))``, put back at random
        places, and the curve is fitted again. An exponent is not identified where its interval reaches an end of its range; then
        ``a`` is not either, nor ``E_inf`` where its interval reaches 0.

    Raises
    ------
    RunError
        When there are fewer than four different ``x``, one is not positive, or an error is negative or not finite.

    References
    ----------
    Efron (1979), "Bootstrap methods: another look at the jackknife", section 7 (residuals of a regression).
    """
    if len(np.unique(x)) < MIN_VALUES:
        raise RunError(f"{len(np.unique(x))} values are too few for a curve", hint=f"give at least {MIN_VALUES} different ones")
    if not ((x > 0).all() and np.isfinite(error).all() and (error >= 0).all()):
        raise RunError("a curve needs positive values, and errors that are finite and not negative", hint="leave the other points out")
    centre = float(np.exp(np.log(x).mean()))
    z = x / centre  # centred: `a` and `p` are then nearly independent
    start = [float(each[0]) for each in _fit_on_grid(z, error[None])]
    bounds = ([0.0, 0.0, MIN_EXPONENT], [np.inf, np.inf, MAX_EXPONENT])
    (e_inf, size, p), _ = curve_fit(lambda v, e, a, q: e + a * v**-q, z, error, p0=start, bounds=bounds, max_nfev=10_000)
    falls = size * np.ptp(z**-p) > 1e-6 * error.mean()
    if not falls:
        e_inf, size = float(error.mean()), 0.0
    fitted = e_inf + size * z**-p
    residuals = error - fitted
    rng = np.random.default_rng(seed)
    spread = (residuals - residuals.mean()) * np.sqrt(len(x) / (len(x) - 3))
    drawn = _fit_on_grid(z, fitted + rng.choice(spread, (draws, len(x))))
    total = float(np.square(error - error.mean()).sum())
    return PowerLaw(
        e_inf=float(e_inf),
        a=float(size * centre**p) if falls else 0.0,
        p=float(p) if falls else float("nan"),
        intervals=_intervals(np.stack([drawn[0], drawn[1] * centre ** drawn[2], drawn[2]]), np.array([e_inf, size * centre**p, p])),
        r2=1 - float(np.square(residuals).sum()) / total if total > 0 else float("nan"),
        points=len(x),
    )


def _intervals(drawn: Array, estimate: Array) -> dict[str, Interval | None]:
    """Return the intervals of ``E_inf``, ``a`` and ``p`` from draws of them ``[3, B]``."""
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    # The draws lie on a grid of exponents, 1 % apart; the estimate between its points.
    low, high = np.minimum(low, estimate).tolist(), np.maximum(high, estimate).tolist()
    within = low[2] > MIN_EXPONENT * 1.001 and high[2] < MAX_EXPONENT * 0.999
    known = {"e_inf": within or low[0] > 0, "a": within, "p": within}
    return {name: (low[i], high[i]) if known[name] else None for i, name in enumerate(known)}


def _fit_on_grid(z: Array, errors: Array) -> tuple[Array, Array, Array]:
    """Return the least-squares ``E_inf``, ``a`` and ``p``, each ``[B]``, of errors ``[B, n]`` over a grid of exponents.

    For a given exponent the curve is a straight line over ``z^-p``, so limit and size follow in closed form: the free line where
    both are at least 0, else the better of the two edges.
    """
    exponents = np.geomspace(MIN_EXPONENT, MAX_EXPONENT, _EXPONENTS)
    basis = z ** -exponents[:, None]  # [G, n]
    n, mean, error_mean = len(z), basis.mean(axis=1), errors.mean(axis=1)[:, None]
    products, squares = errors @ basis.T, np.square(basis).sum(axis=1)  # [B, G], [G]
    slope = (products - n * error_mean * mean) / (squares - n * mean**2)
    limit = error_mean - slope * mean
    through_zero = products / squares
    # Sums of squares but for the errors' own, which are the same for every exponent.
    flat, origin = -n * error_mean**2, -(products**2) / squares
    edge_limit = np.where(flat < origin, error_mean, 0.0)
    edge_slope = np.where(flat < origin, 0.0, through_zero)
    free = (slope >= 0) & (limit >= 0)
    limit, slope = np.where(free, limit, edge_limit), np.where(free, slope, edge_slope)
    loss = n * limit**2 + slope**2 * squares + 2 * limit * slope * n * mean - 2 * (limit * n * error_mean + slope * products)
    best = loss.argmin(axis=1)
    row = np.arange(len(errors))
    return limit[row, best], slope[row, best], exponents[best]

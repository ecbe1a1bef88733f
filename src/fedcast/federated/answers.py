"""What a site's answer to a task of kind ``"evaluate"`` must hold: a malformed one counts as none, and the site is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from fedcast.errors import ScreenError
from fedcast.evaluate.metrics import COUNTS, METRICS
from fedcast.federated.messages import Reply, is_number
from fedcast.models.base import QUANTILES
from fedcast.spec import RunSpec

_SCORES: Final = 64
_NAME: Final = 64
_SERIES: Final = 1_000
_MOST: Final = 10**9
_ALWAYS: Final = frozenset((*METRICS, *COUNTS))
_FAMILIES: Final = ("batch_", "reconstruction_", "windows_available")
"""Scores that only some tasks and data sets have; no other name can stand in a row of results in place of what the server writes there."""
_HINT: Final = "check that both sides run the same version of fedcast"


def screen_answer(reply: Reply, asked: Mapping[str, Any], site: str, spec: RunSpec) -> None:
    """Check a site's answer before anything of it is read.

    Parameters
    ----------
    reply
        The answer.
    asked
        The task's JSON values: ``part`` is ``"validation"``, ``"gradient"`` or ``"test"``; ``baselines`` says whether those are scored.
    site
        Who was asked.
    spec
        The run.

    Raises
    ------
    ScreenError
        Naming the first thing that is not as declared, or the site's own error.
    """
    if reply.error is not None:
        raise ScreenError(reply.error, hint=_HINT)
    if asked["part"] == "gradient":
        return  # a tensor: see fedcast.federated.conflict.conflict_row
    _demand(not reply.tensors, "it holds tensors")
    if asked["part"] == "validation":
        _demand("loss" in reply.meta and _is_score(reply.meta["loss"]), "loss is no number")
        return
    horizons = spec.evaluation.horizons or (spec.model.horizon,)
    results = reply.meta.get("results")
    _demand(isinstance(results, list) and len(results) == len(horizons), f"results are not those of {len(horizons)} horizons")
    baselines = frozenset(spec.evaluation.baselines if asked.get("baselines") else ())
    for result, horizon in zip(results or (), horizons, strict=True):
        _check_result(result, horizon, baselines)
    if asked.get("baselines"):
        _check_samples(reply.meta.get("samples"), site, spec, horizons[0])


def _check_result(result: Any, horizon: int, baselines: frozenset[str]) -> None:
    _demand(_has(result, ("horizon", "windows", "scores", "baselines")), "a result has other keys")
    _demand(type(result["horizon"]) is int and result["horizon"] == horizon, f"a result is not of horizon {horizon}")
    _demand(type(result["windows"]) is int and 0 <= result["windows"] <= _MOST, "windows is no count")
    _demand(_has(result["baselines"], baselines), "baselines are not those of the spec")
    for scores in (result["scores"], *result["baselines"].values()):
        _demand(isinstance(scores, dict) and scores.keys() >= _ALWAYS and len(scores) <= _SCORES, "scores are missing, or are too many")
        known = all(name in _ALWAYS or (name.startswith(_FAMILIES) and len(name) <= _NAME and name.isprintable()) for name in scores)
        _demand(known, "a score has a name that is not declared")
        _demand(all(_is_score(value) for value in scores.values()), "a score is neither a number nor null")


def _check_samples(samples: Any, site: str, spec: RunSpec, horizon: int) -> None:
    fits = isinstance(samples, list) and len(samples) <= spec.evaluation.samples
    _demand(fits, f"samples are not at most {spec.evaluation.samples} forecasts")
    for sample in samples:
        _demand(_has(sample, ("domain", "series", "context", "truth", "point", "quantiles", "seasonal_naive")), "a forecast has other keys")
        named = sample["domain"] == site and isinstance(sample["series"], str) and len(sample["series"]) <= _SERIES
        _demand(named, "a forecast is not named after the site and a series")
        _demand(_has(sample["quantiles"], map(str, QUANTILES)), "a forecast has other quantiles")
        _demand(_is_path(sample["context"], spec.model.context), "a forecast's context is not as long as the model's")
        paths = (sample["truth"], sample["point"], sample["seasonal_naive"], *sample["quantiles"].values())
        _demand(all(_is_path(path, horizon) for path in paths), f"a forecast is not {horizon} numbers")


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise ScreenError(f"its answer is not as declared: {what}", hint=_HINT)


def _has(value: Any, keys: Iterable[str]) -> bool:
    return isinstance(value, dict) and value.keys() == set(keys)


def _is_score(value: object) -> bool:
    # NaN where it was made, and null once it has crossed a wire: a score that does not exist.
    return value is None or isinstance(value, float) or is_number(value)


def _is_path(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(_is_score, value))

"""How a site scores a model on its own windows: the validation loss between rounds, and the test scores at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcast.data.medical import MEDICAL_SOURCES
from fedcast.data.splits import Splits, train_scale
from fedcast.data.store import SeriesStore
from fedcast.data.windows import Batch, WindowSampler
from fedcast.evaluate.baselines import baseline_forecast
from fedcast.evaluate.medical import available_windows, client_scores
from fedcast.evaluate.metrics import score
from fedcast.evaluate.windows import EvaluationSet, evaluation_set
from fedcast.models.base import QUANTILES
from fedcast.models.contract import Model
from fedcast.models.mixture import DomainMixture
from fedcast.spec import RunSpec
from fedcast.tasks.objectives import Objective
from fedcast.tasks.reconstruct import Reconstructor, reconstruction_mse, window_deviation

_BATCH = 256


class SiteScores:
    """Scores models on one site's validation and test windows; both are the same at every call."""

    def __init__(self, site: str, store: SeriesStore, splits: Splits, sampler: WindowSampler, spec: RunSpec) -> None:
        self._site, self._store, self._splits, self._sampler, self._spec = site, store, splits, sampler, spec
        self._validation: Batch | None = None
        self._test: dict[int, EvaluationSet] = {}

    def loss(self, model: Model, task: Objective) -> float | None:
        """Return the task's mean loss over the validation windows; ``None`` where the site has none."""
        batch = self._validation_windows(model.device)
        return task.validate(model, batch, self._since(batch, self._splits.train_end)) if len(batch.windows) else None

    def validation_batches(self, device: torch.device, size: int) -> Sequence[Batch]:
        """Return the validation windows in batches of at most ``size``; none where the site has none."""
        batch = self._validation_windows(device)
        return list(batch.split(size, rest=True))

    def _validation_windows(self, device: torch.device) -> Batch:
        if self._validation is None:
            windows = self._sampler.evaluation("validation", self._spec.evaluation.validation_windows)
            self._validation = self._sampler.gather(windows).to(device)
        return self._validation

    def _since(self, batch: Batch, start: NDArray[np.int64]) -> Tensor:
        """Return where a part of the series starts, int64 [B], in steps from each window's first target; contexts reach back before it."""
        return torch.from_numpy(start[batch.windows.series] - batch.windows.end)

    def test(self, model: Model | DomainMixture, *, baselines: bool) -> dict[str, Any]:
        """Return test scores of a model, of the spec's baselines where asked, and forecasts for the report where the spec keeps some.

        Returns
        -------
        dict
            ``"results"``: for each horizon, horizon, number of windows, scores of the model and of each baseline; ``"samples"``.
        """
        horizons = self._spec.evaluation.horizons or (self._spec.model.horizon,)
        answer: dict[str, Any] = {"results": []}
        for horizon in horizons:
            test = self._windows(horizon)
            point, quantiles = forecast_windows(model, test.context, horizon)
            scores = score(test, point, quantiles)
            if self._spec.data.source in MEDICAL_SOURCES:
                scores |= self._protocol(test, point)
            if horizon == horizons[-1] and isinstance(model, Reconstructor):
                scores |= self._reconstruction(model)
            own = {name: self._baseline(name, test) for name in self._spec.evaluation.baselines} if baselines else {}
            answer["results"].append({"horizon": horizon, "windows": len(test), "scores": scores, "baselines": own})
            if baselines and horizon == horizons[0]:
                answer["samples"] = self._samples(test, point, quantiles)
        return answer

    def _baseline(self, name: str, test: EvaluationSet) -> dict[str, float]:
        point, quantiles = baseline_forecast(name, test)
        scores = score(test, point, quantiles)
        return scores | self._protocol(test, point) if self._spec.data.source in MEDICAL_SOURCES else scores

    def _protocol(self, test: EvaluationSet, point: NDArray[np.floating]) -> dict[str, float]:
        """Return the scores of the medical protocol, and how many test windows weigh them (:mod:`fedcast.evaluate.medical`)."""
        # Windows stand in the order of series and time; the protocol's batches are random.
        order = np.random.default_rng(0).permutation(len(test))
        scores = {f"batch_{name}": value for name, value in client_scores(test.target[order], point[order]).items()}
        return {**scores, "windows_available": float(available_windows(self._store.lengths, self._splits, test.horizon))}

    def _windows(self, horizon: int) -> EvaluationSet:
        if horizon not in self._test:
            spec = self._spec
            self._test[horizon] = evaluation_set(
                self._store, self._splits, "test", context=spec.model.context, horizon=horizon, limit=spec.evaluation.windows
            )
        return self._test[horizon]

    def _reconstruction(self, model: Reconstructor) -> dict[str, float]:
        """Return the reconstruction error of the test windows over five mask ratios, at points of the test part alone.

        ``reconstruction_mse`` is standardised as ``mse`` is, ``reconstruction_nmse`` by each window's own deviation: a window far from
        the train part's level weighs no more there than another one.
        """
        windows = self._sampler.evaluation("test", self._spec.evaluation.windows)
        batch = self._sampler.gather(windows).to(model.device)
        _, scale = train_scale(self._store, self._splits)
        since = self._since(batch, self._splits.validation_end)
        errors = reconstruction_mse(model, batch, torch.from_numpy(scale[windows.series]).to(model.device), since)
        own = reconstruction_mse(model, batch, window_deviation(batch), since)["mse"]
        return {**{f"reconstruction_{name}": value for name, value in errors.items()}, "reconstruction_nmse": own}

    def _samples(self, test: EvaluationSet, point: NDArray[np.float32], quantiles: NDArray[np.float32]) -> list[dict[str, Any]]:
        count = min(self._spec.evaluation.samples, len(test.target))
        if count == 0:
            return []
        naive, _ = baseline_forecast("seasonal_naive", test)
        chosen = np.linspace(0, len(test.target) - 1, count).round().astype(int)
        return [
            {
                "domain": self._site,
                "series": test.ids[i],
                "context": _json(test.context[i]),
                "truth": _json(test.target[i]),
                "point": _json(point[i]),
                "quantiles": {str(level): _json(quantiles[i, :, q]) for q, level in enumerate(QUANTILES)},
                "seasonal_naive": _json(naive[i]),
            }
            for i in chosen
        ]


def forecast_windows(
    model: Model | DomainMixture, context: NDArray[np.float32], horizon: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Forecast windows ``[W, L]`` (NaN where missing); return point ``[W, H]`` and quantiles ``[W, H, 9]`` in the units of the data."""
    if not len(context):
        return np.empty((0, horizon), dtype=np.float32), np.empty((0, horizon, len(QUANTILES)), dtype=np.float32)
    points, bands = [], []
    with torch.inference_mode():
        for start in range(0, len(context), _BATCH):
            piece = torch.from_numpy(np.ascontiguousarray(context[start : start + _BATCH], dtype=np.float32)).to(model.device)
            mask = torch.isfinite(piece)
            forecast = model(torch.nan_to_num(piece, nan=0.0), mask, horizon)
            points.append(forecast.point.cpu().numpy())
            bands.append(forecast.quantiles.cpu().numpy())
    return np.concatenate(points), np.concatenate(bands)


def _json(values: NDArray[np.float32]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]

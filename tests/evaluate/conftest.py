"""Evaluation windows for the tests: of real series, and of numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from statsforecast.utils import AirPassengers

from fedcast.data.splits import split_by_time
from fedcast.data.store import SeriesStore
from fedcast.evaluate.windows import EvaluationSet, evaluation_set

MakeStore = Callable[..., SeriesStore]
MakeEvaluation = Callable[..., EvaluationSet]


def _store(series: Sequence[Any], seasons: Sequence[int], datasets: Sequence[int] | None = None) -> SeriesStore:
    values = [np.asarray(one, dtype=np.float32) for one in series]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int64)
    labels = np.asarray(datasets if datasets is not None else np.arange(len(values)), dtype=np.int32)
    return SeriesStore(
        values=np.concatenate(values),
        offsets=offsets,
        ids=[f"s{i}" for i in range(len(values))],
        starts=["2000-01-01T00:00:00"] * len(values),
        dataset=labels,
        dataset_names=[f"d{i}" for i in range(len(seasons))],
        freqs=["h"] * len(seasons),
        season_lengths=np.asarray(seasons, dtype=np.int32),
        domain=np.zeros(len(values), dtype=np.int32),
        domain_names=["test"],
    )


def _evaluation(context: Any, target: Any, *, season: Any = 1, dataset: Sequence[str] | None = None, **given: Any) -> EvaluationSet:
    seen, truth = np.asarray(context, dtype=np.float32), np.asarray(target, dtype=np.float32)
    windows = len(truth)
    fields = {"loc": 0.0, "scale": 1.0, "mase_scale": 1.0} | given
    return EvaluationSet(
        domain="test",
        dataset=list(dataset or ["d0"] * windows),
        ids=[f"s{i}" for i in range(windows)],
        context=seen,
        target=truth,
        season=np.broadcast_to(np.asarray(season, dtype=np.int64), windows).copy(),
        end=np.full(windows, seen.shape[1], dtype=np.int64),
        **{name: np.broadcast_to(np.asarray(value, dtype=np.float64), windows).copy() for name, value in fields.items()},
    )


@pytest.fixture(scope="session")
def make_store() -> MakeStore:
    return _store


@pytest.fixture(scope="session")
def make_evaluation() -> MakeEvaluation:
    return _evaluation


@pytest.fixture(scope="session")
def passengers() -> EvaluationSet:
    """Test windows of the monthly airline passengers 1949-1960 (144 points) and of their differences."""
    series = np.asarray(AirPassengers, dtype=np.float64)
    store = _store([series, 1000 * np.diff(series)], seasons=[12, 12])
    splits = split_by_time(store, horizon=12, validation=0.1, test=0.25)
    return evaluation_set(store, splits, "test", context=60, horizon=12, limit=16)

"""One worker's training steps by themselves, as a run takes them: for scripts that compare ways of computing a step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import numpy as np

import fedcast.methods  # noqa: F401 - registers the methods
from fedcast.data.splits import split_by_time
from fedcast.data.store import SeriesStore, season_length
from fedcast.data.windows import Batch, WindowSampler
from fedcast.federated.plan import Plan
from fedcast.federated.workspace import build_workspace
from fedcast.methods.base import build_method
from fedcast.spec import RunSpec, parse_spec
from fedcast.tasks.forecast import ForecastTask
from fedcast.training.backend import Backend
from fedcast.training.loop import train

AHEAD = 8  # batches drawn together, as a site does


def random_walks(count: int, length: int) -> SeriesStore:
    """Return hourly random walks with a daily season, as one domain."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((count, length)).cumsum(1) + 3 * np.sin(2 * np.pi * np.arange(length) / 24)
    return SeriesStore(
        values=values.astype(np.float32).reshape(-1),
        offsets=np.arange(count + 1, dtype=np.int64) * length,
        ids=tuple(f"s{i}" for i in range(count)),
        starts=("2020-01-01T00:00:00",) * count,
        dataset=np.zeros(count, dtype=np.int32),
        domain=np.zeros(count, dtype=np.int32),
        dataset_names=("walks",),
        domain_names=("walks",),
        freqs=("h",),
        season_lengths=np.array([season_length("h")], dtype=np.int32),
    )


class Workbench:
    """A workspace and batches for it.

    Parameters
    ----------
    size, batch, context, horizon
        The model's size by name, windows a step, and steps of context and target.
    backend
        What it computes with; the library of float32 products is set by the caller, who may have several workbenches.
    """

    def __init__(self, size: str, batch: int, backend: Backend, *, context: int = 512, horizon: int = 64) -> None:
        self.spec: RunSpec = parse_spec(
            {
                "model": {"size": size, "context": context, "horizon": horizon},
                "method": {"name": "fedavg"},
                "training": {"batch_size": batch, "device": "cpu"},
            }
        )
        self.batch = batch
        self.workspace = build_workspace(Plan(self.spec, build_method(self.spec.method)), {}, backend)
        store = random_walks(64, 4096)
        splits = split_by_time(store, horizon=horizon, validation=0.1, test=0.2)
        self.sampler = WindowSampler(store, splits, context=context, horizon=horizon)
        self.rng = np.random.default_rng(0)
        self._batches = cycle(list(self.draw()))
        self._task = ForecastTask()

    def draw(self) -> Iterator[Batch]:
        """Return eight new batches, as a site draws them."""
        return self.sampler.gather(self.sampler.draw(self.batch * AHEAD, self.rng)).split(self.batch)

    def compile(self) -> float:
        """Compile the step, and return the seconds it took."""
        return self.workspace.compile(self.batch, self.spec.model.context, self.spec.model.horizon)

    def steps(self, count: int) -> float:
        """Take steps, and return the mean seconds of one: forward, backward and optimiser."""
        model = self.workspace.model
        record = train(
            self.workspace.parameters,
            self.workspace.optimiser,
            self._batches,
            lambda batch: self._task.loss(model.normalised(batch.context, batch.mask, batch.target.shape[1]), batch),
            steps=count,
            rate=lambda step: 1e-4,
        )
        return record.compute_seconds / count

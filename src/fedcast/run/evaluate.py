"""Score a trained model on data: a person's own file or folder, the bundled domains, or the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd

from fedcast.data.catalogue import load_domains, split_domains
from fedcast.data.frames import read_frame
from fedcast.data.leakage import WITHOUT_TRAINING, Exposure, exposures
from fedcast.data.splits import split_store
from fedcast.data.store import SeriesStore
from fedcast.errors import ModelError, SplitError, UnknownNameError
from fedcast.evaluate.baselines import baseline_forecast
from fedcast.evaluate.metrics import score
from fedcast.evaluate.windows import evaluation_set
from fedcast.models.forecaster import Forecaster
from fedcast.run.folder import RunFolder
from fedcast.spec import DataSpec, RunSpec
from fedcast.version import __version__, code_version


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    horizon: int | None = None,
    windows: int = 64,
    baselines: Sequence[str] = ("seasonal_naive",),
    domains: Sequence[str] = (),
    time: str | None = None,
    id: str | None = None,
    target: str | None = None,
    freq: str | None = None,
) -> pd.DataFrame:
    """Score a model, and baselines beside it, on the test part of every series: that of the model's own run, else the last 20 %.

    Parameters
    ----------
    model
        A model folder or a run folder.
    data
        ``"bundled"``, ``"catalogue"``, ``"ltsf"``, a folder of domains, or one file.
    horizon
        Steps a forecast; the model's own when absent.
    windows
        Test windows a domain.
    baselines
        Forecasters scored on the same windows.
    domains
        Domains to score; all of the source when empty.
    time, id, target, freq
        Column names and frequency, where they are not recognised.

    Returns
    -------
    pandas.DataFrame
        Result rows, one a model and domain; ``held_out`` says whether the run of the model never trained on the domain, and is
        ``None`` where that cannot be known. ``exposure`` says whether it trained on the domain's recordings, under whatever name:
        ``"seen"``, ``"unseen"`` or ``"unknown"``, see :mod:`fedcast.data.leakage`.

    Raises
    ------
    CheckpointError, SourceError, FrameError, SplitError
        When the model or the data cannot be used.
    """
    forecaster = Forecaster.from_pretrained(model)
    steps = horizon if horizon is not None else forecaster.model.config.horizon
    if steps < 1:
        raise ModelError(f"a horizon of {steps} steps is none", hint="ask for at least 1 step")
    spec = RunFolder(model).spec() if (Path(model) / "spec.toml").is_file() else None
    origin = _Origin.of(spec, str(data))
    stores = _load(str(data), domains, {"time": time, "id": id, "target": target, "freq": freq})
    exposed = _exposures(spec, Path(data), list(stores))
    rows = []
    for domain, store in sorted(stores.items()):
        for row in _score_domain(forecaster, domain, store, steps, windows, baselines, origin):
            rows.append({**row, "exposure": WITHOUT_TRAINING if row["model"] in baselines else exposed[domain]})
    return pd.DataFrame(rows)


def _exposures(spec: RunSpec | None, data: Path, domains: Sequence[str]) -> dict[str, Exposure]:
    """Return of each domain whether the run of a spec trained on its recordings; a file is a domain of the folder it lies in."""
    if spec is None:
        return dict.fromkeys(domains, "unknown")
    return exposures(spec.data, data.parent if data.is_file() else str(data), domains)


def _load(data: str, domains: Sequence[str], columns: Mapping[str, str | None]) -> dict[str, SeriesStore]:
    path = Path(data)
    if not path.is_file():
        return load_domains(DataSpec(source=data, domains=tuple(domains), **columns), list(domains) or None)
    name = path.name.split(".")[0]
    for domain in domains:
        if domain != name:
            raise UnknownNameError.of("domain", domain, [name])
    return {name: SeriesStore.from_frames(name, {path.name: read_frame(path, **columns)})}


@dataclass(frozen=True)
class _Origin:
    """What is known of how a model was trained: the split of the series, horizon and domains; ``None`` where it cannot be known."""

    split: DataSpec
    horizon: int | None = None
    trained: frozenset[str] | None = None
    seed: int | None = None

    @classmethod
    def of(cls, spec: RunSpec | None, source: str) -> _Origin:
        split = DataSpec(source=source)
        if spec is None:
            return cls(split)
        trained = frozenset(split_domains(spec.data)[0]) if spec.data.source == source else None
        # The run's own split and horizon: with others, test windows could lie in what it was trained on. The benchmark has its own.
        if source != "ltsf":
            split = split.model_copy(update={"validation": spec.data.validation, "test": spec.data.test})
        return cls(split, spec.model.horizon, trained, spec.seed)


def _score_domain(
    forecaster: Forecaster, domain: str, store: SeriesStore, horizon: int, windows: int, baselines: Sequence[str], origin: _Origin
) -> list[dict[str, Any]]:
    start = perf_counter()
    context = forecaster.model.config.context
    splits = split_store(store, origin.split, origin.horizon or horizon)
    test = evaluation_set(store, splits, "test", context=context, horizon=horizon, limit=windows)
    if not len(test):
        raise SplitError(f"no test part of domain {domain!r} holds {horizon} steps", hint="lower --horizon, or give longer series")
    forecast = forecaster.predict_arrays(test.context, horizon)
    scored = {"model": score(test, forecast.point, forecast.quantiles)}
    scored |= {name: score(test, *baseline_forecast(name, test)) for name in baselines}
    shared = {
        "kind": "result",
        "domain": domain,
        "held_out": None if origin.trained is None else domain not in origin.trained,
        "part": "test",
        "task": "forecast",
        "windows": len(test.target),
        "horizon": horizon,
        "context": context,
        "seed": origin.seed,
        "method": "model",
        "data_fingerprint": store.fingerprint,
        "version": __version__,
        "code": code_version(),
        "wall_seconds": perf_counter() - start,
        "bytes_total": 0,
    }
    return [{**shared, "model": name, **scores} for name, scores in scored.items()]

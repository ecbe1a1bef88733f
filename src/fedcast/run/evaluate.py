"""Score a trained model on data: a person's own file or folder, the bundled domains, or the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedcast.data.catalogue import load_domains
from fedcast.data.frames import read_frame
from fedcast.data.splits import split_by_time
from fedcast.data.store import SeriesStore
from fedcast.errors import ModelError
from fedcast.evaluate.baselines import baseline_forecast
from fedcast.evaluate.metrics import score
from fedcast.evaluate.windows import evaluation_set
from fedcast.models.forecaster import Forecaster
from fedcast.spec import DataSpec
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
    """Score a model, and baselines beside it, on the last 20 % of every series.

    Parameters
    ----------
    model
        A model folder or a run folder.
    data
        ``"bundled"``, ``"catalogue"``, a folder of domains, or one file.
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
        Result rows, one a model and domain.

    Raises
    ------
    CheckpointError, SourceError, FrameError, SplitError
        When the model or the data cannot be used.
    """
    forecaster = Forecaster.from_pretrained(model)
    config = forecaster.model.config
    steps = horizon if horizon is not None else config.horizon
    if steps < 1:
        raise ModelError(f"a horizon of {steps} steps is none", hint="ask for at least 1 step")
    source = Path(data)
    if source.is_file():
        frame = read_frame(source, time=time, id=id, target=target, freq=freq)
        stores = {source.name.split(".")[0]: SeriesStore.from_frames(source.name.split(".")[0], {source.name: frame})}
    else:
        spec = DataSpec(source=str(data), domains=tuple(domains), time=time, id=id, target=target, freq=freq)
        stores = load_domains(spec, list(domains) or None)
    rows = []
    for domain, store in sorted(stores.items()):
        splits = split_by_time(store, horizon=steps, validation=0.1, test=0.2)
        test = evaluation_set(store, splits, "test", context=config.context, horizon=steps, limit=windows)
        forecast = forecaster.predict_arrays(test.context, steps)
        scored = {"model": score(test, forecast.point, forecast.quantiles)}
        scored |= {name: score(test, *baseline_forecast(name, test)) for name in baselines}
        shared = {
            "kind": "result",
            "domain": domain,
            "held_out": True,
            "part": "test",
            "task": "forecast",
            "windows": len(test.target),
            "horizon": steps,
            "context": config.context,
            "seed": 0,
            "method": "model",
            "data_fingerprint": store.fingerprint,
            "version": __version__,
            "code": code_version(),
        }
        rows += [{**shared, "model": name, **scores} for name, scores in scored.items()]
    return pd.DataFrame(rows)

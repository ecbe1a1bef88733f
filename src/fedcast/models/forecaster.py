"""From a person's frame to a person's forecast: read, batch over series, forecast, put stamps and names back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import Day, Tick
from utilsforecast.processing import make_future_dataframe

from fedcast.data.frames import LongFrame, read_frame
from fedcast.errors import ModelError, QuantileError
from fedcast.models.base import QUANTILES, ForecastArrays
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.contract import Model
from fedcast.models.mixture import DomainMixture
from fedcast.models.precision import Precision, forecast_dtype
from fedcast.models.published.base import Published

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
BATCH = 64  # larger ones are no faster, and leave cores without a batch where series are few


@dataclass(frozen=True)
class _Options:
    """How to forecast: what :meth:`Forecaster.predict` takes beside data, horizon and levels."""

    batch_size: int
    precision: Precision | None
    workers: int | None
    progress: Progress | None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ModelError(f"batches of {self.batch_size} series cannot be forecast", hint="give batch_size at least 1")
        if self.workers is not None and self.workers < 1:
            raise ModelError(f"{self.workers} workers forecast nothing", hint="give workers at least 1, or leave it out for one a core")


class Forecaster:
    """Forecasts frames and arrays with a trained model.

    Parameters
    ----------
    model
        The model; it forecasts on the device and in the type its parameters have.

    Notes
    -----
    Series are forecast in batches of similar length. On a CPU, each worker is a thread that forecasts one batch at a time on one
    core. The number of workers never changes the result, the batch size only by the rounding of products (in float32 about 1e-5 of
    a series' standard deviation). A precision other than that of the parameters converts a copy of the model at every call; to
    convert it once, build the forecaster from a model of that type. Forecasts in bfloat16 differ from those in float32 by less than
    a hundredth of a series' standard deviation on average, and scores by less than 0.3 %.
    """

    def __init__(self, model: Model | DomainMixture) -> None:
        self.model = model.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Read a model folder, the ``final`` model of a run folder, whose scores the run reports, or a published checkpoint.

        Parameters
        ----------
        path
            A folder, or a published checkpoint's name on the Hugging Face hub, such as ``amazon/chronos-bolt-tiny``.

        Raises
        ------
        CheckpointError
            When there is no usable model.
        MissingExtraError
            When a published model's library is not installed.
        """
        return cls(load_checkpoint(path))

    def predict(
        self,
        source: str | Path | pd.DataFrame | LongFrame,
        horizon: int,
        quantiles: Sequence[float] = (0.1, 0.5, 0.9),
        *,
        time: str | None = None,
        id: str | None = None,
        target: str | None = None,
        freq: str | None = None,
        batch_size: int = BATCH,
        precision: Precision | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> pd.DataFrame:
        """Forecast the steps after the end of every series.

        Parameters
        ----------
        source
            A file, a frame, or a frame that was read before.
        horizon, batch_size
            Steps to forecast, and series a batch.
        quantiles
            Levels from 0.1 to 0.9; those between two learnt levels are interpolated linearly.
        time, id, target, freq
            As in :func:`fedcast.data.frames.read_frame`.
        precision
            ``"float32"`` (published models know no other), ``"bfloat16"``, ``"auto"`` (the faster one); ``None``: the parameters' type.
        workers
            Threads on a CPU; by default as many as torch uses, one a core. Other devices have one.
        progress
            Called with (series done, series in all) after every batch.

        Returns
        -------
        pandas.DataFrame
            ``horizon`` rows a series: the source's own id and time columns, ``forecast``, and one column a level, such as ``q0.1``.
            Daily and coarser stamps keep their time of day across clock changes.

        Raises
        ------
        FrameError, SourceError
            When the source cannot be used.
        QuantileError
            When a level is outside what the model learnt, or given twice.
        ModelError
            When the horizon, the batch size or the number of workers is under 1, or a column of the source has the name of a result.
        UnknownNameError
            When there is no such precision.
        """
        options = _Options(batch_size, precision, workers, progress)
        weights = _interpolation(quantiles)
        long = source if isinstance(source, LongFrame) else read_frame(source, time=time, id=id, target=target, freq=freq)
        columns = _columns(long, quantiles)
        names, offsets = _series_of(long.frame["unique_id"])
        point, levels = self._forecast(long.frame["y"].to_numpy(dtype=np.float64), offsets, horizon, weights, options)
        stamps = future_stamps(long.frame["ds"].iloc[offsets[1:] - 1], long.freq, horizon)
        parts = [np.repeat(names, horizon), stamps, point.ravel(), *(levels[..., k].ravel() for k in range(len(quantiles)))]
        return pd.DataFrame(dict(zip(columns, parts, strict=True)))

    def predict_arrays(
        self,
        contexts: Sequence[npt.ArrayLike] | npt.NDArray[np.floating],
        horizon: int,
        *,
        batch_size: int = BATCH,
        precision: Precision | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> ForecastArrays:
        """Forecast the steps after the end of every array.

        Parameters
        ----------
        contexts
            W arrays of any lengths, or one array [W, L]; NaN where missing.
        horizon, batch_size, precision, workers, progress
            As in :meth:`predict`.

        Returns
        -------
        ForecastArrays
            ``point`` [W, H] and ``quantiles`` [W, H, 9], in data units.
        """
        options = _Options(batch_size, precision, workers, progress)
        rows = [np.asarray(row, dtype=np.float64) for row in contexts]
        if any(row.ndim != 1 for row in rows):
            raise ModelError("a context is not one-dimensional", hint="give one array a series, or an array [windows, steps]")
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.concatenate(rows) if rows else np.empty(0)
        return ForecastArrays(*self._forecast(values, offsets, horizon, _interpolation(QUANTILES), options))

    def _forecast(
        self, values: Floats, offsets: Ints, horizon: int, weights: tuple[Ints, Floats], options: _Options
    ) -> tuple[Floats, Floats]:
        if horizon < 1:
            raise ModelError(f"a horizon of {horizon} steps is none", hint="ask for at least 1 step")
        model, device = self._model(options.precision), self.model.device
        lower, share = weights
        count = len(offsets) - 1
        lengths = np.minimum(np.diff(offsets), model.config.context)
        order = np.argsort(lengths, kind="stable")
        point, levels = np.empty((count, horizon)), np.empty((count, horizon, len(lower)))

        def one_batch(start: int) -> int:
            rows = order[start : start + options.batch_size]
            with torch.inference_mode():  # a thread does not have it from the one that started it
                context = torch.from_numpy(_gather(values, offsets, rows, int(lengths[rows[-1]]))).to(device)
                forecast = model(context, context.isfinite(), horizon)
            point[rows] = forecast.point.cpu().numpy()
            levels[rows] = _interpolate(forecast.quantiles.cpu().numpy(), lower, share)
            return len(rows)

        done = 0
        with _mapping(device, options.workers or torch.get_num_threads()) as mapped:
            for size in mapped(one_batch, range(0, count, options.batch_size)):
                done += size
                if options.progress is not None:
                    options.progress(done, count)
        return point, levels

    def _model(self, precision: Precision | None) -> Model | DomainMixture:
        """Return the model in the type of a precision: itself where it has that type."""
        published = any(isinstance(module, Published) for module in self.model.modules())  # also one under a new head
        if precision is None or (published and precision != "bfloat16"):
            return self.model
        if published:
            raise ModelError("published models forecast in float32", hint="leave the precision out")
        dtype = forecast_dtype(precision, self.model.device)
        if all(parameter.dtype == dtype for parameter in self.model.parameters()):
            return self.model
        return copy.deepcopy(self.model).to(dtype)


@contextmanager
def _mapping(device: torch.device, workers: int) -> Iterator[Callable[[Callable[[int], int], Iterable[int]], Iterable[int]]]:
    """Give a ``map`` that works in threads on a CPU; once it is left, what has not begun is not done.

    Each thread computes on one core, also where it is the only one: how torch splits a product over cores changes its rounding.
    """
    if device.type != "cpu":
        yield map
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # torch would give 1 to later threads of this process


def _gather(values: Floats, offsets: Ints, rows: Ints, length: int) -> Floats:
    """Return the last ``length`` points of each series [B, length], NaN before its start."""
    places = offsets[rows + 1][:, None] + np.arange(-length, 0)
    inside = places >= offsets[rows][:, None]
    return np.where(inside, values[np.maximum(places, 0)], np.nan) if length else np.empty((len(rows), 0))


def _columns(long: LongFrame, quantiles: Sequence[float]) -> list[str]:
    """Return the columns of a forecast; a column of the data may not have the name of a result."""
    columns = [long.columns.id, long.columns.time, "forecast", *(f"q{level:g}" for level in quantiles)]
    if len(set(columns)) < len(columns):
        raise ModelError(
            f"the columns of the forecast would be {', '.join(columns)}, with one name twice", hint="rename that column of the data"
        )
    return columns


def _series_of(ids: pd.Series[str]) -> tuple[npt.NDArray[np.object_], Ints]:
    """Return names [S] and offsets [S + 1] of a column that is sorted by series."""
    codes, names = pd.factorize(ids)
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    return np.asarray(names, dtype=object), np.append(starts, len(codes)).astype(np.int64)


def _interpolation(levels: Sequence[float]) -> tuple[Ints, Floats]:
    """Return, for each level, the learnt level below it and the share of the way to the next one."""
    wanted = np.asarray(levels, dtype=np.float64).reshape(-1)
    lowest, highest = QUANTILES[0], QUANTILES[-1]
    for level in wanted:
        if not lowest <= level <= highest:
            raise QuantileError(f"level {level:g} lies outside the learnt quantiles", hint=f"ask for levels from {lowest} to {highest}")
    if len({f"{level:g}" for level in wanted}) < len(wanted):
        raise QuantileError(f"levels {', '.join(f'{level:g}' for level in wanted)} name one level twice", hint="ask for each level once")
    known = np.asarray(QUANTILES)
    lower = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
    share = (wanted - known[lower]) / (known[lower + 1] - known[lower])
    return lower, share


def _interpolate(quantiles: npt.NDArray[np.floating], lower: Ints, share: Floats) -> Floats:
    """Return levels [B, H, Q] from learnt quantiles [B, H, 9]; rounding never makes them cross."""
    below, above = quantiles[..., lower], quantiles[..., lower + 1]
    return cast(Floats, np.where(share >= 1, above, np.minimum(below + (above - below) * share, above)))


def future_stamps(last: pd.Series, freq: str | int, horizon: int) -> pd.Series:
    """Return the ``horizon`` stamps after each last one, series after series.

    Parameters
    ----------
    last
        The last stamp of every series: datetime64, with or without a time zone, or int64.
    freq
        pandas frequency, or the integer step.
    horizon
        Stamps a series.

    Returns
    -------
    pandas.Series
        [S * horizon], of the same type as ``last``.
    """
    codes, unique = pd.factorize(last)
    stamps = pd.Index(unique)
    step = freq if isinstance(freq, int) else to_offset(freq)
    zone = stamps.tz if isinstance(stamps, pd.DatetimeIndex) else None
    calendar = zone is not None and (isinstance(step, Day) or not isinstance(step, Tick))
    if calendar:  # a day is a day on the clock, 23 to 25 hours long
        stamps = stamps.tz_localize(None)
    future = pd.Index(make_future_dataframe(pd.Series(np.arange(len(stamps))), stamps, step, horizon)["ds"])
    if calendar:
        future = future.tz_localize(zone, ambiguous=np.ones(len(future), dtype=bool), nonexistent="shift_forward")
    places = codes[:, None] * horizon + np.arange(horizon)  # [S, horizon]
    return pd.Series(future.take(places.ravel()))

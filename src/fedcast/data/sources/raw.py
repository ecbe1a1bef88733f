"""Readers of the raw recordings: each gives regular series, holes made explicit as NaN.

The raw folder keeps every recording in the format its publisher chose (CSV, Monash tsf, WFDB, mat, npz, tar of CSVs). Nothing here
unpickles: npz are opened with ``allow_pickle=False``.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.io import loadmat
from scipy.signal import resample_poly

from fedcast.data.frames import Columns, LongFrame, read_frame
from fedcast.errors import SourceError

Floats = npt.NDArray[np.float64]

EPOCH = pd.Timestamp("2000-01-01")
"""First stamp of recordings whose clock was not kept."""

_ANCHORED = {"W-SUN": "W-SAT", "W-MON": "W-SUN", "MS": "M", "QS": "Q", "YS": "Y"}


class Series(NamedTuple):
    """One regular series: its name, its first stamp (or integer step), and its values [T] with NaN where missing."""

    id: str
    start: pd.Timestamp | int
    values: Floats


def anchor(start: pd.Timestamp, freq: str) -> pd.Timestamp:
    """Return the first stamp of the week, month, quarter or year that `start` lies in; other frequencies keep it."""
    period = _ANCHORED.get(freq)
    return start if period is None else start.to_period(period).start_time.normalize()


def long_frame(series: Iterable[Series], freq: str | int, source: str) -> LongFrame:
    """Return regular series as one long frame, sorted by name, leading and trailing NaN cut.

    Parameters
    ----------
    series
        A series without any finite value is left out.
    freq
        Pandas offset alias, or an integer step.
    source
        Name for messages.

    Raises
    ------
    SourceError
        When two series have one name.
    """
    kept = sorted((trimmed for s in series if (trimmed := _trimmed(s, freq)) is not None), key=lambda s: s.id)
    lengths = np.array([len(s.values) for s in kept])
    if len({s.id for s in kept}) < len(kept):
        raise SourceError(f"two series of {source} have one name", hint="the raw file is not the one the recipe was written for")
    ids = np.repeat(np.array([s.id for s in kept], dtype=object), lengths)
    stamps = np.concatenate([_stamps(s.start, len(s.values), freq) for s in kept])
    values = np.concatenate([s.values for s in kept]).astype(np.float64, copy=False)
    frame = pd.DataFrame({"unique_id": ids, "ds": stamps, "y": values})
    return LongFrame(frame=frame, freq=freq, columns=Columns(id="unique_id", time="ds", target="y"), source=source)


def _trimmed(series: Series, freq: str | int) -> Series | None:
    finite = np.flatnonzero(np.isfinite(series.values))
    if not len(finite):
        return None
    first, last = int(finite[0]), int(finite[-1])
    start = _stamps(series.start, first + 1, freq)[-1] if first else series.start
    return Series(series.id, int(start) if isinstance(freq, int) else pd.Timestamp(start), series.values[first : last + 1])


def _stamps(start: pd.Timestamp | int, periods: int, freq: str | int) -> Any:
    if isinstance(freq, int):
        first = start if isinstance(start, int) else 0
        return first + freq * np.arange(periods, dtype=np.int64)
    return pd.date_range(pd.Timestamp(start), periods=periods, freq=freq).to_numpy(dtype="datetime64[ns]")


def on_grid(name: str, times: Any, values: Any, step: str) -> Series:
    """Put stamped values on a regular grid from the first stamp; the first value of a grid point stays, holes become NaN.

    Parameters
    ----------
    name
        Name of the series.
    times
        Stamps in any order.
    values
        One number a stamp.
    step
        Grid step, such as ``"5min"``; each stamp goes to the nearest grid point.
    """
    stamps = pd.DatetimeIndex(times)
    order = np.argsort(stamps.asi8, kind="stable")
    stamps, numbers = stamps[order], np.asarray(values, dtype=np.float64)[order]
    position = np.rint(((stamps - stamps[0]) / pd.Timedelta(step)).to_numpy()).astype(np.int64)
    grid = np.full(int(position[-1]) + 1, np.nan)
    grid[position[::-1]] = numbers[::-1]
    return Series(name, stamps[0], grid)


def columns_of(frame: pd.DataFrame, start: pd.Timestamp | int, names: Sequence[str] | None = None) -> list[Series]:
    """Return the columns of a regular wide table as series that all begin at `start`."""
    return [Series(str(name), start, frame[name].to_numpy(dtype=np.float64)) for name in (names if names is not None else frame.columns)]


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """Read a compressed CSV (gz or xz by suffix) into a table."""
    frame: pd.DataFrame = pd.read_csv(path, **options)
    return frame


def read_tsf(path: Path, freq: str) -> list[Series]:
    """Read a Monash ``.tsf`` file; starts are moved to the frequency's anchor.

    Parameters
    ----------
    path
        The file.
    freq
        Pandas alias of the file's frequency, such as ``"W-SUN"`` for ``weekly``.

    Raises
    ------
    FrameError
        When the file is malformed.
    """
    frame = read_frame(path).frame
    ids = frame["unique_id"].to_numpy()
    firsts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    starts = [anchor(start, freq) for start in frame["ds"].iloc[firsts]]
    return [
        Series(str(ids[i]), start, values)
        for i, start, values in zip(firsts, starts, np.split(frame["y"].to_numpy(), firsts[1:]), strict=True)
    ]


def tar_csvs(path: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield (file stem, table) of each CSV in a tar, in name order."""
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            handle = archive.extractfile(member) if member.name.endswith(".csv") else None
            if handle is not None:
                yield Path(member.name).stem, pd.read_csv(io.BytesIO(handle.read()))


def read_nab(path: Path, step: str, names: Sequence[str] = ()) -> list[Series]:
    """Read the series of a Numenta archive (timestamp, value); all of them, or those in `names`."""
    return [
        on_grid(name, pd.to_datetime(table["timestamp"]), table["value"], step)
        for name, table in tar_csvs(path)
        if not names or name in names
    ]


@dataclass(frozen=True)
class _Signal:
    file: str
    format: int
    offset: int
    frame_samples: int
    gain: float
    baseline: float
    name: str


def read_wfdb(folder: Path, record: str) -> tuple[float, dict[str, Floats]]:
    """Read a WFDB record of format 212, 16 or 61 into physical units.

    Parameters
    ----------
    folder
        Where ``<record>.hea`` lies, with its ``.dat`` (or ``.dat.gz``) or ``.mat`` files.
    record
        Name of the record.

    Returns
    -------
    tuple
        Frames a second, and for each signal its values [frames]; a signal with several samples a frame gives their mean.

    Raises
    ------
    SourceError
        When the format is another one.
    """
    lines = [line for line in (folder / f"{record}.hea").read_text().splitlines() if line.strip() and not line.startswith("#")]
    _, count, rate, length, *_ = lines[0].split()
    signals = [_signal(line) for line in lines[1 : 1 + int(count)]]
    result: dict[str, Floats] = {}
    for file in dict.fromkeys(signal.file for signal in signals):
        group = [signal for signal in signals if signal.file == file]
        widths = [signal.frame_samples for signal in group]
        samples = _samples(folder, file, group[0].format, group[0].offset)
        table = samples[: int(length) * sum(widths)].reshape(-1, sum(widths)).astype(np.float64)  # [frames, samples a frame]
        for signal, block in zip(group, np.split(table, np.cumsum(widths)[:-1], axis=1), strict=True):
            result[signal.name] = (block.mean(axis=1) - signal.baseline) / signal.gain
    return float(rate), result


def _signal(line: str) -> _Signal:
    file, layout, gain, _, zero, *_ = line.split()
    layout, _, offset = layout.partition("+")
    layout = layout.partition(":")[0]
    layout, _, frame_samples = layout.partition("x")
    number, _, rest = gain.partition("/")[0].partition("(")
    return _Signal(
        file, int(layout), int(offset or 0), int(frame_samples or 1), float(number), float(rest.rstrip(")") or zero), line.split()[-1]
    )


def _samples(folder: Path, file: str, layout: int, offset: int) -> npt.NDArray[np.int16]:
    packed = folder / f"{file}.gz"
    data = (gzip.decompress(packed.read_bytes()) if packed.is_file() else (folder / file).read_bytes())[offset:]
    if layout == 16:
        return np.frombuffer(data, dtype="<i2")
    if layout == 61:
        return np.frombuffer(data, dtype=">i2").astype(np.int16)
    if layout != 212:
        raise SourceError(f"{folder / file} has WFDB format {layout}", hint="formats 212, 16 and 61 are read; convert it with wfdb")
    triple = np.frombuffer(data, dtype=np.uint8)[: len(data) // 3 * 3].reshape(-1, 3).astype(np.int16)  # 2 samples in 3 bytes
    first = ((triple[:, 1] & 0x0F) << 8) | triple[:, 0]
    second = ((triple[:, 1] & 0xF0) << 4) | triple[:, 2]
    samples = np.stack([first, second], axis=1).ravel()
    return np.where(samples > 2047, samples - 4096, samples).astype(np.int16)


def resampled(values: Floats, rate: float, to: float = 125.0, seconds: float | None = None) -> Floats:
    """Return the first `seconds` of a waveform resampled from `rate` to `to` Hz with an anti-aliasing filter."""
    part = values if seconds is None else values[: round(seconds * rate)]
    ratio = Fraction(to).limit_denominator(10000) / Fraction(rate).limit_denominator(10000)
    result: Floats = resample_poly(part, ratio.numerator, ratio.denominator, padtype="line")
    return result


def read_mat(path: Path, key: str) -> Floats:
    """Read one array of a MATLAB file."""
    result: Floats = np.asarray(loadmat(str(path), variable_names=[key])[key], dtype=np.float64)
    return result

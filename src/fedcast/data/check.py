"""Checks of data before anything runs on it, and a summary of what is usable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedcast.data.frames import LongFrame, examine
from fedcast.errors import FrameProblem


def check_frame(
    source: str | Path | pd.DataFrame | object,
    *,
    time: str | None = None,
    id: str | None = None,
    target: str | None = None,
    freq: str | int | None = None,
) -> list[FrameProblem]:
    """Return everything that is wrong with a file or a frame; an empty list means that it is usable.

    Parameters
    ----------
    source
        A data file, a pandas frame, or any other object (which is then named as no frame).
    time, id, target, freq
        As for :func:`fedcast.data.frames.read_frame`.

    Raises
    ------
    SourceError
        If the file is missing or cannot be read.
    """
    return examine(source, time=time, id=id, target=target, freq=freq)[1]


def describe(long: LongFrame) -> dict[str, Any]:
    """Summarise a long frame.

    Returns
    -------
    dict
        JSON-ready: ``source``, ``series``, ``rows`` (gaps included), ``points`` (observed values), ``missing`` (share of rows without a
        value), ``freq``, ``start`` and ``end`` (ISO 8601 text, or whole numbers), ``time_zone``, ``shortest``, ``median`` and
        ``longest`` (rows a series), ``minimum`` and ``maximum`` of the values, and ``columns`` (the person's own names).
    """
    frame = long.frame
    lengths = frame.groupby("unique_id", sort=False).size().to_numpy()
    values = frame["y"].to_numpy(dtype=np.float64)
    observed = int(np.count_nonzero(~np.isnan(values)))
    start, end = frame["ds"].min(), frame["ds"].max()
    dated = isinstance(start, pd.Timestamp) and isinstance(end, pd.Timestamp)
    zone = start.tzinfo if dated else None
    return {
        "source": long.source,
        "series": len(lengths),
        "rows": len(frame),
        "points": observed,
        "missing": 1.0 - observed / len(frame),
        "freq": long.freq,
        "start": start.isoformat() if dated else int(start),
        "end": end.isoformat() if dated else int(end),
        "time_zone": None if zone is None else str(zone),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "minimum": float(np.nanmin(values)),
        "maximum": float(np.nanmax(values)),
        "columns": {"id": long.columns.id, "time": long.columns.time, "target": long.columns.target},
    }

"""The page that ``fedcast forecast --plot`` writes: each series' last points, its forecast and its quantile fan."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fedcast.data.frames import LongFrame
from fedcast.errors import SourceError

SERIES_SHOWN = 12
HISTORY_OVER_HORIZON = 4
_LINE = "#2a6f97"
_FAN = "rgba(42, 111, 151, 0.18)"
_HISTORY = "#555555"


def write_plot(history: LongFrame, forecast: pd.DataFrame, levels: Sequence[float], path: Path) -> None:
    """Draw the first series of a forecast on one self-contained page.

    Parameters
    ----------
    history
        What was forecast from.
    forecast
        What :meth:`fedcast.models.forecaster.Forecaster.predict` returned for it.
    levels
        The quantile levels in it; they are paired from the outside in.
    path
        The page.

    Raises
    ------
    SourceError
        When the page cannot be written.
    """
    every = list(dict.fromkeys(forecast[history.columns.id]))
    names = every[:SERIES_SHOWN]
    titles = [html.escape(str(name)) for name in names]
    figure = make_subplots(rows=len(names), cols=1, subplot_titles=titles, vertical_spacing=0.32 / len(names))
    shown = history.frame[history.frame["unique_id"].isin([str(name) for name in names])]
    pasts = dict(tuple(shown.groupby("unique_id", sort=False)))
    for row, name in enumerate(names, 1):
        future = forecast[forecast[history.columns.id] == name]
        past = pasts[str(name)].tail(HISTORY_OVER_HORIZON * len(future))
        times = future[history.columns.time]
        for trace in [*_fans(times, future, levels), *_lines(past, times, future)]:
            trace.showlegend = bool(trace.name) and row == 1
            figure.add_trace(trace, row=row, col=1)
    title = "Forecasts" if len(names) == len(every) else f"Forecasts of the first {len(names)} of {len(every)} series"
    figure.update_layout(template="plotly_white", height=100 + 220 * len(names), title=title, hovermode="x unified")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.write_html(path, include_plotlyjs=True)
    except OSError as error:
        raise SourceError(f"cannot write {path}: {error.strerror}", hint="choose another file with --plot") from error


def _lines(past: pd.DataFrame, times: pd.Series, future: pd.DataFrame) -> list[go.Scatter]:
    return [
        go.Scatter(x=past["ds"], y=past["y"], name="history", line={"color": _HISTORY, "width": 1.4}),
        go.Scatter(x=times, y=future["forecast"], name="forecast", line={"color": _LINE, "width": 2}),
    ]


def _fans(times: pd.Series, future: pd.DataFrame, levels: Sequence[float]) -> list[go.Scatter]:
    """Return the bands between the outermost pair of levels, the next pair, and so on."""
    ordered = sorted(set(levels))
    bands = []
    for low, high in zip(ordered[: len(ordered) // 2], reversed(ordered[(len(ordered) + 1) // 2 :]), strict=True):
        bands.append(go.Scatter(x=times, y=future[f"q{low:g}"], line={"width": 0}, hoverinfo="skip"))
        name = f"{low:g} to {high:g}"
        bands.append(go.Scatter(x=times, y=future[f"q{high:g}"], name=name, line={"width": 0}, fill="tonexty", fillcolor=_FAN))
    return bands

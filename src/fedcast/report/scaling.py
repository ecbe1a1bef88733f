"""Scaling curves on a page: the points of each run, the fitted curve, and its numbers beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from fedcast.report import figures
from fedcast.report.page import document_of, render_page, write_page
from fedcast.report.tables import PARTS, fit_cells, format_bytes, metric_of, pretty_name, value_cells
from fedcast.run.scaling import Fit, Scaling

_STEPS = 80
_COLUMNS = ("Curve", "E_inf", "a", "p", "R²", "points")


def scaling_curves(curves: Sequence[tuple[str, pd.DataFrame, Fit | None]], *, axis: str, unit: str) -> go.Figure:
    """Draw points and fitted curves of one part over a logarithmic axis, one colour a curve.

    Parameters
    ----------
    curves
        Name, points (columns ``x``, ``value``, ``score``, ``seed``) and fit of each; without a fit the means over seeds are joined.
    axis, unit
        Titles of the axes.
    """
    figure = figures.blank(height=340)
    styles = figures.styles_of([name for name, _, _ in curves])
    for name, points, fit in curves:
        style = styles[name]
        figure.add_scatter(
            x=_clean(points["x"]),
            y=_clean(points["score"]),
            name=figures.label(name),
            meta=name,
            mode="markers",
            marker={"color": style.colour, "size": 8, "symbol": "circle-open", "line": {"width": 1.6}},
            customdata=[[f"{value:g}", int(seed)] for value, seed in zip(points["value"], points["seed"], strict=True)],
            hovertemplate="%{y:.4f}<br>value %{customdata[0]}, seed %{customdata[1]}<extra>%{fullData.name}</extra>",
        )
        if fit is None:
            mean = points.groupby("value")[["x", "score"]].mean()
            x, y = mean["x"].to_numpy(np.float64), mean["score"].to_numpy(np.float64)
        else:
            x = np.geomspace(points["x"].min(), points["x"].max(), _STEPS)
            y = fit(x)
        line = {"color": style.colour, "width": 2.0, "dash": "2px,3px" if fit is None else "solid"}
        figure.add_scatter(x=_clean(x), y=_clean(y), name=figures.label(name), meta=name, mode="lines", line=line, hoverinfo="skip")
    figure.update_xaxes(type="log", title_text=f"{axis}, log scale", **_ticks(curves))
    figure.update_yaxes(title_text=unit)
    figure.update_layout(hovermode="closest")
    return figure


def write_scaling(curves: Sequence[Scaling], output: str | Path, *, title: str = "Federated scaling") -> Path:
    """Write one self-contained page of scaling curves: a section a key of the spec, a colour a method.

    Raises
    ------
    SourceError
        When the page cannot be written.
    """
    drawn: dict[str, dict[str, Any]] = {}
    by_key: dict[str, list[Scaling]] = {}
    for curve in curves:
        by_key.setdefault(curve.over, []).append(curve)
    methods = list(dict.fromkeys(pretty_name(curve.method) for curve in curves))
    styles = figures.styles_of(methods)
    dashes = {name: "" if style.dash == "solid" else style.dash.replace("px", "") for name, style in styles.items()}
    context = {
        "kind": "scaling",
        "title": title,
        "lede": "How the error falls along one number of a federation, and the curve E = E_inf + a x^-p that fits it best.",
        "facts": _facts(curves),
        "verdicts": [],
        "sections": {f"axis-{i}": _section(over, group, drawn) for i, (over, group) in enumerate(by_key.items())},
        "chips": [{"name": name, "hue": styles[name].hue, "dash": dashes[name], "shown": True} for name in methods],
        "spec_text": "",
        "visible": figures.VISIBLE,
    }
    return write_page(render_page(context, drawn), Path(output))


def _section(over: str, group: Sequence[Scaling], drawn: dict[str, dict[str, Any]]) -> dict[str, Any]:
    unit = f"{metric_of(group[0].metric).label} ÷ seasonal naive's"
    slots, fits = [], []
    for held_out, part in PARTS.items():
        curves = [
            (pretty_name(each.method), each.points[each.points["held_out"] == held_out], each.fits[held_out])
            for each in group
            if held_out in each.fits
        ]
        if not curves:
            continue
        name = f"{over}, {part}"
        document = document_of(scaling_curves(curves, axis=group[0].axis, unit=unit))
        drawn[name] = {"only": document}
        slots.append({"title": f"{part[:1].upper()}{part[1:]}", "figure": name, "view": "only", "height": document["layout"]["height"]})
        fits += [[f"{method}, {part}", *fit_cells(fit)] for method, _, fit in curves]
    tables = [{"title": "Fitted curves, with 95 % intervals", "columns": _COLUMNS, "rows": fits}]
    for each in group:
        columns, rows = value_cells(each.points, each.over, each.axis)
        tables.append({"title": f"{pretty_name(each.method)}: mean ± deviation over seeds", "columns": columns, "rows": rows})
    notes = ["Intervals: bootstrap over the residuals. A dashed line joins means where there is no fit."]
    notes += [f"{pretty_name(each.method)}: {note}." for each in group for note in each.notes]
    return {"title": over, "figures": slots, "plain_tables": tables, "notes": notes}


def _facts(curves: Sequence[Scaling]) -> list[tuple[str, str]]:
    rows = pd.concat([curve.rows for curve in curves], ignore_index=True)
    facts = [("Runs", str(rows["run"].nunique())), ("Seeds", ", ".join(str(seed) for seed in sorted(set(rows["seed"]))))]
    facts += [("Code version", ", ".join(sorted({str(code)[:12] for code in rows["code"]})))]
    return [*facts, ("Data fingerprint", ", ".join(sorted({str(digest)[:12] for digest in rows["data_fingerprint"]})))]


def _ticks(curves: Sequence[tuple[str, pd.DataFrame, Fit | None]]) -> dict[str, object]:
    """Name the values that were run; every method's training points are the same, so the first curve's stand for all."""
    means = curves[0][1].groupby("value")["x"].mean()
    low, high = math.log10(means.min()), math.log10(means.max())
    room = 0.06 * (high - low)
    texts = [f"{x:g}" if x == value else format_bytes(x).removesuffix("B").replace(" ", "") for value, x in means.items()]
    return {"tickmode": "array", "tickvals": means.tolist(), "ticktext": texts, "range": [low - room, high + room]}


def _clean(values: Sequence[float] | pd.Series[float] | np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Round to what a figure can show."""
    return [float(f"{value:.6g}") for value in values]

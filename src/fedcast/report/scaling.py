"""Scaling curves on a page: the points of each run, the fitted curve, and its numbers beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from fedcast.report import figures
from fedcast.report.page import document_of, legend_key, render_page, write_page
from fedcast.report.tables import FIT_COLUMNS, PARTS, fit_cells, format_count, metric_of, pretty_name, value_cells
from fedcast.run.scaling import PowerLaw, Scaling

_STEPS = 80


def scaling_curves(curves: Sequence[tuple[str, pd.DataFrame, PowerLaw | None]], *, axis: str, unit: str) -> go.Figure:
    """Draw points and fitted curves of one part, one colour a curve; the axis is logarithmic where every value is positive.

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
            x=_cleaned(points["x"]),
            y=_cleaned(points["score"]),
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
        figure.add_scatter(x=_cleaned(x), y=_cleaned(y), name=figures.label(name), meta=name, mode="lines", line=line, hoverinfo="skip")
    if all((points["x"] > 0).all() for _, points, _ in curves):
        figure.update_xaxes(type="log", title_text=f"{axis}, log scale", **_log_ticks(curves))
    else:
        figure.update_xaxes(title_text=axis)
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
    context = {
        "kind": "scaling",
        "title": title,
        "lede": "How the error falls along one number of a federation, and the curve E = E_inf + a x^-p that fits it best.",
        "facts": _facts(curves),
        "verdicts": [],
        "sections": {f"axis-{i}": _section(over, group, drawn) for i, (over, group) in enumerate(by_key.items())},
        "chips": [legend_key(name, styles[name]) | {"shown": True} for name in methods],
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
    tables = [{"title": "Fitted curves, with 95 % intervals", "columns": ("Curve", *FIT_COLUMNS), "rows": fits}]
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


def _log_ticks(curves: Sequence[tuple[str, pd.DataFrame, PowerLaw | None]]) -> dict[str, object]:
    """Name the values that were run; every method's training points are the same, so the first curve's stand for all."""
    means = curves[0][1].groupby("value")["x"].mean()
    low, high = math.log10(means.min()), math.log10(means.max())
    room = 0.06 * (high - low)
    texts = [f"{x:g}" if x == value else format_count(x) for value, x in means.items()]
    return {"tickmode": "array", "tickvals": means.tolist(), "ticktext": texts, "range": [low - room, high + room]}


def _cleaned(values: Iterable[float]) -> list[float | None]:
    return [figures.clean(value) for value in values]

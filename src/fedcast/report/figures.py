"""The figures of the report, as plotly figures whose colours are CSS variables that the page resolves for light and dark."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from fedcast.report.tables import Metric, format_bytes, is_number, own_models, pretty_name, score_table

HUES: Final = 8
VISIBLE: Final = 12
_DASHES: Final = ("solid", "5px,3px", "1.5px,3px", "9px,3px,2px,3px")
_SYMBOLS: Final = (
    "circle-open",
    "diamond-open",
    "square-open",
    "triangle-up-open",
    "x-thin-open",
    "cross-thin-open",
    "star-open",
    "hexagon-open",
)
_LONGEST_LABEL: Final = 22
_MOST_DOTS: Final = 80

INK, SOFT_INK, MUTED, RULE, GRID, SURFACE = "var(--ink)", "var(--ink-2)", "var(--ink-3)", "var(--rule)", "var(--grid)", "var(--surface)"
ACCENT: Final = "var(--accent)"


@dataclass(frozen=True)
class Style:
    """How one site or domain is drawn everywhere: a hue first, a dash once the hues are used up."""

    hue: int
    dash: str

    @property
    def colour(self) -> str:
        """The line colour."""
        return f"var(--hue-{self.hue})"

    @property
    def soft(self) -> str:
        """The same colour for areas."""
        return f"var(--hue-{self.hue}-soft)"


def styles_of(names: Sequence[str]) -> dict[str, Style]:
    """Give each name its own combination of hue and dash, in the order of the names."""
    return {name: Style(i % HUES, _DASHES[(i // HUES) % len(_DASHES)]) for i, name in enumerate(dict.fromkeys(names))}


def label(name: str, longest: int = _LONGEST_LABEL) -> str:
    """Return a name as plotly text: shortened, and with its markup disarmed (plotly reads a subset of HTML)."""
    short = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return html.escape(short, quote=False)


def site_lines(
    series: Mapping[str, Sequence[tuple[int, float]]],
    styles: Mapping[str, Style],
    *,
    unit: str,
    percent: bool = False,
    mean: bool = True,
    height: int = 300,
) -> go.Figure:
    """Draw one line a site over the rounds, with the mean over sites where there are several.

    Parameters
    ----------
    series
        Points (round, value) of each site.
    styles
        Style of each site.
    unit
        Title of the value axis; empty for none.
    percent
        Whether values are shares, to be written as per cent.
    mean
        Whether the mean over the sites is drawn where there are several.
    height
        Height in pixels.
    """
    figure = blank(height=height)
    spread = "%{y:.1%}" if percent else "%{y:.4g}"
    for name, points in series.items():
        style = styles[name]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[clean(y) for _, y in points],
            name=label(name),
            meta=name,
            mode="lines" if len(points) > 1 else "markers",
            line={"color": style.colour, "width": 1.6, "dash": style.dash},
            marker={"color": style.colour, "size": 7},
            hovertemplate=f"{spread}<extra>%{{fullData.name}}</extra>",
        )
    if mean and len(series) > 1:
        _mean_line(figure, series, spread)
    _round_axis(figure, [x for points in series.values() for x, _ in points])
    figure.update_yaxes(title_text=unit or None, tickformat=".0%" if percent else None)
    values = [y for points in series.values() for _, y in points if y > 0 and math.isfinite(y)]
    if values and not percent and max(values) > 30 * min(values) and len(values) == sum(len(p) for p in series.values()):
        figure.update_yaxes(type="log", dtick=1 if max(values) > 1000 * min(values) else None, exponentformat="power")
    return figure


def _mean_line(figure: go.Figure, series: Mapping[str, Sequence[tuple[int, float]]], spread: str) -> None:
    by_round: dict[int, list[float]] = {}
    for x, y in itertools.chain.from_iterable(series.values()):
        by_round.setdefault(x, []).append(y)
    mean = {x: sum(ys) / len(ys) for x, ys in sorted(by_round.items())}
    figure.add_scatter(
        x=list(mean),
        y=list(mean.values()),
        name="mean",
        mode="lines" if len(mean) > 1 else "markers",
        line={"color": INK, "width": 2.8},
        marker={"color": INK, "size": 9},
        hovertemplate=f"<b>{spread}</b><extra><b>mean</b></extra>",
    )


def reference_line(figure: go.Figure, value: float, text: str, *, above: bool = True) -> go.Figure:
    """Add a dashed horizontal line with a name above or below it, such as chance or the equal share."""
    figure.add_hline(y=value, line={"color": MUTED, "width": 1, "dash": "4px,3px"}, layer="below")
    figure.add_annotation(
        x=1,
        xref="paper",
        xanchor="right",
        y=value,
        yanchor="bottom" if above else "top",
        text=text,
        showarrow=False,
        font={"size": 11, "color": MUTED},
    )
    return figure


def weights_against_share(weights: Mapping[str, float], samples: Mapping[str, float], styles: Mapping[str, Style]) -> go.Figure:
    """Draw each site's last aggregation weight beside its share of the samples, largest weight on top."""
    total = sum(samples.values())
    names = sorted(weights, key=lambda name: weights[name])
    figure = blank(height=max(220, 60 + 24 * len(names)), left=8)
    shown = [label(name) for name in names]
    if total > 0 and set(samples) == set(weights):
        shares = [samples[name] / total for name in names]
        stems = list(itertools.chain.from_iterable((share, weights[name], None) for name, share in zip(names, shares, strict=True)))
        rungs = list(itertools.chain.from_iterable((row, row, None) for row in range(len(names))))
        figure.add_scatter(x=stems, y=rungs, mode="lines", line={"color": RULE, "width": 2}, hoverinfo="skip")
        figure.add_scatter(
            x=shares,
            y=list(range(len(names))),
            name="share of samples",
            mode="markers",
            marker={"symbol": "circle-open", "size": 9, "color": MUTED, "line": {"width": 1.6}},
            hovertemplate="%{x:.1%}<extra>share of samples</extra>",
        )
    figure.add_scatter(
        x=[weights[name] for name in names],
        y=list(range(len(names))),
        name="weight",
        mode="markers",
        marker={"size": 10, "color": [styles[name].colour for name in names]},
        hovertemplate="%{x:.1%}<extra>weight</extra>",
    )
    figure.update_xaxes(title_text="share", tickformat=".0%", rangemode="tozero")
    _name_axis(figure, shown)
    return figure


def heatmap(matrix: Sequence[Sequence[float]], names: Sequence[str]) -> go.Figure:
    """Draw the cosine similarity of the sites' prototypes, similar sites side by side.

    Parameters
    ----------
    matrix
        Square matrix [sites, sites] of cosines.
    names
        The sites, in the matrix's order.
    """
    cosine = np.asarray(matrix, dtype=np.float64)
    order = similarity_order(cosine)
    ordered = cosine[np.ix_(order, order)]
    size = len(order)
    off = ordered[~np.eye(size, dtype=bool)]
    low = float(np.nanmin(off)) if off.size and np.isfinite(off).any() else 0.0
    shown = [label(names[i], 16) for i in order]
    figure = blank(height=min(400, 140 + 40 * size), left=8, bottom=8)
    figure.add_heatmap(
        z=[[clean(v) for v in row] for row in ordered],
        x=list(range(size)),
        y=list(range(size)),
        customdata=[[f"{a} and {b}" for b in shown] for a in shown],
        zmin=low,
        zmax=1.0,
        xgap=2,
        ygap=2,
        colorscale=[[i / 4, f"var(--heat-{i})"] for i in range(5)],
        texttemplate=("%{z:.3f}" if low > 0.9 else "%{z:.2f}") if size <= VISIBLE else None,
        textfont={"size": 11},
        hovertemplate="%{customdata}<br>cosine %{z:.3f}<extra></extra>",
        showscale=size > VISIBLE,
        colorbar={"thickness": 8, "outlinewidth": 0, "len": 0.9, "tickfont": {"color": SOFT_INK, "size": 11}, "nticks": 5},
    )
    ticks = {
        "tickmode": "array",
        "tickvals": list(range(size)),
        "ticktext": shown,
        "showgrid": False,
        "ticks": "",
        "showline": False,
        "automargin": True,
    }
    figure.update_xaxes(**ticks, tickangle=-45)
    figure.update_yaxes(**ticks, autorange="reversed")
    figure.update_layout(hovermode="closest", dragmode=False)
    return figure


def similarity_order(cosine: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """Return an order of the sites that puts similar ones side by side (average linkage, optimal leaf order)."""
    if len(cosine) < 3 or not np.isfinite(cosine).all():
        return list(range(len(cosine)))
    distance = np.clip(1 - (cosine + cosine.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    return [int(i) for i in leaves_list(optimal_leaf_ordering(linkage(condensed, "average"), condensed))]


def fan(sample: Mapping[str, Any], style: Style) -> go.Figure:
    """Draw one forecast: the end of the context, the truth, the median with its 80 % band, and the seasonal naive forecast.

    Parameters
    ----------
    sample
        One entry of ``samples.json``; ``None`` = missing, drawn as a gap.
    style
        The domain's style; its hue colours the forecast.
    """
    truth = [clean(v) for v in sample.get("truth") or ()]
    steps = max(len(truth), len(sample.get("point") or ()))
    context = [clean(v) for v in sample.get("context") or ()][-max(3 * steps, 48) :]
    ahead = list(range(1, steps + 1))
    figure = blank(height=230, left=8, bottom=28)
    _band(figure, ahead, sample.get("quantiles") or {}, style)
    naive = [clean(v) for v in sample.get("seasonal_naive") or ()]
    if naive:
        line = {"color": MUTED, "width": 1.2, "dash": "2px,2px"}
        figure.add_scatter(x=ahead, y=naive, mode="lines", line=line, hovertemplate="%{y:.4g}<extra>seasonal naive</extra>")
    _observed(figure, list(range(1 - len(context), 1)), context, width=1.1, colour=SOFT_INK, name="context")
    last = context[-1:]
    _observed(figure, [0, *ahead][1 - len(last) :], [*last, *truth], width=1.6, colour=INK, name="truth")
    median = [clean(v) for v in (sample.get("quantiles") or {}).get("0.5") or sample.get("point") or ()]
    line = {"color": style.colour, "width": 2.2}
    figure.add_scatter(x=ahead, y=median, mode="lines", line=line, hovertemplate="<b>%{y:.4g}</b><extra><b>median</b></extra>")
    figure.add_vline(x=0.5, line={"color": RULE, "width": 1}, layer="below")
    figure.update_xaxes(showgrid=False, nticks=6, range=[min(1 - len(context), 0), steps + 0.5], hoverformat="d")
    figure.update_yaxes(nticks=5)
    return figure


def _band(figure: go.Figure, ahead: Sequence[int], quantiles: Mapping[str, Sequence[object]], style: Style) -> None:
    low, high = quantiles.get("0.1"), quantiles.get("0.9")
    if not low or not high:
        return
    for values, level in ((high, "0.9"), (low, "0.1")):
        figure.add_scatter(
            x=list(ahead),
            y=[clean(v) for v in values],
            mode="lines",
            line={"width": 0, "color": style.colour},
            fill="tonexty" if level == "0.1" else None,
            fillcolor=style.soft if level == "0.1" else None,
            hovertemplate=f"%{{y:.4g}}<extra>{level} quantile</extra>",
        )


def relative_dots(results: pd.DataFrame, metric: Metric) -> go.Figure | None:
    """Draw each model's score in each domain, held-out domains on top, with the seasonal naive (or the right coverage) as a line.

    Returns
    -------
    plotly.graph_objects.Figure or None
        ``None`` when nothing can be compared with the seasonal naive, or when the domains are too many for one figure.
    """
    both = (score_table(results, metric.key, held_out=False), score_table(results, metric.key, held_out=True))
    tables = [table for table in both if table is not None and (table.relative or metric.share)]
    if not tables or sum(len(table.domains) for table in tables) > _MOST_DOTS:
        return None
    own = own_models(results)[:1]
    figure = blank(height=300, left=8)
    ticks: dict[int, str] = {}
    row = 0
    for table in tables:
        rank = _domain_order(table.values, [table.models.index(m) for m in own if m in table.models])
        rows = list(range(row, row + len(rank)))
        ticks |= {r: label(table.domains[d]) for r, d in zip(rows, rank, strict=True)}
        for model, symbol in reversed(model_symbols(results).items()):
            if model in table.models:
                values = [clean(table.values[table.models.index(model), d]) for d in rank]
                _dots(figure, model, symbol, values, rows, metric)
        row += len(rank) + 1
        words = "held-out domains" if table is both[1] else "training domains"
        place = {"xref": "paper", "x": 0, "xanchor": "left", "yanchor": "middle", "showarrow": False}
        figure.add_annotation(text=words, y=row - 1, font={"size": 11, "color": MUTED}, **place)
    figure.update_layout(height=70 + 24 * row, hovermode="closest")
    figure.add_vline(x=1.0 if metric.relative else metric.goal, line={"color": INK, "width": 1}, layer="below")
    figure.update_yaxes(tickmode="array", tickvals=list(ticks), ticktext=list(ticks.values()), range=[-0.7, row - 0.5])
    if metric.relative:
        text = f"{metric.label} ÷ seasonal naive's, log scale"
        figure.update_xaxes(title_text=text, type="log", **_ratio_ticks(figure))
    else:
        figure.update_xaxes(title_text="share of true values inside the 80 % interval", tickformat=".0%", range=[0, 1.02])
    return figure


def model_symbols(results: pd.DataFrame) -> dict[str, str]:
    """Return the plotly symbol of every model; the first trained one has the filled circle."""
    own = own_models(results)[:1]
    others = [m for m in dict.fromkeys(results["model"].astype(str)) if m not in own] if "model" in results.columns else []
    return dict.fromkeys(own, "circle") | {m: _SYMBOLS[i % len(_SYMBOLS)] for i, m in enumerate(others)}


def stacked_bars(rounds: Sequence[int], parts: Mapping[str, Sequence[float]], *, unit: str, as_bytes: bool = False) -> go.Figure:
    """Draw the parts of a per-round cost as stacked bars.

    Parameters
    ----------
    rounds
        The rounds, ascending.
    parts
        Values of each part, one a round.
    unit
        Title of the value axis.
    as_bytes
        Whether the values are bytes, to be scaled to a readable unit.
    """
    figure = blank(height=260)
    largest = max((sum(column) for column in zip(*parts.values(), strict=True)), default=0.0)
    power = min(int(math.log10(largest) // 3), 4) if as_bytes and largest >= 1 else 0
    scale, title = (1000.0**power, ("B", "kB", "MB", "GB", "TB")[power]) if as_bytes else (1.0, unit)
    for (name, values), colour in zip(parts.items(), (ACCENT, "var(--accent-2)", MUTED), strict=False):
        texts = [format_bytes(v) if as_bytes else f"{v:.3g} {unit}" for v in values]
        figure.add_bar(
            x=list(rounds),
            y=[v / scale for v in values],
            name=label(name),
            marker={"color": colour, "line": {"width": 0}},
            customdata=texts,
            hovertemplate="%{customdata}<extra>%{fullData.name}</extra>",
        )
    _round_axis(figure, rounds)
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_yaxes(title_text=title, rangemode="tozero")
    return figure


def template() -> dict[str, Any]:
    """Return the layout that all figures share, as the plotly template that the page lays under each of them."""
    axis = {
        "gridcolor": GRID,
        "linecolor": RULE,
        "tickcolor": RULE,
        "tickfont": {"color": SOFT_INK, "size": 11},
        "title": {"font": {"color": SOFT_INK, "size": 12}, "standoff": 8},
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
    }
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": SURFACE, "bordercolor": RULE, "font": {"color": INK, "size": 12}, "namelength": 24},
        "font": {"color": SOFT_INK, "size": 12},
        "xaxis": axis | {"showline": True, "ticks": "outside", "ticklen": 4, "showgrid": False},
        "yaxis": axis | {"showline": False, "ticks": ""},
    }
    document: dict[str, Any] = go.layout.Template(layout=layout).to_plotly_json()
    return document


def blank(*, height: int, left: int = 52, bottom: int = 40) -> go.Figure:
    """Return an empty figure of so many pixels, which the page's template styles."""
    margin = {"l": left, "r": 12, "t": 10, "b": bottom, "pad": 4}
    return go.Figure(layout={"template": {"data": {}}, "height": height, "margin": margin})


def _round_axis(figure: go.Figure, rounds: Sequence[int]) -> None:
    last = max(rounds, default=1)
    figure.update_xaxes(title_text="round", hoverformat="d", **({"dtick": 1} if last <= 8 else {"nticks": 8}))


def _name_axis(figure: go.Figure, names: Sequence[str]) -> None:
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=list(names),
        range=[-0.7, len(names) - 0.3],
        showgrid=False,
        automargin=True,
    )
    figure.update_xaxes(showgrid=True, showline=False, ticks="")
    figure.update_layout(hovermode="closest")


def _observed(figure: go.Figure, x: Sequence[int], y: Sequence[float | None], *, width: float, colour: str, name: str) -> None:
    """Add a line with gaps; a value between two gaps, which a line would hide, becomes a dot."""
    known = [False, *(v is not None for v in y), False]
    alone = [here and not before and not after for before, here, after in zip(known, known[1:], known[2:], strict=False)]
    dots = (
        {"mode": "lines+markers", "marker": {"color": colour, "size": [3 if a else 0 for a in alone], "line": {"width": 0}}}
        if any(alone)
        else {"mode": "lines"}
    )
    figure.add_scatter(
        x=list(x),
        y=list(y),
        line={"color": colour, "width": width},
        connectgaps=False,
        hovertemplate=f"%{{y:.4g}}<extra>{name}</extra>",
        **dots,
    )


def _dots(figure: go.Figure, model: str, symbol: str, values: Sequence[float | None], rows: Sequence[int], metric: Metric) -> None:
    leading = symbol == "circle"
    colour = ACCENT if leading else SOFT_INK
    figure.add_scatter(
        x=list(values),
        y=list(rows),
        name=label(pretty_name(model), 30),
        mode="markers",
        marker={"symbol": symbol, "size": 11 if leading else 9, "color": colour, "line": {"width": 0 if leading else 1.4, "color": colour}},
        hovertemplate=("%{x:.3f}" if metric.relative else "%{x:.0%}") + "<extra>%{fullData.name}</extra>",
    )


def _domain_order(values: np.ndarray[Any, np.dtype[np.float64]], own: Sequence[int]) -> list[int]:
    key = values[own[0]] if own else np.nanmin(values, axis=0)
    return [int(i) for i in np.argsort(-np.nan_to_num(key, nan=np.inf), kind="stable")]


def _ratio_ticks(figure: go.Figure) -> dict[str, object]:
    """Round tick values for a log axis of ratios; the axis always holds 1."""
    values = [x for trace in figure.data for x in trace.x if x is not None and x > 0]
    low, high = min([*values, 0.9]), max([*values, 1.1])
    decades = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000]
    tenths = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2]
    ticks = [t for t in (tenths if high < 4 * low else decades) if low / 1.12 <= t <= high * 1.12]
    return {
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{t:g}" for t in ticks],
        "range": [math.log10(low / 1.12), math.log10(high * 1.12)],
    }


def clean(value: object) -> float | None:
    """Return a number with as many digits as a figure can show; ``None`` for anything missing."""
    return float(f"{value:.6g}") if is_number(value) else None

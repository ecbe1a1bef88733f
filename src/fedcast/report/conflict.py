"""The figures of how much the domains' gradients contradict each other: over the rounds, and pair by pair at the last report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import plotly.graph_objects as go

from fedcast.report import figures
from fedcast.report.record import Row
from fedcast.report.tables import is_number

LINES: Final = {"mean": ("mean cosine", figures.Style(0, "solid")), "negative": ("share of pairs below 0", figures.Style(1, "5px,3px"))}
"""Key of a row to the line's name and style; the page's legend follows."""

_COLOURS: Final = ("var(--warm)", "var(--bad-3)", figures.SURFACE, "var(--good-3)", figures.ACCENT)
_NARROWEST: Final = 0.1


def conflict_lines(rows: Sequence[Row]) -> go.Figure:
    """Draw the mean cosine of the domains' gradients and the share of negative ones over the rounds.

    Parameters
    ----------
    rows
        Rows of kind ``conflict``, ascending.
    """
    series = {name: [(int(row["round"]), float(row[key])) for row in rows if is_number(row.get(key))] for key, (name, _) in LINES.items()}
    figure = figures.site_lines(series, dict(LINES.values()), unit="", mean=False)
    figure.add_hline(y=0, line={"color": figures.RULE, "width": 1}, layer="below")
    figure.update_yaxes(type="linear", dtick=None)
    return figure


def conflict_map(matrix: Sequence[Sequence[float]], names: Sequence[str]) -> go.Figure:
    """Draw the cosine of each two domains' gradients, similar domains side by side; what contradicts and what agrees differ in colour.

    Parameters
    ----------
    matrix
        Square matrix [domains, domains] of cosines.
    names
        The domains, in the matrix's order.
    """
    figure = figures.heatmap(matrix, names)
    heat = figure.data[0]
    # A gradient agrees with itself: the diagonal would only hide how the others differ.
    others = [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(heat.z)]
    largest = max((abs(value) for row in others for value in row if value is not None and math.isfinite(value)), default=0.0)
    reach = max(largest, _NARROWEST)
    colours = [[i / (len(_COLOURS) - 1), colour] for i, colour in enumerate(_COLOURS)]
    heat.update(z=others, zmin=-reach, zmax=reach, colorscale=colours, hoverongaps=False)
    return figure

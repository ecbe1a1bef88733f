"""Loss landscapes side by side: contours of the loss on a plane through the weights of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fedcast.report import figures
from fedcast.report.page import document_of, render_page, write_page
from fedcast.run.landscape import Surroundings
from fedcast.training.landscape import Landscape

SHARPNESS_COLUMNS: Final = ("Run", "Loss", "tr(H)", "|H|_F", "tr(H) / |H|_F", "Largest eigenvalue")
_LEVELS: Final = 12
_HEIGHT: Final = 300


def landscape_contours(landscapes: Mapping[str, Landscape], *, unit: str = "loss") -> go.Figure:
    """Draw one panel a model, all with the same contour lines, and a cross at its weights.

    Lines stand at equal ratios of the loss, so that a steep wall does not hide the bottom of the valley; colours end at the smallest
    loss that the figure knows and at the largest.

    Parameters
    ----------
    landscapes
        What :func:`fedcast.training.landscape.loss_landscape` gave, by the name of the model; at least one.
    unit
        What the loss is called.
    """
    figure = make_subplots(
        rows=1,
        cols=len(landscapes),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[figures.label(name, 40) for name in landscapes],
        figure=figures.blank(height=_HEIGHT, left=8),
    )
    values = np.concatenate([_heights(each).ravel() for each in landscapes.values()])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    for column, landscape in enumerate(landscapes.values(), 1):
        place = {"row": 1, "col": column}
        axis = [figures.clean(x) for x in landscape.coordinates]
        figure.add_contour(
            z=[[figures.clean(v) for v in row] for row in _heights(landscape)],
            x=axis,
            y=axis,
            customdata=[[figures.clean(v) for v in row] for row in landscape.losses],
            zmin=low,
            zmax=high,
            autocontour=False,
            contours={"start": low, "end": high, "size": max((high - low) / _LEVELS, 1e-6), "coloring": "fill"},
            line={"width": 0.5, "color": figures.SURFACE},
            colorscale=[[i / 4, f"var(--heat-{i})"] for i in range(5)],
            showscale=False,
            hovertemplate=f"{unit} %{{customdata:.4g}}<extra></extra>",
            **place,
        )
        mark = {"symbol": "cross-thin-open", "size": 9, "color": figures.INK, "line": {"width": 1.6}}
        figure.add_scatter(x=[0], y=[0], mode="markers", marker=mark, hoverinfo="skip", **place)
    figure.update_annotations(font={"size": 12, "color": figures.SOFT_INK})
    figure.update_xaxes(title_text="first direction", constrain="domain")
    figure.update_yaxes(title_text="second direction", col=1)
    figure.update_layout(hovermode="closest", margin={"t": 28})
    return figure


def _heights(landscape: Landscape) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the logarithms of the losses [G, G], NaN where there is none."""
    losses = landscape.losses
    return np.log10(np.where(np.isfinite(losses) & (losses > 0), losses, np.nan))


def sharpness_rows(found: Sequence[Surroundings]) -> list[list[str]]:
    """Return the cells of :data:`SHARPNESS_COLUMNS`, a row a run; H is the Hessian of the loss."""
    rows = []
    for each in found:
        sharp = each.sharpness
        values = (sharp.frobenius, sharp.ratio, sharp.largest)
        trace = f"{sharp.trace:.4g} ± {sharp.trace_error:.2g}"
        rows.append([str(each.run), f"{each.loss:.4g}", trace, *(f"{value:.4g}" for value in values)])
    return rows


def write_landscapes(found: Sequence[Surroundings], output: str | Path) -> Path:
    """Write one self-contained page: the loss around the final model of each run, and how sharply it bends there.

    Parameters
    ----------
    found
        What :func:`fedcast.run.landscape.surroundings` gave, with planes.
    output
        The page.

    Raises
    ------
    SourceError
        When the page cannot be written.
    """
    planes = {str(each.run): each.landscape for each in found if each.landscape is not None}
    document = document_of(landscape_contours(planes, unit="loss"))
    slot = {"title": "Loss on a plane through the weights", "figure": "planes", "view": "only", "height": document["layout"]["height"]}
    notes = [
        "Each direction is random and as long as the weights, tensor by tensor; lines stand at equal ratios of the loss.",
        "H is the Hessian of the loss; trace, with its standard error, and norm are Hutchinson's estimates.",
    ]
    table = {"title": "Sharpness", "columns": SHARPNESS_COLUMNS, "rows": sharpness_rows(found)}
    context = {
        "kind": "landscape",
        "title": "Loss landscapes",
        "lede": "How sharply the loss bends around the final model of each run, on the same windows.",
        "facts": [("Runs", str(len(found))), ("Domain", ", ".join(dict.fromkeys(each.domain for each in found)))],
        "verdicts": [],
        "sections": {"planes": {"title": "Landscapes", "figures": [slot], "plain_tables": [table], "notes": notes}},
        "chips": [],
        "spec_text": "",
        "visible": figures.VISIBLE,
    }
    return write_page(render_page(context, {"planes": {"only": document}}), Path(output))

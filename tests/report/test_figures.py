"""The figures: what is drawn, and that nothing in the data can change how."""

from __future__ import annotations

import itertools
import math
import re
from importlib import resources

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcast.report import figures


def ys(figure: go.Figure, name: str) -> list[float | None]:
    """Values of the trace whose hover text ends in this name."""
    return next(list(trace.y) for trace in figure.data if name in trace.hovertemplate)


@given(st.lists(st.text(max_size=8), unique=True, max_size=32))
def test_when_up_to_32_sites_are_drawn_then_no_two_look_the_same(names: list[str]) -> None:
    styles = figures.styles_of(names)
    assert list(styles) == names
    assert len(set(styles.values())) == len(names)


@given(st.text(max_size=60))
def test_when_a_name_becomes_a_label_then_it_holds_no_markup(name: str) -> None:
    text = figures.label(name)
    assert "<" not in text
    assert ">" not in text


def test_when_values_are_missing_then_the_fan_has_gaps_and_lone_points_dots() -> None:
    sample = {
        "context": [1.0, None, 3.0, 4.0],
        "truth": [5.0, None, 7.0, None],
        "point": [5.0, 6.0, 7.0, 8.0],
        "quantiles": {"0.1": [4.0, 5.0, 6.0, 7.0], "0.5": [5.1, 6.1, 7.1, 8.1], "0.9": [6.0, 7.0, 8.0, 9.0]},
        "seasonal_naive": [1.0, None, math.nan, 4.0],
    }
    figure = figures.fan(sample, figures.Style(2, "solid"))
    assert ys(figure, "context") == [1.0, None, 3.0, 4.0]
    assert ys(figure, "truth") == [4.0, 5.0, None, 7.0, None]
    assert ys(figure, "seasonal naive") == [1.0, None, None, 4.0]
    assert ys(figure, "median") == [5.1, 6.1, 7.1, 8.1]
    truth = next(trace for trace in figure.data if "truth" in trace.hovertemplate)
    assert list(truth.marker.size) == [0, 0, 0, 3, 0]
    assert not truth.connectgaps
    assert next(trace for trace in figure.data if trace.fill == "tonexty").fillcolor == "var(--hue-2-soft)"


def test_when_a_sample_has_neither_quantiles_nor_naive_then_the_point_forecast_is_drawn() -> None:
    figure = figures.fan({"context": [], "truth": [1.0, 2.0], "point": [1.5, 2.5]}, figures.Style(0, "solid"))
    assert ys(figure, "median") == [1.5, 2.5]
    assert len(figure.data) == 3


def test_when_losses_span_decades_then_the_axis_is_logarithmic() -> None:
    styles = figures.styles_of(["a", "b"])
    wide = figures.site_lines({"a": [(1, 100.0), (2, 1.0)], "b": [(1, 10.0), (2, 0.5)]}, styles, unit="")
    assert wide.layout.yaxis.type == "log"
    assert ys(wide, "mean") == [55.0, 0.75]
    assert figures.site_lines({"a": [(1, 2.0), (2, 1.0)]}, styles, unit="").layout.yaxis.type is None


def test_when_sites_form_groups_then_the_heatmap_keeps_them_together() -> None:
    group = np.array([0, 1, 0, 1, 0, 1])
    cosine = np.where(group[:, None] == group[None, :], 0.9, 0.1) + 0.1 * np.eye(6)
    order = figures.similarity_order(cosine)
    assert sorted(order) == list(range(6))
    assert len({int(g) for g in group[order][:3]}) == 1
    figure = figures.heatmap(cosine.tolist(), [f"s{i}" for i in range(6)])
    assert list(figure.layout.xaxis.ticktext) == [f"s{i}" for i in order]


def test_when_a_similarity_is_missing_then_the_heatmap_leaves_a_hole() -> None:
    figure = figures.heatmap([[1.0, math.nan], [math.nan, 1.0]], ["a", "b"])
    assert [list(row) for row in figure.data[0].z] == [[1.0, None], [None, 1.0]]


def test_when_costs_are_bytes_then_they_are_drawn_in_a_readable_unit() -> None:
    figure = figures.stacked_bars([1, 2], {"up": [1e6, 2e6], "down": [2e6, 1e6]}, unit="B", as_bytes=True)
    assert figure.layout.yaxis.title.text == "MB"
    assert list(figure.data[0].y) == [1.0, 2.0]


# Matrices of full colour-vision deficiency on linear RGB: Machado, Oliveira and Fernandes (2009), doi 10.1109/TVCG.2009.113.
VISIONS = {
    "usual": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def cielab(colour: str, vision: NDArray[np.float64]) -> NDArray[np.float64]:
    """The colour as this vision sees it, in CIELAB (D65)."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = vision @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(linear, 0, 1) / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("vision", VISIONS)
def test_when_colours_are_seen_with_a_deficiency_then_every_pair_stays_apart(theme: str, vision: str) -> None:
    template = resources.files("fedcast.report").joinpath("template.html").read_text(encoding="utf-8")
    block = template.split(f"macro {theme}()")[1].split("endmacro")[0]
    colours = re.findall(r"--hue-\d: (#[0-9a-f]{6});", block)
    assert len(colours) == figures.HUES
    seen = [cielab(colour, np.array(VISIONS[vision])) for colour in colours]
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 18

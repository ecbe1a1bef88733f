"""Contours of loss landscapes."""

from __future__ import annotations

import numpy as np
import pytest

from fedcast.report.landscape import landscape_contours
from fedcast.report.page import document_of
from fedcast.training.landscape import Landscape


def plane(depth: float) -> Landscape:
    axis = np.linspace(-1, 1, 5)
    return Landscape(axis, depth + axis[None, :] ** 2 + 2 * axis[:, None] ** 2)


def test_when_landscapes_are_drawn_then_each_has_a_panel_with_the_same_contour_lines() -> None:
    figure = landscape_contours({"pre-trained": plane(0.1), "smoothed <b>": plane(1.0)}, unit="MSE")
    contours = [trace for trace in figure.data if trace.type == "contour"]
    assert [trace.xaxis for trace in contours] == ["x", "x2"]
    assert contours[0].contours == contours[1].contours
    assert (contours[0].zmin, contours[0].zmax) == pytest.approx((-1.0, np.log10(4.0)))
    assert contours[0].z[0][2] == pytest.approx(np.log10(2.1), abs=1e-5)
    assert contours[0].customdata[0][2] == pytest.approx(2.1)
    assert [note.text for note in figure.layout.annotations] == ["pre-trained", "smoothed &lt;b&gt;"]


def test_when_a_loss_is_not_finite_then_its_place_is_empty() -> None:
    broken = plane(0.5)
    broken.losses[1, 3] = np.inf
    contour = document_of(landscape_contours({"one": broken}))["data"][0]
    assert contour["z"][1][3] is None
    assert contour["customdata"][1][3] is None
    assert contour["zmax"] == pytest.approx(np.log10(3.5))


def test_when_the_loss_is_the_same_everywhere_then_a_figure_is_drawn() -> None:
    flat = Landscape(np.linspace(-1, 1, 3), np.ones((3, 3)))
    contour = document_of(landscape_contours({"flat": flat}))["data"][0]
    assert contour["zmin"] == contour["zmax"] == 0

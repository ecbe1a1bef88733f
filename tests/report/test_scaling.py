"""The page and the tables of scaling curves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.scaling_runs import SHARES, prox_runs, share_runs, share_spec, write_run

from fedcast.errors import SourceError
from fedcast.report.console import scaling_tables
from fedcast.report.scaling import write_scaling
from fedcast.report.tables import value_cells
from fedcast.run.scaling import Scaling, scaling


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Scaling:
    return scaling(share_runs(tmp_path_factory.mktemp("runs")), "data.share")


def figures_of(page: str) -> dict[str, Any]:
    """The figures that a page carries, by name and view."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    figures: dict[str, Any] = json.loads(found.group(1))["figures"]
    return figures


def test_when_curves_are_written_then_the_page_holds_points_curve_and_numbers(curve: Scaling, tmp_path: Path) -> None:
    page = write_scaling([curve], tmp_path / "deep" / "scaling.html").read_text(encoding="utf-8")
    figures = figures_of(page)
    assert figures["data.share, held-out"]["only"]["layout"]["xaxis"]["ticktext"] == ["1k", "2.5k", "5k", "10k"]
    assert set(figures) == {"data.share, held-out", "data.share, in-domain"}
    points, line = figures["data.share, held-out"]["only"]["data"]
    assert len(points["x"]) == 2 * len(SHARES)
    assert line["y"] == sorted(line["y"], reverse=True)
    assert line["x"][0] == min(points["x"])
    assert not re.search(r'(src|href)="https?:', page[: page.index('id="figures"')])
    for words in ("training points", "fedcast · scaling", "FedAvg, held-out", "c0de"):
        assert words in page


def test_when_there_is_no_fit_then_means_are_joined(tmp_path: Path) -> None:
    few = scaling(share_runs(tmp_path, (0.5, 1.0)), "data.share")
    page = write_scaling([few], tmp_path / "scaling.html").read_text(encoding="utf-8")
    assert "no fit" in page
    assert "too few for a fit" in page


def test_when_a_value_is_zero_then_the_axis_is_linear_and_the_note_says_why_there_is_no_curve(tmp_path: Path) -> None:
    page = write_scaling([scaling(prox_runs(tmp_path, (0.0, 1.0)), "method.mu")], tmp_path / "s.html").read_text(encoding="utf-8")
    figure = figures_of(page)["method.mu, held-out"]["only"]
    assert figure["layout"]["xaxis"] == {"title": {"text": "method.mu"}}
    assert figure["data"][1]["x"] == [0, 1]
    assert "x^-p has no value at method.mu = 0" in page
    assert "FedProx, held-out" in page


def test_when_the_page_cannot_be_written_then_that_is_said(curve: Scaling, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot write"):
        write_scaling([curve], tmp_path)


def test_when_a_curve_is_shown_in_a_terminal_then_values_and_fit_stand_there(curve: Scaling) -> None:
    console = Console(width=140, record=True, file=None, quiet=False)
    with console.capture() as captured:
        for table in scaling_tables(curve):
            console.print(table)
    text = captured.get()
    for words in ("data.share", "10,000", "held-out", "in-domain", "E_inf", "0.487 to 0.512"):
        assert words in text, text
    assert "gradient steps" not in text


@pytest.mark.parametrize("width", [80, 50])
def test_when_the_terminal_is_narrow_then_scores_stay_whole_and_at_80_columns_intervals_too(curve: Scaling, width: int) -> None:
    console = Console(width=width)
    with console.capture() as captured:
        for table in scaling_tables(curve):
            console.print(table)
    text = captured.get().replace("\u00a0", " ")
    assert len(re.findall(r"\d\.\d{3} ± \d\.\d{3}", text)) == 2 * len(SHARES)
    assert width < 80 or len(re.findall(r"\d to \d", text)) == 6


def test_when_runs_differ_in_work_then_their_steps_have_a_column(tmp_path: Path) -> None:
    found = scaling(
        [write_run(tmp_path / f"{share}", share_spec(share), 0.9, steps=round(100 * share)) for share in (0.5, 1.0)], "data.share"
    )
    columns, rows = value_cells(found.points, found.over, found.axis)
    assert [row[columns.index("gradient steps")] for row in rows] == ["50", "100"]

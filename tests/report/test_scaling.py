"""The page and the tables of scaling curves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from tests.scaling_runs import SHARES, share_runs

from fedcast.errors import SourceError
from fedcast.report.console import scaling_tables
from fedcast.report.scaling import write_scaling
from fedcast.run.scaling import Scaling, scaling


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> Scaling:
    return scaling(share_runs(tmp_path_factory.mktemp("runs")), "data.share")


def test_when_curves_are_written_then_the_page_holds_points_curve_and_numbers(curve: Scaling, tmp_path: Path) -> None:
    page = write_scaling([curve], tmp_path / "deep" / "scaling.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    figures = json.loads(found.group(1))["figures"]
    assert set(figures) == {"data.share, held-out", "data.share, in-domain"}
    points, line = figures["data.share, held-out"]["only"]["data"]
    assert len(points["x"]) == 2 * len(SHARES)
    assert line["y"] == sorted(line["y"], reverse=True)
    assert line["x"][0] == min(points["x"])
    assert not re.search(r'(src|href)="https?:', page[: found.start()])
    for words in ("training points", "fedcast · scaling", "FedAvg, held-out", "c0de"):
        assert words in page


def test_when_there_is_no_fit_then_means_are_joined(tmp_path: Path) -> None:
    few = scaling(share_runs(tmp_path, (0.5, 1.0)), "data.share")
    page = write_scaling([few], tmp_path / "scaling.html").read_text(encoding="utf-8")
    assert "too few points" in page
    assert "too few for a fit" in page


def test_when_the_page_cannot_be_written_then_that_is_said(curve: Scaling, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot write"):
        write_scaling([curve], tmp_path)


def test_when_a_curve_is_shown_in_a_terminal_then_values_and_fit_stand_there(curve: Scaling) -> None:
    console = Console(width=140, record=True, file=None, quiet=False)
    with console.capture() as captured:
        for table in scaling_tables(curve):
            console.print(table)
    text = captured.get()
    for words in ("data.share", "10,000", "held-out", "in-domain", "E_inf", "0.5 (0."):
        assert words in text, text

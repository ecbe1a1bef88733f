"""The page's section on the conflict of gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_page import _Elements, figures_in

from fedcast.report import figures
from fedcast.report.conflict import conflict_lines, conflict_map
from fedcast.report.page import write_report

MakeRun = Callable[..., Path]


def row(number: int, mean: float | None, negative: float | None, cosines: list[list[float]], sites: list[str]) -> dict[str, Any]:
    return {"kind": "conflict", "round": number, "sites": sites, "cosines": cosines, "mean": mean, "negative": negative, "bytes_probe": 8}


def test_when_a_run_reported_then_the_page_draws_its_rows_and_says_what_they_mean(make_run: MakeRun) -> None:
    page = write_report(make_run(rounds=12)).read_text(encoding="utf-8")
    assert "conflict" in _Elements(page).ids()
    assert {"conflict", "conflict-map"} <= set(figures_in(page))
    section = page[page.index('<section id="conflict"') :]
    assert "a step that helps one domain harms the other" in section[: section.index("</section>")]
    assert "Cosine of gradients, round 12" in section


@pytest.mark.parametrize("rows", [[], [row(1, None, None, [[1.0]], ["cloud"])], [{"kind": "conflict", "round": 1, "sites": {"a": 1}}]])
def test_when_no_pair_of_domains_was_compared_then_the_section_is_left_out(rows: list[dict[str, Any]], make_run: MakeRun) -> None:
    run = make_run(rounds=2, conflict=False)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as record:
        record.writelines(json.dumps(each) + "\n" for each in rows)
    page = write_report(run).read_text(encoding="utf-8")
    assert "conflict" not in _Elements(page).ids()
    assert "Conflict of gradients" not in page


def test_when_mean_and_share_are_drawn_then_there_is_one_line_each_on_a_linear_axis() -> None:
    # All above 0 and decades apart, which elsewhere makes an axis logarithmic.
    figure = conflict_lines([row(1, 0.9, 0.01, [], []), row(11, 0.8, 0.02, [], [])])
    assert {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data} == {
        "mean cosine": [(1, 0.9), (11, 0.8)],
        "share of pairs below 0": [(1, 0.01), (11, 0.02)],
    }
    assert figure.layout.yaxis.type == "linear"


def test_when_cosines_are_drawn_then_colours_part_at_zero_and_the_diagonal_is_empty() -> None:
    matrix = [[1.0, -0.4, 0.2], [-0.4, 1.0, math.nan], [0.2, math.nan, 1.0]]
    heat = conflict_map(matrix, ["a", "b", "c"]).data[0]
    assert [list(line) for line in heat.z] == [[None, -0.4, 0.2], [-0.4, None, None], [0.2, None, None]]
    assert (heat.zmin, heat.zmax) == (-0.4, 0.4)
    assert heat.colorscale[2] == (0.5, figures.SURFACE)

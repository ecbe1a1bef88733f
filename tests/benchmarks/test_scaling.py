"""The grid of the scaling benchmark: runs of one axis do equal work and differ in what the axis says."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.scaling import AXES, PAGE, SPEC, spec_of, tables
from tests.federations import small_spec
from tests.scaling_runs import share_runs

from fedcast.run.scaling import scaling
from fedcast.spec import load_spec


@pytest.mark.parametrize("axis", AXES)
def test_when_an_axis_is_run_then_every_value_takes_as_many_steps_in_total(axis: str) -> None:
    base, values = small_spec("fedavg", local_steps=20), AXES[axis].values
    specs = [spec_of(base, axis, value, values, "fedtrl", 1, 3000) for value in values]
    section, _, name = axis.partition(".")
    assert [getattr(getattr(spec, section), name) for spec in specs] == list(values)
    work = [
        spec.federation.rounds
        * spec.federation.local_steps
        * spec.federation.selected(3 if spec.data.partition == "domain" else spec.data.clients)
        for spec in specs
    ]
    assert max(work) == min(work)
    assert 2700 <= max(work) <= 3300
    assert {spec.evaluation.every == spec.federation.rounds for spec in specs} == {True}


def test_when_curves_are_fitted_then_the_page_has_a_place_for_their_tables(tmp_path: Path) -> None:
    text = tables([scaling(share_runs(tmp_path), "data.share")])
    assert "| data.share | training points | seeds | held-out | in-domain |" in text
    assert text.count("| data.share | fedavg |") == 2
    assert "<!-- scaling -->" in PAGE.read_text(encoding="utf-8")
    assert load_spec(SPEC).model.size == "nano"

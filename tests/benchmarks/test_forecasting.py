"""The scripts that time forecasts and start-up, in a moment each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import forecast_throughput, startup


def test_when_forecasts_are_timed_then_every_way_and_phase_takes_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forecast_throughput.main(["--quick", "--files", "0", "--output", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    own = [row for row in rows if row["name"] == "fedcast nano"]
    assert {(row["what"].split(",")[0], row["precision"]) for row in own} == {
        (what, precision) for what in ("model", "package") for precision in ("float32", "bfloat16")
    }
    assert all(row["series_a_second"] > 0 for row in rows)
    assert forecast_throughput.PEER in capsys.readouterr().out


@pytest.mark.slow
def test_when_the_command_is_timed_then_its_phases_are_parts_of_the_process(tmp_path: Path) -> None:
    for row in forecast_throughput.phases("nano", 20, tmp_path):
        assert 0 < row["reading"] + row["forecasting"] + row["writing"] < row["process"]


@pytest.mark.slow
def test_when_start_up_is_timed_then_help_takes_less_than_a_forecast(tmp_path: Path) -> None:
    startup.main(["--quick", "--output", str(tmp_path / "out.json")])
    seconds = {row["command"]: row["seconds"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert 0 < seconds["fedcast --help"] < seconds["fedcast forecast"]

"""The scripts that compare ways of computing a step, in a moment each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import allocator, precision, sampling
from benchmarks import compile as compiling


def test_when_sampling_is_timed_then_every_part_takes_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling.main(["--quick", "--output", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert min(row[name] for name in ("draw", "step", "loader", "iterator")) > 0
    assert "| nano |" in capsys.readouterr().out


@pytest.mark.slow
def test_when_precisions_are_compared_then_float32_differs_from_itself_by_nothing(tmp_path: Path) -> None:
    again = ["--also", "again", "training.precision=float32", "training.products=default"]
    precision.main(["--quick", "--settings", "float32", "bfloat16", *again, "--output", str(tmp_path / "out.json")])
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert len(scores) == 2
    for by_setting in scores:
        assert by_setting["again"] == by_setting["float32"]
        assert by_setting["bfloat16"] != by_setting["float32"]
        assert by_setting["bfloat16"] == pytest.approx(by_setting["float32"], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
def test_when_allocators_are_compared_then_each_setting_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    allocator.main(["--quick", "--output", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert all(row[name]["seconds"] > 0 for name in allocator.SETTINGS)
    assert row["default"]["speedup"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own compiler warns about itself
def test_when_compiling_is_timed_then_its_seconds_are_counted(tmp_path: Path) -> None:
    compiling.main(["--quick", "--output", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["compile_seconds"] > 1
    assert row["speedup"] > 0

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import secure_sum


def test_when_the_cost_of_a_secure_sum_is_taken_quickly_then_every_part_has_seconds_and_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secure_sum.main(["--quick", "--output", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["sites"], row["gone"], row["masked_bytes"]) == (5, 1, 4008)
    assert min(row["site_seconds"], row["server_seconds"]) > 0
    assert "| 5 | 1,000 | 32 | 1 |" in capsys.readouterr().out

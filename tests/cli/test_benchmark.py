"""The verb ``benchmark``, on a small native model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcast.models.base import ModelConfig
from fedcast.models.patch import PatchTransformer
from fedcast.run import medical

Call = Callable[..., Any]


@pytest.mark.usefixtures("real_data")
def test_when_the_benchmark_runs_then_lines_name_the_run_and_baselines_stand_last_without_costs(
    fedcast: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(d_model=16, n_heads=2, encoder_layers=1, decoder_layers=1, context=512, horizon=64, patch=32)
    PatchTransformer(config).save_pretrained(tmp_path / "model")
    monkeypatch.setitem(medical.SETTINGS, "small", medical.Setting(rounds=1, steps=1, batch=2, windows=4))
    words = ("benchmark", "medical", "--checkpoint", tmp_path / "model", "--strategy", "medical-real-100hz", "--setting", "small")
    words += ("--methods", "zero_shot,fedavg", "--seeds", "1", "-o", tmp_path / "runs")
    answer = fedcast(*words)
    assert answer.code == 0
    assert [line.split("  ")[:2] for line in answer.err.splitlines() if " round " in line] == [["fedavg, seed 0", "round 1/1"]]
    names = [line.strip().split("  ")[0] for line in answer.out.splitlines() if " all (" in line]
    assert names == ["Zero-shot", "FedAvg", "Seasonal naive"]
    naive = next(line for line in answer.out.splitlines() if "Seasonal naive" in line)
    assert len(naive.split()) == len(["Seasonal", "naive", "all", "(n)", "RMSE", "MAE", "sMAPE"])

    rows = fedcast(*words, "--json").json()
    assert rows == json.loads((tmp_path / "runs" / "medical-real-100hz-full.json").read_text(encoding="utf-8"))
    for row in rows:
        costs = [row[cost] for cost in medical.COSTS]
        assert all(cost is None for cost in costs) == (row["model"] == "seasonal_naive")
        assert all(cost is not None for cost in costs) == (row["model"] != "seasonal_naive")

    run = tmp_path / "runs" / "medical-real-100hz" / "full" / "fedavg" / "seed-0"
    (run / "metrics.jsonl").write_text("", encoding="utf-8")  # as a run that was stopped before it was scored
    assert fedcast("compare", run).err.splitlines()[1] == f"hint: finish it with `fedcast finetune {run}/spec.toml -o {run}`"


def test_when_a_strategy_is_misspelt_then_the_short_names_are_suggested(fedcast: Call, tmp_path: Path) -> None:
    answer = fedcast("benchmark", "medical", "--strategy", "by-hospital", "-o", tmp_path)
    assert (answer.code, answer.err.splitlines()[1]) == (11, "hint: known: modality, real, sites, subjects")
    assert fedcast("benchmark", "medical", "--strategy", "subject").err.splitlines()[1] == "hint: did you mean 'subjects'?"

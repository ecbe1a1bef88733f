"""Whole runs: partitions, precision, partial participation, and what a site left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.federations import small_spec, train_small, untrained_loss

from fedcast.errors import SpecError, SplitError
from fedcast.models.forecaster import Forecaster
from fedcast.run.pretrain import pretrain
from fedcast.spec import RunSpec, parse_spec


def changed(spec: RunSpec, section: str, **values: object) -> RunSpec:
    return spec.model_copy(update={section: getattr(spec, section).model_copy(update=values)})


@pytest.mark.parametrize("scheme", ["series", "iid", "dirichlet", "long_tail"])
@pytest.mark.parametrize("method", ["fedavg", "fedtrl"])
def test_when_clients_cut_across_domains_then_scores_are_still_by_domain(scheme: str, method: str, tmp_path: Path) -> None:
    run = train_small(changed(small_spec(method), "data", partition=scheme, clients=4), tmp_path)
    assert set(run.rows("round")[0]["sites"]) == {f"site-{i:03d}" for i in range(4)}
    results = run.results()
    assert set(results.domain) == {"energy", "health", "medical", "transport"}
    assert results.mse.notna().all()


def test_when_clients_cut_across_domains_then_domains_are_validated_on_the_mean_of_what_clients_keep(tmp_path: Path) -> None:
    spec = changed(small_spec("fedtrl", local_steps=30), "data", partition="iid", clients=2)
    run = train_small(spec, tmp_path)

    assert run.rows("validation")[-1]["mean"] < 0.95 * untrained_loss(spec, tmp_path / "untrained")


def test_when_computing_in_bfloat16_then_training_learns_as_in_float32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        run = train_small(changed(small_spec("fedavg"), "training", precision=precision), tmp_path / precision)
        losses[precision] = [row["mean"] for row in run.rows("validation")]
        assert json.loads((run.folder / "run.json").read_text())["precision"] == precision
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_when_few_take_part_then_every_site_that_trained_stands_in_the_served_model(tmp_path: Path) -> None:
    spec = changed(small_spec("fedtrl", rounds=6), "federation", participation=0.3)
    run = pretrain(spec, output=tmp_path / "run")
    trained = {site for row in run.rows("round") for site in row["sites"]}
    model = Forecaster.from_pretrained(run.final).model
    assert set(model.names) == trained  # type: ignore[union-attr]
    assert run.results().mse.notna().all()


def test_when_values_after_the_train_part_change_then_the_weights_do_not(tmp_path: Path) -> None:
    weights = []
    for tail in (0.0, 1000.0):
        folder = tmp_path / f"data-{tail:g}"
        folder.mkdir()
        for seed in (0, 1):
            values = np.random.default_rng(seed).normal(size=400).cumsum()
            values[320:] += tail
            stamps = pd.date_range("2024-01-01", periods=400, freq="h")
            pd.DataFrame({"unique_id": "a", "ds": stamps, "y": values}).to_csv(folder / f"d{seed}.csv", index=False)
        document = {
            "data": {"source": str(folder), "validation": 0.1, "test": 0.2},
            "model": {"context": 32, "horizon": 8},
            "method": {"name": "fedavg"},
            "training": {"batch_size": 4},
            "federation": {"rounds": 1, "local_steps": 2},
        }
        weights.append(pretrain(parse_spec(document), output=tmp_path / f"run-{tail:g}").results().weights_sha256.iloc[0])
    assert weights[0] == weights[1]


def test_when_a_series_is_too_short_then_it_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    frames = []
    for name, count in (("a", 300), ("b", 20)):
        stamps = pd.date_range("2024-01-01", periods=count, freq="D")
        frames.append(pd.DataFrame({"unique_id": name, "ds": stamps, "y": np.arange(count) % 7.0}))
    pd.concat(frames).to_csv(folder / "shop.csv", index=False)
    pd.concat(frames[1:]).to_csv(folder / "kiosk.csv", index=False)
    model, federation = {"context": 32, "horizon": 14}, {"rounds": 1, "local_steps": 1}
    document = {"data": {"source": str(folder), "domains": ["shop"]}, "model": model, "federation": federation}
    run = pretrain(parse_spec(document), output=tmp_path / "run")
    assert json.loads((run.folder / "run.json").read_text())["series_left_out"] == {"shop": 1}
    document["data"] = {"source": str(folder), "domains": ["shop"], "held_out": ["kiosk"]}
    # A domain that cannot be scored is found before anything trains.
    with pytest.raises(SplitError, match="site kiosk"):
        pretrain(parse_spec(document), output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_when_a_value_is_infinite_then_the_spec_is_refused() -> None:
    with pytest.raises(SpecError, match="learning_rate"):
        parse_spec({"training": {"learning_rate": float("inf")}})

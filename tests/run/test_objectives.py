"""What a run trains for, and the horizons it is scored at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.federations import DOMAINS, HELD_OUT, small_spec, train_small

from fedcast.errors import FedcastError, SpecError
from fedcast.evaluate.statistics import geometric_mean
from fedcast.models.forecaster import Forecaster
from fedcast.report.tables import score_table
from fedcast.run.pretrain import pretrain
from fedcast.spec import RunSpec, parse_spec

ERRORS = [f"reconstruction_mse_{ratio}" for ratio in (15, 30, 45, 60, 75)]


def _changed(spec: RunSpec, section: str, **values: object) -> RunSpec:
    return spec.model_copy(update={section: getattr(spec, section).model_copy(update=values)})


@pytest.mark.parametrize("method", ["fedtrl", pytest.param("local", marks=pytest.mark.slow)])
def test_when_the_objective_is_reconstruction_then_any_method_learns_it_and_still_forecasts(method: str, tmp_path: Path) -> None:
    short = _changed(small_spec(method, rounds=1, local_steps=1), "model", objective="reconstruct")
    long = _changed(small_spec(method, rounds=3, local_steps=30), "model", objective="reconstruct")

    before, after = train_small(short, tmp_path / "short"), train_small(long, tmp_path / "long")

    assert after.rows("validation")[-1]["mean"] < 0.97 * before.rows("validation")[-1]["mean"]
    rows = after.results()
    own = rows[rows.model == method]
    seen = own[~own.held_out]
    assert set(seen.domain) == set(DOMAINS)
    assert np.isfinite(seen[[*ERRORS, "reconstruction_mse", "reconstruction_nmse", "mse", "wql"]].to_numpy(dtype=float)).all()
    assert np.allclose(seen[ERRORS].mean(axis=1), seen.reconstruction_mse)
    folder = after.final / DOMAINS[0] if method == "local" else after.final
    assert Forecaster.from_pretrained(folder).predict_arrays(np.zeros((2, 64), dtype=np.float32), 16).point.shape == (2, 16)


def test_when_the_objective_is_reconstruction_then_the_same_seed_gives_the_same_bytes_with_one_worker_or_two(tmp_path: Path) -> None:
    digests = set()
    for workers in (1, 2):
        spec = _changed(small_spec("fedavg", workers=workers, rounds=2), "model", objective="reconstruct")
        digests |= set(train_small(spec, tmp_path / str(workers)).results().weights_sha256)

    assert len(digests) == 1


def test_when_a_method_has_a_model_that_reconstructs_nothing_then_the_objective_is_refused_before_anything_trains(tmp_path: Path) -> None:
    spec = _changed(small_spec("fedpm"), "model", objective="reconstruct")

    with pytest.raises(SpecError, match="'fedpm' reconstructs nothing"):
        pretrain(spec, output=tmp_path / "run")

    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("horizons", "error", "words"), [((8, 8), "spec", "stands twice"), ((8, 20_000), "split", "holds 20000 steps")])
def test_when_a_horizon_cannot_be_scored_then_it_is_refused_before_anything_trains(
    horizons: tuple[int, ...], error: str, words: str, tmp_path: Path
) -> None:
    document = small_spec("fedavg").to_dict()
    document["evaluation"]["horizons"] = list(horizons)

    with pytest.raises(FedcastError, match=words) as caught:
        pretrain(parse_spec(document), output=tmp_path / "run")

    assert caught.value.code == error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_when_several_horizons_are_asked_for_then_each_has_its_rows_and_tables_average_them(tmp_path: Path) -> None:
    spec = _changed(small_spec("fedavg"), "evaluation", horizons=(8, 16, 24))

    rows = train_small(spec, tmp_path).results()

    assert len(rows) == 2 * 3 * len((*DOMAINS, *HELD_OUT))
    assert set(rows.horizon) == {8, 16, 24}
    assert np.isfinite(rows.mse.to_numpy(dtype=float)).all()
    table = score_table(rows, "mse", held_out=True)
    assert table is not None
    mean = {model: rows[rows.held_out & (rows.model == model)].mse.mean() for model in ("fedavg", "seasonal_naive")}
    assert geometric_mean([table.values[table.models.index("fedavg"), 0]]) == pytest.approx(mean["fedavg"] / mean["seasonal_naive"])

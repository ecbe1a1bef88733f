from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedcast.errors import UnknownNameError
from fedcast.models.base import ModelConfig
from fedcast.models.patch import PatchTransformer
from fedcast.run.medical import ROWS, SETTINGS, Setting, medical_spec, run_medical

QUICK = Setting(rounds=2, steps=1, batch=2, windows=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(d_model=16, n_heads=2, encoder_layers=1, decoder_layers=1, context=512, horizon=64, patch=32)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    PatchTransformer(config).save_pretrained(folder)
    return folder


def test_when_the_paper_s_setting_is_asked_for_then_the_spec_says_what_the_paper_did() -> None:
    spec = medical_spec("amazon/chronos-t5-tiny", method=ROWS["fedprox"])
    assert (spec.model.context, spec.model.horizon) == (512, 64)
    assert (spec.federation.rounds, spec.federation.local_steps, spec.training.batch_size) == (30, 400, 64)
    assert (spec.training.learning_rate, spec.training.schedule, spec.training.schedule_over) == (1e-3, "linear", "round")
    assert spec.training.moments == "reset"
    assert spec.method.options == {"mu": 1.0}
    assert spec.data.test == 0.4
    assert SETTINGS["paper"].windows == 3200


def test_when_no_such_strategy_or_method_exists_then_the_known_ones_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="by-hospital"):
        medical_spec(checkpoint, strategy="by-hospital")
    with pytest.raises(UnknownNameError, match="fedsgd"):
        run_medical(checkpoint, tmp_path, methods=["fedsgd"])


@pytest.mark.usefixtures("real_data")
def test_when_the_benchmark_runs_then_every_method_has_a_row_a_group(checkpoint: Path, tmp_path: Path) -> None:
    rows = run_medical(checkpoint, tmp_path, strategy="medical-real-100hz", methods=["zero_shot", "fedla"], setting=QUICK, seeds=1)
    assert set(rows.model) == {"zero_shot", "fedla", "seasonal_naive"}
    assert set(rows.group) == {"all", "ecg, real", "icg, real"}
    ours = rows[rows.model != "seasonal_naive"]
    assert len(ours) == 2 * 3
    assert np.isfinite(rows[["rmse", "mae", "smape"]].to_numpy(dtype=float)).all()
    assert (rows.rmse >= rows.mae).all()  # of one batch a client; the weights over clients are the same
    zero = ours[ours.model == "zero_shot"]
    assert (zero.bytes_total == 0).all()
    sizes = rows.drop_duplicates("group").set_index("group").clients
    assert sizes["all"] == sizes["ecg, real"] + sizes["icg, real"]


def test_when_a_strategy_is_unknown_then_short_names_are_suggested_and_sources_are_taken_still() -> None:
    with pytest.raises(UnknownNameError) as caught:
        medical_spec("amazon/chronos-t5-tiny", strategy="by-hospital")
    assert caught.value.hint == "known: modality, real, sites, subjects"
    assert medical_spec("amazon/chronos-t5-tiny", strategy="medical-real-100hz").data.source == "medical-real-100hz"

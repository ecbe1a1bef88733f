import threading

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcast.data.frames import read_frame
from fedcast.errors import CheckpointError, FrameError, ModelError, QuantileError, UnknownNameError
from fedcast.models.base import QUANTILES, ModelConfig
from fedcast.models.forecaster import Forecaster, future_stamps
from fedcast.models.mixture import DomainMixture
from fedcast.models.patch import PatchTransformer

CONFIG = ModelConfig(d_model=32, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8)


@pytest.fixture(scope="module")
def forecaster():
    return Forecaster(PatchTransformer(CONFIG, seed=4))


def long_frame(stamps, names=("b", "a"), seed=0):
    generator = np.random.default_rng(seed)
    parts = [pd.DataFrame({"shop": name, "when": stamps, "sales": generator.normal(10, 2, len(stamps))}) for name in names]
    return pd.concat(parts, ignore_index=True)


def predict(forecaster, frame, horizon, **options):
    return forecaster.predict(frame, horizon, id="shop", time="when", target="sales", **options)


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        (pd.date_range("2024-01-01", periods=40, freq="h"), pd.date_range("2024-01-02 16:00", periods=20, freq="h")),
        (pd.date_range("2024-01-01", periods=40, freq="h", tz="UTC"), pd.date_range("2024-01-02 16:00", periods=20, freq="h", tz="UTC")),
        (
            pd.date_range("2024-03-29 10:00", periods=38, freq="h", tz="Europe/Berlin"),
            pd.date_range("2024-03-31 00:00", periods=20, freq="h", tz="Europe/Berlin"),
        ),
        (pd.date_range("2020-01-31", periods=40, freq="ME"), pd.date_range("2023-05-31", periods=20, freq="ME")),
        (pd.date_range("2024-01-05", periods=40, freq="W-FRI"), pd.date_range("2024-10-11", periods=20, freq="W-FRI")),
        (np.arange(100, 180, 2), np.arange(180, 220, 2)),
    ],
)
def test_when_a_frame_is_forecast_then_stamps_and_names_go_on(forecaster, stamps, expected):
    result = predict(forecaster, long_frame(stamps), 20, quantiles=(0.1, 0.25, 0.9))
    assert list(result.columns) == ["shop", "when", "forecast", "q0.1", "q0.25", "q0.9"]
    assert result["shop"].tolist() == ["a"] * 20 + ["b"] * 20
    assert result["when"].tolist() == [*expected, *expected]
    if isinstance(expected, pd.DatetimeIndex):
        assert str(result["when"].dt.tz) == str(expected.tz)
    assert np.isfinite(result[["forecast", "q0.1", "q0.25", "q0.9"]].to_numpy()).all()
    assert (result["q0.1"] <= result["q0.25"]).all()
    assert (result["q0.25"] <= result["q0.9"]).all()


def test_when_each_series_is_forecast_alone_then_the_numbers_are_the_same(forecaster):
    frame = long_frame(pd.date_range("2024-01-01", periods=40, freq="D"), names=("x", "y", "z"))
    frame = frame.drop(index=range(40, 70))  # y is short
    together = predict(forecaster, frame, 5)
    for name in ("x", "y", "z"):
        alone = predict(forecaster, frame[frame["shop"] == name], 5, freq="D")
        columns = ["forecast", "q0.1", "q0.5", "q0.9"]
        np.testing.assert_allclose(alone[columns], together.loc[together["shop"] == name, columns], rtol=1e-5, atol=1e-4)


def test_when_a_file_or_a_read_frame_is_given_then_the_forecast_is_the_same(forecaster, tmp_path):
    frame = long_frame(pd.date_range("2024-01-01", periods=40, freq="D"))
    frame.to_csv(tmp_path / "shops.csv", index=False)
    direct = predict(forecaster, frame, 5)
    pd.testing.assert_frame_equal(predict(forecaster, tmp_path / "shops.csv", 5), direct)
    read = read_frame(frame, id="shop", time="when", target="sales")
    pd.testing.assert_frame_equal(forecaster.predict(read, 5), direct, check_exact=True)


def test_when_a_frame_is_malformed_then_its_error_comes_through(forecaster):
    frame = long_frame(pd.date_range("2024-01-01", periods=40, freq="D"))
    with pytest.raises(FrameError):
        predict(forecaster, pd.concat([frame, frame.iloc[:3]]), 5)


def test_when_saved_and_loaded_then_the_frame_is_equal_to_the_bit(forecaster, tmp_path):
    frame = long_frame(pd.date_range("2024-01-01", periods=40, freq="D"))
    forecaster.model.save_pretrained(tmp_path / "run" / "final")
    expected = predict(forecaster, frame, 30)
    for folder in (tmp_path / "run", tmp_path / "run" / "final", str(tmp_path / "run")):
        pd.testing.assert_frame_equal(predict(Forecaster.from_pretrained(folder), frame, 30), expected, check_exact=True)


def test_when_the_folder_holds_no_model_then_it_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Forecaster.from_pretrained(tmp_path)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(1, 5), st.integers(1, 40))
def test_when_batches_are_cut_differently_then_the_forecast_is_the_same(lengths, batch_size, horizon):
    forecaster = Forecaster(PatchTransformer(CONFIG, seed=4))
    generator = np.random.default_rng(len(lengths))
    contexts = [np.where(generator.random(n) < 0.1, np.nan, generator.normal(100, 3, n)) for n in lengths]
    whole = forecaster.predict_arrays(contexts, horizon)
    cut = forecaster.predict_arrays(contexts, horizon, batch_size=batch_size)
    assert whole.point.shape == (len(lengths), horizon)
    assert whole.quantiles.shape == (len(lengths), horizon, 9)
    assert np.isfinite(whole.point).all()
    assert (np.diff(whole.quantiles, axis=-1) >= 0).all()
    np.testing.assert_allclose(whole.point, cut.point, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(whole.quantiles, cut.quantiles, rtol=1e-5, atol=1e-3)


def test_when_arrays_are_given_then_the_model_itself_gives_the_same(forecaster):
    context = np.random.default_rng(0).normal(5, 2, (3, 64)).astype(np.float32)
    with torch.inference_mode():
        expected = forecaster.model(torch.from_numpy(context), torch.ones(3, 64, dtype=torch.bool), 20)
    result = forecaster.predict_arrays(context, 20)
    np.testing.assert_allclose(result.point, expected.point, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.quantiles, expected.quantiles, rtol=1e-4, atol=1e-4)


def test_when_there_is_no_series_then_the_result_is_empty(forecaster):
    assert forecaster.predict_arrays([], 4).quantiles.shape == (0, 4, 9)


def test_when_progress_is_wanted_then_every_batch_is_told(forecaster):
    seen = []
    forecaster.predict_arrays(np.zeros((5, 8)), 4, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("levels", [(0.05,), (0.5, 0.95), (float("nan"),), (0.0,), (0.5, 0.5)])
def test_when_a_level_was_not_learnt_then_it_is_refused(forecaster, levels):
    with pytest.raises(QuantileError):
        predict(forecaster, long_frame(pd.date_range("2024-01-01", periods=40, freq="D")), 3, quantiles=levels)


def test_when_levels_lie_between_learnt_ones_then_they_are_interpolated(forecaster):
    frame = long_frame(pd.date_range("2024-01-01", periods=40, freq="D"))
    result = predict(forecaster, frame, 7, quantiles=[*QUANTILES, 0.15, 0.825])
    values = read_frame(frame, id="shop", time="when", target="sales").frame["y"].to_numpy().reshape(2, 40)
    learnt = forecaster.predict_arrays(values, 7).quantiles.reshape(-1, 9)
    np.testing.assert_array_equal(result[[f"q{level:g}" for level in QUANTILES]].to_numpy(), learnt)
    np.testing.assert_allclose(result["q0.15"], (learnt[:, 0] + learnt[:, 1]) / 2)
    np.testing.assert_allclose(result["q0.825"], 0.75 * learnt[:, 7] + 0.25 * learnt[:, 8])


def test_when_no_quantiles_are_wanted_then_only_the_forecast_comes(forecaster):
    result = predict(forecaster, long_frame(pd.date_range("2024-01-01", periods=40, freq="D")), 3, quantiles=())
    assert list(result.columns) == ["shop", "when", "forecast"]


def test_when_a_column_has_the_name_of_a_result_then_it_is_refused(forecaster):
    frame = long_frame(pd.date_range("2024-01-01", periods=40, freq="D")).rename(columns={"when": "forecast"})
    with pytest.raises(ModelError, match="one name twice"):
        forecaster.predict(frame, 3, id="shop", time="forecast", target="sales")


@pytest.mark.parametrize("options", [{"horizon": 0}, {"horizon": 3, "batch_size": 0}, {"horizon": 3, "workers": 0}])
def test_when_nothing_is_asked_for_then_it_says_so(forecaster, options):
    with pytest.raises(ModelError, match="at least 1"):
        forecaster.predict_arrays([np.zeros(4)], **options)


def test_when_a_precision_is_not_known_then_the_nearest_one_is_named(forecaster):
    with pytest.raises(UnknownNameError, match="did you mean 'bfloat16'"):
        forecaster.predict_arrays([np.zeros(4)], 3, precision="float16")


def noisy_weeks(count, seed, length=80):
    generator = np.random.default_rng(seed)
    steps = np.arange(length) + generator.integers(0, 12, (count, 1))
    return 50 + 10 * np.sin(2 * np.pi * steps / 12) + generator.normal(0, 2, (count, length))


@pytest.fixture(scope="module")
def trained():
    model = PatchTransformer(CONFIG, seed=4)
    optimiser, levels = torch.optim.AdamW(model.parameters(), 3e-3), torch.tensor(QUANTILES)
    for step in range(60):
        windows = torch.from_numpy(noisy_weeks(32, step)).float()
        output = model.normalised(windows[:, :64], torch.ones(32, 64, dtype=torch.bool), 16)
        truth = (windows[:, 64:] - output.loc) / output.scale
        gap = truth[..., None] - output.quantiles
        loss = torch.maximum(levels * gap, (levels - 1) * gap).mean() + (truth - output.point).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Forecaster(model)


def test_when_bfloat16_is_asked_for_then_forecasts_are_near_and_scores_nearly_the_same(trained):
    series = noisy_weeks(300, 999)
    truth, spread = series[:, 64:], series[:, :64].std(axis=1)[:, None]
    full, short = (trained.predict_arrays(series[:, :64], 16, precision=name) for name in ("float32", "bfloat16"))
    off = np.abs(full.quantiles - short.quantiles) / spread[..., None]
    assert 0 < off.mean() < 0.01
    assert off.max() < 0.05
    assert np.abs(full.point - short.point).max() < 0.05 * spread.max()
    assert (np.diff(short.quantiles, axis=-1) >= 0).all()

    def scores(forecast):
        gap = truth[..., None] - forecast.quantiles
        levels = np.asarray(QUANTILES)
        return np.array([np.maximum(levels * gap, (levels - 1) * gap).mean(), np.square(truth - forecast.point).mean()])

    np.testing.assert_allclose(scores(short), scores(full), rtol=0.003)


def test_when_a_precision_is_asked_for_then_the_model_itself_keeps_its_own(forecaster):
    contexts = noisy_weeks(3, 0)
    before = forecaster.predict_arrays(contexts, 5)
    short = forecaster.predict_arrays(contexts, 5, precision="bfloat16")
    assert forecaster.model.dtype == torch.float32
    converted = Forecaster(PatchTransformer(CONFIG, seed=4).bfloat16())
    np.testing.assert_array_equal(converted.predict_arrays(contexts, 5).point, short.point)
    np.testing.assert_array_equal(forecaster.predict_arrays(contexts, 5, precision="float32").point, before.point)
    fastest = forecaster.predict_arrays(contexts, 5, precision="auto").point
    assert (fastest == before.point).all() or (fastest == short.point).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["one model", "mixture"])
def test_when_workers_are_more_or_fewer_then_the_forecast_is_the_same_to_the_bit(precision, kind):
    models = {str(seed): PatchTransformer(CONFIG, seed=seed) for seed in (4, 5)}
    forecaster = Forecaster(models["4"] if kind == "one model" else DomainMixture(models))
    contexts = [row[: 80 - index] for index, row in enumerate(noisy_weeks(23, 0))]
    threads = torch.get_num_threads()
    alone, *others = (
        forecaster.predict_arrays(contexts, 20, batch_size=5, precision=precision, workers=count) for count in (1, 2, 7, None)
    )
    assert torch.get_num_threads() == threads
    for other in others:
        np.testing.assert_array_equal(other.point, alone.point)
        np.testing.assert_array_equal(other.quantiles, alone.quantiles)


def test_when_it_is_stopped_then_waiting_batches_are_not_forecast_and_threads_are_as_before(forecaster):
    threads, seen = torch.get_num_threads(), []

    def stop(done, total):
        seen.append(done)
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        forecaster.predict_arrays(noisy_weeks(5000, 0), 16, batch_size=1, workers=2, progress=stop)
    assert seen == [1]
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("last", "freq", "expected"),
    [
        (pd.Timestamp("2024-03-30", tz="Europe/Berlin"), "D", ["2024-03-31 00:00+01:00", "2024-04-01 00:00+02:00"]),
        (pd.Timestamp("2024-10-26", tz="Europe/Berlin"), "D", ["2024-10-27 00:00+02:00", "2024-10-28 00:00+01:00"]),
        (pd.Timestamp("2024-10-27 00:30", tz="Europe/Berlin"), "h", ["2024-10-27 01:30+02:00", "2024-10-27 02:30+02:00"]),
        (pd.Timestamp("2024-10-27 02:30+02:00").tz_convert("Europe/Berlin"), "h", ["2024-10-27 02:30+01:00", "2024-10-27 03:30+01:00"]),
        (pd.Timestamp("2024-02-29", tz="America/New_York"), "ME", ["2024-03-31 00:00-04:00", "2024-04-30 00:00-04:00"]),
        (pd.Timestamp("2024-03-29"), "B", ["2024-04-01", "2024-04-02"]),
        (pd.Timestamp("2024-01-01"), "QS-OCT", ["2024-04-01", "2024-07-01"]),
    ],
)
def test_when_a_clock_changes_then_days_stay_days_and_hours_hours(last, freq, expected):
    stamps = future_stamps(pd.Series([last]), freq, 2)
    assert stamps.tolist() == [pd.Timestamp(text).tz_convert(last.tz) if last.tz else pd.Timestamp(text) for text in expected]


def test_when_series_end_at_different_times_then_each_goes_on_from_its_own():
    last = pd.Series(pd.to_datetime(["2024-01-31", "2023-06-30", "2024-01-31"]))
    result = future_stamps(last, "ME", 2)
    assert [str(day.date()) for day in result] == ["2024-02-29", "2024-03-31", "2023-07-31", "2023-08-31", "2024-02-29", "2024-03-31"]

"""Tiny Time Mixers: what is theirs beside the contract, and the real weights where FEDCAST_WEIGHTS names their folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fedcast.errors import CheckpointError
from fedcast.models.base import Output
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.published.ttm import TTM

if TTM.library.installed is None:
    pytest.skip("granite-tsfm is not installed", allow_module_level=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TTM.tiny(0).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | keys), encoding="utf-8")


def library_forward(folder: Path, values: torch.Tensor) -> torch.Tensor:
    """Return the forecast [B, H] of the library's own model."""
    from tsfm_public import TinyTimeMixerForPrediction

    network = TinyTimeMixerForPrediction.from_pretrained(folder).eval()
    with torch.inference_mode():
        forecast: torch.Tensor = network(past_values=values.unsqueeze(-1)).prediction_outputs
    return forecast.squeeze(-1)


def test_when_the_library_reads_what_was_written_then_it_forecasts_the_same(folder: Path) -> None:
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).cumsum(1) + 20
    with torch.inference_mode():
        own = TTM.tiny(0)(values, torch.ones_like(values, dtype=torch.bool), 8).point
    # the library adds 1e-5 to the variance of the raw values, here of the standardised ones
    torch.testing.assert_close(own, library_forward(folder, values), rtol=1e-4, atol=1e-3)


def test_when_the_context_is_short_then_it_counts_as_padded_with_steps_that_were_not_observed() -> None:
    model, values = TTM.tiny(0), torch.linspace(5, 9, 20)[None]
    mask = torch.ones_like(values, dtype=torch.bool)
    padded = torch.nn.functional.pad(values, (12, 0), value=99.0), torch.nn.functional.pad(mask, (12, 0))
    with torch.inference_mode():
        assert torch.equal(model(values, mask, 8).point, model(*padded, 8).point)


def test_when_a_checkpoint_was_trained_on_many_alike_channels_then_it_is_run_with_one(folder: Path) -> None:
    before = load_checkpoint(folder).state_dict()
    change(folder, num_input_channels=7, prediction_channel_indices=[2, 3])
    model = load_checkpoint(folder)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with torch.inference_mode():
        assert model(torch.randn(2, 32), torch.ones(2, 32, dtype=torch.bool), 8).point.shape == (2, 8)


@pytest.mark.parametrize(
    "keys", [{"decoder_mode": "mix_channel"}, {"enable_forecast_channel_mixing": True}, {"norm_mlp": "BatchNorm"}, {"loss": "nll"}]
)
def test_when_one_series_alone_cannot_be_forecast_then_the_checkpoint_is_refused(folder: Path, keys: dict[str, object]) -> None:
    change(folder, **keys)
    with pytest.raises(CheckpointError, match=f"{next(iter(keys.values()))}"):
        load_checkpoint(folder)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "pinball"])
def test_when_the_configuration_names_a_loss_then_it_is_the_librarys(folder: Path, loss: str) -> None:
    change(folder, loss=loss, quantile=0.8)
    model = load_checkpoint(folder)
    assert isinstance(model, TTM)
    generator = torch.Generator().manual_seed(0)
    point, target = torch.randn(2, 5, 8, generator=generator)
    losses = {
        "mse": torch.nn.MSELoss(),
        "mae": torch.nn.L1Loss(),
        "huber": torch.nn.HuberLoss(),
        "pinball": lambda point, target: torch.max(0.8 * (target - point), -0.2 * (target - point)).mean(),
    }
    output = Output(*model.levels(point), *[point] * 4)
    torch.testing.assert_close(model.error(output, target).mean(), losses[loss](point, target))


def test_when_a_model_has_a_frequency_prefix_then_its_features_are_those_of_the_patches(folder: Path) -> None:
    from tsfm_public import TinyTimeMixerConfig, TinyTimeMixerForPrediction

    config = TinyTimeMixerConfig(
        context_length=32, prediction_length=8, patch_length=8, patch_stride=8, d_model=8, num_layers=1, decoder_num_layers=1,
        resolution_prefix_tuning=True, loss="mse",
    )  # fmt: skip
    TinyTimeMixerForPrediction(config).save_pretrained(folder)
    model = load_checkpoint(folder)
    context, mask = torch.randn(2, 32), torch.ones(2, 32, dtype=torch.bool)
    assert model.embed(context, mask).shape == (2, 4, 8)
    assert model(context, mask, 8).point.isfinite().all()


def test_when_the_real_r1_is_read_then_all_is_as_in_its_file_and_it_forecasts_as_its_library(real_weights: Path, real_data: Path) -> None:
    folder = real_weights / "ttm_r1_1024_96_finetuned"
    model = load_checkpoint(folder)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert isinstance(model, TTM)
    assert model.network.state_dict().keys() == stored.keys()
    assert all(torch.equal(model.network.state_dict()[name], value) for name, value in stored.items())
    with gzip.open(real_data / "energy" / "ETTh1.csv.gz", "rt") as file:
        rows = np.loadtxt(file, delimiter=",", skiprows=1, usecols=range(1, 8), max_rows=1024 + 96, dtype=np.float32)
    values = torch.from_numpy(rows.T.copy())
    context, target = values[:, :1024], values[:, 1024:]
    with torch.inference_mode():
        point = model(context, torch.ones_like(context, dtype=torch.bool), 96).point
    scale = context.std(dim=1, keepdim=True)
    torch.testing.assert_close(point / scale, library_forward(folder, context) / scale, rtol=1e-4, atol=1e-4)
    # better than the mean of the context
    assert ((point - target) / scale).square().mean() < ((context.mean(dim=1, keepdim=True) - target) / scale).square().mean()


def test_when_the_real_r2_mixes_31_channels_then_it_is_refused(real_weights: Path) -> None:
    with pytest.raises(CheckpointError, match="decoder mixes channels"):
        load_checkpoint(real_weights / "ttm_r2_512_96_finetuned")

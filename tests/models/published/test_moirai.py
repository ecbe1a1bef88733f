"""Moirai-2: a pass as the library's, its way of forecasting further, and the published checkpoint's configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedcast.models.layers import InstanceNorm
from fedcast.models.published.moirai import Moirai2

pytestmark = pytest.mark.skipif(Moirai2.library.installed is None, reason="uni2ts is not installed")
PUBLISHED = {
    "attn_dropout_p": 0,
    "d_ff": 1024,
    "d_model": 384,
    "dropout_p": 0,
    "max_seq_len": 512,
    "num_layers": 6,
    "num_predict_token": 4,
    "patch_size": 16,
    "quantile_levels": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "scaling": True,
}


@pytest.fixture(scope="module")
def model() -> Moirai2:
    return Moirai2.tiny(0).eval()


def test_when_a_pass_is_trained_on_then_it_is_the_pass_that_the_library_forecasts_with(model: Moirai2) -> None:
    generator = torch.Generator().manual_seed(1)
    context, mask = torch.randn(3, 21, generator=generator), torch.rand(3, 21, generator=generator) > 0.3
    mask[1, :9], mask[1, 9:] = False, True
    with torch.inference_mode():
        output = model.normalised(context, mask, 4)
        forecast = model(context, mask, 4)
    expected = InstanceNorm.inverse(output.quantiles.sort(dim=-1).values, output.loc, output.scale)
    assert torch.allclose(forecast.quantiles, expected, atol=1e-5)
    assert output.feature_mask[1].tolist() == [False] * 5 + [True] * 6


def test_when_a_longer_horizon_is_forecast_then_it_is_the_librarys_prediction(model: Moirai2) -> None:
    from uni2ts.model.moirai2 import Moirai2Forecast

    context = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    runner = Moirai2Forecast(11, 1, 0, 0, 40, module=model.network)
    theirs = runner.predict([row.numpy()[:, None] for row in context])
    with torch.inference_mode():
        own = model(context, torch.ones_like(context, dtype=torch.bool), 11)
    assert np.allclose(own.quantiles.numpy(), np.sort(theirs.transpose(0, 2, 1), axis=-1), atol=1e-3)


def test_when_the_published_configuration_is_read_then_its_shape_is_known() -> None:
    assert Moirai2.recognises(PUBLISHED)
    model = Moirai2.drawn(PUBLISHED, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_387_208
    assert (model.config.context, model.config.horizon, model.config.patch) == (8128, 64, 16)


def test_when_a_model_is_written_then_the_library_reads_it(model: Moirai2, tmp_path: Path) -> None:
    from uni2ts.model.moirai2 import Moirai2Module

    model.save_pretrained(tmp_path)
    read = Moirai2Module.from_pretrained(tmp_path, local_files_only=True, strict=True)
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.network.state_dict().items())

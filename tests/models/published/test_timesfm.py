"""TimesFM 2.5: forecasts as the library's, a loss with each level at its own output, and no negative values for positive series."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedcast.models.base import QUANTILES, Output
from fedcast.models.published.timesfm import TimesFM

pytestmark = pytest.mark.skipif(TimesFM.library.installed is None, reason="transformers is not installed")


@pytest.fixture(scope="module")
def model() -> TimesFM:
    return TimesFM.tiny(0).eval()


def series(rows: int = 3, length: int = 64) -> Tensor:
    return 3 * torch.randn(rows, length, generator=torch.Generator().manual_seed(1)) - 5


def test_when_nothing_is_missing_then_the_quantiles_are_the_librarys(model: TimesFM) -> None:
    context = series()
    with torch.inference_mode():
        own = model(context, torch.ones_like(context, dtype=torch.bool), 16)
        theirs = model.network(past_values=list(context), truncate_negative=False).full_predictions[..., 1:]
    assert torch.allclose(own.quantiles, theirs.sort(dim=-1).values, rtol=1e-4, atol=1e-4)


def test_when_the_first_steps_are_missing_then_the_forecast_is_that_of_the_rest(model: TimesFM) -> None:
    context = series()
    mask = torch.ones_like(context, dtype=torch.bool)
    mask[:, :24] = False
    with torch.inference_mode():
        whole, rest = model(context, mask, 5), model(context[:, 24:], mask[:, 24:], 5)
    assert torch.allclose(whole.quantiles, rest.quantiles, rtol=1e-4, atol=1e-4)


def test_when_the_loss_is_taken_then_each_quantile_has_its_own_level(model: TimesFM) -> None:
    target = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2))
    level = torch.tensor(QUANTILES)
    best = target.flatten().quantile(level)
    quantiles = best.expand(4000, 1, 9).clone().requires_grad_()
    model.error(Output(*model.levels(quantiles), *[target] * 4), target).mean().backward()
    assert quantiles.grad is not None
    slope = quantiles.grad.sum(dim=(0, 1))
    # At its own quantile the pinball loss is flat; the median is trained by the squared error, which is flat at the mean.
    assert slope[[0, 1, 2, 3, 5, 6, 7, 8]].abs().max() < 1e-3
    assert slope[4] == pytest.approx(2 * (best[4] - target.mean()).item(), abs=1e-3)


def test_when_a_series_has_no_negative_value_then_only_its_own_forecast_has_none(model: TimesFM) -> None:
    rare = torch.zeros(64)
    rare[::16] = 5.0
    context = torch.stack([rare, series(1)[0]])
    mask = torch.ones_like(context, dtype=torch.bool)
    with torch.inference_mode():
        both, alone = model(context, mask, 40), model(context[:1], mask[:1], 40)
        output = model.normalised(context, mask, 16)
    assert (output.quantiles[0] < -output.loc[0] / output.scale[0]).any()
    assert (both.quantiles[0] >= 0).all()
    assert (both.quantiles[1] < 0).any()
    assert torch.allclose(both.quantiles[:1], alone.quantiles, atol=1e-6)

"""Sundial: features, sample paths and loss as the authors' class gives them for the same noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcast.data.windows import Batch, Windows
from fedcast.models.base import QUANTILES
from fedcast.models.layers import InstanceNorm
from fedcast.models.published.sundial import SAMPLES, Sundial

pytestmark = [
    pytest.mark.skipif(Sundial.library.installed is None, reason="sktime is not installed"),
    # the authors' own forward pass, which the adapter does not use
    pytest.mark.filterwarnings("ignore:The attention mask API:FutureWarning"),
]


@pytest.fixture(scope="module")
def model() -> Sundial:
    return Sundial.tiny(0).eval()


def normal(rows: int, length: int) -> torch.Tensor:
    values = torch.randn(rows, length, generator=torch.Generator().manual_seed(1))
    return InstanceNorm.forward(values, torch.ones_like(values, dtype=torch.bool))[0]


def test_when_nothing_is_missing_then_the_features_are_the_authors(model: Sundial) -> None:
    values = normal(3, 64)
    with torch.inference_mode():
        own = model.features(values, torch.ones_like(values, dtype=torch.bool))
        theirs = model.network.model(values, use_cache=False, return_dict=True).last_hidden_state
    assert torch.allclose(own, theirs, atol=1e-5)


def test_when_a_window_is_forecast_then_its_quantiles_are_those_of_the_authors_sample_paths(model: Sundial) -> None:
    values = normal(1, 64)
    mask = torch.ones_like(values, dtype=torch.bool)
    with torch.inference_mode(), torch.random.fork_rng():
        quantiles, features = model.one_pass(values, mask)
        torch.manual_seed(0)
        paths = model.network.flow_loss.sample(features[:, -1], SAMPLES)
    assert torch.allclose(quantiles[0], paths[0].quantile(torch.tensor(QUANTILES), dim=0).T, atol=1e-5)


def test_when_a_window_is_forecast_beside_others_then_it_is_forecast_the_same(model: Sundial) -> None:
    values = normal(4, 64)
    mask = torch.ones_like(values, dtype=torch.bool)
    with torch.inference_mode():
        both, alone = model(values, mask, 40), model(values[2:3], mask[2:3], 40)
    assert torch.allclose(both.quantiles[2:3], alone.quantiles, atol=1e-5)


def test_when_a_batch_is_trained_on_then_the_loss_is_the_authors_for_the_same_noise(model: Sundial) -> None:
    values, target = normal(3, 64), torch.randn(3, 20, generator=torch.Generator().manual_seed(2))
    rows = torch.zeros(3, dtype=torch.int64)
    full, seen = torch.ones_like(values, dtype=torch.bool), torch.rand(3, 20, generator=torch.Generator().manual_seed(3)) > 0.2
    batch = Batch(values, full, target, seen, Windows(np.arange(3), np.arange(3)), rows, rows)
    with torch.no_grad(), torch.random.fork_rng():
        own, _ = model.step(batch, lambda: torch.Generator().manual_seed(5))
        features = model.features(values, full)[:, -1]
        padded = [torch.nn.functional.pad(part.float(), (0, 12)).repeat(4, 1) for part in (torch.where(seen, target, 0.0), seen)]
        torch.manual_seed(5)
        theirs = model.network.flow_loss(padded[0], features.repeat(4, 1), None, padded[1])
    assert own.item() == pytest.approx(theirs.item(), rel=1e-4)

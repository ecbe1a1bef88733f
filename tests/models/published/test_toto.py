"""Toto 1.0: the library's distribution and loss, and quantiles of mixtures that are those of their distribution functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import stdtr

from fedcast.models.base import QUANTILES
from fedcast.models.published.toto import Toto, mixture_quantiles

pytestmark = pytest.mark.skipif(Toto.library.installed is None, reason="toto-ts is not installed")


@pytest.fixture(scope="module")
def model() -> Toto:
    return Toto.tiny(0).eval()


def test_when_a_pass_is_run_then_its_distribution_is_the_librarys(model: Toto) -> None:
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[0, :11] = False
    values = torch.where(mask, values, 0.0)
    with torch.inference_mode():
        mixture, loc, scale, features = model.distribution(values, mask)
        theirs = model.network.model(values[:, None], mask[:, None], torch.zeros(2, 1, 32))
    assert torch.equal(loc, theirs.loc[:, 0, -1:])
    assert torch.equal(scale, theirs.scale[:, 0, -1:])
    assert torch.allclose(mixture.mean, theirs.distribution.mean[:, 0, -8:], atol=1e-6)
    assert features.shape == (2, 4, 16)


def test_when_quantiles_of_a_mixture_are_taken_then_its_distribution_function_agrees() -> None:
    from gluonts.torch.distributions.studentT import StudentT

    generator = torch.Generator().manual_seed(3)
    df, loc = 2 + 3 * torch.rand(5, 4, generator=generator), 3 * torch.randn(5, 4, generator=generator)
    scale, weight = 0.3 + torch.rand(5, 4, generator=generator), torch.rand(5, 4, generator=generator)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(probs=weight), StudentT(df, loc, scale))
    quantiles = mixture_quantiles(mixture)
    assert quantiles.shape == (5, 9)
    share = (weight / weight.sum(dim=1, keepdim=True)).numpy()
    reached = [(share * stdtr(df.numpy(), (quantiles[:, [q]].numpy() - loc.numpy()) / scale.numpy())).sum(axis=1) for q in range(9)]
    assert np.abs(np.stack(reached, axis=1) - np.array(QUANTILES)).max() < 0.02


def test_when_a_window_is_forecast_beside_others_then_it_is_forecast_the_same(model: Toto) -> None:
    context = torch.randn(4, 40, generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(context, dtype=torch.bool)
    with torch.inference_mode():
        both, alone = model(context, mask, 12), model(context[2:3], mask[2:3], 12)
    assert torch.allclose(both.quantiles[2:3], alone.quantiles, atol=1e-5)


def test_when_a_model_is_written_then_the_library_reads_it(model: Toto, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    read = type(model.network).load_from_checkpoint(tmp_path, use_memory_efficient_attention=False)
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.network.state_dict().items())

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedcast.errors import CheckpointError, ModelError
from fedcast.models.base import ModelConfig
from fedcast.models.forecaster import Forecaster
from fedcast.models.mixture import DomainMixture
from fedcast.models.patch import PatchTransformer

CONFIG = ModelConfig(d_model=16, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8)
ENCODER = [name for name, _ in PatchTransformer(CONFIG).named_parameters() if name.startswith("encoder.")]


def states(*seeds: int) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters of models that share the first one's encoder."""
    made = {f"domain {seed}": dict(PatchTransformer(CONFIG, seed=seed).state_dict()) for seed in seeds}
    first = next(iter(made.values()))
    return {name: {**state, **{key: first[key] for key in ENCODER}} for name, state in made.items()}


def mixture(*seeds: int) -> DomainMixture:
    return DomainMixture.of(CONFIG, states(*seeds), ENCODER).eval()


def windows(count: int = 5, length: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    context = torch.randn(count, length, generator=torch.Generator().manual_seed(0)).cumsum(1)
    return context, torch.ones_like(context, dtype=torch.bool)


def test_when_there_is_one_expert_then_the_mixture_is_that_model() -> None:
    context, mask = windows()
    alone = PatchTransformer(CONFIG, seed=1)
    ours, theirs = mixture(1)(context, mask, 16), alone(context, mask, 16)
    assert torch.allclose(ours.point, theirs.point, atol=1e-5)
    assert torch.allclose(ours.quantiles, theirs.quantiles, atol=1e-5)


def test_when_experts_share_an_encoder_then_it_is_one_module() -> None:
    model = mixture(1, 2, 3)
    assert len({id(model.expert(name).encoder) for name in model.names}) == 1
    apart = DomainMixture.of(CONFIG, states(1, 2), [])
    assert len({id(apart.expert(name).encoder) for name in apart.names}) == 2


def test_when_one_expert_knows_the_window_then_it_gets_the_weight() -> None:
    context, mask = windows(4, 48)
    made = states(1, 2)
    model = DomainMixture.of(CONFIG, made, ENCODER)
    # Let the last patch be exactly what the second expert forecasts for it.
    known = model.expert("domain 2")(context[:, :-8], mask[:, :-8], 8)
    context[:, -8:] = known.quantiles[..., 4].detach()
    weights = model.weights(context, mask)
    assert torch.allclose(weights.sum(1), torch.ones(4))
    assert (weights[:, 1] > weights[:, 0]).all()


def test_when_an_expert_was_right_on_all_patches_but_the_last_then_it_still_outweighs_one_that_was_lucky_once() -> None:
    context, mask = windows(1, 64)
    model = DomainMixture.of(CONFIG, states(1, 2), ENCODER)
    errors = {end: torch.tensor([[0.1, 1.0]]) for end in range(16, 64, 8)} | {64: torch.tensor([[0.4, 0.1]])}
    model._backtest = lambda context, mask, tail: (errors[context.shape[1]], torch.ones(1, 1, dtype=torch.bool))  # type: ignore[method-assign]

    weights = model.weights(context, mask)

    means = [(0.1**6 * 0.4) ** (1 / 7), 0.1 ** (1 / 7)]
    expected = torch.tensor(means) ** -10.0
    assert torch.allclose(weights, expected / expected.sum())
    assert weights[0, 0] > 0.9


def test_when_a_window_is_multiplied_then_weights_stay_the_same() -> None:
    context, mask = windows()
    model = mixture(1, 2, 3)
    assert torch.allclose(model.weights(context, mask), model.weights(1000 * context, mask), atol=1e-3)


@pytest.mark.parametrize("length", [1, 8])
def test_when_a_window_is_too_short_to_judge_on_then_experts_weigh_the_same(length: int) -> None:
    context, mask = windows(3, length)
    assert torch.allclose(mixture(1, 2).weights(context, mask), torch.full((3, 2), 0.5))


def test_when_only_the_first_patch_is_observed_then_experts_weigh_the_same() -> None:
    context, mask = windows(3, 32)
    mask[:, 8:] = False
    context[:, 8:] = torch.nan
    assert torch.allclose(mixture(1, 2).weights(context, mask), torch.full((3, 2), 0.5))


def test_when_the_tail_is_missing_then_earlier_patches_tell_experts_apart() -> None:
    context, mask = windows(3, 32)
    mask[:, -8:] = False
    context[:, -8:] = torch.nan
    weights = mixture(1, 2).weights(context, mask)
    assert torch.allclose(weights.sum(1), torch.ones(3))
    assert ((weights - 0.5).abs() > 1e-4).all()


def test_when_forecasting_beyond_one_pass_then_it_rolls_and_quantiles_stay_monotone() -> None:
    context, mask = windows()
    forecast = mixture(1, 2, 3)(context, mask, 40)
    assert forecast.point.shape == (5, 40)
    assert (forecast.quantiles.diff(dim=-1) >= 0).all()
    assert forecast.quantiles.isfinite().all()


@pytest.mark.parametrize("shared", [ENCODER, []])
def test_when_saved_and_loaded_then_forecasts_are_bit_equal(shared: list[str], tmp_path: Path) -> None:
    model = DomainMixture.of(CONFIG, states(1, 2, 3), shared).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = Forecaster.from_pretrained(tmp_path / "model")
    assert isinstance(loaded.model, DomainMixture)
    context = windows()[0].numpy()
    before, after = Forecaster(model).predict_arrays(context, 20), loaded.predict_arrays(context, 20)
    assert np.array_equal(before.point, after.point)
    assert np.array_equal(before.quantiles, after.quantiles)


def test_when_a_mixture_is_damaged_or_of_another_kind_then_it_is_refused(tmp_path: Path) -> None:
    mixture(1, 2).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError):
        PatchTransformer.from_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"domain 2"', '"domain 3"'))
    with pytest.raises(CheckpointError, match="domain"):
        DomainMixture.from_pretrained(tmp_path / "model")
    with pytest.raises(ModelError):
        DomainMixture({})

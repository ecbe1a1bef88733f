"""Smoothed full fine-tuning: what the mixture of weights is (sff.md A6)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tests.tuned import MODELS, forecast, same, tiny, weights
from torch import Tensor, nn

from fedcast.errors import SpecError
from fedcast.models.base import ModelConfig
from fedcast.models.patch import PatchTransformer
from fedcast.spec import TuningSpec
from fedcast.tuning.base import build_tuning
from fedcast.tuning.sff import GRID, SFF

SEED = 11


def learnable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("control", ["none", "noise", "shrink"])
def test_when_alpha_is_one_then_training_starts_where_full_fine_tuning_does(name: str, control: str) -> None:
    tuning = build_tuning(TuningSpec(name="sff", options={"alpha": 1, "control": control}))
    assert same(weights(tuning.prepare(tiny(name), SEED)), weights(tiny(name)))


@pytest.mark.parametrize("name", MODELS)
def test_when_alpha_is_zero_then_the_model_is_a_new_one(name: str) -> None:
    new = tiny(name).fresh(SEED)
    mixed = SFF(alpha=0.0).prepare(tiny(name), SEED)
    assert same(learnable(mixed), learnable(new))
    assert torch.equal(forecast(mixed), forecast(new))


@pytest.mark.parametrize("name", MODELS)
def test_when_weights_are_mixed_then_each_tensor_is_the_weighted_mean_and_buffers_are_untouched(name: str) -> None:
    one, two = tiny(name), tiny(name).fresh(SEED)
    mixed = SFF(alpha=0.7).prepare(tiny(name), SEED)
    pre, new = learnable(one), learnable(two)
    for key, tensor in learnable(mixed).items():
        assert torch.allclose(tensor, 0.7 * pre[key] + 0.3 * new[key], rtol=1e-6, atol=1e-7), key
    buffers = dict(one.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in mixed.named_buffers())
    assert all(parameter.requires_grad for parameter in mixed.parameters())


class Tied(PatchTransformer):
    """Two names for one tensor, and a buffer that differs from model to model."""

    architecture = "tied"

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.heads.point.weight = self.encoder.embedding.out.weight
        self.register_buffer("offset", torch.full((2,), float(seed)))


def test_when_a_tensor_is_tied_then_it_is_mixed_once_and_a_buffer_not_at_all() -> None:
    config = ModelConfig(8, 2, 1, 1, context=16, horizon=8, patch=8)
    model = Tied(config, 1)
    before, new = model.heads.point.weight.detach().clone(), Tied(config, SEED).heads.point.weight
    mixed = SFF(alpha=0.5).prepare(model, SEED)
    assert isinstance(mixed, Tied)
    assert mixed.heads.point.weight is mixed.encoder.embedding.out.weight
    assert torch.allclose(mixed.heads.point.weight, 0.5 * before + 0.5 * new)
    assert mixed.get_buffer("offset").tolist() == [1.0, 1.0]


def test_when_weights_are_mixed_then_the_new_model_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    born: list[weakref.ref[PatchTransformer]] = []

    def fresh(self: PatchTransformer, seed: int) -> PatchTransformer:
        model = PatchTransformer(self.config, seed)
        born.append(weakref.ref(model))
        return model

    monkeypatch.setattr(PatchTransformer, "fresh", fresh)
    kept = SFF().prepare(tiny("native"), SEED)
    gc.collect()
    assert kept.training
    assert [model() for model in born] == [None]


def test_when_weights_are_only_shrunk_then_nothing_is_added() -> None:
    before = weights(tiny("native"))
    for key, tensor in weights(SFF(alpha=0.7, control="shrink").prepare(tiny("native"), SEED)).items():
        assert torch.equal(tensor, 0.7 * before[key])


def test_when_noise_is_added_then_it_has_the_spread_of_the_new_weights_but_not_their_values() -> None:
    config = ModelConfig(64, 2, 1, 1, context=32, horizon=8, patch=8)
    name = "encoder.blocks.0.feed_forward.hidden.weight"
    before, new = PatchTransformer(config, 3).get_parameter(name), PatchTransformer(config, SEED).get_parameter(name).detach()
    noisy = SFF(alpha=0.7, control="noise").prepare(PatchTransformer(config, 3), SEED)
    noise = noisy.get_parameter(name).detach() - before.detach()
    assert noise.std().item() == pytest.approx(0.3 * new.std().item(), rel=0.03)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01 * new.std().item())
    assert abs(torch.corrcoef(torch.stack((noise.flatten(), new.flatten())))[0, 1].item()) < 0.05
    gain = "encoder.norm.weight"  # constant in every new model
    assert torch.equal(noisy.get_parameter(gain), PatchTransformer(config, 3).get_parameter(gain))


def test_when_validation_chooses_alpha_then_there_is_a_candidate_each_and_none_is_prepared_unchosen() -> None:
    tuning = build_tuning(TuningSpec(name="sff", options={"alpha": "validation", "control": "shrink"}))
    assert list(tuning.candidates()) == [SFF(alpha, "shrink") for alpha in GRID]
    with pytest.raises(SpecError, match="alpha is still to be chosen"):
        tuning.prepare(tiny("native"), SEED)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "guess"])
def test_when_alpha_is_no_share_then_it_is_refused(alpha: float | str) -> None:
    with pytest.raises(SpecError, match=r"tuning\.alpha"):
        build_tuning(TuningSpec(name="sff", options={"alpha": alpha}))

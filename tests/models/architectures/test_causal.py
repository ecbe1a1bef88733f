from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcast import Forecaster
from fedcast.errors import ModelError
from fedcast.models.architectures import build_model
from fedcast.models.architectures.causal import CausalTransformer, causal_bias
from fedcast.models.base import ModelConfig

CONFIG = ModelConfig(
    d_model=32,
    n_heads=2,
    encoder_layers=2,
    decoder_layers=1,
    context=64,
    horizon=20,
    patch=8,
    architecture="causal",
    settings=(("bias", "mixed"),),
)
PATCHES = 8 + 3


def model_of(seed: int = 3, **changes: object) -> CausalTransformer:
    model = CausalTransformer(replace(CONFIG, **changes), seed)  # type: ignore[arg-type]
    if model.domain is not None:
        with torch.no_grad():
            model.domain.own.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(9))
    return model


@pytest.fixture(scope="module", params=["rope", "learned"])
def model(request: pytest.FixtureRequest) -> CausalTransformer:
    return model_of(position=request.param)


def windows(batch: int, length: int, seed: int = 0, missing: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, length, generator=generator).cumsum(dim=1) * 3 + 10
    mask = torch.rand(batch, length, generator=generator) >= missing
    return torch.where(mask, context, 0.0), mask


def hide(*patches: int, batch: int = 4) -> Tensor:
    hidden = torch.zeros(batch, PATCHES, dtype=torch.bool)
    hidden[:, list(patches)] = True
    return hidden


def test_when_a_configuration_names_it_then_it_is_built_and_its_blocks_are_those_of_encoder_and_decoder() -> None:
    model = build_model(CONFIG)
    assert isinstance(model, CausalTransformer)
    assert len(model.encoder.blocks) == 3
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"encoder", "domain", "heads"}
    assert model.domain is not None
    assert model.domain.own.shape == (PATCHES, 32)
    assert not model.domain.own.any()
    assert "domain" not in {name.split(".")[0] for name, _ in build_model(replace(CONFIG, settings=())).named_parameters()}


@pytest.mark.parametrize("settings", [(("bias", "everything"),), (("axes", "mixed"),)])
def test_when_a_setting_is_unknown_then_it_is_refused(settings: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(ModelError, match="settings"):
        CausalTransformer(replace(CONFIG, settings=settings))


def test_when_a_later_patch_changes_then_no_earlier_representation_does(model: CausalTransformer) -> None:
    values, mask = windows(4, 8 * PATCHES, missing=0.0)
    encoded = model.represent(values, mask, hide(2))
    tokens = encoded.tokens
    changed = tokens.patches.clone()
    changed[:, 6] += 5
    other = model._run(tokens._replace(patches=changed), hide(2), 0).features
    assert torch.equal(other[:, :6], encoded.features[:, :6])
    assert (other[:, 6:] != encoded.features[:, 6:]).any(-1).all()


def test_when_a_patch_is_hidden_then_nothing_of_it_is_seen(model: CausalTransformer) -> None:
    values, mask = windows(4, 8 * PATCHES)
    hidden = hide(1, 4, 10)
    one = model.output(model.represent(values, mask, hidden))
    points = hidden.repeat_interleave(8, dim=1)
    two = model.output(model.represent(torch.where(points, 1e6, values), mask, hidden))
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first, second)
    assert torch.allclose(one.loc, ((values * mask * ~points).sum(1) / (mask & ~points).sum(1)).unsqueeze(1))


def test_when_a_patch_is_missing_then_it_is_no_key_and_what_is_hidden_is_one() -> None:
    usable = torch.tensor([[False, True, True, False]])
    allowed = causal_bias(usable, torch.float32)[0, 0] == 0
    assert allowed.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [False, True, True, True],
    ]


def test_when_a_forecast_is_made_then_it_is_the_hidden_horizon_filled_in(model: CausalTransformer) -> None:
    context, mask = windows(4, 64)
    output = model.normalised(context, mask, 20)
    values, seen = (torch.nn.functional.pad(x, (0, 24)) for x in (context, mask))
    whole = model.output(model.represent(values, seen, hide(8, 9, 10)))
    assert torch.allclose(output.point, whole.point[:, 64:84], atol=1e-5)
    assert torch.allclose(output.quantiles, whole.quantiles[:, 64:84], atol=1e-5)
    # Causal: a shorter horizon is the beginning of a longer one, and the context's features are those without any horizon.
    assert torch.allclose(model.normalised(context, mask, 5).point, output.point[:, :5], atol=1e-5)
    assert torch.allclose(model.encode(context, mask).features, output.features, atol=1e-5)
    assert torch.allclose(model.decode(model.encode(context, mask), 20).point, output.point, atol=1e-6)
    data = model.fill(values, seen, hide(8, 9, 10))[:, 64:84]
    assert torch.allclose(data, model(context, mask, 20).point, rtol=1e-4, atol=1e-3)


def test_when_other_windows_share_the_batch_then_a_forecast_stays(model: CausalTransformer) -> None:
    context, mask = windows(4, 64)
    mask[2, :40] = False
    alone = torch.cat([model.normalised(context[i : i + 1], mask[i : i + 1], 20).point for i in range(4)])
    assert torch.allclose(alone, model.normalised(context, mask, 20).point, atol=1e-5)


def test_when_there_is_a_bias_then_it_is_added_before_the_head() -> None:
    model = model_of()
    values, mask = windows(4, 8 * PATCHES)
    encoded = model.represent(values, mask, hide(3))
    bias = torch.randn(PATCHES, 32, generator=torch.Generator().manual_seed(1))
    expected = (encoded.features + bias) @ model.heads.point.weight.T + model.heads.point.bias
    assert torch.allclose(model.output(encoded, bias).point, expected.flatten(1), atol=1e-5)
    assert model.domain is not None
    assert torch.equal(model.output(encoded).point, model.output(encoded, model.domain.own).point)


def test_when_the_quantiles_are_trained_then_nothing_but_their_head_gets_a_gradient() -> None:
    model = model_of()
    values, mask = windows(4, 8 * PATCHES)
    model.output(model.represent(values, mask, hide(3))).quantiles.sum().backward()  # type: ignore[no-untyped-call]
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"heads.quantiles.weight", "heads.quantiles.bias"}


def test_when_values_are_learnt_then_second_derivatives_exist_also_at_a_constant_window() -> None:
    model = model_of()
    model.use_explicit()
    values, mask = windows(4, 8 * PATCHES, missing=0.0)
    values[0] = 2.0
    values.requires_grad_(True)
    point = model.output(model.represent(values, mask, hide(3, 5))).point
    gradient = torch.autograd.grad(point.square().mean(), model.encoder.blocks[-1].qkv.weight, create_graph=True)[0]
    (second,) = torch.autograd.grad(gradient.square().sum(), values)
    assert second.isfinite().all()
    assert second.abs().sum() > 0


def test_when_attention_is_explicit_then_the_result_is_the_same() -> None:
    one, two = model_of(), model_of()
    two.use_explicit()
    context, mask = windows(4, 64)
    assert torch.allclose(one.normalised(context, mask, 20).point, two.normalised(context, mask, 20).point, atol=1e-5)


@pytest.mark.parametrize("axes", ["mixed", "batch+token"])
def test_when_a_model_is_saved_then_it_forecasts_the_same_to_the_bit(axes: str, tmp_path: Path) -> None:
    model = model_of(settings=(("bias", axes),))
    model.save_pretrained(tmp_path / "model")
    again = Forecaster.from_pretrained(tmp_path / "model").model
    assert isinstance(again, CausalTransformer)
    context, mask = windows(4, 64)
    with torch.inference_mode():
        for first, second in zip(model(context, mask, 50), again(context, mask, 50), strict=True):
            assert torch.equal(first, second)


def test_when_windows_are_hard_then_forecasts_are_finite() -> None:
    rng = np.random.default_rng(0)
    contexts = [np.full(70, np.nan), np.zeros(30), np.array([3.0]), 1e30 * rng.normal(size=64), rng.normal(size=5), np.full(64, 7.0)]
    for dtype in (torch.float32, torch.bfloat16):
        forecast = Forecaster(model_of().to(dtype)).predict_arrays(contexts, 45)
        assert np.isfinite(forecast.point).all()
        assert (np.diff(forecast.quantiles, axis=-1) >= 0).all()


def test_when_it_computes_in_bfloat16_then_it_is_close_to_float32() -> None:
    context, mask = windows(8, 64)
    exact, short = model_of().normalised(context, mask, 20), model_of().to(torch.bfloat16).normalised(context, mask, 20)
    assert short.point.dtype == torch.float32
    assert (exact.point - short.point).abs().max() < 0.05


def test_when_shapes_do_not_fit_then_they_are_refused() -> None:
    model = model_of()
    values, mask = windows(4, 8 * PATCHES)
    for wrong in (hide(1)[:, 1:], hide(1)[:2]):
        with pytest.raises(ModelError, match="do not fit"):
            model.represent(values, mask, wrong)
    with pytest.raises(ModelError, match="21"):
        model.normalised(values, mask, 21)


def test_when_the_seed_is_the_same_then_so_are_the_weights_and_the_global_state_is_untouched() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (CausalTransformer(CONFIG, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["heads.point.weight"], other["heads.point.weight"])


@pytest.mark.usefixtures("compiled")
def test_when_native_kernels_compute_then_outputs_and_gradients_are_those_of_torch() -> None:
    config = replace(CONFIG, d_model=64)
    values, mask = windows(4, 8 * PATCHES)
    mask[1, :30] = False
    outputs, gradients = [], []
    for native in (False, True):
        model = CausalTransformer(config, 3).to(torch.bfloat16)
        model.use_native(native)
        output = model.output(model.represent(values, mask, hide(2, 5, 10)))
        output.point.square().mean().backward()  # type: ignore[no-untyped-call]
        outputs.append(output.point)
        gradients.append(model.encoder.blocks[0].qkv.weight.grad.float())
    assert (outputs[0] - outputs[1]).abs().max() < 0.05
    assert torch.nn.functional.cosine_similarity(gradients[0].flatten(), gradients[1].flatten(), dim=0) > 0.99

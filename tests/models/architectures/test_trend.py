"""The masked reconstructor of FFTS: its formulas, what a window may influence, and that it forecasts, saves and loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedcast.errors import CheckpointError, ModelError
from fedcast.models.architectures import build_model
from fedcast.models.architectures.trend import (
    SCALES,
    Gate,
    PatchDecoder,
    TrendAwareness,
    TrendBlock,
    TrendSettings,
    TrendTransformer,
    WindowDecoder,
    choose_experts,
    moving_average,
)
from fedcast.models.base import ModelConfig
from fedcast.models.forecaster import Forecaster
from fedcast.models.layers import InstanceNorm, sinusoids
from fedcast.models.mixture import DomainMixture
from fedcast.models.patch import PatchTransformer

CONFIG = ModelConfig(
    d_model=16,
    n_heads=2,
    encoder_layers=2,
    decoder_layers=1,
    context=64,
    horizon=16,
    patch=8,
    architecture="trend",
    settings=(("top_k", 2),),
)
VARIANTS = [
    (),
    (("experts", "mlp"), ("scaled", 1)),
    (("experts", "none"),),
    (("top_k", 4), ("scaled", 1)),
    (("head", "patch"),),
]


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value: the layers leave theirs empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module


def tokens(batch: int = 3, count: int = 12, width: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def windows(count: int = 5, length: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    context = 10 + torch.randn(count, length, generator=torch.Generator().manual_seed(seed)).cumsum(1)
    return context, torch.ones_like(context, dtype=torch.bool)


@pytest.fixture(params=VARIANTS, ids=str)
def model(request: pytest.FixtureRequest) -> TrendTransformer:
    built = build_model(replace(CONFIG, settings=request.param), seed=3)
    assert isinstance(built, TrendTransformer)
    return built.eval()


@pytest.mark.parametrize(("count", "kernel"), [(40, 25), (12, 25), (9, 3), (5, 1)])
def test_when_averaged_then_neighbours_count_and_edges_are_repeated(count: int, kernel: int) -> None:
    x = tokens(2, count, 3)
    matrix = moving_average(count, kernel, torch.float32, x.device)
    padded = F.pad(x.transpose(1, 2), (kernel // 2, kernel // 2), mode="replicate")
    assert torch.allclose(matrix @ x, F.avg_pool1d(padded, kernel, stride=1).transpose(1, 2), atol=1e-6)


def test_when_positions_are_fixed_then_they_are_the_transformers() -> None:
    table = sinusoids(20, 8, torch.float64, torch.device("cpu"))
    expected = [[np.sin(p / 10000 ** (i / 8)) if i % 2 == 0 else np.cos(p / 10000 ** ((i - 1) / 8)) for i in range(8)] for p in range(20)]
    assert torch.allclose(table, torch.tensor(expected))


@given(st.integers(1, 4), st.integers(0, 1000))
def test_when_experts_are_chosen_then_the_largest_chances_are_kept_and_sum_to_one(top_k: int, seed: int) -> None:
    chances = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    weights = choose_experts(chances, top_k)
    for token, row in zip(chances.flatten(0, 1).tolist(), weights.flatten(0, 1).tolist(), strict=True):
        kept = sorted(range(4), key=lambda e: -token[e])[:top_k]
        mass = sum(token[e] for e in kept)
        assert row == pytest.approx([token[e] / mass if e in kept else 0.0 for e in range(4)], abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_when_any_number_of_experts_is_used_then_the_gate_learns(top_k: int) -> None:
    awareness = fill(TrendAwareness(16, TrendSettings(top_k=top_k)))
    (awareness(tokens()) ** 2).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in awareness.gate.parameters())


def test_when_one_expert_is_used_then_every_expert_has_tokens_and_every_token_an_expert() -> None:
    # The released code uses the first expert on the first patches, and nothing elsewhere.
    weights = choose_experts(fill(Gate(16, 25), seed=4)(tokens(64, 24)), 1)
    assert torch.equal(weights.sum(-1), torch.ones(64, 24))
    assert (weights.sum((0, 1)) > 0).all()


def test_when_a_gate_opens_then_trend_and_rest_are_weighed_as_in_the_equation() -> None:
    gate, x = fill(Gate(16, 5)), tokens()
    trend = torch.stack([torch.stack([x[:, [min(max(i + o, 0), 11) for o in range(-2, 3)]].mean(1) for i in range(12)], 1)])[0]

    def branch(part: nn.Linear, norm: nn.LayerNorm, y: Tensor) -> Tensor:
        z = y @ part.weight.T + part.bias
        return (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias

    hidden = branch(gate.trend, gate.trend_norm, trend) + branch(gate.season, gate.season_norm, x - trend)
    expected = (hidden.clamp_min(0) @ gate.out.weight.T + gate.out.bias).softmax(-1)
    assert torch.allclose(gate(x), expected, atol=1e-5)


@pytest.mark.parametrize("experts", ["linear", "mlp"])
def test_when_trend_awareness_is_computed_then_it_is_the_weighted_sum_of_scaled_experts(experts: str) -> None:
    settings = TrendSettings(experts=experts, scaled=1, top_k=2)
    awareness, x = fill(TrendAwareness(16, settings)), tokens()
    weights = choose_experts(awareness.gate(x), 2)
    expected = torch.zeros_like(x)
    for number, name in enumerate(("second", "minute", "hour", "day")):
        expert = awareness.experts[name]
        if experts == "linear":
            y = x @ expert.layers.weight.T + expert.layers.bias
        else:
            hidden = F.gelu(x @ expert.layers.hidden.weight.T + expert.layers.hidden.bias)
            y = hidden @ expert.layers.out.weight.T + expert.layers.out.bias
        expected += weights[..., number : number + 1] * expert.scale * y
    assert torch.allclose(awareness(x), expected, atol=1e-5)


@pytest.mark.parametrize("experts", ["linear", "mlp", "none"])
def test_when_a_block_is_computed_then_residuals_and_norms_stand_where_the_experts_demand(experts: str) -> None:
    block, x = fill(TrendBlock(CONFIG, TrendSettings(experts=experts))), tokens()
    query, key, value = (part.view(3, 12, 2, 8).transpose(1, 2) for part in block.qkv(x).chunk(3, dim=-1))
    mixed = ((query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value).transpose(1, 2).reshape(3, 12, 16)
    first = block.attention_norm(x + block.out(mixed))
    if experts == "linear":
        expected = block.forward_norm(first + block.trend(block.feed_forward(first)))
    else:
        expected = block.forward_norm(first + block.feed_forward(first))
    if experts == "mlp":
        expected = block.trend_norm(expected + block.trend(expected))
    assert torch.allclose(block(x, torch.zeros(3, 1, 1, 12)), expected, atol=1e-5)


def test_when_the_width_is_the_papers_then_the_module_is_as_large_as_the_papers() -> None:
    """1,315,332 a layer is what the bytes reported for FFTS say (ffts.md B2); today's experts add 35.7 MB in two layers."""
    with torch.device("meta"):
        then = TrendAwareness(512, TrendSettings())
        now = TrendAwareness(512, TrendSettings(experts="mlp", scaled=1))
        norm = nn.LayerNorm(512)
    assert sum(p.numel() for p in then.parameters()) == 1_315_332
    assert 2 * 4 * sum(p.numel() for p in (*now.parameters(), *norm.parameters())) == pytest.approx(35.7e6, rel=0.01)


def test_when_the_settings_are_todays_then_the_model_is_as_large_as_the_released_one() -> None:
    settings = (("experts", "mlp"), ("scaled", 1))
    config = ModelConfig(512, 8, 2, 1, context=496, horizon=16, patch=16, architecture="trend", settings=settings)
    with torch.device("meta"):
        model = TrendTransformer(config)
    paper = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("heads."))
    assert paper == pytest.approx(32.0e6, rel=0.005)


def test_when_experts_are_scaled_then_the_scales_start_as_released() -> None:
    model = build_model(replace(CONFIG, settings=(("scaled", 1),)))
    starts = {name.split(".")[-2]: p.item() for name, p in model.named_parameters() if name.endswith(".scale")}
    assert starts == pytest.approx({"second": 0.1, "minute": 0.3, "hour": 0.5, "day": 1.0})
    assert dict(SCALES) == pytest.approx(starts)


def test_when_a_window_is_decoded_then_all_tokens_reach_every_point() -> None:
    decoder, x = fill(WindowDecoder(12, 48, 16)), tokens()
    expected = x.flatten(1) @ decoder.out.weight.T + decoder.out.bias
    assert torch.allclose(decoder(x, 40, 44), expected[:, 40:44], atol=1e-5)


def test_when_patches_are_decoded_then_overlapping_ones_are_averaged() -> None:
    decoder, x = fill(PatchDecoder(8, 4, 16)), tokens()
    total, count = torch.zeros(3, 52), torch.zeros(52)
    for number in range(12):
        total[:, 4 * number : 4 * number + 8] += decoder.out(x[:, number])
        count[4 * number : 4 * number + 8] += 1
    assert torch.allclose(decoder(x, 0, 48), (total / count)[:, :48], atol=1e-5)


def test_when_encoded_then_patches_overlap_by_half_and_the_horizon_is_hidden(model: TrendTransformer) -> None:
    context, mask = windows()
    encoded = model.encode(context, mask)
    values, _, _ = InstanceNorm.forward(context, mask)
    assert encoded.memory.shape == (5, (64 + 16) // 4, 16)
    assert encoded.features.shape == (5, 64 // 4, 16)
    for number in (0, 1, 7, 14):
        assert torch.allclose(encoded.tokens.patches[:, number], values[:, 4 * number : 4 * number + 8], atol=1e-6)
    assert torch.equal(encoded.tokens.patches[:, 15, 4:], torch.zeros(5, 4))
    assert torch.equal(encoded.bias[:, 0, 0] == 0, torch.arange(20).expand(5, -1) < 16)


def test_when_points_are_hidden_then_their_values_have_no_influence(model: TrendTransformer) -> None:
    values, mask = windows(length=80)
    mask[:, 10:20] = False
    first, second = model.represent(values, mask), model.represent(torch.where(mask, values, 1e6), mask)
    assert torch.equal(model.restore(first, 80), model.restore(second, 80))
    assert torch.equal(first.tokens.scale, second.tokens.scale)


def test_when_the_whole_horizon_is_hidden_then_filling_it_in_is_the_forecast(model: TrendTransformer) -> None:
    values, mask = windows(length=80)
    mask[:, :5] = False
    mask[:, 64:] = False
    encoded = model.represent(values, mask)
    output = model.normalised(values[:, :64], mask[:, :64], 16)
    assert torch.allclose(model.restore(encoded, 16), output.point, atol=1e-5)
    assert torch.allclose(model.decode(encoded, 16).quantiles, output.quantiles, atol=1e-5)
    filled = model.fill(values, mask, F.pad(torch.zeros(5, 8, dtype=torch.bool), (0, 2), value=True))
    assert torch.allclose(filled[:, 64:], model(values[:, :64], mask[:, :64], 16).point, atol=1e-3)


def test_when_a_shorter_window_is_filled_in_then_its_beginning_counts_as_missing(model: TrendTransformer) -> None:
    values, mask = windows(length=40)
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[:, 2] = True
    whole = model.fill(F.pad(values, (40, 0)), F.pad(mask, (40, 0)), F.pad(hidden, (5, 0)))
    assert torch.allclose(model.fill(values, mask, hidden), whole[:, 40:], atol=1e-4)


@pytest.mark.parametrize("length", [30, 96])
def test_when_a_window_does_not_fit_then_it_is_refused(model: TrendTransformer, length: int) -> None:
    with pytest.raises(ModelError, match="do not fit"):
        model.represent(*windows(length=length))


def test_when_decoded_then_context_and_horizon_are_parts_of_one_window(model: TrendTransformer) -> None:
    encoded = model.encode(*windows())
    whole = model.decoder(encoded.memory, 0, 80)
    assert torch.allclose(model.restore(encoded, 40), whole[:, 40:], atol=1e-6)
    assert torch.allclose(model.decode(encoded, 16).point, whole[:, 64:], atol=1e-6)


@pytest.mark.parametrize("length", [1, 8, 30, 64, 100])
@pytest.mark.parametrize("horizon", [1, 16, 40])
def test_when_context_and_horizon_have_any_length_then_forecasts_are_finite_and_sorted(
    model: TrendTransformer, length: int, horizon: int
) -> None:
    forecast = model(*windows(length=length), horizon)
    assert forecast.point.shape == (5, horizon)
    assert forecast.quantiles.shape == (5, horizon, 9)
    assert forecast.quantiles.isfinite().all()
    assert (forecast.quantiles.diff(dim=-1) >= 0).all()


def test_when_the_context_is_empty_constant_or_missing_then_the_forecast_is_finite(model: TrendTransformer) -> None:
    context = torch.cat((torch.zeros(1, 64), torch.full((1, 64), 7.0), torch.full((1, 64), 3e38)))
    for mask in (torch.ones_like(context, dtype=torch.bool), torch.zeros_like(context, dtype=torch.bool)):
        assert model(context, mask, 16).quantiles.isfinite().all()


def test_when_a_window_is_alone_or_its_beginning_is_missing_then_its_forecast_is_the_same(model: TrendTransformer) -> None:
    context, mask = windows(length=30)
    together = model(context, mask, 16)
    padded = model(F.pad(context, (34, 0)), F.pad(mask, (34, 0)), 16)
    alone = model(context[2:3], mask[2:3], 16)
    assert torch.allclose(together.point, padded.point, atol=1e-4)
    assert torch.allclose(together.point[2:3], alone.point, atol=1e-4)


def test_when_quantiles_are_trained_then_the_papers_weights_get_no_gradient(model: TrendTransformer) -> None:
    model.normalised(*windows(), 16).quantiles.square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"heads.quantiles.weight", "heads.quantiles.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_when_gradients_are_taken_then_they_are_finite_and_reach_every_parameter(model: TrendTransformer, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    context, mask = windows(16)
    encoded = model.encode(context, mask)
    output = model.decode(encoded, 16)
    (output.point.square().sum() + output.quantiles.square().sum() + model.restore(encoded, 80).square().sum()).backward()
    for name, parameter in model.named_parameters():
        # With one expert a token, an expert without tokens gets none.
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_when_parameters_are_bfloat16_then_forecasts_are_close() -> None:
    model = build_model(replace(CONFIG, settings=(("top_k", 4),)), seed=1)
    context, mask = windows()
    exact, rounded = model(context, mask, 16), build_model(model.config, seed=1).bfloat16()(context, mask, 16)
    assert rounded.point.dtype == torch.float32
    assert (exact.point - rounded.point).abs().max() < 0.05 * context.std()


def test_when_the_seed_is_the_same_then_so_are_the_weights_and_the_global_state_is_untouched() -> None:
    before = torch.random.get_rng_state()
    first, second, third = (build_model(CONFIG, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.encoder.embedding.weight, third.encoder.embedding.weight)
    assert all(p.isfinite().all() for p in first.parameters())


def test_when_saved_and_loaded_then_forecasts_are_equal_to_the_bit(model: TrendTransformer, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    context, mask = windows()
    loaded = Forecaster.from_pretrained(tmp_path / "model").model
    assert isinstance(loaded, TrendTransformer)
    ours, theirs = model(context, mask, 24), loaded(context, mask, 24)
    assert torch.equal(ours.point, theirs.point)
    assert torch.equal(ours.quantiles, theirs.quantiles)
    with pytest.raises(CheckpointError, match="'trend'"):
        PatchTransformer.from_pretrained(tmp_path / "model")


def test_when_models_are_mixed_then_the_mixture_of_one_is_that_model(model: TrendTransformer) -> None:
    mixture = DomainMixture.of(model.config, {"a": dict(model.state_dict())}, [])
    context, mask = windows()
    assert torch.allclose(mixture(context, mask, 16).point, model(context, mask, 16).point, atol=1e-5)


@pytest.mark.parametrize("setting", [("colour", 1), ("top_k", 5), ("experts", "many"), ("kernel", 4), ("scaled", 2)])
def test_when_a_setting_is_unknown_or_refused_then_it_is_named(setting: tuple[str, int | str]) -> None:
    with pytest.raises(ModelError, match=rf"{setting[0]}|moving average"):
        build_model(replace(CONFIG, settings=(setting,)))


def test_when_the_patch_is_odd_then_patches_do_not_overlap() -> None:
    model = build_model(replace(CONFIG, patch=5, settings=(("head", "patch"),)))
    assert model.encode(*windows()).memory.shape[1] == 13 + 4
    assert model(*windows(), 16).point.isfinite().all()


def test_when_shapes_do_not_fit_then_they_are_named(model: TrendTransformer) -> None:
    with pytest.raises(ModelError, match=r"context .* and mask"):
        model(torch.zeros(3, 20), torch.ones(3, 21, dtype=torch.bool), 16)

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcast.data.windows import Batch, Windows
from fedcast.errors import CheckpointError, ModelError
from fedcast.models.base import ModelConfig
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.contract import Model
from fedcast.models.patch import PatchTransformer
from fedcast.models.published.base import FAMILIES
from fedcast.models.reheaded import BASE, HeadKind, Reheaded, ReheadedConfig, build_head

CONFIG = ModelConfig(d_model=16, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8)
KINDS: tuple[HeadKind, ...] = ("flatten", "depthwise")


def moment() -> Model:
    if FAMILIES["moment"].library.installed is None:
        pytest.skip("momentfm is not installed")
    return FAMILIES["moment"].tiny(0)


BASES: dict[str, Callable[[], Model]] = {"native": lambda: PatchTransformer(CONFIG, seed=1), "moment": moment}


@pytest.fixture(params=sorted(BASES))
def base(request: pytest.FixtureRequest) -> Model:
    return BASES[request.param]()


def batch(context: int = 64, horizon: int = 16, rows: int = 6) -> Batch:
    """Sines of several periods, with gaps in the first rows."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(context + horizon)
    values = 5 + torch.sin(2 * torch.pi * steps / torch.arange(6, 6 + rows)[:, None]) * torch.arange(1, 1 + rows)[:, None]
    values = values + 0.1 * torch.randn(values.shape, generator=generator)
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[0, :20], mask[1, -3:] = False, False
    values = torch.where(mask, values, 0.0)
    places, label = np.arange(rows), torch.zeros(rows, dtype=torch.int64)
    return Batch(values[:, :context], mask[:, :context], values[:, context:], mask[:, context:], Windows(places, places), label, label)


def no_draws() -> torch.Generator:
    raise AssertionError("nothing is drawn")


@pytest.mark.parametrize(
    ("kind", "horizon", "width", "parameters"),
    [
        ("flatten", 96, 64, 4_718_688),
        ("flatten", 192, 64, 9_437_376),
        ("flatten", 336, 64, 16_515_408),
        ("flatten", 720, 64, 35_390_160),
        ("depthwise", 96, 32, 224_384),
        ("depthwise", 96, 64, 445_600),
        ("depthwise", 96, 128, 888_032),
        ("depthwise", 192, 32, 421_088),
        ("depthwise", 192, 64, 838_912),
        ("depthwise", 192, 128, 1_674_560),
        ("depthwise", 336, 32, 716_144),
        ("depthwise", 336, 64, 1_428_880),
        ("depthwise", 336, 128, 2_854_352),
        ("depthwise", 720, 32, 1_502_960),
        ("depthwise", 720, 64, 3_002_128),
        ("depthwise", 720, 128, 6_000_464),
    ],
)
def test_when_a_head_is_built_for_moment_base_then_it_has_the_papers_number_of_parameters(
    kind: HeadKind, horizon: int, width: int, parameters: int
) -> None:
    with torch.device("meta"):
        head = build_head(ReheadedConfig(kind, width, context=512, horizon=horizon, patch=8, d_model=768, tokens=64))
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters


@pytest.mark.parametrize("kind", KINDS)
def test_when_a_head_is_put_on_a_model_then_the_seed_alone_decides_its_weights(base: Model, kind: HeadKind) -> None:
    before = torch.get_rng_state()
    one, same, other = (Reheaded.on(base, kind, seed=seed).network.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
def test_when_a_new_head_is_trained_then_the_loss_falls_and_the_frozen_model_stays(base: Model, kind: HeadKind) -> None:
    base.requires_grad_(False)
    model, start = Reheaded.on(base, kind, width=8), copy.deepcopy(base.state_dict())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss, encoding = model.step(batch(), no_draws)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not encoding.features.requires_grad
    assert all(torch.equal(value, start[name]) for name, value in base.state_dict().items())


def test_when_the_model_under_the_head_trains_then_the_gradient_reaches_it(base: Model) -> None:
    model = Reheaded.on(base, "depthwise", width=8)
    loss, encoding = model.step(batch(), no_draws)
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {model.part(name).split(".")[0] for name in reached} == {"encoder", "heads"}
    assert any(name.startswith("base.") for name in reached)
    assert encoding.features.shape == (6, model.config.tokens, model.config.d_model)
    assert encoding.feature_mask.shape == (6, model.config.tokens)
    assert not encoding.feature_mask[0, :2].any()


def test_when_the_features_carry_no_gradient_then_training_what_is_before_them_is_refused() -> None:
    base = PatchTransformer(CONFIG, seed=1)
    model = Reheaded.on(base, "flatten")
    embed = base.embed
    base.embed = lambda context, mask: embed(context, mask).detach()  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="carry no gradient"):
        model.step(batch(), no_draws)
    base.requires_grad_(False)
    model.step(batch(), no_draws)[0].backward()


def test_when_parts_are_asked_for_then_only_the_new_head_is_a_head(base: Model) -> None:
    model = Reheaded.on(base, "flatten")
    heads = {name for name, _ in model.named_parameters() if model.head(name)}
    assert heads == {"network.out.weight", "network.out.bias"}
    assert any(base.head(name) for name, _ in base.named_parameters())


@pytest.mark.parametrize("length", [5, 40, 64, 90])
def test_when_the_window_is_shorter_or_longer_than_the_fixed_context_then_it_is_forecast(base: Model, length: int) -> None:
    model = Reheaded.on(base, "depthwise", width=8).eval()
    values, mask = torch.randn(3, length, generator=torch.Generator().manual_seed(1)), torch.ones(3, length, dtype=torch.bool)
    with torch.inference_mode():
        result = model(values, mask, 16)
        last = model(values[:, -64:], mask[:, -64:], 16)
    assert result.point.shape == (3, 16)
    assert result.point.isfinite().all()
    assert torch.equal(result.quantiles, result.point.unsqueeze(-1).expand(-1, -1, 9))
    assert torch.equal(result.point, last.point)


def test_when_more_than_one_pass_is_asked_for_then_the_forecast_is_rolled(base: Model) -> None:
    model = Reheaded.on(base, "flatten", horizon=8).eval()
    data = batch()
    with torch.inference_mode():
        first, rolled = model(data.context, data.mask, 8), model(data.context, data.mask, 20)
        context, mask = torch.cat((data.context, first.point), 1), torch.cat((data.mask, torch.ones(6, 8, dtype=torch.bool)), 1)
        second = model(context, mask, 8)
    assert rolled.point.shape == (6, 20)
    assert torch.allclose(rolled.point[:, :8], first.point, atol=1e-5)
    assert torch.allclose(rolled.point[:, 8:16], second.point, atol=1e-4)


def test_when_data_are_shifted_and_scaled_then_the_forecast_is_too(base: Model) -> None:
    model, data = Reheaded.on(base, "depthwise", width=8).eval(), batch()
    with torch.inference_mode():
        plain = model(data.context, data.mask, 16).point
        moved = model(torch.where(data.mask, 3 * data.context + 100, 0.0), data.mask, 16).point
    assert torch.allclose(3 * plain + 100, moved, rtol=1e-3, atol=1e-2)


def test_when_a_horizon_or_context_does_not_fit_then_the_error_says_which() -> None:
    model = Reheaded.on(PatchTransformer(CONFIG), "flatten", horizon=8)
    with pytest.raises(ModelError, match="forecasts 8 steps a pass and cannot be trained on 16"):
        model.step(batch(), no_draws)
    with pytest.raises(ModelError, match="a context of 65 steps is more than the 64"):
        Reheaded.on(PatchTransformer(CONFIG), "flatten", context=65)
    with pytest.raises(ModelError, match="do not fit"):
        model(torch.zeros(2, 8), torch.zeros(2, 9), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_when_a_model_is_saved_then_it_is_read_back_to_the_bit(base: Model, kind: HeadKind, tmp_path: Path) -> None:
    model = Reheaded.on(base, kind, width=8, horizon=24).eval()
    model.save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    read = load_checkpoint(tmp_path / "model")
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(read, Reheaded)
    assert read.config == model.config
    assert type(read.base) is type(base)
    data = batch()
    with torch.inference_mode():
        assert torch.equal(read.eval()(data.context, data.mask, 30).point, model(data.context, data.mask, 30).point)


def test_when_a_head_is_put_on_a_model_that_has_one_then_it_takes_its_place_and_is_read_back(base: Model, tmp_path: Path) -> None:
    first = Reheaded.on(base, "flatten", context=32, horizon=4, seed=1)
    second = Reheaded.on(first, "depthwise", width=4, seed=2)
    assert second.base is base
    assert (second.config.context, second.config.horizon) == (64, 16)
    second.save_pretrained(tmp_path)
    read = load_checkpoint(tmp_path)
    data = batch()
    with torch.inference_mode():
        ours, theirs = (model.eval()(data.context, data.mask, 16) for model in (second, read))
    assert torch.equal(ours.point, theirs.point)


def test_when_the_model_under_the_head_is_missing_or_another_then_the_checkpoint_is_refused(tmp_path: Path) -> None:
    model = Reheaded.on(PatchTransformer(CONFIG), "flatten")
    model.save_pretrained(tmp_path / "model")
    wider = PatchTransformer(ModelConfig(d_model=32, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8))
    wider.save_pretrained(tmp_path / "model" / BASE)
    read = load_checkpoint(tmp_path / "model")
    with pytest.raises(ModelError, match="gives features"):
        read(torch.zeros(1, 64), torch.ones(1, 64, dtype=torch.bool), 4)
    (tmp_path / "model" / BASE).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_checkpoint(tmp_path / "model")


def test_when_a_head_is_damaged_then_the_checkpoint_is_refused(tmp_path: Path) -> None:
    Reheaded.on(PatchTransformer(CONFIG), "flatten").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tokens": 8', '"tokens": 7'))
    with pytest.raises(CheckpointError, match="shape"):
        load_checkpoint(tmp_path)
    config.write_text(config.read_text().replace('"tokens": 7', '"tokens": 0'))
    with pytest.raises(CheckpointError, match="tokens"):
        load_checkpoint(tmp_path)


def test_when_a_fresh_model_is_drawn_then_the_seed_decides_all_weights(base: Model) -> None:
    model = Reheaded.on(base, "depthwise", width=8)
    one, same, other = (model.fresh(seed).state_dict() for seed in (5, 5, 6))
    assert one.keys() == model.state_dict().keys()
    assert all(torch.equal(one[name], same[name]) for name in one)

    def differs(name: str) -> bool:
        return not torch.equal(one[name], other[name])

    assert differs("network.out.weight")
    assert any(differs(name) for name in one if name.startswith("base."))


def test_when_targets_lie_far_outside_then_the_loss_stays_finite_and_bounded() -> None:
    model, data = Reheaded.on(PatchTransformer(CONFIG), "flatten"), batch()
    far: Tensor = data.target + 1e20
    loss, _ = model.step(Batch(data.context, data.mask, far, data.target_mask, data.windows, data.dataset, data.domain), no_draws)
    assert 2_000 < loss.item() < 4_000


def test_when_steps_compute_in_bfloat16_then_loss_and_gradient_are_close(base: Model) -> None:
    model, results = Reheaded.on(base, "depthwise", width=8), []
    for mixed in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss, encoding = model.step(batch(), no_draws)
        loss.backward()
        assert loss.dtype == encoding.features.dtype == torch.float32
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert results[1][0] == pytest.approx(results[0][0], rel=0.02)
    assert torch.nn.functional.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.99

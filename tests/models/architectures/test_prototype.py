from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcast.errors import ModelError
from fedcast.models.architectures import build_model
from fedcast.models.architectures.prototype import Memory, PrototypeTransformer
from fedcast.models.base import ModelConfig
from fedcast.models.forecaster import Forecaster
from fedcast.models.mixture import DomainMixture


def config(**changes: object) -> ModelConfig:
    shape = {"d_model": 16, "n_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "context": 32, "horizon": 12, "patch": 4}
    settings = {
        "prototypes": 10,
        "statistics": 8,
        **{k: changes.pop(k) for k in ("units", "statistics", "prototypes", "backbone", "serving") if k in changes},
    }
    return ModelConfig(**(shape | changes), architecture="prototype", settings=tuple(settings.items()))  # type: ignore[arg-type]


def model(seed: int = 0, **changes: object) -> PrototypeTransformer:
    built = build_model(config(**changes), seed)
    assert isinstance(built, PrototypeTransformer)
    with torch.no_grad():
        # As after some training: prototypes as large as the features they stand for.
        built.memory.prototypes.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(seed))
    return built


def windows(count: int = 5, length: int = 32, missing: float = 0.2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(count, length, generator=generator).cumsum(1) * 3 + 10
    mask = torch.rand(count, length, generator=generator) >= missing
    return torch.where(mask, context, 0.0), mask


BACKBONES = ["transformer", "cnn", "fc", "lstm", "gru"]


def numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("horizon", "decoder"), [(96, 347_488), (192, 495_040), (336, 716_368), (720, 1_306_576)])
def test_when_the_sizes_are_the_papers_then_so_are_the_numbers_of_parameters(horizon: int, decoder: int) -> None:
    paper = ModelConfig(
        d_model=64, n_heads=8, encoder_layers=2, decoder_layers=4, context=96, horizon=horizon, patch=4, architecture="prototype"
    )
    with torch.device("meta"):
        built = build_model(paper)
    assert isinstance(built, PrototypeTransformer)
    parts = [numbers(part) for part in (built.encoder, built.memory, built.decoder, built.heads.statistics)]
    assert parts == [68_800, 16_384, decoder, 314_370]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_when_the_seed_is_the_same_then_so_are_the_weights_and_the_global_state_is_untouched(backbone: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_model(config(backbone=backbone), seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in first.state_dict().items())
    for name, tensor in first.state_dict().items():
        drawn = tensor.dim() > 1
        assert torch.equal(tensor, other.state_dict()[name]) != drawn
        assert not drawn or tensor.abs().max() < 1
    memory = first.state_dict()["memory.prototypes"]
    assert memory.abs().max() <= 1 / 10
    assert memory.std() == pytest.approx(1 / 10 / math.sqrt(3), rel=0.2)


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 5))
def test_when_looking_up_then_it_is_the_nearest_prototype_by_a_direct_search(seed: int, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    memory = Memory(count, width)
    with torch.no_grad():
        memory.prototypes.copy_(torch.randn(count, width, generator=generator))
    features = torch.randn(2, 3, width, generator=generator)
    nearest, rows = memory(features)
    for b in range(2):
        for n in range(3):
            distances = [float((features[b, n] - p).square().sum()) for p in memory.prototypes.detach()]
            assert distances[int(rows[b, n])] <= min(distances) + 1e-5
            assert torch.equal(nearest[b, n], memory.prototypes[rows[b, n]])


def test_when_prototypes_are_the_same_then_the_first_is_taken() -> None:
    memory = Memory(3, 2)
    with torch.no_grad():
        memory.prototypes.copy_(torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0]]))
    assert memory(torch.tensor([[[0.9, 0.1]]]))[1].tolist() == [[1]]


def test_when_decoding_then_it_reads_exactly_the_prototypes_and_the_gradient_goes_straight_through() -> None:
    net = model()
    context, mask = windows()
    reading = net.read(context, mask)
    encoded = net.straight_through(reading)
    assert torch.equal(encoded.memory, net.memory.prototypes[reading.rows])
    factor = torch.randn_like(encoded.memory)
    (gradient,) = torch.autograd.grad((encoded.memory * factor).sum(), reading.features, retain_graph=True)
    assert torch.equal(gradient, factor)
    # The forecast alone never moves the memory, and moves the encoder.
    output = net.decode(encoded, 12)
    output.point.sum().backward()
    assert net.memory.prototypes.grad is None
    assert net.encoder.embedding.weight.grad.abs().sum() > 0


def test_when_quantiles_are_trained_then_only_their_head_moves() -> None:
    net = model()
    net.normalised(*windows(), 12).quantiles.square().sum().backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {f"heads.{layer}.{leaf}" for layer in ("summary", "quantiles") for leaf in ("weight", "bias")}


@pytest.mark.parametrize("units", ["window", "data"])
def test_when_predicting_then_the_forecast_in_data_units_is_the_papers_formula(units: str) -> None:
    net = model(units=units)
    context, mask = windows(missing=0)
    prediction = net.predict(net.encode(context, mask), 12)
    output = prediction.output
    x = context if units == "data" else (context - context.mean(1, keepdim=True)) / context.std(1, correction=0, keepdim=True)
    mean, deviation = x.mean(1, keepdim=True), (x.var(1, correction=0, keepdim=True) + (1e-5 if units == "data" else 0)).sqrt()
    torch.testing.assert_close(prediction.mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prediction.deviation, deviation, atol=1e-4, rtol=1e-4)
    inner, middle, last = net.heads.statistics
    change = last(torch.relu(middle(torch.relu(inner(torch.cat((x, mean, deviation), 1))))))
    torch.testing.assert_close(torch.cat((prediction.shift, prediction.widening), 1), change, atol=1e-4, rtol=1e-4)
    expected = prediction.shape * (change[:, 1:] + deviation) + change[:, :1] + mean
    ours = net.in_units(output.point * output.scale + output.loc, output)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)


def test_when_statistics_are_not_predicted_then_those_of_the_context_stay() -> None:
    net = model(statistics=0)
    prediction = net.predict(net.encode(*windows()), 7)
    assert prediction.shift is None
    assert prediction.widening is None
    assert torch.equal(prediction.output.point, prediction.shape)
    assert prediction.shape.shape == (5, 7)


@pytest.mark.parametrize(("factor", "shift"), [(1e-3, 0.0), (1.0, 1e3), (1e4, -50.0)])
def test_when_the_unit_of_the_data_changes_then_the_forecast_changes_alike(factor: float, shift: float) -> None:
    net = model()
    context, mask = windows(3, missing=0)
    context = context.double()
    with torch.inference_mode():
        plain, other = net(context, mask, 12), net(context * factor + shift, mask, 12)
    torch.testing.assert_close(other.point, plain.point * factor + shift, rtol=1e-3, atol=1e-3 * factor + 1e-6 * abs(shift))


@pytest.mark.parametrize(
    ("length", "backbone"), [*((n, "transformer") for n in (1, 3, 4, 31, 32, 33, 90)), *((9, b) for b in BACKBONES[1:])]
)
def test_when_a_context_is_short_then_it_is_one_whose_beginning_is_missing(length: int, backbone: str) -> None:
    net = model(backbone=backbone)
    context, mask = windows(3, length)
    mask[:, -1] = True
    output = net.normalised(context, mask, 12)
    padded = torch.nn.functional.pad(context, (40, 0)), torch.nn.functional.pad(mask, (40, 0))
    torch.testing.assert_close(output.point, net.normalised(*padded, 12).point)
    assert output.features.shape == (3, 8, 16)
    assert output.feature_mask.sum() <= 3 * math.ceil(length / 4)


ODD = [("window", "transformer"), ("data", "transformer"), *(("window", backbone) for backbone in BACKBONES[1:])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("units", "backbone"), ODD)
def test_when_windows_are_odd_then_forecasts_are_finite_and_quantiles_never_fall(dtype: torch.dtype, units: str, backbone: str) -> None:
    net = model(units=units, backbone=backbone).to(dtype)
    context = torch.stack(
        [torch.zeros(32), torch.full((32,), 7e20), torch.randn(32) * 1e-25, torch.full((32,), torch.nan), torch.randn(32)]
    )
    with torch.inference_mode():
        forecast = net(context, context.isfinite(), 40)
    assert forecast.point.isfinite().all()
    assert forecast.quantiles.isfinite().all()
    assert (forecast.quantiles.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_when_saved_and_loaded_then_forecasts_are_bit_equal(backbone: str, tmp_path: Path) -> None:
    net = model(3, backbone=backbone)
    net.save_pretrained(tmp_path)
    loaded = Forecaster.from_pretrained(tmp_path)
    assert isinstance(loaded.model, PrototypeTransformer)
    context, mask = windows()
    assert torch.equal(net(context, mask, 20).quantiles, loaded.model(context, mask, 20).quantiles)


@pytest.mark.parametrize(
    "settings",
    [
        (("colour", 3),),
        (("prototypes", 0),),
        (("units", "metres"),),
        (("statistics", "wide"),),
        (("decoder_heads", 3),),
        (("backbone", "s4"),),
    ],
)
def test_when_a_setting_is_unknown_or_does_not_fit_then_it_is_refused(settings: tuple[tuple[str, int | str]]) -> None:
    with pytest.raises(ModelError):
        build_model(ModelConfig(16, 2, 1, 1, 32, 12, 4, architecture="prototype", settings=settings))


def test_when_a_window_is_judged_then_by_the_mean_squared_distance_to_its_prototypes() -> None:
    net = model()
    context, mask = windows(4)
    mask[1, :12] = False
    mask[2] = False
    with torch.no_grad():
        net.heads.typical_error.fill_(0.5)
    assert model(serving="mixture").window_errors(context, mask) is None
    plain = model(serving="quantisation")
    plain.load_state_dict(net.state_dict())
    errors = plain.window_errors(context, mask).detach()
    # As it is served: in units of what the site's own windows have.
    torch.testing.assert_close(net.window_errors(context, mask).detach(), 2 * errors)
    reading = net.read(context, mask)
    for b in range(4):
        seen = [n for n in range(8) if mask[b, 4 * n : 4 * n + 4].any()]
        distances = [min(float((reading.features[b, n] - p).square().mean().detach()) for p in net.memory.prototypes) for n in seen]
        assert float(errors[b]) == pytest.approx(sum(distances) / len(seen) if seen else 0.0, rel=1e-4)


def test_when_models_are_mixed_then_each_window_has_the_one_whose_memory_knows_it() -> None:
    experts = {name: model(seed) for seed, name in enumerate(("a", "b"))}
    with torch.no_grad():
        experts["b"].memory.prototypes.mul_(100)
    context, mask = windows(3)
    known = experts["b"].read(context[:1], mask[:1])
    with torch.no_grad():
        # The first window's features stand in the memory of the second model.
        experts["b"].memory.prototypes[:8] = known.features[0]
    mask[2] = False
    mixture = DomainMixture.of(config(), {name: dict(net.state_dict()) for name, net in experts.items()}, [])
    weights = mixture.weights(context, mask)
    errors = torch.stack([experts[name].window_errors(context, mask) for name in ("a", "b")], dim=1)
    assert weights[0].tolist() == [0.0, 1.0]
    assert torch.equal(weights[:2].argmax(1), errors[:2].argmin(1))
    # Nothing is known of a window without points: both have a say.
    assert weights[2].tolist() == [0.5, 0.5]
    torch.testing.assert_close(mixture(context, mask, 12).point[0], experts["b"](context, mask, 12).point[0])

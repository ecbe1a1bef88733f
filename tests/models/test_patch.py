import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcast.errors import CheckpointError, ModelError
from fedcast.models.base import ModelConfig
from fedcast.models.patch import PatchTransformer
from fedcast.spec import ModelSpec

COUNTS = {"nano": 0.5e6, "tiny": 3e6, "small": 20e6, "base": 80e6}


def config(**changes):
    shape = {"d_model": 32, "n_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "context": 64, "horizon": 24, "patch": 8}
    return ModelConfig(**(shape | changes))


@pytest.fixture(scope="module", params=["rope", "learned"])
def model(request):
    return PatchTransformer(config(position=request.param), seed=3)


def windows(batch, length, seed=0, missing=0.2):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, length, generator=generator).cumsum(dim=1) * 3 + 10
    mask = torch.rand(batch, length, generator=generator) >= missing
    return torch.where(mask, context, 0.0), mask


@pytest.mark.parametrize(("size", "about"), COUNTS.items())
def test_when_a_size_is_named_then_the_parameters_are_about_as_many(size, about):
    with torch.device("meta"):
        model = PatchTransformer(ModelConfig.of(ModelSpec(size=size)))
    d, m, patch = model.config.d_model, model.config.horizon_patches, model.config.patch
    block = 12 * d**2 + 13 * d  # qkv 3, out 1, feed-forward 8 matrices; their biases and two norms
    embedding = d**2 + 2 * (2 * patch * d) + 3 * d
    decoder_block = 8 * d**2 + 11 * d
    expected = model.config.encoder_layers * block + embedding + 2 * d
    assert sum(p.numel() for p in model.encoder.parameters()) == expected
    expected += model.config.decoder_layers * decoder_block + m * d + 2 * d + 10 * patch * (d + 1)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert abs(expected / about - 1) < 0.2


def test_when_parameters_are_named_then_they_belong_to_encoder_decoder_or_heads(model):
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"encoder", "decoder", "heads"}
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict())


def test_when_the_seed_is_the_same_then_so_are_the_weights_and_the_global_state_is_untouched():
    before = torch.random.get_rng_state()
    first, again, other = (PatchTransformer(config(), seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.encoder.embedding.hidden.weight, other.encoder.embedding.hidden.weight)
    assert all(p.isfinite().all() for p in first.parameters())


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 64, 65, 200])
@pytest.mark.parametrize("horizon", [1, 8, 9, 24])
def test_when_a_context_of_any_length_is_given_then_shapes_fit(model, length, horizon):
    context, mask = windows(3, length)
    output = model.normalised(context, mask, horizon)
    patches = -(-min(length, 64) // 8)
    assert output.point.shape == (3, horizon)
    assert output.quantiles.shape == (3, horizon, 9)
    assert output.features.shape == (3, patches, 32)
    assert output.feature_mask.shape == (3, patches)
    assert output.loc.shape == output.scale.shape == (3, 1)
    counted = output.feature_mask | ~output.feature_mask.any(dim=1, keepdim=True)
    torch.testing.assert_close(model.embed(context, mask), output.features * counted.unsqueeze(-1))


def test_when_the_context_is_too_long_then_its_end_counts(model):
    context, mask = windows(2, 200)
    assert torch.equal(model(context, mask, 5).point, model(context[:, -64:], mask[:, -64:], 5).point)


def test_when_the_context_is_empty_then_the_forecast_is_finite(model):
    assert model(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.bool), 5).point.isfinite().all()


@pytest.mark.parametrize("horizon", [1, 24, 25, 100])
def test_when_a_forecast_is_made_then_quantiles_never_fall(model, horizon):
    forecast = model(*windows(4, 50), horizon)
    assert forecast.point.shape == (4, horizon)
    assert forecast.quantiles.shape == (4, horizon, 9)
    assert (forecast.quantiles.diff(dim=-1) >= 0).all()


def test_when_the_horizon_is_shorter_then_the_forecast_is_the_start_of_the_longer_one(model):
    context, mask = windows(4, 50)
    long = model(context, mask, 70)
    for horizon in (1, 9, 24, 30):
        torch.testing.assert_close(model(context, mask, horizon).point, long.point[:, :horizon], rtol=1e-5, atol=1e-4)


def test_when_the_horizon_is_rolled_then_the_second_pass_sees_the_first_one(model):
    context, mask = windows(4, 50)
    first = model(context, mask, 24).point
    second = model(torch.cat((context, first), 1), torch.cat((mask, torch.ones_like(first, dtype=torch.bool)), 1), 24)
    rolled = model(context, mask, 48)
    torch.testing.assert_close(rolled.point[:, 24:], second.point)
    torch.testing.assert_close(rolled.quantiles[:, 24:], second.quantiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 7.0, -1e-20, 1e30, float("nan"), float("inf")])
def test_when_a_context_is_constant_or_missing_then_the_forecast_is_finite_and_near(dtype, value):
    model = PatchTransformer(config()).to(dtype)
    context = torch.full((2, 40), value)
    forecast = model(context, torch.ones(2, 40, dtype=torch.bool), 60)
    assert forecast.point.dtype == forecast.quantiles.dtype == torch.float32
    assert forecast.point.isfinite().all()
    assert forecast.quantiles.isfinite().all()
    if torch.tensor(value).isfinite() and value:
        torch.testing.assert_close(forecast.point, torch.full((2, 60), value), rtol=0.05, atol=0)


def test_when_values_are_missing_then_what_stands_there_has_no_influence(model):
    context, mask = windows(3, 50)
    noise = torch.where(mask, context, torch.tensor(float("nan")))
    assert torch.equal(model(context, mask, 24).point, model(noise, mask, 24).point)


def test_when_missing_patches_are_put_before_a_context_then_the_forecast_stays(model):
    context, mask = windows(3, 32)
    padded, padded_mask = torch.nn.functional.pad(context, (32, 0)), torch.nn.functional.pad(mask, (32, 0))
    torch.testing.assert_close(model(padded, padded_mask, 24).point, model(context, mask, 24).point, rtol=1e-4, atol=1e-4)
    assert not model.normalised(padded, padded_mask, 8).feature_mask[:, :4].any()


def test_when_a_window_is_alone_in_its_batch_then_its_forecast_is_the_same(model):
    context, mask = windows(5, 64)
    mask[0] = False
    together = model(context, mask, 30).point
    alone = torch.cat([model(context[i : i + 1], mask[i : i + 1], 30).point for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.integers(2, 70), st.integers(0, 1000))
def test_when_a_series_is_shifted_and_scaled_then_so_is_its_forecast(factor, shift, length, seed):
    model = PatchTransformer(config(), seed=5)
    context, mask = windows(2, length, seed)
    context, mask = context.double(), mask.clone()
    mask[:, :2] = True
    context[:, 0] = 1.0
    context[:, 1] = 2.0
    plain, moved = model(context, mask, 40), model(factor * context + shift, mask, 40)
    slack = 1e-3 * factor * context.abs().max().item()
    torch.testing.assert_close(moved.point, factor * plain.point + shift, rtol=1e-4, atol=slack)
    torch.testing.assert_close(moved.quantiles, factor * plain.quantiles + shift, rtol=1e-4, atol=slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [0.0, 0.3, 1.0])
def test_when_gradients_are_taken_then_they_are_finite_and_reach_every_parameter(dtype, missing):
    model = PatchTransformer(config(position="learned")).to(dtype)
    output = model.normalised(*windows(4, 64, missing=missing), 24)
    (output.point.square().mean() + output.quantiles.square().mean() + output.features.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert missing == 1.0 or parameter.grad.abs().max() > 0, name


def test_when_parameters_are_bfloat16_then_forecasts_are_close(model):
    context, mask = windows(8, 64)
    exact = model.normalised(context, mask, 24)
    rounded = PatchTransformer(model.config, seed=3).to(torch.bfloat16).normalised(context, mask, 24)
    assert all(part.dtype == torch.float32 for part in (rounded.point, rounded.quantiles, rounded.features, rounded.loc))
    torch.testing.assert_close(rounded.point, exact.point, rtol=0.05, atol=0.05)
    torch.testing.assert_close(rounded.quantiles, exact.quantiles, rtol=0.05, atol=0.05)
    torch.testing.assert_close(rounded.features, exact.features, rtol=0.1, atol=0.1)


def test_when_products_are_routed_elsewhere_then_forecasts_are_close(model):
    context, mask = windows(8, 64)
    exact = model(context, mask, 24).point
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(model(context, mask, 24).point, exact, rtol=0.02, atol=0.2)
    finally:
        torch.set_float32_matmul_precision(before)


def test_when_trained_and_evaluated_then_the_forecast_is_the_same(model):
    context, mask = windows(3, 64)
    assert torch.equal(model.train()(context, mask, 24).point, model.eval()(context, mask, 24).point)


@pytest.mark.parametrize("horizon", [0, -1, 25])
def test_when_one_pass_is_asked_for_too_much_then_it_says_so(model, horizon):
    with pytest.raises(ModelError, match="1 to 24"):
        model.normalised(*windows(1, 8), horizon)


def test_when_shapes_do_not_fit_then_they_are_named(model):
    with pytest.raises(ModelError, match=r"\(2, 8\)"):
        model(torch.zeros(2, 8), torch.ones(2, 9, dtype=torch.bool), 4)
    with pytest.raises(ModelError, match="at least 1"):
        model(*windows(1, 8), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_when_saved_and_loaded_then_forecasts_are_equal_to_the_bit(tmp_path, model, dtype):
    model = PatchTransformer(model.config, seed=11).to(dtype)
    model.save_pretrained(tmp_path / "deep" / "model")
    loaded = PatchTransformer.from_pretrained(tmp_path / "deep" / "model")
    assert loaded.config == model.config
    assert loaded.dtype == dtype
    context, mask = windows(5, 64)
    for left, right in zip(model(context, mask, 60), loaded(context, mask, 60), strict=True):
        assert torch.equal(left, right)
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["model"]


def test_when_parameters_are_views_of_one_tensor_then_they_are_saved(tmp_path):
    model = PatchTransformer(config())
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(flat, model.parameters())
    model.save_pretrained(tmp_path / "m")
    context, mask = windows(2, 64)
    torch.testing.assert_close(PatchTransformer.from_pretrained(tmp_path / "m")(context, mask, 24).point, model(context, mask, 24).point)


def test_when_saved_over_another_model_then_the_new_one_is_read_and_other_files_stay(tmp_path):
    PatchTransformer(config(), seed=1).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    newer = PatchTransformer(config(), seed=2)
    newer.save_pretrained(tmp_path)
    loaded = PatchTransformer.from_pretrained(tmp_path)
    assert torch.equal(loaded.decoder.queries, newer.decoder.queries)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


def rewrite_weights(folder: Path, change) -> None:
    import hashlib

    state = safetensors.torch.load_file(folder / "model.safetensors")
    change(state)
    content = safetensors.torch.save(state)
    (folder / "model.safetensors").write_bytes(content)
    rewrite_config(folder, lambda document: document.update(weights_sha256=hashlib.sha256(content).hexdigest()))


def rewrite_config(folder: Path, change) -> None:
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(document)
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "cut": (truncate, "model.safetensors is damaged"),
    "one bit": (flip_a_bit, "model.safetensors is damaged"),
    "not JSON": (lambda f: (f / "config.json").write_bytes(b"{"), "config.json is damaged"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "deep": (lambda f: (f / "config.json").write_bytes(b"[" * 200_000), "config.json is"),
    "a list": (lambda f: (f / "config.json").write_bytes(b"[]"), "config.json is refused"),
    "unknown key": (lambda f: rewrite_config(f, lambda d: d.update(code="x")), "code"),
    "unknown model key": (lambda f: rewrite_config(f, lambda d: d["model"].update(auto_map="x")), "auto_map"),
    "missing key": (lambda f: rewrite_config(f, lambda d: d["model"].pop("patch")), "patch"),
    "newer version": (lambda f: rewrite_config(f, lambda d: d.update(version=2)), "version"),
    "other format": (lambda f: rewrite_config(f, lambda d: d.update(format="bert")), "format"),
    "huge": (lambda f: rewrite_config(f, lambda d: d["model"].update(d_model=2**40)), "d_model"),
    "other depth": (lambda f: rewrite_config(f, lambda d: d["model"].update(encoder_layers=3)), "lacks"),
    "other width": (lambda f: rewrite_config(f, lambda d: d["model"].update(d_model=64)), "shape"),
    "lacks a tensor": (lambda f: rewrite_weights(f, lambda s: s.pop("decoder.queries")), r"lacks 1 tensors, first 'decoder.queries'"),
    "surplus tensor": (lambda f: rewrite_weights(f, lambda s: s.update(extra=torch.ones(1))), "surplus"),
    "not finite": (lambda f: rewrite_weights(f, lambda s: s["decoder.queries"].fill_(float("nan"))), "not finite"),
    "integers": (lambda f: rewrite_weights(f, lambda s: s.update({"decoder.queries": s["decoder.queries"].int()})), "decoder.queries"),
    "mixed types": (lambda f: rewrite_weights(f, lambda s: s.update({"decoder.queries": s["decoder.queries"].half()})), "mixes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_when_a_model_folder_is_damaged_then_the_file_is_named(tmp_path, damage):
    spoil, named = DAMAGES[damage]
    PatchTransformer(config()).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=named) as caught:
        PatchTransformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_when_there_is_no_folder_then_it_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        PatchTransformer.from_pretrained(tmp_path / "nowhere")

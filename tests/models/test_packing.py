import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import packing as benchmark
from fedcast.models.base import ModelConfig
from fedcast.models.layers import key_bias, rotary_table
from fedcast.models.mixture import DomainMixture
from fedcast.models.packing import WORTHWHILE, arrange, first_fit, pack
from fedcast.models.patch import PatchTransformer

PATCH, PATCHES = 4, 8
LENGTHS = st.lists(st.integers(0, PATCHES), min_size=1, max_size=12)  # used patches of each window; 0: none is observed


def patch_mask(lengths, seed=0, gaps=0.0):
    """Return a mask [B, N] with the last ``lengths`` patches observed, but for a share of gaps; the last patch stays."""
    mask = torch.arange(PATCHES) >= PATCHES - torch.tensor(lengths)[:, None]
    kept = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) >= gaps
    kept[:, -1] = True
    return mask & kept


def windows(lengths, seed=0, gaps=0.0):
    mask = patch_mask(lengths, seed, gaps).repeat_interleave(PATCH, dim=1)
    generator = torch.Generator().manual_seed(seed)
    holes = torch.rand(mask.shape, generator=generator) < 0.2
    holes[:, ::PATCH] = False  # so that a patch keeps an observed point
    return torch.randn(mask.shape, generator=generator).cumsum(dim=1) + 5, mask & ~holes


def model_of(position, dtype=torch.float32):
    shape = {"d_model": 16, "n_heads": 2, "encoder_layers": 2, "decoder_layers": 2, "horizon": 3 * PATCH, "patch": PATCH}
    return PatchTransformer(ModelConfig(**shape, context=PATCH * PATCHES, position=position), seed=1).to(dtype)


def padded(model, context, mask):
    """Forecast as if there were no packing: every patch of every window is encoded where it stands."""
    config, tokens = model.config, model.tokens(context, mask)
    bias = key_bias(tokens.mask, model.dtype)
    before = after = None
    if config.position == "rope":
        now, end = config.context_patches, config.context_patches + config.horizon_patches
        tables = rotary_table(end, config.d_model // config.n_heads, model.dtype, torch.device("cpu"))
        before = tuple(table[now - tokens.mask.shape[1] : now] for table in tables)
        after = tuple(table[now:end] for table in tables)
    features = model.encoder(tokens.patches, bias, before)
    decoded = model.decoder(features, bias, config.horizon_patches, before and (after, before))
    return (*model.heads(decoded, config.horizon), features, tokens.mask)


def results(model, point, quantiles, features, mask):
    """Return what counts of a forecast, and the gradient of all of it, per parameter."""
    counted = features * (mask | ~mask.any(dim=1, keepdim=True)).unsqueeze(-1)
    loss = point.sin().mean() + quantiles.square().mean() + counted.square().mean()
    return (point, quantiles, counted), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("position", ["rope", "learned"])
@settings(max_examples=60)
@given(LENGTHS, st.integers(0, 1000), st.sampled_from([0.0, 0.4]))
def test_when_windows_are_packed_then_forecasts_features_and_gradients_are_those_of_the_padded_batch(position, lengths, seed, gaps):
    model = model_of(position)
    context, mask = windows(lengths, seed, gaps)
    output = model.normalised(context, mask, model.config.horizon)
    packed, gradients = results(model, output.point, output.quantiles, output.features, output.feature_mask)
    expected, wanted = results(model, *padded(model, context, mask))
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    largest = max(float(gradient.norm()) for gradient in wanted)
    for mine, other in zip(gradients, wanted, strict=True):
        assert float((mine - other).norm()) <= 1e-5 * max(float(other.norm()), largest)


@pytest.mark.parametrize("lengths", [[8, 1, 1, 2, 2, 1, 1], [3, 3, 2], [8, 0, 1, 1, 1]], ids=["packed", "cut", "without points"])
def test_when_the_model_is_bfloat16_then_packed_forecasts_are_close(lengths):
    context, mask = windows(lengths)
    model = model_of("rope", torch.bfloat16)
    output = model.normalised(context, mask, 12)
    exact = padded(model_of("rope"), context, mask)
    torch.testing.assert_close(output.point, exact[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(output.quantiles, exact[1], rtol=0.05, atol=0.05)


def test_when_float32_products_are_routed_elsewhere_then_packed_forecasts_are_close():
    context, mask = windows([8, 1, 1, 2, 2, 1, 1])
    model = model_of("rope")
    exact = padded(model, context, mask)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        torch.testing.assert_close(model.normalised(context, mask, 12).point, exact[0], rtol=0.02, atol=0.02)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_when_windows_of_a_mixture_are_packed_then_each_has_the_forecast_that_it_has_alone(position):
    context, mask = windows([8, 1, 3, 0, 2, 2, 1], gaps=0.3)
    states = {str(seed): PatchTransformer(model_of(position).config, seed).state_dict() for seed in range(2)}
    mixture = DomainMixture.of(model_of(position).config, states, [])
    together = mixture(context, mask, 20)
    for i in range(len(context)):
        alone = mixture(context[i : i + 1], mask[i : i + 1], 20)
        torch.testing.assert_close(together.quantiles[i : i + 1], alone.quantiles, rtol=1e-4, atol=1e-4)


def test_when_lengths_differ_then_rows_are_shared_and_when_they_are_equal_nothing_is_done():
    width, packing = arrange(patch_mask([8, 1, 1, 2, 2, 1, 1]))
    assert (width, tuple(packing.source.shape)) == (8, (2, 8))
    assert arrange(patch_mask([8] * 5)) == (8, None)
    assert arrange(patch_mask([3, 3, 2])) == (3, None)  # the five first patches are cut off
    assert arrange(patch_mask([8, 8, 8, 8, 7])) == (8, None)  # too little to gain
    assert arrange(patch_mask([8] * 5).to("meta")) == (8, None)
    assert arrange(patch_mask([])) == (8, None)


def test_when_code_is_compiled_then_its_shapes_stay():
    compiled = torch.compile(lambda mask: arrange(mask)[0] + mask.sum(), backend="eager", fullgraph=True)
    assert compiled(patch_mask([2, 1])) == 8 + 3


@given(LENGTHS, st.integers(0, 1000), st.sampled_from([0.0, 0.4]))
def test_when_a_batch_is_packed_then_each_used_patch_has_one_slot_in_the_row_of_its_window(lengths, seed, gaps):
    mask = patch_mask(lengths, seed, gaps)
    _, packing = arrange(mask)
    if packing is None:
        return
    used = mask | ~mask.any(dim=1, keepdim=True)
    assert packing.source.numel() <= WORTHWHILE * mask.numel()
    assert packing.patches.tolist() == used.flatten().nonzero().flatten().tolist()
    assert len(set(packing.slots.tolist())) == len(packing.slots) == int((packing.owner >= 0).sum())
    owners = packing.owner.flatten()[packing.slots]
    assert torch.equal(owners, packing.patches // PATCHES)
    assert torch.equal(packing.rows[owners], packing.slots // packing.source.shape[1])
    again = arrange(mask.clone())[1]
    assert all(torch.equal(left, right) for left, right in zip(packing, again, strict=True))


def test_when_rows_are_restored_then_used_patches_return_and_the_rest_is_zero():
    used = patch_mask([8, 2, 3])
    row, start = first_fit(used.sum(dim=1).numpy(), 8)
    packing = pack(used.numpy(), row, start, (2, 8))
    x = torch.randn(3, PATCHES, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(packing.restore(packing.gather(x), PATCHES), x * used.unsqueeze(-1))


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_when_pieces_are_placed_then_they_fit_without_overlap_and_no_two_rows_could_be_one(lengths):
    lengths = np.array(lengths)
    row, start = first_fit(lengths, 32)
    taken = np.zeros((row.max() + 1, 32), dtype=int)
    for piece, length in enumerate(lengths):
        assert start[piece] + length <= 32
        taken[row[piece], start[piece] : start[piece] + length] += 1
    assert taken.max() == 1
    filled = np.sort(taken.sum(axis=1))
    assert filled[0] > 0
    assert len(filled) == 1 or filled[:2].sum() > 32


def test_when_the_benchmark_is_run_for_a_moment_then_it_gives_its_rows(tmp_path, capsys):
    benchmark.main(["--quick", "--output", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert {row["lengths"] for row in rows} >= {"equal", "uniform", "geometric"}
    assert all(row["packed"] > 0 and row["padded"] > 0 for row in rows)
    assert all(row["tokens"] == 1 for row in rows if row["lengths"] == "equal")
    assert capsys.readouterr().out.count("| equal |") == 2

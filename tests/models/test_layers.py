import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcast.models.layers import (
    InstanceNorm,
    _attend_explicitly,
    attend,
    key_bias,
    observed_mean,
    rotary_table,
    rotate,
    scaled_target,
)


def test_when_window_has_missing_points_then_only_observed_ones_count():
    values = torch.tensor([[1.0, 0.0, 3.0, 5.0]])
    mask = torch.tensor([[True, False, True, True]])
    normal, loc, scale = InstanceNorm.forward(values, mask)
    observed = np.array([1.0, 3.0, 5.0])
    assert loc.item() == pytest.approx(observed.mean())
    assert scale.item() == pytest.approx(observed.std())
    assert normal[0, 1] == 0
    torch.testing.assert_close(InstanceNorm.inverse(normal, loc, scale)[mask], values[mask])


@pytest.mark.parametrize("level", [0.0, 5.0, -5.0, 0.1, 1e-30, 1e-38, 1e30, 3e38])
def test_when_window_is_constant_then_normalised_values_are_zero_and_scale_is_positive(level):
    values = torch.full((1, 37), level)
    normal, loc, scale = InstanceNorm.forward(values, torch.ones(1, 37, dtype=torch.bool))
    assert normal.abs().max() == 0
    assert scale.isfinite().all()
    assert (scale > 0).all()
    torch.testing.assert_close(loc, values[:, :1], rtol=1e-6, atol=1e-37)


def test_when_nothing_is_observed_then_loc_is_zero_and_scale_one():
    normal, loc, scale = InstanceNorm.forward(torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.bool))
    assert normal.abs().max() == 0
    assert loc.tolist() == [[0.0], [0.0]]
    assert scale.tolist() == [[1.0], [1.0]]


def test_when_steps_are_missing_then_the_mean_is_over_the_others():
    losses, mask = torch.tensor([[1.0, 5.0], [3.0, 7.0]]), torch.tensor([[True, False], [True, False]])
    assert observed_mean(losses, mask).item() == 2.0
    assert observed_mean(losses, torch.zeros_like(mask)).item() == 0.0


def test_when_a_target_lies_far_from_its_context_then_it_is_clamped_in_units_of_that():
    target = torch.tensor([[3.0, 7.0, 999.0], [3.0, -1e38, 1e38]])
    scaled = scaled_target(target, torch.tensor([[5.0], [3.0]]), torch.tensor([[2.0], [1e-30]]))
    assert scaled.tolist() == [[-1.0, 1.0, 50.0], [0.0, -50.0, 50.0]]
    assert scaled_target(target, torch.tensor([[5.0], [3.0]]), torch.ones(2, 1), limit=1.5).tolist() == [[-1.5, 1.5, 1.5], [0.0, -1.5, 1.5]]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.data())
def test_when_values_are_extreme_then_normalised_values_are_bounded(values, data):
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))])
    context = torch.tensor([values], dtype=torch.float32).where(mask, torch.zeros(()))
    normal, loc, scale = InstanceNorm.forward(context, mask)
    assert normal.isfinite().all()
    assert normal.abs().max() <= len(values) ** 0.5 + 1  # no point is further out than sqrt(n) standard deviations
    assert loc.isfinite().all()
    assert (scale > 0).all()
    assert InstanceNorm.inverse(torch.full((1, 3), 1e30), loc, scale).isfinite().all()


def test_when_float64_is_given_then_small_changes_of_a_large_level_survive():
    values = torch.sin(torch.arange(64, dtype=torch.float64))[None] + 1e10
    normal, _, scale = InstanceNorm.forward(values, torch.ones(1, 64, dtype=torch.bool))
    assert scale.item() == pytest.approx(values.std(correction=0).item(), rel=1e-4)
    assert normal.std(correction=0).item() == pytest.approx(1, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([(1, 8), (2, 16), (4, 32)]), st.integers(0, 10_000))
def test_when_attention_is_explicit_then_it_equals_the_fused_kernel(queries, keys, shape, seed):
    heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(3, heads, n, width, generator=generator) for n in (queries, keys, keys))
    bias = key_bias(torch.rand(3, keys, generator=generator) > 0.5, torch.float32)
    explicit = _attend_explicitly(query, key, value, bias)
    torch.testing.assert_close(attend(query, key, value, bias), explicit, rtol=1e-4, atol=1e-5)
    small = [x.bfloat16() for x in (query, key, value, bias)]
    torch.testing.assert_close(attend(*small).float(), explicit, rtol=0.05, atol=0.05)


def test_when_a_key_is_excluded_then_its_value_has_no_influence():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 4, 8, generator=generator) for _ in range(3))
    bias = key_bias(torch.tensor([[False, True, True, True]]), torch.float32)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, 0], other_value[:, :, 0] = 100.0, 1e6
    for function in (attend, _attend_explicitly):
        assert torch.equal(function(query, key, value, bias), function(query, other_key, other_value, bias))


def test_when_no_key_is_left_then_all_are_used():
    assert key_bias(torch.zeros(1, 3, dtype=torch.bool), torch.float32).abs().max() == 0


def test_when_positions_are_turned_then_products_depend_on_their_distance_only():
    table = rotary_table(12, 16, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    turned_queries, turned_keys = rotate(query.expand(12, 16), table), rotate(key.expand(12, 16), table)
    scores = turned_queries @ turned_keys.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned_queries.norm(dim=-1), query.norm().expand(12))


def test_when_the_rotary_table_is_first_used_in_inference_then_training_can_use_it():
    with torch.inference_mode():
        table = rotary_table(7, 6, torch.float32, torch.device("cpu"))
    x = torch.ones(7, 6, requires_grad=True)
    rotate(x, table).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedcast.training.flat import FlatAdamW, FlatParameters, Layout, weighted_mean


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def flat_of(module: nn.Module, dtype: torch.dtype = torch.float32) -> FlatParameters:
    named = dict(module.named_parameters())
    return FlatParameters(named, Layout.of(named, lambda name: name.startswith("0.")), dtype)


def test_when_laid_out_then_shared_parameters_come_first_and_views_cover_the_vector() -> None:
    module = small()
    named = dict(module.named_parameters())
    layout = Layout.of(named, lambda name: name.startswith("2."))
    assert layout.names == ("2.weight", "2.bias", "0.weight", "0.bias")
    assert layout.shared_size == 7 * 3 + 3
    assert layout.size == sum(p.numel() for p in named.values())
    vector = layout.flatten(named)
    for name, view in layout.views(vector).items():
        assert torch.equal(view, named[name])


def test_when_weights_change_in_the_vector_then_the_module_computes_with_them() -> None:
    module = small()
    flat = flat_of(module)
    flat.vector.zero_()
    flat.publish()
    assert torch.equal(module(torch.ones(2, 5)), torch.zeros(2, 3))


def test_when_backward_runs_then_gradients_land_in_the_flat_vector() -> None:
    module, reference = small(), small()
    flat = flat_of(module)
    x = torch.randn(4, 5)
    module(x).square().sum().backward()
    reference(x).square().sum().backward()
    expected = flat.layout.flatten({name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    assert torch.allclose(flat.gradient, expected)


@pytest.mark.parametrize("clip_norm", [1e9, 0.1])
def test_when_stepping_then_the_result_is_torchs_adamw(clip_norm: float) -> None:
    module, reference = small(), small()
    flat = flat_of(module)
    ours = FlatAdamW(flat, beta1=0.9, beta2=0.99, weight_decay=0.01, clip_norm=clip_norm)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        flat.gradient.zero_()
        module(x).square().sum().backward()
        ours.step(1e-2)
        theirs.zero_grad()
        reference(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
        theirs.step()
    expected = flat.layout.flatten(dict(reference.named_parameters()))
    assert torch.allclose(flat.vector, expected, atol=1e-6)


def test_when_computing_in_bfloat16_then_master_weights_keep_small_steps() -> None:
    module = small()
    flat = flat_of(module, torch.bfloat16)
    optimiser = FlatAdamW(flat, beta1=0.9, beta2=0.99, weight_decay=0.0, clip_norm=1e9)
    before = flat.vector.clone()
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    for _ in range(3):
        flat.gradient.fill_(1.0)
        # A step of 1e-6 is lost in bfloat16 weights of size 0.1 to 1, and must not be lost in the master weights.
        optimiser.step(1e-6)
    assert torch.allclose(before - flat.vector, torch.full_like(before, 3e-6), rtol=0.1, atol=1e-7)


def test_when_moments_are_saved_and_loaded_then_the_next_step_is_the_same() -> None:
    first, second = flat_of(small()), flat_of(small())
    a = FlatAdamW(first, beta1=0.9, beta2=0.99, weight_decay=0.01, clip_norm=1.0)
    b = FlatAdamW(second, beta1=0.9, beta2=0.99, weight_decay=0.01, clip_norm=1.0)
    first.gradient.fill_(0.5)
    a.step(1e-2)
    second.vector.copy_(first.vector)
    b.load(a.state())
    for flat, optimiser in ((first, a), (second, b)):
        flat.gradient.fill_(-0.25)
        optimiser.step(1e-2)
    assert torch.equal(first.vector, second.vector)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_when_averaging_then_it_is_the_weighted_mean_in_float64(clients: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(size, generator=generator) * 10**k for k in range(clients)]
    weights = torch.rand(clients, generator=generator).double() + 0.1
    expected = (torch.stack(vectors).double() * weights[:, None]).sum(0) / weights.sum()
    assert torch.allclose(weighted_mean(vectors, weights.tolist()), expected.float(), rtol=1e-6)

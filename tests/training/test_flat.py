from __future__ import annotations

import pytest
import torch
from torch import nn

from fedcast.training.flat import FlatAdamW, FlatParameters, Layout


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


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("size", [1, 15, 16, 17, 5000])
def test_when_a_step_is_native_then_weights_and_moments_are_those_of_torch(size: int) -> None:
    layout = Layout(("w",), ((size,),), 1)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = []
    for native in (False, True):
        parameters = FlatParameters({"w": nn.Parameter(start.clone())}, layout, torch.bfloat16)
        optimiser = FlatAdamW(parameters, beta1=0.9, beta2=0.99, weight_decay=0.1, clip_norm=1.0, native=native)
        gradients = torch.Generator().manual_seed(1)
        for step in range(5):
            parameters.gradient.copy_(torch.randn(size, generator=gradients) * 10.0 ** (step - 3))
            optimiser.step(1e-2)
        found.append((parameters.vector.clone(), optimiser.state(), parameters.compute.clone()))
    (weights, moments, compute), (native_weights, native_moments, native_compute) = found
    torch.testing.assert_close(native_weights, weights, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(native_compute, native_weights.to(torch.bfloat16), rtol=0, atol=0)
    torch.testing.assert_close(compute, weights.to(torch.bfloat16), rtol=0, atol=0)
    for name, moment in moments.items():
        torch.testing.assert_close(native_moments[name], moment, rtol=2e-5, atol=1e-9)

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcast.data.catalogue import load_domains
from fedcast.data.splits import split_by_time
from fedcast.data.windows import WindowSampler
from fedcast.models.architectures.causal import CausalTransformer
from fedcast.models.base import ModelConfig
from fedcast.models.masking import patch_mask
from fedcast.spec import DataSpec
from fedcast.tasks.reconstruct import ReconstructTask, whole_windows
from fedcast.training.coreset import float_model, last_weights, match_gradients, nearest_distances, perturb_amplitudes, standardise, tune
from fedcast.training.flat import Layout

PATCH, CONTEXT, HORIZON = 8, 48, 16
CONFIG = ModelConfig(
    d_model=16, n_heads=2, encoder_layers=1, decoder_layers=1, context=CONTEXT, horizon=HORIZON, patch=PATCH, architecture="causal"
)


@pytest.fixture(scope="module")
def sampler() -> WindowSampler:
    store = load_domains(DataSpec(), ["health"])["health"]
    return WindowSampler(store, split_by_time(store, horizon=HORIZON, validation=0.1, test=0.2), context=CONTEXT, horizon=HORIZON)


def real(sampler: WindowSampler, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return whole_windows(sampler.gather(sampler.draw(count, np.random.default_rng(seed))), PATCH)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh() -> CausalTransformer:
    named = dict(CausalTransformer(CONFIG, 0).named_parameters())
    layout = Layout.of(named, lambda name: True)
    return float_model(CONFIG, layout, layout.flatten(named))


@given(st.integers(2, 70), st.integers(0, 10_000))
def test_when_noise_is_added_then_amplitudes_change_as_drawn_and_phases_stay(length: int, seed: int) -> None:
    vectors = torch.randn(3, length, generator=generator(seed))
    noisy = perturb_amplitudes(vectors, 0.3, generator(seed))
    before, after = torch.fft.rfft(vectors), torch.fft.rfft(noisy)
    draws = torch.randn(before.shape, generator=generator(seed))
    assert torch.allclose(after.abs(), before.abs() * (1 + 0.3 * draws).clamp_min(0), atol=1e-4)
    clear = (after.abs() > 1e-2) & (before.abs() > 1e-2)
    turned = (after / before)[clear]
    assert torch.allclose(turned.imag / turned.real.abs().clamp_min(1e-3), torch.zeros(len(turned)), atol=2e-2)
    assert (turned.real > 0).all()
    assert torch.allclose(perturb_amplitudes(vectors, 0.0, generator()), vectors, atol=1e-5)


def test_when_gradients_are_matched_then_they_are_closer_than_those_of_the_windows_it_started_from(sampler: WindowSampler) -> None:
    batch = real(sampler, 16, seed=1)

    def mismatch(start: Tensor, rate: float) -> tuple[Tensor, float]:
        return match_gradients(fresh(), start, lambda: batch, ReconstructTask(), ratio=0.5, steps=40, rate=rate, generator=generator())

    start = standardise(*real(sampler, 16, seed=2))
    learnt, _ = mismatch(start, 0.05)
    # At a rate of nearly 0 nothing is learnt, and the second value is what the core-set comes to under the same masks.
    assert mismatch(learnt, 1e-9)[1] < 0.7 * mismatch(start, 1e-9)[1]
    assert mismatch(standardise(*batch), 1e-9)[1] < 1e-6


def test_when_gradients_are_matched_then_the_distance_is_that_of_head_and_last_block(sampler: WindowSampler) -> None:
    values, mask = real(sampler, 8, seed=1)
    start, model, task = standardise(*real(sampler, 8, seed=2)), fresh(), ReconstructTask()
    _, found = match_gradients(model, start, lambda: (values, mask), task, ratio=0.5, steps=1, rate=0.01, generator=generator(5))
    seed = int(torch.randint(2**62, (), generator=generator(5)))
    names = [n for n, _ in model.named_parameters() if n.startswith(("heads.point", "encoder.blocks.1."))]
    assert len(last_weights(model)) == len(names) == 2 + 12
    whole, gradients = torch.ones_like(start, dtype=torch.bool), []
    for windows, seen in ((values, mask), (start, whole)):
        plain = CausalTransformer(CONFIG, 0)
        hidden = patch_mask(seen.view(8, -1, PATCH).any(-1), 0.5, generator(seed))
        task.loss(plain.output(plain.represent(windows, seen, hidden)), windows, seen, hidden)[0].backward()
        gradients.append(torch.cat([plain.get_parameter(name).grad.flatten() for name in names]))  # type: ignore[union-attr]
    assert found == pytest.approx(float((gradients[1] - gradients[0]).square().sum() / gradients[0].square().sum()), rel=1e-3)


def test_when_distances_are_reported_then_a_copy_is_at_0_and_noise_is_not(sampler: WindowSampler) -> None:
    copies = standardise(*real(sampler, 5, seed=3))
    assert nearest_distances(copies * 4 - 7, sampler, PATCH).max() < 2e-3
    strangers = torch.randn(5, CONTEXT + HORIZON, generator=generator())
    found = nearest_distances(strangers, sampler, PATCH)
    assert found.min() > 0.5
    every = standardise(*whole_windows(sampler.gather(sampler.evenly(10**9)), PATCH))
    unit = standardise(strangers, torch.ones_like(strangers, dtype=torch.bool))
    complete = (every != 0).all(1)  # standardised windows without a missing point: there it is the RMS difference
    differences = (unit[:, None] - every[complete][None]).square().mean(-1).sqrt().amin(1)
    assert (found <= differences + 1e-4).all()
    assert math.isclose(float(found.min()), float(differences.min()), rel_tol=0.05)


def test_when_a_model_is_tuned_then_it_learns_the_core_sets_and_the_number_of_threads_is_restored() -> None:
    phases = torch.rand(64, 1, generator=generator(4)) * 6.28
    pooled, model = torch.sin(torch.arange(64.0) * 0.7854 + phases), fresh()
    threads = torch.get_num_threads()
    errors = tune(model, pooled, ReconstructTask(), ratio=0.5, epochs=15, rate=5e-3, batch_size=16, generator=generator())
    assert errors[-1] < 0.7 * errors[0]
    assert torch.get_num_threads() == threads
    again = fresh()
    assert tune(again, pooled, ReconstructTask(), ratio=0.5, epochs=15, rate=5e-3, batch_size=16, generator=generator()) == errors
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

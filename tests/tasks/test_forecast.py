import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcast.data.windows import Batch, Windows
from fedcast.models.base import QUANTILES, ModelConfig, Output
from fedcast.models.patch import PatchTransformer
from fedcast.tasks.forecast import ForecastTask


def batch_of(target, mask, context=None):
    count = len(target)
    context = torch.zeros(count, 4) if context is None else context
    labels = torch.zeros(count, dtype=torch.int64)
    places = np.zeros(count, dtype=np.int64)
    return Batch(context, torch.ones_like(context, dtype=torch.bool), target, mask, Windows(places, places), labels, labels)


def output_of(point, quantiles, loc, scale):
    count = len(point)
    return Output(point, quantiles, torch.zeros(count, 1, 2), torch.ones(count, 1, dtype=torch.bool), loc, scale)


def by_hand(point, quantiles, target, mask, eta):
    total, count = 0.0, 0
    for b, t in np.argwhere(mask):
        error = target[b, t] - point[b, t]
        total += 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
        for k, q in enumerate(QUANTILES):
            u = target[b, t] - quantiles[b, t, k]
            total += eta * 2 / 9 * max(q * u, (q - 1) * u)
        count += 1
    return total / max(count, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.0, 1.0, 0.3]))
def test_when_a_loss_is_taken_then_it_equals_the_formula(seed, count, horizon, eta):
    generator = torch.Generator().manual_seed(seed)
    target = 5 + 3 * torch.randn(count, horizon, generator=generator)
    mask = torch.rand(count, horizon, generator=generator) > 0.3
    point, quantiles = torch.randn(count, horizon, generator=generator), torch.randn(count, horizon, 9, generator=generator)
    loc, scale = torch.randn(count, 1, generator=generator), 0.5 + torch.rand(count, 1, generator=generator)
    loss = ForecastTask(eta=eta).loss(output_of(point, quantiles, loc, scale), batch_of(target, mask))
    expected = by_hand(point.numpy(), quantiles.numpy(), ((target - loc) / scale).numpy(), mask.numpy(), eta)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_when_the_quantiles_are_those_of_the_data_then_no_others_are_better():
    target = torch.linspace(0, 1, 1001).view(1, -1)
    mask = torch.ones_like(target, dtype=torch.bool)
    loc, scale = torch.zeros(1, 1), torch.ones(1, 1)
    right = torch.tensor(QUANTILES).expand(1, 1001, 9)
    task = ForecastTask()

    def loss(quantiles):
        return task.loss(output_of(torch.full_like(target, 0.5), quantiles, loc, scale), batch_of(target, mask)).item()

    assert loss(right) < min(loss(right + 0.05), loss(right - 0.05), loss(right * 0.9 + 0.05))


def test_when_a_target_is_missing_then_what_stands_there_has_no_influence():
    point, quantiles = torch.zeros(1, 2), torch.zeros(1, 2, 9)
    mask = torch.tensor([[True, False]])
    losses = [
        ForecastTask().loss(output_of(point, quantiles, torch.zeros(1, 1), torch.ones(1, 1)), batch_of(torch.tensor([[1.0, x]]), mask))
        for x in (0.0, 1e30)
    ]
    assert torch.equal(*losses)


def test_when_no_target_is_observed_then_loss_and_gradients_are_zero():
    point, quantiles = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, 9, requires_grad=True)
    output = output_of(point, quantiles, torch.zeros(2, 1), torch.ones(2, 1))
    loss = ForecastTask().loss(output, batch_of(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)))
    loss.backward()
    assert loss.item() == 0
    assert point.grad.abs().max() == quantiles.grad.abs().max() == 0


def test_when_a_series_leaves_a_constant_context_then_the_loss_is_bounded_and_gradients_are_the_same():
    gradients = []
    for target in (60.0, 1e30):
        point = torch.zeros(1, 1, requires_grad=True)
        output = output_of(point, torch.zeros(1, 1, 9), torch.zeros(1, 1), torch.full((1, 1), 1e-20))
        loss = ForecastTask().loss(output, batch_of(torch.full((1, 1), target), torch.ones(1, 1, dtype=torch.bool)))
        loss.backward()
        assert loss.item() < 200
        gradients.append(point.grad.item())
    assert gradients == [-1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_when_a_model_takes_steps_then_the_loss_falls(dtype):
    torch_generator = torch.Generator().manual_seed(0)
    config = ModelConfig(d_model=32, n_heads=2, encoder_layers=1, decoder_layers=1, context=48, horizon=16, patch=8)
    master = PatchTransformer(config, seed=0)
    optimiser = torch.optim.AdamW(master.parameters(), lr=3e-3)
    task, losses = ForecastTask(), []
    for _ in range(60):
        phase = 6.28 * torch.rand(32, 1, generator=torch_generator)
        series = 7 + 4 * torch.sin(torch.arange(64) * (6.28 / 8) + phase)
        batch = batch_of(series[:, 48:], torch.ones(32, 16, dtype=torch.bool), series[:, :48])
        model = PatchTransformer(config).to(dtype)
        model.load_state_dict(master.state_dict())
        loss = task.loss(model.normalised(batch.context, batch.mask, 16), batch)
        loss.backward()
        for kept, used in zip(master.parameters(), model.parameters(), strict=True):
            kept.grad = used.grad.float()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.25 * np.mean(losses[:5])

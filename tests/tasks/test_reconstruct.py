from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.batches import batch_of
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.models.base import QUANTILES, ModelConfig, Output
from fedcast.tasks.reconstruct import RATIOS, ReconstructTask, reconstruction_mse, whole_windows

PATCH = 4
CONFIG = ModelConfig(d_model=8, n_heads=1, encoder_layers=1, decoder_layers=1, context=16, horizon=8, patch=PATCH)


def batch(context: Tensor, target: Tensor) -> Batch:
    values = torch.cat((context, target), dim=1)
    return batch_of(values, context.shape[1], torch.isfinite(values))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_when_windows_are_joined_then_patches_are_whole_and_what_is_added_is_missing() -> None:
    windows = batch(torch.arange(1.0, 11).view(1, 10), torch.arange(11.0, 16).view(1, 5))
    values, mask = whole_windows(windows, PATCH)
    assert values.tolist() == [[0, 0, *range(1, 16), 0, 0, 0]]
    assert mask.tolist() == [[False] * 2 + [True] * 15 + [False] * 3]


@given(st.integers(0, 10_000))
def test_when_a_loss_is_taken_then_it_equals_the_formula(seed: int) -> None:
    batch, patches = 3, 5
    generator = torch.Generator().manual_seed(seed)
    values = random(batch, patches * PATCH, seed=seed).cumsum(1)
    mask = torch.rand(values.shape, generator=generator) < 0.8
    hidden = torch.rand(batch, patches, generator=generator) < 0.6
    loc, scale = random(batch, 1, seed=seed + 1), random(batch, 1, seed=seed + 2).abs() + 0.1
    point, quantiles = random(*values.shape, seed=seed + 3), random(*values.shape, 9, seed=seed + 4)
    unused = torch.zeros(batch, patches, 2)
    error, pinball = ReconstructTask(eta=0.5).loss(Output(point, quantiles, unused, hidden, loc, scale), values, mask, hidden)
    squares, slopes, count = 0.0, 0.0, 0
    for b in range(batch):
        observed = values[b][mask[b]]
        unit = max(float(observed.std(unbiased=False)), float(scale[b]))
        for t in range(patches * PATCH):
            if not (mask[b, t] and hidden[b, t // PATCH]):
                continue
            truth, count = float((values[b, t] - loc[b]) / scale[b]), count + 1
            truth = min(max(truth, -50), 50)
            squares += float((truth - point[b, t]) * scale[b] / unit) ** 2
            for k, q in enumerate(QUANTILES):
                u = truth - float(quantiles[b, t, k])
                slopes += 0.5 * 2 / 9 * max(q * u, (q - 1) * u) * float(scale[b]) / unit
    assert float(error) == pytest.approx(squares / max(count, 1), rel=1e-3, abs=1e-6)
    assert float(pinball) == pytest.approx(slopes / max(count, 1), rel=1e-3, abs=1e-6)


class _Fills:
    """A reconstructor that answers one value, or the truth, and notes what was hidden."""

    def __init__(self, answer: float | None) -> None:
        self.config, self.answer, self.hidden = CONFIG, answer, list[Tensor]()

    def fill(self, values: Tensor, mask: Tensor, hidden: Tensor) -> Tensor:
        self.hidden.append(hidden)
        return values.clone() if self.answer is None else torch.full_like(values, self.answer)


def test_when_reconstructions_are_scored_then_hidden_observed_points_count_at_five_ratios() -> None:
    context, target = random(40, 16), random(40, 8, seed=1)
    context[0, :5] = torch.nan
    scale = torch.full((40,), 2.0)
    model = _Fills(1.0)
    scores = reconstruction_mse(model, batch(context, target), scale)
    assert list(scores) == ["mse_15", "mse_30", "mse_45", "mse_60", "mse_75", "mse"]
    whole = torch.cat((context, target), dim=1)
    for name, hidden, ratio in zip(scores, model.hidden, RATIOS, strict=False):
        assert abs(float(hidden.float().mean()) - ratio) < 0.1
        points = hidden.repeat_interleave(PATCH, dim=1) & whole.isfinite()
        assert scores[name] == pytest.approx(float(((1 - whole[points]) / 2).square().mean()), rel=1e-5)
    assert scores["mse"] == pytest.approx(sum(scores[f"mse_{round(100 * r)}"] for r in RATIOS) / 5)
    assert reconstruction_mse(_Fills(None), batch(context, target), scale)["mse"] == 0
    again = _Fills(None)
    reconstruction_mse(again, batch(context, target), scale)
    assert all(torch.equal(a, b) for a, b in zip(model.hidden, again.hidden, strict=True))


def test_when_only_a_part_may_count_then_errors_before_it_do_not() -> None:
    context, target = random(40, 16), random(40, 8, seed=1)
    since = torch.arange(40) % 20 - 12  # from 12 steps before the first target to 7 after it
    model = _Fills(1.0)
    scores = reconstruction_mse(model, batch(context, target), torch.ones(40), since)
    whole = torch.cat((context, target), dim=1)
    late = torch.arange(24) - 16 >= since.unsqueeze(1)
    for name, hidden in zip(scores, model.hidden, strict=False):
        points = hidden.repeat_interleave(PATCH, dim=1) & late
        assert scores[name] == pytest.approx(float((1 - whole[points]).square().mean()), rel=1e-5)


def test_when_no_hidden_point_counts_then_there_is_no_score() -> None:
    context = torch.full((2, 16), torch.nan)
    context[:, -1] = 1.0
    scores = reconstruction_mse(_Fills(0.0), batch(context, torch.full((2, 8), torch.nan)), torch.ones(2))
    assert all(math.isnan(value) for value in scores.values())

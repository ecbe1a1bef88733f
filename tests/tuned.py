"""Tiny models and windows for whatever tunes models: the native one, and published ones where their libraries are installed."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

import fedcast.models.published  # noqa: F401 - registers the adapters
from fedcast.data.windows import Batch
from fedcast.models.base import ModelConfig
from fedcast.models.contract import Model, OwnLossModel
from fedcast.models.patch import PatchTransformer
from fedcast.models.published.base import FAMILIES
from fedcast.tasks.forecast import ForecastTask
from tests.batches import batch_of

ROWS, CONTEXT, HORIZON = 4, 32, 8
MODELS = ("native", "chronos-bolt", "ttm")


def tiny(name: str) -> Model:
    """Return a tiny model of one of :data:`MODELS`; without its library the test is skipped."""
    return copy.deepcopy(_tiny(name))


@cache
def _tiny(name: str) -> Model:
    if name == "native":
        return PatchTransformer(ModelConfig(16, 2, 2, 1, context=CONTEXT, horizon=HORIZON, patch=8), seed=3)
    if FAMILIES[name].library.installed is None:
        pytest.skip(f"{FAMILIES[name].library.package} is not installed")
    return FAMILIES[name].tiny(3)


def windows(seed: int = 0) -> Batch:
    """Return four noisy sines, a tenth of the context missing."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(CONTEXT + HORIZON)
    values = 5 + torch.sin(steps / torch.tensor([[2.0], [3.0], [4.0], [5.0]])) + 0.1 * torch.randn(ROWS, len(steps), generator=generator)
    mask = torch.rand(ROWS, CONTEXT, generator=generator) > 0.1
    return batch_of(values, CONTEXT, torch.cat((mask, torch.ones(ROWS, HORIZON, dtype=torch.bool)), dim=1))


def loss_of(model: Model, batch: Batch) -> Tensor:
    """Return the loss that the model trains with."""
    if isinstance(model, OwnLossModel):
        return model.step(batch, torch.Generator)[0]
    assert isinstance(model, PatchTransformer)
    return ForecastTask().step(model, batch, torch.Generator)[0]


def train(model: Model, steps: int = 3) -> None:
    """Take steps of Adam on what requires a gradient."""
    model.train()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimiser.zero_grad()
        loss_of(model, windows(step)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def forecast(model: Model) -> Tensor:
    """Return point and quantiles of the model for the windows, as one tensor.

    They are a frozen copy's: torch rounds products of four-dimensional tensors differently where the weights require a gradient.
    """
    batch, frozen = windows(), copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        point, quantiles = frozen(batch.context, batch.mask, HORIZON)
    return torch.cat((point.unsqueeze(-1), quantiles), dim=-1)


def weights(model: Model) -> dict[str, Tensor]:
    """Return copies of the state, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Return whether two states have the same names and bits."""
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())

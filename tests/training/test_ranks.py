"""Ranks that share a batch: their parts are the batch, and their losses and gradients add up to its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tests.batches import batch_of
from torch import Tensor

import fedcast.models.published  # noqa: F401 - registers the adapters
from fedcast.data.windows import Batch
from fedcast.models.base import ModelConfig
from fedcast.models.contract import Model, OwnLossModel
from fedcast.models.patch import PatchTransformer
from fedcast.models.published.base import FAMILIES
from fedcast.models.reheaded import Reheaded
from fedcast.tasks.forecast import ForecastTask
from fedcast.training.flat import FlatParameters, Layout
from fedcast.training.ranks import Ranks, share_of

CONFIG = ModelConfig(d_model=16, n_heads=2, encoder_layers=1, decoder_layers=1, context=64, horizon=16, patch=8)


def native() -> Model:
    return PatchTransformer(CONFIG, seed=1)


def published(family: str) -> Model:
    chosen = FAMILIES[family]
    if chosen.library.installed is None:
        pytest.skip(f"{chosen.library.package} is not installed")
    return chosen.tiny(0)


SPLITTING = sorted(name for name, family in FAMILIES.items() if family.splits)
MODELS: dict[str, Callable[[], Model]] = {
    "native": native,
    "new head": lambda: Reheaded.on(native(), "flatten"),
    **{family: lambda family=family: published(family) for family in SPLITTING},  # type: ignore[misc]
}


def batch(model: Model, rows: int) -> Batch:
    """Return sines with gaps: every row misses another share of its targets, the second all of them."""
    generator = torch.Generator().manual_seed(0)
    context, horizon = model.config.context, model.config.horizon
    steps = torch.arange(context + horizon)
    values = 5 + torch.sin(2 * torch.pi * steps / torch.arange(6, 6 + rows)[:, None]) + 0.1 * torch.randn(rows, len(steps))
    seen = torch.rand(rows, len(steps), generator=generator) > torch.linspace(0, 0.6, rows)[:, None]
    seen[1, context:] = False
    return batch_of(values, context, seen)


def loss(model: Model, windows: Batch) -> Tensor:
    return ForecastTask().step(model, windows, torch.Generator)[0]


@given(st.integers(1, 40), st.integers(1, 9))
def test_when_ranks_share_a_batch_then_their_parts_are_the_batch_in_order_and_as_even_as_can_be(rows: int, size: int) -> None:
    whole = batch_of(torch.arange(float(rows * 20)).view(rows, 20), 16)
    parts = [Ranks(rank, size).part(whole) for rank in range(size)]
    assert torch.equal(torch.cat([part.target for part in parts]), whole.target)
    assert [end for part in parts for end in part.windows.end] == whole.windows.end.tolist()
    lengths = [len(part.windows) for part in parts]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("name", ["native", "new head", *(pytest.param(family, marks=pytest.mark.slow) for family in SPLITTING)])
@pytest.mark.parametrize("size", [2, 3])
def test_when_a_model_says_that_its_loss_splits_then_gradients_of_the_parts_add_up_to_that_of_the_batch(name: str, size: int) -> None:
    model = MODELS[name]().train()
    whole = batch(model, 5)
    value = loss(model, whole)
    value.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    expected = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    model.zero_grad()
    parts = [Ranks(rank, size).part(whole) for rank in range(size)]
    values = [loss(model, part) * share_of(part, whole) for part in parts]
    torch.stack(values).sum().backward()
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert torch.stack(values).sum().item() == pytest.approx(value.item(), rel=1e-6)
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_when_a_model_draws_or_means_over_windows_then_it_says_that_its_loss_does_not_split() -> None:
    own = {name for name, family in FAMILIES.items() if issubclass(family, OwnLossModel) and not family.splits}
    assert own == {"chronos-2", "chronos-bolt", "chronos-t5", "heartgpt", "sundial"}


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ranks]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield Ranks(0, 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_when_there_is_one_rank_then_its_gradient_is_that_of_a_plain_backward_pass(alone: Ranks, dtype: torch.dtype) -> None:
    model = native()
    named = dict(model.named_parameters())
    parameters = FlatParameters(named, Layout.of(named, lambda _: True), dtype)
    whole = batch(model, 4)
    plain = loss(model, whole)
    plain.backward()
    expected = parameters.gradient.clone()
    for _ in range(2):
        parameters.gradient.zero_()
        value = alone.backward(lambda part: loss(model, part), whole, parameters)
        assert torch.equal(parameters.gradient, expected)
        assert value.item() == plain.item()


def test_when_no_target_is_observed_then_loss_and_gradient_are_zero(alone: Ranks) -> None:
    model = native()
    named = dict(model.named_parameters())
    parameters = FlatParameters(named, Layout.of(named, lambda _: True), torch.float32)
    whole = batch(model, 4).rows(slice(1, 2))
    assert alone.backward(lambda part: loss(model, part), whole, parameters).item() == 0.0
    assert not parameters.gradient.any()

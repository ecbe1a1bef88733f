from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.batches import batch_of
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.errors import ModelError
from fedcast.models.contract import Model
from fedcast.models.patch import PatchTransformer
from fedcast.models.published.chronos_2 import Chronos2
from fedcast.models.published.ttm import TTM
from fedcast.spec import ModelSpec
from fedcast.tasks.forecast import ForecastTask
from fedcast.training.flat import FlatParameters, Layout
from fedcast.training.private import Hooked, Looped, add_noise, choose, clip_update, private_gradient, system_normal

CONTEXT, HORIZON = 64, 16


def _native(position: str = "rope") -> Model:
    return PatchTransformer.from_spec(ModelSpec(size="nano", context=CONTEXT, horizon=HORIZON, position=position), 1)  # type: ignore[arg-type]


def _bound(model: Model) -> tuple[FlatParameters, Callable[[Batch], Tensor]]:
    model.train()
    named = dict(model.named_parameters())
    parameters = FlatParameters(named, Layout.of(named, lambda _: True), torch.float32)
    return parameters, lambda batch: ForecastTask().step(model, batch, torch.Generator)[0]


def _batch(model: Model, size: int = 6) -> Batch:
    context, horizon = model.config.context, min(HORIZON, model.config.horizon)
    values = torch.randn(size, context + horizon, generator=torch.Generator().manual_seed(3)).cumsum(1)
    seen = torch.ones(size, context + horizon, dtype=torch.bool)
    seen[1, : context // 2], seen[4, : context - 20], seen[2, context + 3 :] = False, False, False
    return batch_of(values, context, seen)


def _rows(source: Any, batch: Batch) -> Tensor:
    return torch.cat([piece.rows for piece in source.gradients(batch)])


@pytest.mark.parametrize("make", [_native, lambda: _native("learned"), lambda: TTM.tiny(3)], ids=["native", "learned", "ttm"])
def test_when_opacus_knows_a_model_then_its_gradients_of_windows_are_those_of_one_pass_a_window(make: Callable[[], Model]) -> None:
    model = make()
    parameters, loss = _bound(model)
    batch = _batch(model)
    source = choose("opacus", model, parameters, loss, batch, "it")
    assert isinstance(source, Hooked)
    wanted = _rows(Looped(parameters, loss), batch)
    torch.testing.assert_close(_rows(source, batch), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_when_a_model_mixes_the_batch_axis_then_opacus_is_refused_by_name_and_auto_takes_one_pass_a_window() -> None:
    model = Chronos2.tiny(3)
    parameters, loss = _bound(model)
    batch = _batch(model)
    with pytest.raises(ModelError, match="opacus gives chronos-2 wrong gradients"):
        choose("opacus", model, parameters, loss, batch, "chronos-2")
    source = choose("auto", model, parameters, loss, batch, "chronos-2")
    assert isinstance(source, Looped)
    # Nothing of the failed attempt is left: a window's gradient is that of an untouched model.
    untouched = Chronos2.tiny(3)
    torch.testing.assert_close(_rows(source, batch), _rows(Looped(*_bound(untouched)), batch), rtol=0, atol=0)


class _Leaky(nn.Module):
    """A layer that adds the batch's mean to every window: its shapes are those of an honest one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.linear = nn.Linear(CONTEXT, HORIZON)

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.linear(batch.context + batch.context.mean(dim=0))
        return ((out - batch.target) * batch.target_mask).square().sum() / batch.target_mask.sum()


def test_when_windows_leak_into_each_other_with_the_right_shapes_then_the_numbers_give_it_away() -> None:
    model: Any = _Leaky().train()
    named = dict(model.named_parameters())
    parameters = FlatParameters(named, Layout.of(named, lambda _: True), torch.float32)
    with pytest.raises(ModelError, match="off by"):
        choose("opacus", model, parameters, model, _batch(_native()), "leaky")


def test_when_a_loss_averages_over_windows_first_then_the_gaps_of_the_check_show_it() -> None:
    model = _native()
    parameters, _ = _bound(model)

    def by_window(batch: Batch) -> Tensor:
        output = model.normalised(batch.context, batch.mask, HORIZON)  # type: ignore[operator]
        error = (output.point - (batch.target - output.loc) / output.scale).square() * batch.target_mask
        return (error.sum(1) / batch.target_mask.sum(1)).mean()

    whole = batch_of(torch.randn(4, CONTEXT + HORIZON, generator=torch.Generator().manual_seed(3)), CONTEXT)
    source = choose("opacus", model, parameters, by_window, whole, "native")
    assert isinstance(source, Hooked)
    assert source.reduction == "windows"


def test_when_a_gradient_is_private_then_it_is_the_clipped_sum_over_the_expected_size() -> None:
    model = _native()
    parameters, loss = _bound(model)
    batch = _batch(model)
    rows = _rows(Looped(parameters, loss), batch)
    lengths = rows.norm(dim=1)
    norm = float(lengths.median())
    wanted = (rows * (norm / lengths).clamp(max=1)[:, None]).sum(0) / 10
    value = private_gradient(Looped(parameters, loss), batch, parameters, norm=norm, noise=0.0, size=10, rng=np.random.default_rng(0))
    torch.testing.assert_close(parameters.gradient, wanted, rtol=1e-4, atol=1e-6)
    assert float(value) > 0


def test_when_a_step_has_no_window_then_its_gradient_is_noise_alone() -> None:
    model = _native()
    parameters, loss = _bound(model)
    empty = next(_batch(model).split(6))
    empty = Batch(
        *(part[:0] for part in (empty.context, empty.mask, empty.target, empty.target_mask)), empty.windows, empty.dataset, empty.domain
    )
    empty.windows = type(empty.windows)(empty.windows.series[:0], empty.windows.end[:0])
    value = private_gradient(Looped(parameters, loss), empty, parameters, norm=2.0, noise=3.0, size=4, rng=np.random.default_rng(0))
    assert float(value) == 0
    assert float(parameters.gradient.std()) == pytest.approx(3.0 * 2.0 / 4, rel=0.01)


def test_when_one_window_has_no_finite_gradient_then_it_counts_as_nothing() -> None:
    class Broken(Looped):
        def gradients(self, batch: Batch) -> Any:
            for number, piece in enumerate(super().gradients(batch)):
                yield replace(piece, factor=piece.factor * float("nan")) if number == 2 else piece

    model = _native()
    parameters, loss = _bound(model)
    private_gradient(Broken(parameters, loss), _batch(model), parameters, norm=1.0, noise=0.0, size=6, rng=None)
    assert bool(parameters.gradient.isfinite().all())
    assert float(parameters.gradient.norm()) > 0


@given(
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-20, 1e-6, 1e-3, 1.0, 1e3, 1e30]),
    st.sampled_from([1e-7, 1e-3, 1.0, 1e4]),
    st.sampled_from([0.0, 1.0, 1e4]),
)
def test_when_an_update_is_clipped_then_the_weights_that_come_out_are_within_the_bound(
    size: int, seed: int, length: float, norm: float, level: float
) -> None:
    rng = np.random.default_rng(seed)
    before = torch.from_numpy(level * rng.standard_normal(size)).float()
    after = (before.double() + length * torch.from_numpy(rng.standard_normal(size))).float()
    clipped = clip_update(after, before, norm)
    assert clipped.dtype == torch.float32
    assert float((clipped.double() - before.double()).norm()) <= norm
    if float((after.double() - before.double()).norm()) <= norm:
        assert torch.equal(clipped, after)


@pytest.mark.parametrize("seeded", [True, False])
def test_when_noise_is_added_then_it_is_gaussian_of_that_spread(seeded: bool) -> None:
    noise = torch.zeros(400_000, dtype=torch.float64)
    add_noise(noise, 2.5, np.random.default_rng(1) if seeded else None)
    values = noise.numpy() / 2.5
    # Five standard errors: mean, variance, fourth moment, and the share beyond two and three standard deviations.
    n = len(values)
    assert abs(values.mean()) < 5 / n**0.5
    assert abs(values.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for bound, share in ((2, 0.0455003), (3, 0.0026998)):
        assert abs((np.abs(values) > bound).mean() - share) < 5 * (share / n) ** 0.5
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / n**0.5


def test_when_noise_comes_from_the_system_then_no_two_draws_are_alike_and_any_length_is_given() -> None:
    assert not np.array_equal(system_normal(8), system_normal(8))
    assert [len(system_normal(size)) for size in (0, 1, 2, 7)] == [0, 1, 2, 7]

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor
from fedcast.models.patch import PatchTransformer


def counted(size: str, batch: int, *, context: int = 512, horizon: int = 64) -> tuple[int, int]:
    """Return the operations of forward and backward that torch counts, in bfloat16: there attention is plain products."""
    model = PatchTransformer(floor.configuration(size, context, horizon)).to(torch.bfloat16)
    windows = torch.randn(batch, context)
    with FlopCounterMode(display=False) as forward:
        output = model.normalised(windows, torch.ones_like(windows, dtype=torch.bool), horizon)
    loss = output.point.sum() + output.quantiles.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("size", ["nano", "micro", "tiny", "mini"])
def test_when_torch_counts_a_step_then_it_finds_the_operations_of_the_floor(size: str) -> None:
    batch = 3
    step = floor.step(floor.configuration(size), batch)

    forward, backward = counted(size, batch)

    assert forward == step.forward
    assert backward == step.backward


def test_when_context_and_horizon_change_then_the_floor_follows() -> None:
    step = floor.step(floor.configuration("nano", 200, 40), 2)

    assert counted("nano", 2, context=200, horizon=40) == (step.forward, step.backward)


@pytest.mark.parametrize("size", floor.SIZES)
def test_when_a_size_is_built_then_it_has_the_parameters_of_the_floor(size: str) -> None:
    with torch.device("meta"):
        model = PatchTransformer(floor.configuration(size))

    assert floor.parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


def test_when_rates_are_known_then_the_least_seconds_add_products_and_memory() -> None:
    step = floor.step(floor.configuration("nano"), 1)

    assert step.seconds(1e9, 1e9) == pytest.approx((step.products + step.optimiser_bytes) / 1e9)


def test_when_clients_double_then_the_bytes_of_a_round_double() -> None:
    config = floor.configuration("nano")

    assert floor.round_bytes(config, 1) == 8 * floor.parameters(config)
    assert floor.round_bytes(config, 20) == 20 * floor.round_bytes(config, 1)

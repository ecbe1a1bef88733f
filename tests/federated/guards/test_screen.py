"""The screen: what is too long or too large is dropped, and what is not passes as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.federations import small_spec
from torch import Tensor

from fedcast.errors import ScreenError, SpecError
from fedcast.federated.guards import Guards
from fedcast.federated.guards.base import Arrival
from fedcast.federated.guards.screen import Screen
from fedcast.federated.plan import Plan
from fedcast.methods.base import build_method
from fedcast.spec import GuardSpec, RunSpec

SENT = torch.full((100,), 0.3)  # of length 3


def arrival(sent: Tensor = SENT, initial: Tensor | None = None, **tensors: Tensor) -> Arrival:
    return Arrival("a", tensors, {}, {"shared": sent}, 10, torch.zeros(0) if initial is None else initial)


def update(length: float) -> Tensor:
    return SENT + length / 10


@pytest.mark.parametrize("length", [0.0, 1.0, 2.99])
def test_when_an_update_is_within_the_bound_then_nothing_is_changed(length: float) -> None:
    came = arrival(shared=update(length))
    Screen().inspect(came)
    assert torch.equal(came.tensors["shared"], update(length))


@pytest.mark.parametrize("shared", [update(3.01), SENT * -100, SENT * 1e6, torch.full((100,), 3e38), torch.full((100,), -3e38)])
def test_when_an_update_is_longer_than_the_weights_then_it_is_dropped(shared: Tensor) -> None:
    with pytest.raises(ScreenError, match=r"its update is .* times as long as the weights, 1 may be"):
        Screen().inspect(arrival(shared=shared))


def test_when_weights_are_all_zero_then_an_update_may_be_as_long_as_newly_drawn_ones() -> None:
    zero = torch.zeros(100)  # 0.02 a weight: 0.2 in all
    Screen().inspect(arrival(zero, shared=torch.full((100,), 0.0199)))
    with pytest.raises(ScreenError, match="times as long"):
        Screen().inspect(arrival(zero, shared=torch.full((100,), 0.0201)))


def test_when_a_bound_is_absolute_then_it_holds_beside_the_other() -> None:
    Screen(absolute=0.5).inspect(arrival(shared=update(0.49)))
    with pytest.raises(ScreenError, match=r"has the length 0\.51"):
        Screen(absolute=0.5).inspect(arrival(shared=update(0.51)))


def test_when_private_weights_are_many_times_those_at_first_then_the_reply_is_dropped() -> None:
    initial = torch.cat([SENT, torch.full((50,), 0.1)])
    Screen().inspect(arrival(initial=initial, shared=SENT, private=torch.full((50,), 0.9)))
    with pytest.raises(ScreenError, match="its private weights are 100 times as long as at first, 10 may be"):
        Screen().inspect(arrival(initial=initial, shared=SENT, private=torch.full((50,), -10.0)))


def test_when_a_value_of_another_tensor_is_too_large_then_the_reply_is_dropped() -> None:
    Screen(largest=8).inspect(arrival(shared=SENT, counts=torch.tensor([8.0])))
    with pytest.raises(ScreenError, match="counts has a value beyond 8"):
        Screen(largest=8).inspect(arrival(shared=SENT, counts=torch.tensor([0.0, -8.5])))


def test_when_nothing_is_shared_then_there_is_nothing_to_look_at() -> None:
    Screen().inspect(arrival(torch.zeros(0), shared=torch.zeros(0)))


def spec(*guards: dict[str, Any]) -> RunSpec:
    return small_spec("fedavg").model_copy(update={"guards": tuple(GuardSpec.model_validate(guard) for guard in guards)})


def test_when_the_server_sees_no_update_then_the_screen_is_refused() -> None:
    run = spec({"name": "screen"}, {"name": "secure_sum"})
    plan = Plan(run, build_method(run.method))
    with pytest.raises(SpecError, match="cannot look into what the guard 'secure_sum' adds up unseen"):
        plan.guards.check(plan)


@pytest.mark.parametrize("options", [{"norm": 0}, {"growth": 1}, {"largest": -1}, {"norm": "long"}])
def test_when_an_option_is_refused_then_it_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=rf"guard\.{next(iter(options))}"):
        Guards.of([GuardSpec(name="screen", options=options)])

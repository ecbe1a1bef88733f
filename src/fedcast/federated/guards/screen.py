"""Drop replies whose size gives them away, by name, and go on with the round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fedcast.errors import ScreenError, SpecError
from fedcast.federated.guards.base import Arrival, Guard
from fedcast.methods.base import MODEL_PARTS
from fedcast.registry import hyper
from fedcast.training.aggregate import length

if TYPE_CHECKING:
    from fedcast.federated.plan import Plan

_DRAWN = 0.02  # standard deviation of newly drawn weights: shorter ones count as that long


@dataclass(frozen=True)
class Screen(Guard):
    """Bounds on the sizes of what a reply holds; names, shapes, types, finiteness and claims are checked in every run, guards or not.

    An update is what a site has after its steps less what it began from; its bound is a share of the length of those weights, or of
    ``0.02 sqrt(n)`` where they are shorter (newly drawn weights have about that length, an untrained low-rank addition has none). Private
    weights, of which the server does not know what they began from in this round, are held against those before any training.
    """

    name: ClassVar[str] = "screen"
    summary: ClassVar[str] = "drops replies whose update is too long or whose values are too large, and names them"

    norm: Annotated[float, Field(gt=0)] = hyper(1.0, "largest length of an update, over that of the weights it began from")
    absolute: Annotated[float, Field(gt=0)] | None = hyper(None, "largest length of an update, as it is")
    growth: Annotated[float, Field(gt=1)] = hyper(10.0, "largest length of exported private weights, over that before any training")
    largest: Annotated[float, Field(gt=0)] = hyper(1e6, "largest magnitude of a value in any other tensor")

    def check(self, plan: Plan, guards: Sequence[Guard]) -> None:
        """Refuse guards under which the server sees no site's update."""
        for guard in guards:
            if type(guard).accumulator is not Guard.accumulator:
                raise SpecError(
                    f"the guard 'screen' cannot look into what the guard {guard.name!r} adds up unseen",
                    hint="put 'clip' in its place: sites then bound their own updates",
                )

    def inspect(self, arrival: Arrival) -> None:
        """Drop a reply with an update that is too long, or a value that is too large."""
        hint = "look at that site; raise the bound in the guard 'screen' if its reply is as it should be"
        tensors = arrival.tensors
        if "shared" in tensors and "shared" in arrival.sent:
            began = arrival.sent["shared"]
            found, base = length(tensors["shared"] - began), _base(began)
            if not found <= self.norm * base:
                raise ScreenError(f"its update is {found / base:.3g} times as long as the weights, {self.norm:g} may be", hint=hint)
            if self.absolute is not None and not found <= self.absolute:
                raise ScreenError(f"its update has the length {found:.3g}, {self.absolute:g} may be", hint=hint)
        if "private" in tensors:
            private = tensors["private"]
            found, base = length(private), _base(arrival.initial[len(arrival.initial) - len(private) :])
            if not found <= self.growth * base:
                raise ScreenError(
                    f"its private weights are {found / base:.3g} times as long as at first, {self.growth:g} may be", hint=hint
                )
        for name, tensor in tensors.items():
            if name not in MODEL_PARTS and tensor.numel() and not float(tensor.abs().max()) <= self.largest:
                raise ScreenError(f"{name} has a value beyond {self.largest:g} in magnitude", hint=hint)


def _base(weights: Tensor) -> float:
    return max(length(weights), _DRAWN * sqrt(len(weights)))

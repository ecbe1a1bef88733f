"""Bound what one site can do to the shared weights in a round: longer updates are shortened, not dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fedcast.federated.guards.base import Arrival, Guard, Outgoing
from fedcast.registry import hyper
from fedcast.training.aggregate import length

_ROUNDING = 1e-5  # an update that its site has brought to the bound is a little longer in float32


@dataclass(frozen=True)
class Clip(Guard):
    """An update ``u`` of the shared weights travels as ``u * min(1, norm / |u|)``; private weights and a method's own tensors as they are.

    Sites shorten their own updates, and the server shortens what a site did not. Where the server sees no single update
    (``secure_sum``), the sites' own part alone is left, which binds honest sites only.
    """

    name: ClassVar[str] = "clip"
    summary: ClassVar[str] = "bounds the length of a site's update of the shared weights, at the site and again at the server"

    norm: Annotated[float, Field(gt=0)] = hyper(1.0, "largest length of an update of the shared weights")

    def encode(self, outgoing: Outgoing) -> None:
        """Shorten the site's update."""
        self._shorten(outgoing.tensors, outgoing.received.get("shared"))

    def inspect(self, arrival: Arrival) -> None:
        """Shorten an update that its site did not."""
        self._shorten(arrival.tensors, arrival.sent.get("shared"))

    def _shorten(self, tensors: dict[str, Tensor], began: Tensor | None) -> None:
        if began is None or "shared" not in tensors:
            return
        update = tensors["shared"] - began
        found = length(update)
        if found > self.norm * (1 + _ROUNDING):
            tensors["shared"] = began + update * (self.norm / found)

"""Fed-LA (arXiv 2502.09744, "hybrid" in its code): a federated stage, then each site adapts the model to itself.

Stage 1 is FedAvg over the first two thirds of the rounds (20 of 30, fedchronos.md C2). In stage 2 each site minimises
``L_i(w) + (mu / 2) |w - w_G|^2`` alone, w_G being the weights at the end of stage 1; nothing travels, and the site is scored with its
own weights (the intended form, reconstructed). The released code differs: sites are given the server's weights in every round of stage
2 too, which are averaged again, the proximal term is 0 because both of its weights are one tensor, and the loss counts twice;
``as_released`` does what that code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.methods.base import Client, hyper
from fedcast.methods.fedprox import FedProx


@dataclass(frozen=True)
class FedLA(FedProx):
    """FedAvg, then local adaptation with a pull to the federation's model."""

    name: ClassVar[str] = "fedla"
    summary: ClassVar[str] = "FedAvg, then each site adapts the model to itself, pulled to it; scored with its own weights"

    mu: Annotated[float, Field(ge=0)] = hyper(1.0, "weight of the pull to the federation's model, in stage 2")
    adapt: Annotated[float, Field(gt=0, lt=1)] = hyper(1 / 3, "share of the rounds, at the end, in which sites adapt alone")

    def adaptation(self, rounds: int) -> int:
        """Return the rounds of stage 2: at least one, and at least one of stage 1 before them; none as released."""
        return 0 if self.as_released else self._last(rounds)

    def _last(self, rounds: int) -> int:
        return min(rounds - 1, max(1, round(self.adapt * rounds)))

    def local_loss(self, client: Client, batch: Batch) -> Tensor:
        """Return the task's loss; twice in stage 2 as released."""
        loss, _ = client.task_loss(batch)
        doubled = self.as_released and client.round > client.rounds - self._last(client.rounds)
        return 2 * loss if doubled else loss

    def correction(self, client: Client) -> Tensor | None:
        """Return the gradient of the pull in stage 2; nothing in stage 1."""
        return super().correction(client) if client.adapting else None

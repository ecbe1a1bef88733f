"""FedProx (Li et al., MLSys 2020, arXiv 1812.06127): FedAvg whose sites are pulled to the weights they received.

A site minimises ``L(w) + (mu / 2) |w - w_round|^2`` (their eq. 2), ``w_round`` being the weights at the start of the round: a tensor of
its own, not the one that is trained. fedchronos.md C2 reports released code in which the two are the same, so that the term is
always 0; ``as_released`` does what that code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.methods.base import Client, Method, hyper


@dataclass(frozen=True)
class FedProx(Method):
    """FedAvg with a proximal term on the weights that travel."""

    name: ClassVar[str] = "fedprox"
    summary: ClassVar[str] = "FedAvg; sites are pulled to the weights they received"

    mu: Annotated[float, Field(ge=0)] = hyper(0.01, "weight of the proximal term")
    as_released: bool = hyper(False, "as the released code of arXiv 2502.09744: no proximal term, and the loss counted twice")

    def local_loss(self, client: Client, batch: Batch) -> Tensor:
        """Return the task's loss; twice as released."""
        loss, _ = client.task_loss(batch)
        return 2 * loss if self.as_released else loss

    @property
    def splits(self) -> bool:
        """True: the loss is the task's, or twice that."""
        return True

    def correction(self, client: Client) -> Tensor | None:
        """Return the gradient of the proximal term, ``mu * (w - w_round)``; 0 for weights that stay."""
        if self.as_released or self.mu == 0:
            return None
        parameters = client.parameters
        pull: Tensor = client.scratch.setdefault("pull", torch.zeros_like(parameters.vector))
        shared = pull[: parameters.layout.shared_size]
        torch.sub(parameters.shared, client.received["shared"], out=shared)
        # |w - w_round|^2 / 2 of the steps: whether sites drift at all
        client.record("proximal", 0.5 * shared.square().sum())
        return pull.mul_(self.mu)

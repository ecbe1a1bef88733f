"""FedDyn (Acar et al., ICLR 2021, arXiv 2111.04263): a dynamic regulariser that makes the sites' optima agree.

Site k minimises ``L_k(w) - <h_k, w> + (alpha / 2) |w - w_round|^2`` (their eq. 1), ``h_k`` being its gradient at its last optimum, kept as
``h_k - alpha (w_k - w_round)``. The server keeps ``h - alpha / m * sum_k (w_k - w_round)`` over the m sites and sets the weights to the
plain mean of the replies less ``h / alpha`` (their Algorithm 1). After the last round the mean stays as it is: the step counts on sites
that go on training against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedcast.methods.base import Client, Method, Server, Update, hyper


@dataclass(frozen=True)
class FedDyn(Method):
    """Local losses are bent so that, where all sites have converged, each is at the optimum of the mean loss."""

    name: ClassVar[str] = "feddyn"
    summary: ClassVar[str] = "dynamic regularisation: sites' optima are made to agree"

    # The paper's grid (0.001 to 0.1) is for SGD; as in FeDaL here, a clipped gradient of AdamW is about 0.001 a weight.
    alpha: Annotated[float, Field(gt=0)] = hyper(0.03, "weight of the regulariser")

    def correction(self, client: Client) -> Tensor:
        """Return the regulariser's gradient, ``alpha (w - w_round) - h_k``; 0 for weights that stay."""
        parameters = client.parameters
        bend: Tensor = client.scratch.setdefault("bend", torch.zeros_like(parameters.vector))
        shared = bend[: parameters.layout.shared_size]
        torch.sub(parameters.shared, client.received["shared"], out=shared)
        shared.mul_(self.alpha).sub_(self._own(client))
        return bend

    def reply(self, client: Client) -> dict[str, Tensor]:
        """Keep the new ``h_k``; nothing but the shared weights is sent."""
        client.state["h"] = self._own(client) - self.alpha * (client.parameters.shared - client.received["shared"])
        return {}

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Take the plain mean, less the server's ``h / alpha``."""
        before = server.shared
        self.combine(server, updates, [1.0] * len(updates))
        moved = (server.shared - before) * len(updates)
        h = server.tensors.get("h", torch.zeros_like(before)) - self.alpha * moved / server.sites
        server.tensors["h"] = h
        if server.round < server.rounds:
            server.shared = server.shared - h / self.alpha

    def _own(self, client: Client) -> Tensor:
        return client.state.get("h", torch.zeros_like(client.received["shared"]))

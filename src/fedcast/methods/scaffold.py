"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378): control variates against the drift of the sites.

Each step of site i adds ``c - c_i`` to its gradient (their Algorithm 1, line 10): the mean gradient of all sites in place of its own.
Their option II sets ``c_i`` to ``c_i - c + (x - y) / (K eta)``, which for K steps of SGD is the mean of the site's own gradients over the
round. That mean is taken here, so that it holds for AdamW too, whose steps are no multiples of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedcast.methods.base import Client, Method, Server, Update, hyper
from fedcast.models.contract import ModelShape


@dataclass(frozen=True)
class Scaffold(Method):
    """FedAvg with control variates; twice the bytes both ways."""

    name: ClassVar[str] = "scaffold"
    summary: ClassVar[str] = "FedAvg with control variates against the sites' drift; twice the bytes"

    server_rate: Annotated[float, Field(gt=0)] = hyper(1.0, "step of the server along the mean update")

    def correction(self, client: Client) -> Tensor:
        """Return ``c - c_i``, 0 for weights that stay, and add up the site's own gradients."""
        parameters, scratch = client.parameters, client.scratch
        size = parameters.layout.shared_size
        if "drift" not in scratch:
            scratch["drift"] = torch.zeros_like(parameters.vector)
            scratch["drift"][:size] = client.received["control"] - self._own(client)
            scratch["sum"], scratch["steps"] = torch.zeros(size, device=parameters.vector.device), 0
        scratch["sum"] += parameters.gradient[:size]
        scratch["steps"] += 1
        drift: Tensor = scratch["drift"]
        return drift

    def reply(self, client: Client) -> dict[str, Tensor]:
        """Return how the site's control variate moved; the new one stays at the site."""
        before, after = self._own(client), client.scratch["sum"] / client.scratch["steps"]
        client.state["control"] = after
        return {"control_step": after - before}

    def reply_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Declare the move of the control variate."""
        return {"control_step": (shape.shared_size,)}

    def message(self, server: Server, site: str) -> dict[str, Tensor]:
        """Send the shared weights and the server's control variate."""
        return {"shared": server.shared, "control": self._control(server)}

    def message_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Declare the server's control variate."""
        return {"control": (shape.shared_size,)}

    @property
    def averages(self) -> bool:
        """No: the control variate moves by the sum of what sites send."""
        return False

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Move along the mean update, and the control variate by the sites' moves over all sites (line 16 and 17)."""
        before, control = server.shared, self._control(server)
        self.combine(server, updates, [float(update.samples) for update in updates])
        server.shared = before + self.server_rate * (server.shared - before)
        moved = torch.zeros_like(control, dtype=torch.float64)
        for update in updates:
            moved += update.tensors["control_step"]
        server.tensors["control"] = (control + moved / server.sites).float()

    def _own(self, client: Client) -> Tensor:
        return client.state.get("control", torch.zeros_like(client.received["control"]))

    def _control(self, server: Server) -> Tensor:
        return server.tensors.get("control", torch.zeros_like(server.shared))

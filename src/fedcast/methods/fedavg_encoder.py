"""FedAvg on the encoder only: decoder and heads stay personal (FedPer-like control for FedTRL, fedtrl.md A5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcast.methods.base import Method, Unseen, hyper


@dataclass(frozen=True)
class FedAvgEncoder(Method):
    """Only the encoder travels; domains that no site has seen get the mean of the sites' decoders and heads."""

    name: ClassVar[str] = "fedavg_encoder"
    summary: ClassVar[str] = "average of encoders; each site trains its own decoder and heads"

    serving: Literal["shadow", "mixture"] = hyper("shadow", "unseen domains: mean of the sites' decoders, or their mixture")

    def unseen(self) -> Unseen:
        """Serve unseen domains as asked for."""
        return self.serving

    def shares(self, name: str) -> bool:
        """Let the encoder travel."""
        return name.startswith("encoder.")

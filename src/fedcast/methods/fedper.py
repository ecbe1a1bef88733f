"""FedPer (Arivazhagan et al., 2019, arXiv 1912.00818): base layers travel, the last layers are personal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcast.methods.base import Method, Unseen, hyper


@dataclass(frozen=True)
class FedPer(Method):
    """Encoder and decoder travel; each site trains its own heads."""

    name: ClassVar[str] = "fedper"
    summary: ClassVar[str] = "average of encoders and decoders; each site trains its own heads"

    serving: Literal["shadow", "mixture"] = hyper("shadow", "unseen domains: mean of the sites' heads, or their mixture")

    def unseen(self) -> Unseen:
        """Serve unseen domains as asked for."""
        return self.serving

    def shares(self, name: str) -> bool:
        """Let everything but the heads travel."""
        return not name.startswith("heads.")

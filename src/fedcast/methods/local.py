"""Every site trains alone: the control that shows what a site could do without the federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcast.methods.base import Method, Server, Unseen, Update, hyper


@dataclass(frozen=True)
class Local(Method):
    """Nothing travels while training; see ``unseen`` for domains that no site has seen."""

    name: ClassVar[str] = "local"
    summary: ClassVar[str] = "every site trains alone; nothing travels"

    serving: Literal["each", "mixture"] = hyper("each", "unseen domains: mean score of the sites' models, or their mixture")

    def unseen(self) -> Unseen:
        """Serve unseen domains as asked for."""
        return self.serving

    def shares(self, name: str) -> bool:
        """Keep everything at its site."""
        return False

    @property
    def averages(self) -> bool:
        """No: the server takes nothing over."""
        return False

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Do nothing."""

"""Every site trains alone: the control that shows what a site could do without the federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcast.methods.base import Method, Server, Update


@dataclass(frozen=True)
class Local(Method):
    """Nothing travels; an unseen domain is forecast by each site's model in turn and the scores are averaged."""

    name: ClassVar[str] = "local"
    summary: ClassVar[str] = "every site trains alone; nothing travels"
    unseen: ClassVar[Literal["shared", "each"]] = "each"

    def shares(self, name: str) -> bool:
        """Keep everything at its site."""
        return False

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Keep the sites' models on the last round, when they are exported to be scored on unseen domains."""
        for update in updates:
            if "private" in update.tensors:
                server.tensors[f"each.{update.site}"] = update.tensors["private"]

"""FedAvg that knows groups of sites, such as the modalities of their recordings.

Under FedAvg a modality that few sites have weighs little in the mean (fedchronos.md, strategy 3: one ICG client among nineteen of ECG).
Two cures, and both together: every group weighs as much as any other (``even``), and a part of the model is averaged within its group
alone, on a trunk that all groups share (``apart``). Neither is of that paper; both are controls for its finding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedcast.errors import SpecError
from fedcast.methods.base import Method, Server, Update, hyper

REST = "rest"
"""The group of sites that no pattern names."""


@dataclass(frozen=True)
class FedGroup(Method):
    """FedAvg over groups of sites: groups weigh alike, or have parts of their own, or both."""

    name: ClassVar[str] = "fedgroup"
    summary: ClassVar[str] = "FedAvg over groups of sites: groups weigh alike, or keep parts of the model to themselves"

    groups: tuple[str, ...] = hyper((), "patterns of site names, such as 'client_20*', a group each; the other sites are one more")
    even: bool = hyper(True, "whether each group has the same weight in the mean, whatever its training points")
    apart: Literal["nothing", "heads", "adapters", "all"] = hyper("nothing", "what is averaged within a group alone; adapters: LoRA's")

    def check(self, sites: Sequence[str]) -> None:
        """Refuse patterns that no site fits; without any, all sites are one group."""
        for pattern in self.groups:
            if not any(fnmatchcase(site, pattern) for site in sites):
                raise SpecError(f"no site fits the pattern {pattern!r} in method.groups", hint=f"the sites are {', '.join(sites)}")

    def group(self, site: str) -> str:
        """Return the group of a site: the first one with a pattern that fits its name."""
        return next((pattern for pattern in self.groups if fnmatchcase(site, pattern)), REST)

    @property
    def averages(self) -> bool:
        """Whether no group, which may be a single site, has means of its own."""
        return self.apart == "nothing"

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Average over all sites; parts that are kept apart over the sites of each group, whose sites have them from then on."""
        points = {update.site: float(update.samples) for update in updates}
        weights = self._weights(points)
        self.combine(server, updates, [weights[update.site] for update in updates])
        if self.apart == "nothing":
            return
        own = self._own_part(server)
        for name in sorted({self.group(site) for site in points}):
            members = [update for update in updates if self.group(update.site) == name]
            mean = server.mean("shared", members, [points[u.site] for u in members])
            server.tensors[f"group.{name}"] = mean[own]
        # Also to sites that did not take part this time: they are scored with their group's weights.
        server.own |= {site: self._of_group(server, site, own) for site in {*server.own, *points}}

    def message(self, server: Server, site: str) -> dict[str, Tensor]:
        """Send a site the weights of its group, also one that has not taken part before."""
        return {"shared": self._of_group(server, site, self._own_part(server) if self.apart != "nothing" else None)}

    def _weights(self, points: Mapping[str, float]) -> dict[str, float]:
        if not self.even:
            return dict(points)
        sums: dict[str, float] = {}
        for site, count in points.items():
            sums[self.group(site)] = sums.get(self.group(site), 0.0) + count
        total = math.fsum(points.values())
        return {site: count * total / (len(sums) * sums[self.group(site)]) for site, count in points.items()}

    def _of_group(self, server: Server, site: str, own: Tensor | None) -> Tensor:
        found = server.tensors.get(f"group.{self.group(site)}")
        if own is None or found is None:
            return server.shared
        weights = server.shared.clone()
        weights[own] = found
        return weights

    def _own_part(self, server: Server) -> Tensor:
        """Return which of the shared weights a group keeps to itself, bool ``[shared_size]``."""
        layout, chosen = server.layout, torch.zeros(server.layout.shared_size, dtype=torch.bool)
        for name, view in layout.views(torch.arange(layout.size)).items():
            if name in layout.names[: layout.shared] and self._keeps(server.parts.get(name, name)):
                chosen[view.reshape(-1)] = True
        if not chosen.any():
            raise SpecError(f"this model has no {self.apart} for groups to keep apart", hint="choose another method.apart")
        return chosen

    def _keeps(self, name: str) -> bool:
        if self.apart == "heads":
            return name.startswith("heads.")
        return self.apart == "all" or ".lora_" in name or name.endswith(".gate")

"""FedAvg (McMahan et al., 2017): average whole models, weighted by the sites' training points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcast.methods.base import Method


@dataclass(frozen=True)
class FedAvg(Method):
    """Every parameter travels; the server takes the mean weighted by training points (the contract's defaults)."""

    name: ClassVar[str] = "fedavg"
    summary: ClassVar[str] = "average of whole models, weighted by training points"

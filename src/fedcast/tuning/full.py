"""Full fine-tuning: every weight trains, from the weights of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcast.tuning.base import Tuning


@dataclass(frozen=True)
class Full(Tuning):
    """Every weight trains (the contract's defaults)."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "every weight trains"

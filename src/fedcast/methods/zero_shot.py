"""No training at all: the starting model as it is, the control of every fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcast.methods.base import Method


@dataclass(frozen=True)
class ZeroShot(Method):
    """The checkpoint is scored on every domain; nothing is trained and nothing travels."""

    name: ClassVar[str] = "zero_shot"
    summary: ClassVar[str] = "the starting model as it is: nothing is trained"

    def federated_rounds(self, rounds: int) -> int:
        """Run no round."""
        return 0

"""Centralised training on pooled data in mixed batches: what a federation cannot do, and the most important control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcast.methods.base import Method


@dataclass(frozen=True)
class Central(Method):
    """One client holds all domains and draws uniformly over all windows; it takes as many steps as all sites together would."""

    name: ClassVar[str] = "central"
    summary: ClassVar[str] = "pooled data, windows drawn uniformly (mixed batches)"
    pooled: ClassVar[bool] = True
    balance: ClassVar[Literal["none", "dataset", "domain"]] = "none"

"""Centralised training with domains sampled evenly: tells the effect of balance from the effect of federating."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedcast.methods.base import Method


@dataclass(frozen=True)
class CentralBalanced(Method):
    """As ``central``, but every window's domain is drawn uniformly first."""

    name: ClassVar[str] = "central_balanced"
    summary: ClassVar[str] = "pooled data, domains drawn evenly"
    pooled: ClassVar[bool] = True
    balance: ClassVar[Literal["none", "dataset", "domain"]] = "domain"

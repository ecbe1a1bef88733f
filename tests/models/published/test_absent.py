"""Families without an adapter are named with a reason, and never pretend to be one."""

from __future__ import annotations

from dataclasses import astuple

import fedcast.models.published  # noqa: F401 - registers the adapters
from fedcast.models.published.absent import ABSENT
from fedcast.models.published.base import FAMILIES


def test_when_a_family_has_no_adapter_then_it_is_listed_with_a_reason_and_nowhere_else() -> None:
    assert ABSENT.keys().isdisjoint(FAMILIES)
    assert all(all(astuple(row)) for row in ABSENT.values())

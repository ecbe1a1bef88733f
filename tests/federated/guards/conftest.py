"""Rounds that several tests play again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.federated.guards.rounds import Recorded, record
from tests.federations import DOMAINS


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recorded]:
    """A round of a small federation under the screen, by method and domains; made when it is first asked for."""
    made: dict[tuple[str, tuple[str, ...]], Recorded] = {}

    def of(method: str, domains: tuple[str, ...] = DOMAINS) -> Recorded:
        if (method, domains) not in made:
            made[method, domains] = record(method, [{"name": "screen"}], tmp_path_factory.mktemp(method), domains)
        return made[method, domains]

    return of

"""One consortium for all tests that need a running one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.federated.flower.deployment import Deployment, deployed


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink with three sites over TLS with authenticated nodes, on loopback."""
    with deployed(tmp_path_factory.mktemp("consortium")) as running:
        yield running

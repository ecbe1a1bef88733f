"""Kits of consortia whose ports are free, made for a moment in time or for now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcast.consortium.kits import SiteKit
from fedcast.consortium.provision import Consortium, create
from fedcast.federated.flower.processes import free_port

pytest.importorskip("cryptography")


@pytest.fixture
def consortium(tmp_path: Path) -> Callable[..., Consortium]:
    """Make a consortium of two hospitals on this machine; options change what :func:`create` gets."""

    def make(folder: str = "consortium", **options: Any) -> Consortium:
        defaults = {
            "name": "demo",
            "host": "localhost",
            "sites": ["hospital-a", "hospital-b"],
            "port": free_port(),
            "proxy_port": free_port(),
        }
        return create(tmp_path / folder, **{**defaults, **options})

    return make


def site_kit(made: Consortium, site: str = "hospital-a") -> SiteKit:
    """Open a site's kit as it was made."""
    return SiteKit.open(made.folder / "sites" / site)

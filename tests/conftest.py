"""What all tests share: one way to draw examples, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fedcast", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("fedcast")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of raw real data that FEDCAST_DATA names."""
    folder = os.environ.get("FEDCAST_DATA")
    if not folder:
        pytest.skip("FEDCAST_DATA is not set")
    return Path(folder)

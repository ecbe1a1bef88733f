"""What all tests share: one way to draw examples, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from fedcast.kernels import library

settings.register_profile("fedcast", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("fedcast")


def pytest_configure(config: pytest.Config) -> None:
    """Leave the cores to the workers of pytest-xdist, which inherit this: each computes in one thread."""
    if config.getoption("numprocesses", default=None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


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


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """The folder of real pre-trained weights that FEDCAST_WEIGHTS names."""
    folder = os.environ.get("FEDCAST_WEIGHTS")
    if not folder:
        pytest.skip("FEDCAST_WEIGHTS is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def kernels_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the native kernels compiled; what needs it is skipped by name where they cannot be."""
    if not library.supported():
        pytest.skip("this processor has no AVX-512 with bfloat16 products")
    if library.compiler() is None:
        pytest.skip("there is no C++ compiler")
    base = tmp_path_factory.getbasetemp()
    # The workers of pytest-xdist share the folder above their own. Two may compile at once: the file is put in place whole.
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCAST_CACHE", str(cache))
        library.build()
    return cache


@pytest.fixture
def compiled(kernels_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels are compiled, whatever the person has in the own cache."""
    monkeypatch.setenv("FEDCAST_CACHE", str(kernels_cache))
    library.kernels.cache_clear()

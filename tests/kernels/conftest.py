"""The compiled kernels, once a session; without a processor or compiler for them the tests are skipped by name."""

from __future__ import annotations

import pytest

from fedcast.kernels import library


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile the kernels into a cache of their own and load them."""
    if not library.supported():
        pytest.skip("this processor has no AVX-512 with bfloat16 products")
    if library.compiler() is None:
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        library.build()
        library.kernels.cache_clear()
        library.kernels()

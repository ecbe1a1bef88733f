"""Compiling and loading: where it cannot be done, the error says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedcast.errors import MissingExtraError
from fedcast.kernels import library

needs_processor = pytest.mark.skipif(not library.supported(), reason="this processor has no AVX-512 with bfloat16 products")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels are compiled yet."""
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_when_the_processor_lacks_the_instructions_then_building_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    assert not library.built()
    with pytest.raises(MissingExtraError, match="AVX-512"):
        library.build()


@needs_processor
def test_when_there_is_no_compiler_then_building_names_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="no C\\+\\+ compiler") as caught:
        library.build()
    assert "g++" in caught.value.hint


@needs_processor
def test_when_the_compiler_fails_then_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(MissingExtraError, match="cannot compile"):
        library.build()
    assert not library.built()
    assert not list(library.library_path().parent.iterdir())


@needs_processor
@pytest.mark.skipif(library.compiler() is None, reason="there is no C++ compiler")
def test_when_built_twice_then_the_second_finds_the_first() -> None:
    first = library.build()
    written = first.stat().st_mtime_ns
    assert library.built()
    assert library.build().stat().st_mtime_ns == written


def test_when_nothing_is_compiled_then_loading_says_how_to() -> None:
    library.kernels.cache_clear()
    with pytest.raises(MissingExtraError) as caught:
        library.kernels()
    assert "fedcast machine --build" in caught.value.hint

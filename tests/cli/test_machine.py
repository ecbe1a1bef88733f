"""The verb ``machine``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedcast.cli.main import run
from fedcast.kernels import library


def test_when_asked_then_it_shows_what_auto_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["machine", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["precision"] in ("float32", "bfloat16")
    assert shown["products"] in ("default", "onednn")
    assert shown["probe"]["default_ms"] > 0
    assert run(["machine"]) == 0
    assert shown["torch"] in capsys.readouterr().out


@pytest.mark.skipif(not library.supported() or library.compiler() is None, reason="the native kernels cannot be compiled here")
def test_when_built_then_it_says_compiled(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path))
    assert run(["machine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["native_kernels"] == "not compiled"
    assert run(["machine", "--build", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["native_kernels"] == "compiled"


@pytest.mark.skipif(not library.supported(), reason="this processor has no AVX-512 with bfloat16 products")
def test_when_the_compiler_fails_then_the_error_helps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert run(["machine", "--build"]) == 60
    assert "hint: use g++" in capsys.readouterr().err

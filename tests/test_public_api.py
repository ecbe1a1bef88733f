from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fedcast
from fedcast import version

HEAVY = ("torch", "pandas", "numpy", "plotly", "pydantic", "pyarrow", "statsforecast", "scipy")


def test_when_names_are_public_then_they_are_sorted_and_can_be_imported() -> None:
    assert fedcast.__all__ == sorted(fedcast.__all__)
    for name in fedcast.__all__:
        assert getattr(fedcast, name) is not None
    assert set(fedcast.__all__) <= set(dir(fedcast))


def test_when_a_type_checker_reads_the_package_then_it_sees_the_same_names() -> None:
    tree = ast.parse(Path(fedcast.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedcast.")
        for alias in node.names
    }
    assert imported == set(fedcast.__all__)


def test_when_every_floor_is_imported_then_the_public_names_are_still_the_same() -> None:
    code = """
import json, types, fedcast, fedcast.run.evaluate, fedcast.run.compare, fedcast.run.pretrain, fedcast.evaluate
print(json.dumps([name for name in fedcast.__all__ if isinstance(getattr(fedcast, name), types.ModuleType)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_when_an_unknown_name_is_asked_for_then_the_error_names_it() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fedcast.nothing


def test_when_fedcast_is_imported_then_no_heavy_library_is() -> None:
    code = "import json, sys, fedcast; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)).isdisjoint(HEAVY)


def test_when_forecasting_is_imported_then_the_baselines_library_is_not() -> None:
    code = "import sys, fedcast.models.forecaster; sys.exit(len({'statsforecast', 'plotly', 'scipy.stats'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    return subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package without a repository around it."""
    package = tmp_path / "src" / "fedcast"
    package.mkdir(parents=True)
    (package / "version.py").write_text(Path(version.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def _code_version(checkout: Path) -> str:
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['code_version']())"
    path = checkout / "src" / "fedcast" / "version.py"
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout.strip()


def test_when_code_runs_from_a_checkout_then_its_version_is_the_commit_and_says_whether_it_changed(checkout: Path) -> None:
    assert _code_version(checkout) == fedcast.__version__
    _git(checkout, "init", "-q")
    _git(checkout, "add", ".")
    _git(checkout, "commit", "-q", "-m", "x")
    commit = _git(checkout, "rev-parse", "HEAD")
    assert _code_version(checkout) == commit
    with (checkout / "src" / "fedcast" / "version.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert _code_version(checkout) == f"{commit}+changed"

"""The example of docs/adding-a-method.md is executed as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.federations import small_spec, train_small, untrained_loss

from fedcast.methods.base import METHODS, build_method
from fedcast.spec import MethodSpec


@pytest.fixture
def example(repository: Path, tmp_path: Path) -> Iterator[str]:
    page = (repository / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found
    code = found[1]
    file = tmp_path / "fedavgm.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fedavgm", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    # Type hints are resolved in the module of the class, as they are for an imported file.
    sys.modules["fedavgm"] = module
    spec.loader.exec_module(module)
    yield code
    del METHODS["fedavgm"], sys.modules["fedavgm"]


def test_when_the_example_is_added_then_it_is_forty_lines_and_trains(example: str, tmp_path: Path) -> None:
    assert len(example.splitlines()) <= 40
    spec = small_spec("fedavgm", local_steps=40, momentum=0.5)
    run = train_small(spec, tmp_path)
    assert run.rows("validation")[-1]["mean"] < 0.97 * untrained_loss(spec, tmp_path / "untrained")
    assert build_method(MethodSpec(name="fedavgm")) == METHODS["fedavgm"]()


def test_when_momentum_is_zero_then_the_example_is_fedavg(example: str, tmp_path: Path) -> None:
    ours = train_small(small_spec("fedavgm", momentum=0.0), tmp_path / "a").results()
    theirs = train_small(small_spec("fedavg"), tmp_path / "b").results()
    # a + (b - a) is b up to rounding.
    assert ours.mse.tolist() == pytest.approx(theirs.mse.tolist(), rel=1e-3)

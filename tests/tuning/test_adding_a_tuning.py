"""The example of docs/finetuning.md is executed as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tuned import loss_of, tiny, windows

from fedcast.spec import TuningSpec
from fedcast.tuning.base import TUNINGS, Tuning, build_tuning


@pytest.fixture
def example(repository: Path, tmp_path: Path) -> Iterator[Tuning]:
    found = re.search(r"```python\n(.*?)```", (repository / "docs" / "finetuning.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    file = tmp_path / "bitfit.py"
    file.write_text(found[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("bitfit", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Type hints are resolved in the module of the class, as they are for an imported file.
    sys.modules["bitfit"] = module
    spec.loader.exec_module(module)
    yield build_tuning(TuningSpec(name="bitfit", options={"head": True}))
    del TUNINGS["bitfit"], sys.modules["bitfit"]


def test_when_the_example_is_added_then_biases_and_head_get_gradients_and_nothing_else(example: Tuning) -> None:
    model = example.prepare(tiny("native"), 0)
    loss_of(model, windows()).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert trained
    assert all(name.endswith("bias") or model.head(name) for name in trained)
    assert {name.rpartition(".")[2] for name in trained} == {"weight", "bias"}

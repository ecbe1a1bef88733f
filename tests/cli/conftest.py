"""The command line, run in this process, and a folder of a person's own data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedcast.cli.main import run


@dataclass(frozen=True)
class Answer:
    """What a command line answered."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The JSON on stdout."""
        return json.loads(self.out)


@pytest.fixture
def fedcast(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Run one command line as ``fedcast`` would."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*words: str | Path) -> Answer:
        capfd.readouterr()
        code = run([str(word) for word in words])
        answer = capfd.readouterr()
        return Answer(code, answer.out, answer.err)

    return call


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A folder of a person's own data: three CSVs of daily sales, each a domain of two shops, under names that are no dialect."""
    folder = tmp_path / "my-data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    days = pd.date_range("2024-01-01", periods=240, freq="D")
    week = 1 + 0.3 * np.sin(2 * np.pi * np.arange(len(days)) / 7)
    for place, level in (("north", 30.0), ("south", 80.0), ("west", 150.0)):
        sales = [np.round(level * week + rng.normal(0, level / 20, len(days)), 2) for _ in range(2)]
        shops = [pd.DataFrame({"date": days, "shop": f"{place}-{i}", "sales": column}) for i, column in enumerate(sales)]
        pd.concat(shops).to_csv(folder / f"{place}.csv", index=False)
    return folder

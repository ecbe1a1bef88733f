"""The verb ``models``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.published.absent import ABSENT
from fedcast.models.published.base import FAMILIES
from fedcast.models.published.chronos_bolt import ChronosBolt

Call = Callable[..., Any]


def test_when_models_are_listed_then_every_family_is_there_with_library_and_licence(fedcast: Call) -> None:
    answer = fedcast("models")
    assert (answer.code, answer.err) == (0, "")
    rows = fedcast("models", "--json").json()
    assert {row["family"]: row["trains"] for row in rows} == {**dict.fromkeys(FAMILIES, True), **dict.fromkeys(ABSENT, False)}
    assert [row["family"] for row in rows if row["family"] not in answer.out] == []
    assert all(row["licence"] and row["summary"] for row in rows)
    assert all(row["install"].startswith("pip install") for row in rows if row["trains"])
    assert all(row["reason"] for row in rows if not row["trains"])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_when_one_family_is_asked_for_then_it_is_shown_in_full_without_mark_up(fedcast: Call, name: str) -> None:
    answer = fedcast("models", name)
    assert answer.code == 0
    assert "LoRA adapts" in answer.out
    (row,) = fedcast("models", name, "--json").json()
    assert row["notes"]
    assert [mark for mark in ("``", ":class:", ":attr:", "----") if mark in " ".join(row["notes"])] == []


def test_when_a_family_has_no_adapter_then_the_reason_is_shown(fedcast: Call) -> None:
    name, absent = next(iter(ABSENT.items()))
    out = " ".join(fedcast("models", name).out.split())
    assert absent.reason.split()[-1] in out
    answer = fedcast("models", name, "--random", "x")
    assert (answer.code, answer.err.splitlines()[0]) == (
        10,
        f"error[spec]: no random model can be written: fedcast has no adapter for {name}",
    )
    assert fedcast("models", "--random", "x").code == 10


def test_when_a_family_is_misspelt_then_the_right_one_is_suggested(fedcast: Call) -> None:
    answer = fedcast("models", "chronos-blot")
    assert (answer.code, answer.err.splitlines()[1]) == (11, "hint: did you mean 'chronos-bolt'?")


@pytest.mark.skipif(ChronosBolt.library.installed is None, reason="chronos-forecasting is not installed")
def test_when_a_random_model_is_written_then_it_loads_and_nothing_is_overwritten(fedcast: Call, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "tiny"
    assert fedcast("models", "chronos-bolt", "--random", folder, "--json").json() == {"family": "chronos-bolt", "folder": str(folder)}
    assert isinstance(load_checkpoint(folder), ChronosBolt)
    before = (folder / "config.json").read_bytes()
    answer = fedcast("models", "chronos-bolt", "--random", folder)
    assert (answer.code, answer.err.splitlines()[1]) == (10, "hint: choose a folder that does not exist yet")
    assert (folder / "config.json").read_bytes() == before
    assert fedcast("models", "chronos-bolt", "--random", folder / "config.json").code == 10

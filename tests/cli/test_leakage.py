"""The verb ``leakage``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedcast.data.leakage import corpora, recordings

Call = Callable[..., Any]


def test_when_nothing_is_chosen_then_every_set_has_a_row(fedcast: Call) -> None:
    answer = fedcast("leakage")
    assert (answer.code, answer.err) == (0, "")
    assert [row.title for row in recordings().values() if row.title not in answer.out] == []
    assert "?: not known" in answer.out


def test_when_the_terminal_is_narrow_then_the_corpora_stand_in_words(fedcast: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    answer = fedcast("leakage")
    assert "unseen in every other corpus" in answer.out
    assert max(len(line) for line in answer.out.splitlines()) <= 90


def test_when_one_is_chosen_then_its_sources_are_shown(fedcast: Call) -> None:
    assert "scripts/pretrain.sh" in fedcast("leakage", "--corpus", "lag_llama", "--benchmark", "ETTm2").out
    assert "Time-300B" in fedcast("leakage", "--benchmark", "hospital").out


def test_when_json_is_asked_for_then_every_entry_has_a_source(fedcast: Call) -> None:
    entries = fedcast("leakage", "--json").json()
    assert len(entries) == len(corpora()) * len(recordings())
    assert {entry["exposure"] for entry in entries} == {"seen", "unseen", "unknown"}
    assert all(entry["source"] for entry in entries)
    (one,) = fedcast("leakage", "--corpus", "chronos", "--benchmark", "ECL", "--json").json()
    assert (one["benchmark"], one["corpus"], one["exposure"]) == ("electricity", "chronos", "seen")


@pytest.mark.parametrize(("option", "name", "near"), [("--corpus", "lotsaa", "lotsa"), ("--benchmark", "hospitals", "hospital")])
def test_when_a_name_is_unknown_then_a_near_one_is_suggested(fedcast: Call, option: str, name: str, near: str) -> None:
    answer = fedcast("leakage", option, name)
    assert answer.code == 11
    assert f"did you mean '{near}'" in answer.err

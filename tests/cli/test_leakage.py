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


@pytest.mark.parametrize(("width", "parts"), [(120, 1), (80, 2), (60, 4)])
def test_when_the_terminal_is_narrow_then_the_matrix_comes_in_parts_without_a_fold(
    fedcast: Call, monkeypatch: pytest.MonkeyPatch, width: int, parts: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = fedcast("leakage").out.splitlines()
    assert max(map(len, lines)) <= width
    for row in recordings().values():
        assert len([line for line in lines if line.startswith(f" {row.title} ")]) == parts, row.title
    assert len(lines) == parts * (len(recordings()) + 5) + 1
    labels = [part for each in corpora().values() for part in each.label.split()]
    assert all(part in "\n".join(lines) for part in labels)


def test_when_one_is_chosen_then_its_sources_are_shown_under_what_was_matched(fedcast: Call) -> None:
    both = fedcast("leakage", "--corpus", "lag_llama", "--benchmark", "ETTm2").out
    assert "scripts/pretrain.sh" in both
    assert [line.strip() for line in both.splitlines()[:2]] == ["Lag-Llama corpus; models: Lag-Llama", "ETT, station 2"]
    assert fedcast("leakage", "--corpus", "timer").out.startswith("UTSD-12G; models: Timer, Timer-XL")
    one = fedcast("leakage", "--benchmark", "hospital").out
    assert "Time-300B" in one
    assert one.startswith("Hospital")


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

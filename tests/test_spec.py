from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcast.errors import SpecError, UnknownNameError
from fedcast.spec import RunSpec, iter_keys, load_spec, parse_spec

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_when_an_example_is_loaded_then_it_is_a_valid_spec_that_round_trips(path: Path) -> None:
    spec = load_spec(path)
    assert parse_spec(tomllib.loads(spec.to_toml())) == spec


@given(
    rounds=st.integers(1, 10_000),
    rate=st.floats(1e-8, 10.0),
    domains=st.lists(st.text("abcdefghij_", min_size=1), max_size=4),
    tau=st.floats(0.01, 100.0),
)
def test_when_a_spec_is_written_and_read_then_nothing_changes(rounds: int, rate: float, domains: list[str], tau: float) -> None:
    document = {
        "data": {"domains": domains},
        "training": {"learning_rate": rate},
        "federation": {"rounds": rounds},
        "method": {"name": "fedtrl", "tau": tau},
    }
    spec = parse_spec(document)
    again = parse_spec(tomllib.loads(spec.to_toml()))
    assert again == spec
    assert again.fingerprint() == spec.fingerprint()


def test_when_values_are_overridden_then_they_are_read_as_toml_or_as_text() -> None:
    spec = parse_spec({}, ["federation.rounds=5", "data.source=my folder", "data.domains=['a', 'b']", "method.tau=0.5", "seed=3"])
    assert spec.federation.rounds == 5
    assert spec.data.source == "my folder"
    assert spec.data.domains == ("a", "b")
    assert spec.method.options == {"tau": 0.5}
    assert spec.seed == 3


@pytest.mark.parametrize(
    ("assignment", "error", "said"),
    [
        ("federation.round=5", UnknownNameError, "did you mean 'federation.rounds'?"),
        ("federatoin.rounds=5", UnknownNameError, "did you mean 'federation'?"),
        ("federation.rounds=0", SpecError, "federation.rounds = 0 is refused"),
        ("federation.rounds=many", SpecError, "federation.rounds = 'many' is refused"),
        ("federation.rounds", SpecError, "write key=value"),
        ("name.first=x", SpecError, "is a value, not a section"),
        ("model.size=huge", SpecError, "model.size = 'huge' is refused"),
        ("name=../../elsewhere", SpecError, "is refused"),
        ("guards='clip'", SpecError, "guards = 'clip' is refused: Input should be a list"),
        ("guards=['clip']", SpecError, "guards.0 = 'clip' is refused: Input should be a table"),
        ("guards=[{norm=1.0}]", SpecError, "guards.0.name is missing"),
    ],
)
def test_when_an_override_is_wrong_then_the_key_is_named(assignment: str, error: type[SpecError], said: str) -> None:
    with pytest.raises(error) as caught:
        parse_spec({"name": "demo"}, [assignment])
    assert said in str(caught.value)


def test_when_the_file_is_missing_then_the_hint_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="fedcast init"):
        load_spec(tmp_path / "none.toml")


def test_when_the_file_is_not_toml_then_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("name = demo\n", encoding="utf-8")
    with pytest.raises(SpecError, match="line 1"):
        load_spec(path)


def test_when_only_name_or_fleet_differ_then_the_fingerprint_stays() -> None:
    base = RunSpec()
    assert parse_spec({}, ["name=other", "federation.fleet=processes", "federation.workers=8"]).fingerprint() == base.fingerprint()
    # Who finds a deadline too short raises it and goes on.
    assert parse_spec({}, ["federation.deadline_s=9", "federation.evaluation_deadline_s=9"]).fingerprint() == base.fingerprint()
    assert parse_spec({}, ["seed=1"]).fingerprint() != base.fingerprint()


def test_when_keys_are_listed_then_each_has_a_type_and_a_description() -> None:
    keys = iter_keys()
    assert len(keys) == len({key for key, *_ in keys})
    assert all(kind and default and description for _, kind, default, description in keys)

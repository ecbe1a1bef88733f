from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcast.cli.flags import expand_flags, readable_type, spec_keys
from fedcast.errors import SpecError, UnknownNameError
from fedcast.spec import RunSpec, iter_keys, parse_spec


def _apply(words: list[str]) -> RunSpec:
    expanded = expand_flags(words)
    assert expanded[::2] == ["--set"] * (len(expanded) // 2)
    return parse_spec({}, expanded[1::2])


@pytest.mark.parametrize("words", [["--federation.rounds", "5"], ["--federation.rounds=5"]])
def test_when_a_flag_names_a_key_then_it_becomes_an_override(words: list[str]) -> None:
    assert _apply(words).federation.rounds == 5


def test_when_every_kind_of_key_is_a_flag_then_the_spec_takes_its_value() -> None:
    line = (
        "--name 7 --seed 3 --data.held_out a,b --data.domains=['c'] --model.size tiny --data.time 2 --federation.local-steps 9"
        " --training.learning_rate .5 --method.tau 0.2 --federation.deadline_s 1.5 --model.checkpoint owner/name --tuning.name sff"
        " --tuning.alpha validation --tuning.rank 4"
    )
    spec = _apply(line.split())
    assert (spec.name, spec.seed, spec.model.size, spec.data.time) == ("7", 3, "tiny", "2")
    assert (spec.data.held_out, spec.data.domains) == (("a", "b"), ("c",))
    assert (spec.federation.local_steps, spec.training.learning_rate, spec.federation.deadline_s) == (9, 0.5, 1.5)
    assert spec.method.options == {"tau": 0.2}
    assert (spec.model.checkpoint, spec.tuning.name, spec.tuning.options) == ("owner/name", "sff", {"alpha": "validation", "rank": 4})


def test_when_guards_are_given_as_a_flag_then_they_are_the_list() -> None:
    spec = _apply(["--guards", '[{name="clip", norm=5.0}, {name="screen"}]'])
    assert [(guard.name, guard.options) for guard in spec.guards] == [("clip", {"norm": 5.0}), ("screen", {})]


@given(st.text())
def test_when_a_value_is_text_then_it_arrives_unchanged(text: str) -> None:
    assert _apply([f"--data.source={text}"]).data.source == text


def test_when_words_are_no_flags_of_the_spec_then_they_stay() -> None:
    words = ["spec.toml", "--set", "seed=1", "-o", "runs/x", "--json"]
    assert expand_flags(words) == words
    assert expand_flags(["--", "--seed"]) == ["--", "--seed"]


def test_when_a_flag_is_misspelt_then_the_right_key_is_suggested() -> None:
    with pytest.raises(UnknownNameError) as caught:
        expand_flags(["--federation.round", "5"])
    assert caught.value.hint == "did you mean 'federation.rounds'?"


@pytest.mark.parametrize("words", [["--federation.rounds"], ["--federation.rounds", "--json"]])
def test_when_a_flag_has_no_value_then_that_is_said(words: list[str]) -> None:
    with pytest.raises(SpecError, match=r"--federation\.rounds has no value"):
        expand_flags(words)


def test_when_keys_are_listed_then_all_but_options_are_there() -> None:
    assert {row["key"] for row in spec_keys()} == {key for key, *_ in iter_keys()} - {"method.options", "tuning.options"}
    assert [row["type"] for row in spec_keys() if any(rest in row["type"] for rest in ("Literal", "tuple", "Annotated", ")", "]"))] == []


@pytest.mark.parametrize(
    ("kind", "readable"),
    [
        ("Literal['a', 'b']", "a|b"),
        ("tuple[str, ...]", "list of str"),
        ("tuple[Literal['a', 'b'], ...]", "list of a|b"),
        ("float | None", "float"),
        ("int", "int"),
        ("tuple[fedcast.spec.GuardSpec, ...]", "list of table"),
        ("Annotated[float, Field(gt=0)] | None", "float"),
        ("tuple[Annotated[int, FieldInfo(metadata=[Ge(ge=1)])], ...]", "list of int"),
    ],
)
def test_when_a_type_is_shown_then_it_is_readable(kind: str, readable: str) -> None:
    assert readable_type(kind) == readable


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_when_training_is_asked_for_help_then_every_key_is_a_flag_in_it(fedcast: Callable[..., object], verb: str) -> None:
    answer = fedcast(verb, "--help")
    assert all(f"--{row['key']} " in answer.out for row in spec_keys())

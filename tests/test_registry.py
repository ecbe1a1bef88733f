"""What a section of a spec names, and how its hyper-parameters may be written."""

from __future__ import annotations

import pytest

import fedcast.tuning  # noqa: F401 - registers the tunings
from fedcast.cli.flags import expand_flags
from fedcast.errors import SpecError, UnknownNameError
from fedcast.methods.base import build_method
from fedcast.spec import MethodSpec, TuningSpec, parse_spec
from fedcast.tuning.base import build_tuning
from fedcast.tuning.lora import LoRA


@pytest.mark.parametrize(
    ("text", "targets"), [("q,v", ("q", "v")), ("q, v,", ("q", "v")), ("q", ("q",)), ('["q", "v"]', ("q", "v")), ("", ())]
)
def test_when_a_flag_is_a_list_then_its_parts_arrive(text: str, targets: tuple[str, ...]) -> None:
    overrides = expand_flags(["--tuning.name", "lora", f"--tuning.targets={text}"])[1::2]
    assert build_tuning(parse_spec({}, overrides).tuning) == LoRA(targets=targets)


def test_when_a_method_takes_a_list_then_text_is_one_too() -> None:
    method = build_method(MethodSpec.model_validate({"name": "fedgroup", "groups": "x*,icg_*"}))
    assert getattr(method, "groups", None) == ("x*", "icg_*")


def test_when_a_list_holds_something_else_then_it_is_still_refused() -> None:
    with pytest.raises(SpecError, match=r"tuning\.targets\.0 = 3 is refused"):
        build_tuning(TuningSpec(name="lora", options={"targets": [3]}))


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("alpha", "'full' has no hyper-parameters: set tuning.name to 'lora' or 'sff'"),
        ("learning_speed", "'full' has no hyper-parameters: leave it out, or set tuning.name to another tuning"),
    ],
)
def test_when_the_name_of_a_tuning_is_forgotten_then_those_with_the_option_are_named(option: str, hint: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        build_tuning(TuningSpec(options={option: 1}))
    assert caught.value.hint == hint

from __future__ import annotations

import inspect
import json

import pytest

from fedcast import errors
from fedcast.errors import FedcastError, FrameError, FrameProblem, MissingExtraError, UnknownNameError

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, FedcastError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_when_an_error_class_is_defined_then_it_has_a_code_an_exit_code_and_a_docstring_of_its_own(cls: type[FedcastError]) -> None:
    assert "code" in vars(cls)
    assert cls.code == cls.code.lower()
    assert "exit_code" in vars(cls)
    assert 1 <= cls.exit_code < 128
    assert cls.__doc__
    assert f"{cls.__name__} " in (errors.__doc__ or "")
    assert f" {cls.exit_code} " in (errors.__doc__ or "")


@pytest.mark.parametrize("attribute", ["code", "exit_code"])
def test_when_errors_are_told_apart_by_code_then_no_two_share_one(attribute: str) -> None:
    assert len({getattr(cls, attribute) for cls in CLASSES}) == len(CLASSES)


def test_when_an_error_is_shown_then_message_and_hint_stand_on_lines_of_their_own() -> None:
    error = FedcastError("it broke", hint="mend it")
    assert str(error) == "it broke\nhint: mend it"
    assert json.loads(json.dumps(error.to_json())) == {"error": "fedcast", "exit_code": 1, "message": "it broke", "hint": "mend it"}


def test_when_a_name_is_close_to_a_known_one_then_that_one_is_suggested() -> None:
    assert UnknownNameError.of("method", "fedtlr", ["fedavg", "fedtrl"]).hint == "did you mean 'fedtrl'?"


def test_when_a_name_is_close_to_nothing_then_all_known_names_are_listed() -> None:
    assert UnknownNameError.of("method", "zzz", ["fedtrl", "fedavg"]).hint == "known: fedavg, fedtrl"


def test_when_a_name_is_close_to_nothing_of_many_then_the_first_20_are_listed() -> None:
    names = [f"set{i:03}" for i in range(23)]
    assert UnknownNameError.of("set", "zzz", names).hint == f"known: {', '.join(names[:20])} and 3 more"
    assert UnknownNameError.of("set", "zzz", names[:20]).hint == f"known: {', '.join(names[:20])}"
    assert UnknownNameError.of("set", "zzz", names, otherwise="see the list").hint == "see the list"
    assert UnknownNameError.of("set", "set0222", names, otherwise="see the list").hint == "did you mean 'set022'?"


def test_when_a_frame_has_problems_then_each_is_named_with_place_and_repair() -> None:
    problems = [
        FrameProblem("duplicate-stamps", "two rows share a time stamp", "drop one of them", column="ds", series="T1", row=7, count=2),
        FrameProblem("empty", "there are no rows", "write at least one"),
    ]
    error = FrameError("sales.csv", problems)
    assert "sales.csv cannot be used: 2 problems" in error.message
    assert "(column 'ds', series 'T1', row 7)" in error.message
    assert "repair: write at least one" in error.message
    assert error.problems == tuple(problems)
    assert error.hint == "drop one of them"


def test_when_an_extra_is_missing_then_the_hint_installs_it() -> None:
    assert MissingExtraError.of("flower", "flower").hint == "pip install 'fedcast[flower]'"

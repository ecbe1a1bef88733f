"""One contract for every tuning: a new file in ``fedcast/tuning`` is found and tested here without an edit."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.tuned import MODELS, forecast, loss_of, same, tiny, train, weights, windows

import fedcast.tuning
from fedcast.errors import SpecError, UnknownNameError
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.contract import Model
from fedcast.registry import describe
from fedcast.spec import TuningSpec
from fedcast.tuning.base import TUNINGS, Tuning, build_tuning

ALL_TRAINS = {"full", "sff"}
STARTS_ELSEWHERE = {"sff", "new_head"}
# The decoder of Chronos-Bolt has one token, which can attend to nothing but itself.
IDLE = {"chronos-bolt": re.compile(r"\.decoder\.block\.\d+\.layer\.0\.SelfAttention\.(q|k|relative_attention_bias)\.")}
SEED = 11
_FILES = {path.stem for path in Path(fedcast.tuning.__path__[0]).glob("*.py")} - {"__init__", "base"}


def tuning_of(name: str) -> Tuning:
    if name == "lora" and find_spec("peft") is None:
        pytest.skip("peft is not installed")
    return build_tuning(TuningSpec(name=name))


@pytest.fixture(params=[(tuning, model) for tuning in sorted(_FILES) for model in MODELS], ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Tuning, Model]:
    tuning, model = request.param
    return tuning_of(tuning), tiny(model)


def test_when_a_file_stands_in_the_folder_then_its_tuning_is_registered_under_its_name() -> None:
    assert set(TUNINGS) >= _FILES


@pytest.mark.parametrize("name", sorted(_FILES))
def test_when_a_tuning_is_described_then_every_hyper_parameter_has_a_default_and_a_line(name: str) -> None:
    row = next(row for row in describe(TUNINGS) if row["name"] == name)
    assert row["summary"]
    assert [p["name"] for p in row["parameters"]] == [f.name for f in fields(TUNINGS[name])]
    assert all(p["description"] for p in row["parameters"])
    tuning = build_tuning(TuningSpec(name=name))
    for parameter in fields(tuning):
        with pytest.raises(FrozenInstanceError):
            setattr(tuning, parameter.name, None)


@pytest.mark.parametrize("name", sorted(_FILES))
def test_when_a_tuning_gets_an_unknown_hyper_parameter_then_it_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="learning_speed"):
        build_tuning(TuningSpec(name=name, options={"learning_speed": 1}))


def test_when_two_classes_take_one_name_then_the_second_is_refused() -> None:
    with pytest.raises(SpecError, match="two tunings are named 'full'"):
        type("Other", (Tuning,), {"name": "full"})


def test_when_a_model_is_prepared_twice_then_the_bits_are_the_same_and_the_global_stream_does_not_move(pair: tuple[Tuning, Model]) -> None:
    tuning, model = pair
    again = tiny_like(model)
    stream = torch.get_rng_state()
    first = tuning.prepare(model, SEED)
    torch.manual_seed(99)
    second = tuning.prepare(again, SEED)
    assert same(weights(first), weights(second))
    torch.set_rng_state(stream)
    tuning.prepare(tiny_like(model), SEED)
    assert torch.equal(torch.get_rng_state(), stream)


def test_when_a_model_is_prepared_then_something_trains_and_what_is_frozen_keeps_its_bits(pair: tuple[Tuning, Model]) -> None:
    tuning, untouched = pair
    before = forecast(untouched)
    model = tuning.prepare(untouched, SEED)
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, p in named.items() if p.requires_grad}
    assert trained
    assert (len(trained) == len(named)) == (tuning.name in ALL_TRAINS)
    assert torch.equal(forecast(model), before) == (tuning.name not in STARTS_ELSEWHERE)
    start = weights(model)
    train(model)
    after = weights(model)
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert moved
    assert moved <= trained


def test_when_a_model_trains_then_gradients_reach_every_weight_that_does(pair: tuple[Tuning, Model]) -> None:
    tuning, untouched = pair
    idle = idle_of(untouched)
    model = tuning.prepare(untouched, SEED)
    train(model, steps=1)  # LoRA's A gets none while B is zero
    for parameter in model.parameters():
        parameter.grad = None
    loss_of(model, windows()).backward()  # type: ignore[no-untyped-call]
    missed = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert missed == {name for name, p in model.named_parameters() if p.requires_grad and idle.search(name)}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_when_a_tuned_model_is_saved_then_it_loads_as_a_plain_one(pair: tuple[Tuning, Model], tmp_path: Path) -> None:
    tuning, untouched = pair
    names, kind = [name for name, _ in untouched.named_parameters()], type(untouched)
    model = tuning.prepare(untouched, SEED)
    train(model)
    tuned, state = forecast(model), weights(model)
    plain = tuning.plain(model)
    if isinstance(plain, kind):
        assert [name for name, _ in plain.named_parameters()] == names
    assert torch.allclose(forecast(plain), tuned, atol=1e-5)
    tuning.save(model, tmp_path / "model")
    assert same(weights(model), state)
    loaded = load_checkpoint(tmp_path / "model")
    assert type(loaded) is type(plain)
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(forecast(loaded), forecast(plain))


@pytest.mark.parametrize("name", sorted(_FILES))
def test_when_a_tuning_has_candidates_then_each_of_them_is_settled(name: str) -> None:
    for candidate in tuning_of(name).candidates():
        assert list(candidate.candidates()) == [candidate]


def idle_of(model: Model) -> re.Pattern[str]:
    """Return what the names of weights look like that no gradient reaches."""
    return IDLE.get(getattr(model, "family", ""), re.compile("(?!)"))


def tiny_like(model: Model) -> Model:
    """Return the tiny model of the same kind, untouched."""
    return tiny(getattr(model, "family", "native"))

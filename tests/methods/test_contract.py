"""One contract for every method: a new file in ``fedcast/methods`` is found and tested here without an edit."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.federations import small_spec, train_small, untrained_loss

import fedcast.methods
from fedcast.errors import SpecError, UnknownNameError
from fedcast.methods.base import METHODS, Method, build_method
from fedcast.registry import describe
from fedcast.run.pretrain import Run
from fedcast.spec import MethodSpec, RunSpec

_FILES = {path.stem for path in Path(fedcast.methods.__path__[0]).glob("*.py")} - {"__init__", "base", "subdomains"}
_TRAINING = sorted(name for name in _FILES if METHODS[name]().federated_rounds(1))
# Options under which a method that does much beside its steps is quick.
_QUICK: dict[str, dict[str, object]] = {"fedal": {"match_steps": 5, "coreset": 8}}
# How long a method trains that learns more slowly than the others.
_SLOWLY = {"fedal": {"rounds": 3, "local_steps": 60}, "fedla": {"local_steps": 40}}


def quick_spec(name: str, **changes: Any) -> RunSpec:
    return small_spec(name, **changes, **_QUICK.get(name, {}))


def test_when_a_file_stands_in_the_folder_then_its_method_is_registered_under_its_name() -> None:
    assert set(METHODS) >= _FILES


@pytest.mark.parametrize("name", sorted(_FILES))
def test_when_a_method_is_described_then_every_hyper_parameter_has_a_default_and_a_line(name: str) -> None:
    (row,) = describe({name: METHODS[name]})
    assert row["summary"]
    assert [p["name"] for p in row["parameters"]] == [f.name for f in fields(METHODS[name])]
    assert all(p["description"] for p in row["parameters"])
    method = build_method(MethodSpec(name=name))
    for parameter in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, parameter.name, None)


@pytest.mark.parametrize("name", sorted(_FILES))
def test_when_a_method_gets_an_unknown_hyper_parameter_then_it_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="learning_speed"):
        build_method(MethodSpec(name=name, options={"learning_speed": 1}))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return {name: train_small(quick_spec(name), tmp_path_factory.mktemp(name)) for name in sorted(_FILES)}


@pytest.mark.parametrize("name", _TRAINING)
def test_when_a_method_trains_then_it_learns(name: str, tmp_path: Path) -> None:
    spec = quick_spec(name, **{"rounds": 2, "local_steps": 30, **_SLOWLY.get(name, {})})
    trained = train_small(spec, tmp_path).rows("validation")[-1]["mean"]
    assert trained < 0.97 * untrained_loss(spec, tmp_path / "untrained")


@pytest.mark.parametrize("name", sorted(_FILES))
def test_when_a_method_has_trained_then_every_domain_is_scored(name: str, trained: dict[str, Run]) -> None:
    run = trained[name]
    results = run.results()
    ours = results[results.model == name]
    assert set(ours.domain) == {"energy", "health", "medical", "transport"}
    assert ours.mse.notna().all()
    assert ours.wql.notna().all()
    assert set(ours[ours.held_out].domain) == {"transport"}
    assert (ours.gradient_steps == ours.gradient_steps.iloc[0]).all()


def test_when_methods_are_compared_then_they_took_equally_many_gradient_steps(trained: dict[str, Run]) -> None:
    assert len({trained[name].results().gradient_steps.iloc[0] for name in _TRAINING}) == 1


@pytest.mark.parametrize("name", sorted(_FILES))
def test_when_a_method_trains_again_in_one_worker_then_the_bytes_are_the_same(name: str, trained: dict[str, Run], tmp_path: Path) -> None:
    again = train_small(quick_spec(name, workers=1), tmp_path)
    assert again.results().weights_sha256.iloc[0] == trained[name].results().weights_sha256.iloc[0]


def test_when_two_classes_take_one_name_then_the_second_is_refused() -> None:
    with pytest.raises(SpecError, match="two methods are named 'fedavg'"):

        @dataclass(frozen=True)
        class Other(Method):
            name: ClassVar[str] = "fedavg"


def test_when_a_method_is_misspelt_then_the_right_one_is_proposed() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fedtrl'"):
        build_method(MethodSpec(name="fedtrll"))


@pytest.mark.parametrize(("option", "value"), [("alpha", -1), ("alpha", "much"), ("labels", "colour"), ("tau", 0)])
def test_when_a_hyper_parameter_is_refused_then_it_is_named(option: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"method\.{option}"):
        build_method(MethodSpec(name="fedtrl", options={option: value}))


def test_when_a_spec_names_python_code_then_it_is_only_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError):
        build_method(RunSpec.model_validate({"method": {"name": "os.system"}}).method)


def test_when_weights_are_private_then_they_never_stand_in_a_message(trained: dict[str, Run]) -> None:
    rows = trained["fedtrl"].rows("round")
    encoder = sum(p.numel() for n, p in _model().named_parameters() if n.startswith("encoder."))
    # Three sites; 4 bytes a weight; the prototype is as wide as the model; not exporting in round 1.
    assert rows[0]["bytes_up"] == 3 * 4 * (encoder + 128)


def _model() -> torch.nn.Module:
    from fedcast.models.patch import PatchTransformer

    return PatchTransformer.from_spec(small_spec("fedtrl").model, seed=0)


OPTIONS = [
    {"labels": "dataset"},
    {"labels": "kmeans", "clusters": 3},
    {"labels": "segment"},
    {"labels": "random"},
    {"alpha": 0.0},
    {"beta": 0.0},
    {"barycentre": "wasserstein"},
    {"aggregation": "samples"},
    {"aggregation": "uniform"},
    {"tau": 0.5, "gamma": 1.0},
    {"serving": "shadow"},
    {"travels": "all"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_when_fedtrl_is_switched_then_it_trains_and_differs_from_the_default(
    options: dict[str, object], trained: dict[str, Run], tmp_path: Path
) -> None:
    results = train_small(small_spec("fedtrl", **options), tmp_path).results()
    ours = results[results.model == "fedtrl"]
    assert ours.mse.notna().all()
    default = trained["fedtrl"].results()
    # "dataset" is what the default resolves to where a site has several; all three sites here do.
    same = options == {"labels": "dataset"}
    assert (ours.weights_sha256.iloc[0] == default.weights_sha256.iloc[0]) == same


def test_when_training_is_local_then_nothing_travels_before_the_last_round(trained: dict[str, Run]) -> None:
    assert [row["bytes_up"] for row in trained["local"].rows("round")][:-1] == [0, 0]


def test_when_other_domains_are_held_out_then_training_does_not_notice(trained: dict[str, Run], tmp_path: Path) -> None:
    spec = small_spec("fedavg")
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"held_out": ("web", "tourism")})})
    again = train_small(spec, tmp_path)
    assert again.results().weights_sha256.iloc[0] == trained["fedavg"].results().weights_sha256.iloc[0]


@pytest.mark.parametrize("method", ["fedavg", "central"])
def test_when_half_take_part_then_methods_still_take_equally_many_steps(method: str, tmp_path: Path) -> None:
    spec = small_spec(method)
    spec = spec.model_copy(update={"federation": spec.federation.model_copy(update={"participation": 0.4})})
    # ceil(0.4 * 3) = 2 sites, 3 rounds, 4 steps each.
    assert train_small(spec, tmp_path).results().gradient_steps.iloc[0] == 2 * 3 * 4

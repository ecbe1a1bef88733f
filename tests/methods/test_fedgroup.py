from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.federations import small_spec, train_small

from fedcast.errors import SpecError, UnknownNameError
from fedcast.methods.base import Server, Update, build_method, empty
from fedcast.methods.fedgroup import FedGroup
from fedcast.models.checkpoints import load_checkpoint
from fedcast.spec import MethodSpec
from fedcast.training.flat import Layout

LAYOUT = Layout(("encoder.a", "heads.b"), ((2,), (1,)), 2)


def server() -> Server:
    return Server(LAYOUT, torch.zeros(3), empty(), {}, 1, 2)


def update(site: str, value: float, samples: int) -> Update:
    return Update(site, {"shared": torch.full((3,), value)}, samples)


def test_when_groups_weigh_alike_then_the_minority_has_half_of_the_weight() -> None:
    state = server()
    FedGroup(groups=("icg*",)).aggregate(state, [update("ecg1", 0.0, 30), update("ecg2", 0.0, 10), update("icg", 1.0, 1)])
    torch.testing.assert_close(state.shared, torch.full((3,), 0.5))
    assert state.log["weights"] == pytest.approx({"ecg1": 0.375, "ecg2": 0.125, "icg": 0.5})


def test_when_heads_are_kept_apart_then_the_trunk_alone_is_shared() -> None:
    method, state = FedGroup(groups=("icg*",), even=False, apart="heads"), server()
    method.aggregate(state, [update("ecg", 0.0, 3), update("icg", 4.0, 1)])
    assert state.shared.tolist() == [1.0, 1.0, 1.0]
    assert state.shared_of("ecg").tolist() == [1.0, 1.0, 0.0]
    assert state.shared_of("icg").tolist() == [1.0, 1.0, 4.0]
    # a site of the group that did not take part starts from its group's head too
    assert method.message(state, "icg2")["shared"].tolist() == [1.0, 1.0, 4.0]


@given(samples=st.lists(st.integers(1, 1000), min_size=2, max_size=6), pattern=st.sampled_from(["s0", "s[01]", "none"]))
def test_when_weights_are_made_then_every_group_has_the_same_sum(samples: list[int], pattern: str) -> None:
    method = FedGroup(groups=(pattern,))
    points = {f"s{i}": float(count) for i, count in enumerate(samples)}
    weights = method._weights(points)
    sums: dict[str, float] = {}
    for site, weight in weights.items():
        sums[method.group(site)] = sums.get(method.group(site), 0.0) + weight
    assert list(sums.values()) == pytest.approx([sum(samples) / len(sums)] * len(sums))


def test_when_a_model_has_no_adapters_then_they_cannot_be_kept_apart() -> None:
    with pytest.raises(SpecError, match="no adapters"):
        FedGroup(groups=("icg*",), apart="adapters").aggregate(server(), [update("ecg", 0.0, 1)])


def test_when_groups_are_given_in_a_spec_then_they_are_read_as_patterns() -> None:
    method = build_method(MethodSpec(name="fedgroup", options={"groups": ["icg*", "ppg*"]}))
    assert isinstance(method, FedGroup)
    assert [method.group(site) for site in ("icg1", "ppg", "ecg")] == ["icg*", "ppg*", "rest"]
    with pytest.raises(UnknownNameError):
        build_method(MethodSpec(name="fedgroup", options={"group": []}))


def test_when_a_group_is_a_site_then_it_is_scored_with_its_own_head_and_the_others_with_theirs(tmp_path: Path) -> None:
    run = train_small(small_spec("fedgroup", rounds=2, groups=["medical"], apart="heads"), tmp_path)
    assert run.results().mse.notna().all()
    final = load_checkpoint(run.final).state_dict()
    assert final["heads.point.weight"].isfinite().all()

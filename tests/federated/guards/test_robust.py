"""Robust rules in a real round: one site of several sends what it likes, and the model hardly notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.federated.guards.rounds import Recorded, guarded, same
from tests.federations import small_spec
from torch import Tensor

from fedcast.errors import QuorumError, SpecError
from fedcast.federated.guards.robust import Robust
from fedcast.federated.messages import Reply
from fedcast.federated.plan import Plan
from fedcast.methods.base import build_method

FIVE = ("energy", "health", "medical", "nature", "tourism")
SEVEN = (*FIVE, "web", "wind")
RULES: dict[str, dict[str, Any]] = {
    "median": {},
    "trimmed_mean": {},
    "krum": {},
    "multi_krum": {"keep": 3},
    "geometric_median": {},
    "fltrust": {"root": "health"},
    "bulyan": {},
}
BAD = "medical"


def sites_of(rule: str) -> tuple[str, ...]:
    return SEVEN if rule == "bulyan" else FIVE


def options(rule: str, **more: Any) -> dict[str, Any]:
    malicious = {} if rule in ("median", "geometric_median", "fltrust") else {"malicious": 1}
    return {"name": "robust", "rule": rule, **malicious, **RULES[rule], **more}


def attacked(round_: Recorded, scale: float) -> dict[str, bytes]:
    """Return the replies with one site's update ``scale`` times what it is."""
    began = round_.before.shared
    reply = Reply.decode(round_.replies[BAD])
    shared = began + scale * (reply.tensors["shared"] - began)
    return {**round_.replies, BAD: Reply({**reply.tensors, "shared": shared}, reply.meta, None, reply.task).encode()}


def honest(round_: Recorded) -> Tensor:
    """Return the honest sites' updates, [n, size]."""
    replies = {site: Reply.decode(payload) for site, payload in round_.replies.items() if site != BAD}
    return torch.stack([replies[site].tensors["shared"] - round_.before.shared for site in sorted(replies)])


@pytest.mark.parametrize("scale", [-10.0, 1000.0])
@pytest.mark.parametrize("rule", RULES)
def test_when_one_site_is_malicious_then_the_rule_stays_within_a_bound_that_the_mean_leaves(
    rule: str, scale: float, recorded: Callable[..., Recorded]
) -> None:
    round_ = recorded("fedavg", sites_of(rule))
    updates = honest(round_)
    mean = updates.mean(0)
    spread = float((updates - mean).norm(dim=1).max())
    replies, began = attacked(round_, scale), round_.before.shared
    after, row = round_.play(replies, [options(rule)])
    assert row["dropped"] == {}
    error = float((after.shared - began - mean).norm())
    plain, _ = round_.play(replies, [])
    plain_error = float((plain.shared - began - mean).norm())
    # The farthest honest update from their mean; a geometric median may go farther (Minsker 2015: 2 (1 - a) / (1 - 2 a), a = 1 / 5).
    bound = spread * (2 * 0.8 / 0.6 if rule == "geometric_median" else 1.0)
    if rule == "fltrust":
        root = updates[sorted(set(round_.sites) - {BAD}).index("health")]
        bound = float(root.norm() + mean.norm())
    assert error <= bound * (1 + 1e-5)
    assert plain_error > 1.2 * bound
    assert "weight" not in next(iter(row["sites"].values()))


@pytest.mark.parametrize("rule", ["krum", "multi_krum", "bulyan", "fltrust"])
def test_when_a_rule_chooses_sites_then_the_row_names_them_and_not_the_malicious_one(rule: str, recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedavg", sites_of(rule))
    _, row = round_.play(attacked(round_, -10.0), [options(rule)])
    chosen = row["server"]["robust"]
    if rule == "fltrust":
        assert chosen["health"] == pytest.approx(1, abs=1e-4)
        assert chosen[BAD] == 0
    else:
        assert chosen
        assert BAD not in chosen


@pytest.mark.parametrize("method", ["fedavg", "fedper", "feddyn", "fedprox", "ffts", "fedgroup"])
def test_when_a_site_claims_more_points_then_the_rule_does_not_change(method: str, recorded: Callable[..., Recorded]) -> None:
    round_ = recorded(method, FIVE) if method == "fedavg" else recorded(method)
    reply = Reply.decode(round_.replies["energy"])
    fewer = Reply(reply.tensors, {**reply.meta, "samples": 1}, None, reply.task).encode()
    rule = [{"name": "robust", "rule": "median"}]
    after, _ = round_.play(round_.replies, rule)
    again, _ = round_.play({**round_.replies, "energy": fewer}, rule)
    assert torch.equal(after.shared, again.shared)
    assert not torch.equal(after.shared, round_.before.shared)


def test_when_too_few_replies_are_left_then_the_round_ends_with_a_quorum_error(recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedavg", FIVE)
    left = {site: payload for site, payload in round_.replies.items() if site != "energy"}
    with pytest.raises(QuorumError, match="'krum' has 4 usable replies and needs 5"):
        round_.play(left, [options("krum")])
    with pytest.raises(QuorumError, match="no usable reply of 'energy'"):
        round_.play(left, [options("fltrust", root="energy")])


@pytest.mark.parametrize("rule", RULES)
def test_when_a_value_is_too_large_to_compute_with_then_the_reply_is_dropped(rule: str, recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedavg", sites_of(rule))
    reply = Reply.decode(round_.replies[BAD])
    huge = Reply({"shared": torch.full_like(reply.tensors["shared"], 3e38)}, reply.meta, None, reply.task).encode()
    replies = {site: payload for site, payload in round_.replies.items() if site != BAD}
    if rule in ("krum", "multi_krum", "bulyan"):
        with pytest.raises(QuorumError, match="usable replies and needs"):
            round_.play({**replies, BAD: huge}, [options(rule)])
    else:
        after, row = round_.play({**replies, BAD: huge}, [options(rule)])
        assert row["dropped"] == {BAD: "shared has a value beyond 65536 in magnitude"}
        assert same(after, round_.play(replies, [options(rule)])[0])


def planned(method: str, guard: dict[str, Any], **changes: Any) -> tuple[Plan, Robust]:
    spec = guarded(small_spec(method, **changes), [guard])
    plan = Plan(spec, build_method(spec.method))
    (robust,) = plan.guards
    assert isinstance(robust, Robust)
    return plan, robust


REFUSED_METHODS = ["fedtrl", "scaffold", "local", "fedpm", "fedal", "central"]


@pytest.mark.parametrize("method", REFUSED_METHODS)
def test_when_a_server_step_is_more_than_means_then_a_rule_is_refused(method: str) -> None:
    plan, _ = planned(method, {"name": "robust"})
    with pytest.raises(SpecError, match=f"cannot protect method '{method}'"):
        plan.guards.check(plan)


def test_when_options_leave_means_alone_then_the_rule_is_not_refused_for_the_server_step() -> None:
    assert planned("fedal", {"name": "robust"}, gbe=False)[0].method.averages
    assert planned("fedpm", {"name": "robust"}, aggregation="fedavg")[0].method.averages
    assert not planned("fedgroup", {"name": "robust"}, apart="heads")[0].method.averages


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ({"rule": "fltrust"}, "root belongs to"),
        ({"rule": "median", "root": "energy"}, "root belongs to"),
        ({"rule": "krum", "keep": 2}, "keep belongs to"),
    ],
)
def test_when_options_do_not_belong_together_then_they_are_refused(guard: dict[str, Any], message: str) -> None:
    plan, _ = planned("fedavg", {"name": "robust", **guard})
    with pytest.raises(SpecError, match=message):
        plan.guards.check(plan)


def test_when_private_weights_travel_then_fltrust_is_refused() -> None:
    plan, _ = planned("fedper", {"name": "robust", "rule": "fltrust", "root": "energy"}, serving="shadow")
    with pytest.raises(SpecError, match="sends private ones too"):
        plan.guards.check(plan)


@pytest.mark.parametrize(
    ("guard", "sites", "message"),
    [
        ({"rule": "krum"}, 4, "needs 5 sites, and a round asks 4"),
        ({"rule": "bulyan"}, 6, "needs 7 sites, and a round asks 6"),
        ({"rule": "trimmed_mean", "malicious": 2}, 4, "needs 5 sites, and a round asks 4"),
        ({"rule": "median"}, 2, "needs 3 sites, and a round asks 2"),
        ({"rule": "fltrust", "root": "nobody"}, 5, "'nobody' is not asked in every round"),
    ],
)
def test_when_there_are_too_few_sites_or_no_trusted_one_then_the_run_is_refused(guard: dict[str, Any], sites: int, message: str) -> None:
    plan, robust = planned("fedavg", {"name": "robust", **guard})
    with pytest.raises(SpecError, match=message):
        robust.check_sites(plan, [f"s{number}" for number in range(sites)])


@pytest.mark.parametrize(("asked", "malicious"), [(5, 1), (10, 2), (3, 1), (100, 29)])
def test_when_a_share_is_malicious_then_that_many_sites_are_and_at_least_one(asked: int, malicious: int) -> None:
    plan, robust = planned("fedavg", {"name": "robust", "rule": "krum", "share": 0.29 if asked == 100 else 0.2})
    needed = 2 * malicious + 3
    if asked < needed:
        with pytest.raises(SpecError, match=f"against {malicious} malicious sites needs {needed}"):
            robust.check_sites(plan, [f"s{number}" for number in range(asked)])
    else:
        robust.check_sites(plan, [f"s{number}" for number in range(asked)])
        assert robust._malicious(asked) == malicious

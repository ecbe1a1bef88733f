from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.guards.rounds import guarded
from tests.federations import DOMAINS, small_spec, train_small, untrained_loss
from torch import Tensor

from fedcast import Forecaster
from fedcast.errors import FederationError, PrivacyBudgetError, ResumeError, ScreenError, SpecError
from fedcast.federated.guards.base import Arrival, GuardRound, Outgoing
from fedcast.federated.guards.dp import Dp
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.privacy import LEDGER, Ledger, Spending, epsilon
from fedcast.federated.rounds import Silent
from fedcast.methods.base import Server, build_method, empty
from fedcast.run.pretrain import pretrain
from fedcast.spec import RunSpec
from fedcast.training.aggregate import StreamingMean
from fedcast.training.flat import Layout

DELTA = 1e-5


def _spec(method: str = "fedavg", *others: Mapping[str, Any], rounds: int = 3, local_steps: int = 4, **options: Any) -> RunSpec:
    spec = small_spec(method, rounds=rounds, local_steps=local_steps)
    changes = {
        "evaluation": spec.evaluation.model_copy(update={"samples": 0}),
        "federation": spec.federation.model_copy(update={"weights": "equal"}),
    }
    return guarded(spec.model_copy(update=changes), [{"name": "dp", **options}, *others])


def _check(spec: RunSpec) -> None:
    plan = Plan(spec, build_method(spec.method))
    plan.guards.check(plan)


def _round(
    guard: Dp,
    folder: Path,
    before: Tensor,
    updates: Mapping[str, Tensor],
    asked: int,
    *,
    number: int = 1,
    server: Server | None = None,
    simulated: bool = True,
) -> Server:
    """Take the updates of a round through the guard's hooks at the server, and the streaming mean between them."""
    size = len(before)
    server = server or Server(Layout(("w",), ((size,),), 1), before, empty(), {}, number, 9)
    sites = [f"site{i:02d}" for i in range(asked)]
    samples = dict.fromkeys(sites, 1)
    round_ = GuardRound(number, 9, sites, samples, server, 7, folder, simulated, lambda _: {})
    sent = guard.begin(round_)
    mean = StreamingMean({"shared": size}, asked)
    for site, after in updates.items():
        named = {f"guard.dp.{name}": tensor for name, tensor in sent.get(site, {}).items()}
        arrival = Arrival(site, {"shared": after}, {}, {"shared": before, **named}, 1, memory=round_.memory)
        guard.inspect(arrival)
        mean.add(arrival.tensors, 1)
    server.shared = mean.means()["shared"]
    round_.taken = sorted(updates)
    guard.finish(round_, before)
    return server


def _outgoing(guard: Dp, after: Tensor, before: Tensor, *, simulated: bool = True, **received: Tensor) -> Outgoing:
    outgoing = Outgoing(
        site="a",
        round=1,
        tensors={"shared": after},
        received={"shared": before, **{f"guard.dp.{name}": tensor for name, tensor in received.items()}},
        samples=1,
        meta={"loss": 2.0, "metrics": {"x": 1.0}},
        state={},
        memory={"rate": 0.1, "steps": 4},
        rng=np.random.default_rng(3),
        simulated=simulated,
    )
    guard.encode(outgoing)
    return outgoing


# --- what is protected ---


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from(["none", "zero", "any"]))
def test_when_one_sites_update_is_another_or_missing_then_the_mean_moves_by_the_bound_at_most(
    tmp_path_factory: pytest.TempPathFactory, seed: int, sites: int, length: float, change: str
) -> None:
    rng = np.random.default_rng(seed)
    guard = Dp(norm=0.5, noise=1e-9, noise_source="seeded")
    before = torch.from_numpy(rng.standard_normal(20)).float()
    updates = {f"site{i:02d}": before + torch.from_numpy(length * rng.standard_normal(20)).float() for i in range(sites)}
    changed = dict(updates)
    if change == "none":
        del changed["site00"]
    else:
        changed["site00"] = before if change == "zero" else before - 1e4 * (updates["site00"] - before)
    asked, folder = sites + 1, tmp_path_factory.mktemp("round")  # one that was asked never answers
    one = _round(guard, folder / "one", before, updates, asked).shared
    other = _round(guard, folder / "other", before, changed, asked).shared if changed else before
    most = (2 if change == "any" else 1) * 0.5 / asked
    assert float((one.double() - other.double()).norm()) <= most * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("source", ["seeded", "system"])
def test_when_noise_is_central_then_its_spread_is_that_of_the_bound_over_the_sites_asked(tmp_path: Path, source: Any) -> None:
    before = torch.zeros(60_000)
    server = _round(Dp(norm=2.0, noise=3.0, noise_source=source), tmp_path, before, {"site00": before, "site01": before}, 4)
    assert float(server.shared.std()) == pytest.approx(3.0 * 2.0 / 4, rel=0.02)
    assert server.log["epsilon"] == epsilon((Spending(3.0, 1.0, 1),), DELTA)


@pytest.mark.parametrize("simulated", [True, False])
def test_when_noise_is_local_then_a_site_clips_and_noises_before_anything_leaves_it(simulated: bool) -> None:
    before = torch.zeros(60_000)
    sent = _outgoing(Dp(level="local", norm=2.0, noise=0.5), before + 1.0, before, simulated=simulated).tensors["shared"]
    assert float(sent.std()) == pytest.approx(0.5 * 2.0, rel=0.02)
    assert float(sent.mean()) == pytest.approx(2.0 / 60_000**0.5, abs=5 / 60_000**0.5)


def test_when_noise_is_local_then_any_two_updates_are_to_look_alike_and_half_the_multiplier_counts(tmp_path: Path) -> None:
    before = torch.zeros(4)
    server = _round(Dp(level="local", noise=1.0), tmp_path, before, {"site00": before}, 2)
    assert server.log["epsilon"] == epsilon((Spending(0.5, 1.0, 1),), DELTA)


def test_when_sites_are_apart_then_seeded_noise_is_refused_and_auto_takes_the_systems(tmp_path: Path) -> None:
    before = torch.zeros(8)
    with pytest.raises(SpecError, match="seed"):
        _round(Dp(noise_source="seeded"), tmp_path, before, {"site00": before}, 1, simulated=False)
    one, other = (_round(Dp(), tmp_path / name, before, {"site00": before}, 1, simulated=False).shared for name in "ab")
    assert not torch.equal(one, other)
    same = [_round(Dp(), tmp_path / name, before, {"site00": before}, 1).shared for name in "cd"]
    assert torch.equal(*same)


def test_when_losses_are_withheld_then_none_leaves_the_site() -> None:
    before = torch.zeros(4)
    assert _outgoing(Dp(losses=False), before, before).meta == {"loss": 0.0, "metrics": {}}
    assert _outgoing(Dp(), before, before).meta == {"loss": 2.0, "metrics": {"x": 1.0}}


@pytest.mark.parametrize("told", [{}, {"accounted": torch.tensor([0.01, 4.0])}, {"accounted": torch.tensor([0.1, 3.0])}])
def test_when_a_sites_steps_are_not_accounted_for_as_they_are_then_nothing_leaves_it(told: dict[str, Tensor]) -> None:
    before = torch.zeros(4)
    with pytest.raises(FederationError, match="not accounted for"):
        _outgoing(Dp(level="sample"), before, before, **told)
    assert torch.equal(_outgoing(Dp(level="sample"), before, before, accounted=torch.tensor([0.1, 4.0])).tensors["shared"], before)


# --- adaptive clipping ---


def test_when_clipping_is_adaptive_then_the_bound_reaches_the_quantile_of_the_lengths(tmp_path: Path) -> None:
    guard = Dp(clipping="adaptive", norm=0.1, noise=0.05, bit_noise=0.5, quantile=0.5)
    before, server = torch.zeros(8), None
    lengths = {f"site{i:02d}": 0.5 + 0.1 * i for i in range(20)}
    updates = {site: torch.eye(8)[0] * length for site, length in lengths.items()}
    for number in range(1, 40):
        server = _round(guard, tmp_path, before, updates, 20, number=number, server=server)
    assert server is not None
    assert server.log["clip_norm"] == pytest.approx(float(np.median(list(lengths.values()))), rel=0.15)


def test_when_clipping_is_adaptive_then_bits_and_updates_together_spend_what_one_fixed_round_does() -> None:
    guard = Dp(clipping="adaptive", noise=0.7)
    bits = guard._bit_noise(10)
    assert guard._update_noise(10) ** -2 + (2 * bits) ** -2 == pytest.approx(0.7**-2)
    assert guard._update_noise(10) > 0.7
    assert guard._bit_noise(1000) == 50


@pytest.mark.parametrize("bound", [torch.tensor([0.0]), torch.tensor([float("nan")]), torch.tensor([1.0, 2.0]), torch.tensor([1])])
def test_when_the_bound_in_a_task_is_none_then_the_site_refuses(bound: Tensor) -> None:
    before = torch.zeros(4)
    with pytest.raises(ScreenError, match="bound"):
        _outgoing(Dp(clipping="adaptive"), before, before, norm=bound)


# --- what is refused ---


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("fedpm", {"level": "local"}, "fedpm"),
        ("scaffold", {"level": "sample"}, "scaffold"),
        ("feddyn", {}, "feddyn"),
        ("fedper", {}, "private weights"),
        ("fedavg_encoder", {"level": "local"}, "private weights"),
        ("fedtrl", {"level": "sample"}, "fedtrl"),
        ("ffts", {"level": "sample"}, "single windows"),
        ("fedgroup", {}, "no plain mean"),
        ("fedavg", {"level": "local", "clipping": "adaptive"}, "central"),
        ("fedavg", {"clipping": "adaptive", "noise": 4.0, "bit_noise": 1.0}, "bit_noise"),
    ],
)
def test_when_something_would_leave_unprotected_then_the_run_is_refused_by_name(method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        _check(_spec(method, **options))


def test_when_other_sections_would_undo_the_protection_then_the_run_is_refused() -> None:
    spec = _spec()
    unequal = spec.model_copy(update={"federation": spec.federation.model_copy(update={"weights": "samples"})})
    with pytest.raises(SpecError, match="weigh alike"):
        _check(unequal)
    for change in ({"samples": 1}, {"conflict": 1}):
        with pytest.raises(SpecError, match="in the clear"):
            _check(spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update=change)}))
    flower = spec.model_copy(update={"federation": spec.federation.model_copy(update={"fleet": "flower"})})
    with pytest.raises(SpecError, match="seed"):
        _check(guarded(flower, [{"name": "dp", "noise_source": "seeded"}]))
    compiled = spec.model_copy(update={"training": spec.training.model_copy(update={"compile": True})})
    with pytest.raises(SpecError, match="compile"):
        _check(guarded(compiled, [{"name": "dp", "level": "sample"}]))


@pytest.mark.parametrize("level", ["central", "local"])
def test_when_codes_would_be_made_before_the_noise_then_the_order_is_refused(level: str) -> None:
    codes = {"name": "compress", "codec": "int8"}
    _check(_spec("fedavg", codes, level=level))
    with pytest.raises(SpecError, match="compress"):
        _check(guarded(_spec(), [codes, {"name": "dp", "level": level}]))


def test_when_a_robust_rule_takes_the_place_of_the_mean_then_central_noise_is_refused_and_local_noise_is_not() -> None:
    rule = {"name": "robust", "rule": "median"}
    _check(_spec("fedavg", rule, level="local"))
    with pytest.raises(SpecError, match="robust"):
        _check(_spec("fedavg", rule))


def test_when_sums_are_secure_then_sites_clip_unwatched_and_an_adaptive_bound_is_refused() -> None:
    _check(_spec("fedavg", {"name": "secure_sum"}))
    with pytest.raises(SpecError, match="secure_sum"):
        _check(_spec("fedavg", {"name": "secure_sum"}, clipping="adaptive"))


# --- the account ---


def test_when_the_budget_would_be_exceeded_then_the_round_is_refused_and_the_ledger_is_as_it_was(tmp_path: Path) -> None:
    two = epsilon((Spending(1.0, 1.0, 2),), DELTA)
    guard, before, server = Dp(noise=1.0, budget=two * 1.01), torch.zeros(4), None
    for number in (1, 2):
        server = _round(guard, tmp_path, before, {"site00": before}, 1, number=number, server=server)
    assert server is not None
    written, weights = (tmp_path / LEDGER).read_bytes(), server.shared.clone()
    with pytest.raises(PrivacyBudgetError, match="round 3 would spend"):
        _round(guard, tmp_path, before, {"site00": before}, 1, number=3, server=server)
    assert (tmp_path / LEDGER).read_bytes() == written
    assert torch.equal(server.shared, weights)


def test_when_the_ledger_has_lost_a_line_then_the_run_does_not_go_on(tmp_path: Path) -> None:
    before, server = torch.zeros(4), None
    for number in (1, 2):
        server = _round(Dp(), tmp_path, before, {"site00": before}, 1, number=number, server=server)
    path = tmp_path / LEDGER
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ResumeError, match="has 1 releases, and the checkpoint knows of 2"):
        _round(Dp(), tmp_path, before, {"site00": before}, 1, number=3, server=server)


def test_when_a_site_says_nonsense_about_its_steps_then_it_has_no_account(tmp_path: Path) -> None:
    answers = {
        "a": Reply(meta={"rate": 0.25, "steps": 3}),
        "b": Reply(meta={"rate": float("nan"), "steps": 3}),
        "c": Reply(meta={"rate": 0.1, "steps": True}),
        "d": Reply(error="no"),
        "e": Reply(meta={"rate": 0.1, "steps": 10**12}),
    }
    asked: list[Mapping[str, Task]] = []

    def exchange(tasks: Mapping[str, Task]) -> dict[str, Reply]:
        asked.append(tasks)
        return {site: answers[site] for site in tasks}

    server = Server(Layout(("w",), ((4,),), 1), torch.zeros(4), empty(), {}, 1, 9)
    round_ = GuardRound(1, 9, sorted(answers), dict.fromkeys(answers, 1), server, 7, tmp_path, True, exchange)
    sent = Dp(level="sample").begin(round_)
    assert {site: tensors["accounted"].tolist() for site, tensors in sent.items()} == {"a": [0.25, 3.0]}
    Dp(level="sample").begin(replace(round_, number=2))
    assert [sorted(tasks) for tasks in asked] == [["a", "b", "c", "d", "e"], ["b", "c", "d", "e"]]


def test_when_the_spec_says_how_many_steps_a_round_has_then_a_site_that_claims_others_has_no_account(tmp_path: Path) -> None:
    claims = {"a": Reply(meta={"rate": 0.25, "steps": 3}), "b": Reply(meta={"rate": 0.25, "steps": 10**7})}
    server = Server(Layout(("w",), ((4,),), 1), torch.zeros(4), empty(), {}, 1, 9)
    samples = dict.fromkeys(claims, 1)
    round_ = GuardRound(1, 9, ["a", "b"], samples, server, 7, tmp_path, True, lambda _: claims, steps=dict.fromkeys(claims, 3))
    assert set(Dp(level="sample", budget=100.0).begin(round_)) == {"a"}
    with pytest.raises(PrivacyBudgetError, match="site b claims the most for it, 10000000 steps"):
        Dp(level="sample", budget=100.0).begin(replace(round_, folder=tmp_path / "other", steps={}))


# --- whole runs ---


@pytest.mark.parametrize(
    "options",
    [
        {"level": "central", "noise": 0.003},
        {"level": "central", "noise": 0.003, "clipping": "adaptive"},
        {"level": "local", "noise": 1e-4},
        {"level": "sample", "noise": 0.3, "per_sample": "micro_batch"},
    ],
    ids=["central", "adaptive", "local", "sample"],
)
def test_when_noise_is_mild_then_a_federation_still_learns_and_says_each_round_what_it_spent(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run = train_small(_spec(rounds=2, **options), tmp_path)
    losses = [row["mean"] for row in run.rows("validation")]
    assert losses[-1] < untrained_loss(small_spec("fedavg"), tmp_path / "untrained")
    servers = [row["server"] for row in run.rows("round")]
    spent = [server["epsilon"] for server in servers]
    assert spent == sorted(set(spent))
    assert all(server["clip_norm"] > 0 for server in servers)
    assert len(Ledger(run.folder)) == 2


class _StoppedError(Exception):
    pass


class _StopsAt(Silent):
    def __init__(self, phase: str, round_: int) -> None:
        self._at = (phase, round_)

    def phase(self, name: str, round: int) -> None:
        if (name, round) == self._at:
            raise _StoppedError


@pytest.mark.parametrize("source", ["auto", "system"])
def test_when_a_run_stops_after_a_release_and_goes_on_then_its_epsilon_is_no_lower(tmp_path: Path, source: str) -> None:
    spec = _spec(noise=1.0, noise_source=source, local_steps=1)
    whole = train_small(spec, tmp_path / "whole")
    with pytest.raises(_StoppedError):
        # After the noised weights of round 2, before their checkpoint.
        pretrain(spec, output=tmp_path / "run", observer=_StopsAt("checkpoint", 2))
    assert len(Ledger(tmp_path / "run")) == 2
    resumed = pretrain(spec, output=tmp_path / "run")
    uninterrupted, after = (run.rows("round")[-1]["server"]["epsilon"] for run in (whole, resumed))
    assert len(Ledger(tmp_path / "run")) == 4
    if source == "auto":  # the same bytes were released twice
        assert after == uninterrupted
        assert resumed.results()["weights_sha256"].iloc[0] == whole.results()["weights_sha256"].iloc[0]
    else:
        assert after == epsilon((Spending(1.0, 1.0, 4),), DELTA) > uninterrupted


def test_when_the_budget_ends_a_run_then_the_model_of_the_rounds_done_is_there_and_running_it_again_spends_nothing(tmp_path: Path) -> None:
    budget = epsilon((Spending(1.0, 1.0, 2),), DELTA) * 1.01
    spec = _spec(noise=1.0, norm=1e-3, budget=budget, local_steps=1)
    with pytest.raises(PrivacyBudgetError, match="final/") as caught:
        train_small(spec, tmp_path)
    assert caught.value.exit_code == 70
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows if row["kind"] == "round"] == [1, 2]
    Forecaster.from_pretrained(folder / "final")
    shutil.rmtree(folder / "final")
    with pytest.raises(PrivacyBudgetError):
        train_small(spec, tmp_path)
    assert len(Ledger(folder)) == 2
    Forecaster.from_pretrained(folder / "final")


def test_when_only_some_sites_take_part_then_each_pays_for_its_own_rounds(tmp_path: Path) -> None:
    spec = _spec(noise=1.0, norm=1e-3, rounds=3, local_steps=1)
    spec = spec.model_copy(update={"federation": spec.federation.model_copy(update={"participation": 0.3})})
    run = train_small(spec, tmp_path)
    parts = [list(row["sites"]) for row in run.rows("round")]
    assert all(len(sites) == 1 for sites in parts)
    most = max(sum(site in sites for sites in parts) for site in DOMAINS)
    assert run.rows("round")[-1]["server"]["epsilon"] == epsilon((Spending(1.0, 1.0, most),), DELTA)


@pytest.mark.slow
def test_when_windows_are_private_then_opacus_and_single_passes_give_the_same_model(tmp_path: Path) -> None:
    runs = [train_small(_spec(rounds=2, level="sample", noise=0.5, per_sample=kind), tmp_path / kind) for kind in ("opacus", "micro_batch")]
    losses = [run.rows("validation")[-1]["mean"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs[0].rows("round")[-1]["server"]["epsilon"] == runs[1].rows("round")[-1]["server"]["epsilon"]


@pytest.mark.slow
def test_when_sites_are_processes_then_private_runs_have_the_same_bytes(tmp_path: Path) -> None:
    for options in ({"level": "central"}, {"level": "local", "noise": 1e-3}, {"level": "sample"}):
        spec = _spec(**options, local_steps=2)
        other = spec.model_copy(update={"federation": spec.federation.model_copy(update={"fleet": "processes", "workers": 1})})
        name = str(options["level"])
        digests = {
            train_small(one, tmp_path / f"{name}-{one.federation.fleet}").results()["weights_sha256"].iloc[0] for one in (spec, other)
        }
        assert len(digests) == 1

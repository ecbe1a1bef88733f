"""The guard in real runs: bit-equal on every fleet and to the plain mean, dropouts and tampering at every step, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federations import small_spec

import fedcast.run.pretrain as pretraining
from fedcast.errors import FedcastError, QuorumError, ScreenError, SecureSumError, SpecError
from fedcast.federated.fleet import Fleet
from fedcast.federated.guards.base import Arrival
from fedcast.federated.guards.secure_sum import SecureSum
from fedcast.federated.messages import Reply, Task
from fedcast.federated.secure.quantise import Grid
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec, parse_spec

SITES = ("energy", "health", "medical", "nature", "web")  # four of five must stay
EQUAL = {"federation": {"weights": "equal"}}
Meddle = Callable[[str, Task, Reply], Reply | None]


def spec_of(method: str = "fedavg", *, fleet: str = "threads", rounds: int = 1, guards: object = None, **sections: Any) -> RunSpec:
    document = small_spec(method, fleet=fleet, rounds=rounds, local_steps=2).to_dict()
    document["data"] |= {"domains": list(SITES), "held_out": []}
    document["evaluation"] |= {"windows": 2, "validation_windows": 2, "samples": 0, "baselines": []}
    document["guards"] = [{"name": "secure_sum"}] if guards is None else guards
    for section, options in sections.items():
        document[section] |= options
    return parse_spec(document)


@dataclass
class Wire:
    """A real fleet; keeps what passes, and may change or drop replies, or change tasks."""

    fleet: Fleet
    meddle: Meddle = lambda site, task, reply: reply
    tamper: Callable[[str, Task], Task] = lambda site, task: task
    tasks: list[tuple[str, Task]] = field(default_factory=list)
    replies: list[tuple[str, Task, Reply]] = field(default_factory=list)
    simulated: bool = True
    carried: dict[str, dict[str, Any]] = field(default_factory=dict)

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return self.fleet.sites()

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run the tasks and meddle."""
        tasks = {site: self.tamper(site, task) for site, task in tasks.items()}
        self.tasks += tasks.items()
        for site, reply in self.fleet.run(tasks, deadline_s):
            changed = self.meddle(site, tasks[site], reply)
            if changed is not None:
                self.replies.append((site, tasks[site], changed))
                yield site, changed

    def close(self) -> None:
        """Close the fleet."""
        self.fleet.close()

    def trained(self) -> dict[str, Reply]:
        """Return the replies to training tasks."""
        return {site: reply for site, task, reply in self.replies if task.kind == "train"}

    def shared_after(self) -> torch.Tensor:
        """Return the shared weights after the last round, as they were sent for scoring."""
        return [task.tensors["shared"] for _, task in self.tasks if task.kind == "evaluate"][-1]


def wired(monkeypatch: pytest.MonkeyPatch, spec: RunSpec, folder: Path, **options: Any) -> tuple[Run, Wire]:
    wires: list[Wire] = []
    start = pretraining.start_fleet

    def wire(*arguments: Any) -> Wire:
        wires.append(Wire(start(*arguments), **options))
        return wires[-1]

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "start_fleet", wire)
        try:
            run = pretrain(spec, output=folder)
        except FedcastError as error:
            error.wire = wires[-1]  # type: ignore[attr-defined]
            raise
    return run, wires[-1]


def stage_of(task: Task) -> str:
    return str(task.meta.get("stage", task.kind))


def dropping(stage: str, *gone: str) -> Meddle:
    return lambda site, task, reply: None if site in gone and stage_of(task) == stage else reply


def digest(run: Run) -> str:
    return str(run.results().weights_sha256.iloc[0])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Wire:
    """A round without the guard, and what passed in it."""
    with pytest.MonkeyPatch.context() as patch:
        return wired(patch, spec_of(guards=[]), tmp_path_factory.mktemp("plain") / "run")[1]


def plain_mean(plain: Wire, sites: tuple[str, ...], bits: int = 32, bound: float = 1.0) -> torch.Tensor:
    """Return what the guard must open: the quantised updates of some sites, summed without any mask."""
    before = next(task.tensors["shared"] for _, task in plain.tasks if task.kind == "train")
    weights = {site: int(reply.meta["samples"]) for site, reply in plain.trained().items()}
    grid = Grid(bits, bound, len(SITES), sum(weights.values()))
    words = [grid.quantise((plain.trained()[site].tensors["shared"] - before).numpy(), weights[site]) for site in sites]
    # Python's integers, as nothing of the guard's has added them.
    total = np.sum([w.view(f"<i{bits // 8}").astype(object)[:-2] for w in words], axis=0)
    mean = total.astype(np.float64) / (grid.scale * sum(weights[site] for site in sites))
    return (before.double() + torch.from_numpy(mean)).float()


@pytest.mark.parametrize("bits", [32, 64])
def test_when_all_sites_stay_then_the_weights_are_those_of_the_plain_quantised_mean(
    plain: Wire, bits: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = spec_of(guards=[{"name": "secure_sum", "bits": bits}])
    run, wire = wired(monkeypatch, spec, tmp_path / "run")
    assert torch.equal(wire.shared_after(), plain_mean(plain, SITES, bits))
    # The stated bound, beside the rounding of the result to float32.
    weights = sum(int(reply.meta["samples"]) for reply in plain.trained().values())
    bound = Grid(bits, 1.0, len(SITES), weights).error(len(SITES), weights) + 2**-23
    assert float((wire.shared_after() - plain.shared_after()).abs().max()) <= bound
    [row] = run.rows("round")
    assert row["server"]["secure_sum"] == {"sites": 5, "cut": 0.0}
    for reply in wire.trained().values():
        assert set(reply.tensors) == {"guard.secure_sum.masked"}


@pytest.mark.slow
def test_when_the_fleet_is_of_processes_then_the_weights_are_the_same(tmp_path: Path) -> None:
    runs = [pretrain(spec_of(fleet=fleet, rounds=2), output=tmp_path / fleet) for fleet in ("threads", "processes")]
    assert digest(runs[0]) == digest(runs[1])


@pytest.mark.parametrize("stage", ["keys", "shares", "train", "reveal"])
def test_when_a_site_goes_away_at_any_step_then_the_others_are_summed_exactly(
    plain: Wire, stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, wire = wired(monkeypatch, spec_of(), tmp_path / "run", meddle=dropping(stage, "medical"))
    left = SITES if stage == "reveal" else tuple(site for site in SITES if site != "medical")
    assert torch.equal(wire.shared_after(), plain_mean(plain, left))
    [row] = run.rows("round")
    assert set(row["dropped"]) == set(SITES) - set(left)


@pytest.mark.parametrize(
    ("stage", "did"),
    [("keys", "sent keys"), ("shares", "shared their secrets"), ("train", "sent a masked update"), ("reveal", "revealed their shares")],
)
def test_when_too_many_sites_go_away_then_the_round_ends_with_a_named_error_and_no_weight_has_changed(
    plain: Wire, stage: str, did: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(QuorumError, match=rf"round 1: 3 sites {did}, and a secure sum needs 4") as caught:
        wired(monkeypatch, spec_of(), tmp_path / "run", meddle=dropping(stage, "medical", "web"))
    wire: Wire = caught.value.wire  # type: ignore[attr-defined]
    assert not any(task.kind == "evaluate" for _, task in wire.tasks)
    if stage == "reveal":
        _, wire = wired(monkeypatch, spec_of(), tmp_path / "run")  # the same command again
        assert torch.equal(wire.shared_after(), plain_mean(plain, SITES))


def test_when_the_server_alters_a_share_then_that_site_is_dropped_by_name_and_the_round_goes_on(
    plain: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tamper(site: str, task: Task) -> Task:
        if site != "nature" or "guard.secure_sum.shares" not in task.tensors:
            return task
        shares = task.tensors["guard.secure_sum.shares"].clone()
        shares[0, 40] ^= 1
        return replace(task, tensors={**task.tensors, "guard.secure_sum.shares": shares})

    run, wire = wired(monkeypatch, spec_of(), tmp_path / "run", tamper=tamper)
    [row] = run.rows("round")
    assert row["dropped"] == {
        "nature": "secure-sum: site nature, round 1: the shares of site energy do not open: they were altered, or are of another round"
    }
    assert torch.equal(wire.shared_after(), plain_mean(plain, tuple(site for site in SITES if site != "nature")))


def test_when_a_site_reveals_a_wrong_share_of_a_seed_then_the_sum_is_not_taken_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lie(site: str, task: Task, reply: Reply) -> Reply:
        if site == "energy" and stage_of(task) == "reveal":
            return replace(reply, tensors={**reply.tensors, "seeds": reply.tensors["seeds"] ^ 1})
        return reply

    with pytest.raises(SecureSumError, match=r"beyond what its sites could have sent|do not belong together"):
        wired(monkeypatch, spec_of(), tmp_path / "run", meddle=lie)


def test_when_a_site_answers_with_something_else_then_it_is_left_out(plain: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def spoil(site: str, task: Task, reply: Reply) -> Reply:
        return replace(reply, tensors={"keys": torch.zeros(3, 32)}) if site == "web" and stage_of(task) == "keys" else reply

    run, wire = wired(monkeypatch, spec_of(), tmp_path / "run", meddle=spoil)
    [row] = run.rows("round")
    assert row["dropped"] == {"web": "secure-sum: site web was not part of the exchange of keys"}
    assert torch.equal(wire.shared_after(), plain_mean(plain, SITES[:-1]))


def test_when_a_site_is_dropped_then_the_error_of_a_round_that_fails_names_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(site: str, task: Task, reply: Reply) -> Reply:
        ill = site in ("energy", "web") and stage_of(task) == "shares"
        return Reply(error="secure-sum: a public key is not usable", task=reply.task) if ill else reply

    with pytest.raises(QuorumError, match=r"energy: secure-sum: a public key is not usable; web: "):
        wired(monkeypatch, spec_of(), tmp_path / "run", meddle=fail)


def test_when_two_rounds_pass_then_the_wire_shows_other_masks_and_all_values_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, wire = wired(monkeypatch, spec_of(rounds=2), tmp_path / "run")
    masked = [reply.tensors["guard.secure_sum.masked"] for _, task, reply in wire.replies if task.kind == "train"]
    assert len(masked) == 10
    for vector in masked:
        # An update lies within a narrow part of the 2^32 integers; a uniform one has mean 0 and deviation 2^32 / sqrt(12).
        values = vector.double()
        assert abs(float(values.mean())) < 5 * 2**32 / (12 * values.numel()) ** 0.5
        assert float(values.std()) == pytest.approx(2**32 / 12**0.5, rel=0.02)
    first, second = ({site: r for site, t, r in wire.replies if t.kind == "train" and t.round == n} for n in (1, 2))
    for site in SITES:
        one, other = (replies[site].tensors["guard.secure_sum.masked"] for replies in (first, second))
        assert float((one == other).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_when_a_masked_update_has_another_type_then_it_is_dropped_by_name(
    dtype: torch.dtype, plain: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def widen(site: str, task: Task, reply: Reply) -> Reply:
        if site == "web" and task.kind == "train":
            return replace(reply, tensors={name: tensor.to(dtype) for name, tensor in reply.tensors.items()})
        return reply

    run, wire = wired(monkeypatch, spec_of(), tmp_path / "run", meddle=widen)
    [row] = run.rows("round")
    assert "declared is int32" in row["dropped"]["web"]
    assert torch.equal(wire.shared_after(), plain_mean(plain, SITES[:-1]))


def test_when_a_masked_update_is_of_an_attempt_that_was_given_up_then_it_is_dropped() -> None:
    sent = {"guard.secure_sum.attempt": torch.arange(16, dtype=torch.uint8)}
    SecureSum().inspect(Arrival("web", {}, {"secure_sum": bytes(range(16)).hex()}, sent, 1))
    for meta in ({}, {"secure_sum": bytes(16).hex()}):
        with pytest.raises(ScreenError, match="not of this sum"):
            SecureSum().inspect(Arrival("web", {}, meta, sent, 1))


class Circle:
    """Sites of the guard without training: each has a memory, and answers what the server asks."""

    def __init__(self, count: int = 4) -> None:
        self.guard = SecureSum()
        self.memories: dict[str, dict[str, Any]] = {f"s{index}": {} for index in range(count)}

    def ask(self, stage: str, site: str, tensors: Mapping[str, torch.Tensor] | None = None, round_: int = 1, **meta: Any) -> Reply:
        """Ask one site."""
        told = {"guard": "secure_sum", "stage": stage, "run": "run", "attempt": "one", **meta}
        return self.guard.answer(Task("guard", round_, tensors or {}, told), site, self.memories[site])

    def ready(self, **meta: Any) -> None:
        """Bring every site to where it has masked an update."""
        names = sorted(self.memories)
        table = torch.stack([self.ask("keys", site, **meta).tensors["keys"].flatten() for site in names])
        told = {"sites": names, "threshold": self.guard.rule.threshold(len(names)), "total": 100, **meta}
        boxes = {site: self.ask("shares", site, {"keys": table}, **told).tensors["shares"] for site in names}
        for index, site in enumerate(names):
            session = self.memories[site]["sessions"][meta.get("attempt", "one")].round
            session.receive({other: boxes[other][index].numpy().tobytes() for other in names if other != site})
            session.mask(np.zeros(3, dtype="<u4"))


def test_when_a_message_comes_twice_then_the_answer_is_the_same() -> None:
    circle = Circle()
    names = sorted(circle.memories)
    table = torch.stack([circle.ask("keys", site).tensors["keys"].flatten() for site in names])
    for site in names:
        told = {"sites": names, "threshold": 3, "total": 100}
        once, again = (circle.ask("shares", site, {"keys": table}, **told).tensors["shares"] for _ in range(2))
        assert torch.equal(once, again)
        assert torch.equal(circle.ask("keys", site).tensors["keys"].flatten(), table[names.index(site)])


def test_when_both_shares_of_a_site_are_asked_for_then_the_site_refuses() -> None:
    circle = Circle()
    circle.ready()
    with pytest.raises(SecureSumError, match="each once"):
        circle.ask("reveal", "s0", arrived=["s0", "s1", "s2", "s3"], missing=["s3"])
    with pytest.raises(SecureSumError, match="twice"):
        circle.ask("reveal", "s0", arrived=["s0", "s1", "s2", "s3", "s3"], missing=[])
    circle.ask("reveal", "s0", arrived=["s0", "s1", "s2", "s3"], missing=[])
    with pytest.raises(SecureSumError, match="opened before"):
        circle.ask("reveal", "s0", arrived=["s0", "s1", "s2"], missing=["s3"])


def test_when_a_round_is_repeated_then_it_is_opened_over_the_same_sites_alone() -> None:
    circle = Circle()
    circle.ready()
    circle.ask("reveal", "s0", arrived=["s0", "s1", "s2", "s3"], missing=[])
    circle.ready(attempt="two")
    with pytest.raises(SecureSumError, match="both sums together would show single updates"):
        circle.ask("reveal", "s0", attempt="two", arrived=["s0", "s1", "s2"], missing=["s3"])
    assert circle.ask("reveal", "s0", attempt="two", arrived=["s0", "s1", "s2", "s3"], missing=[]).tensors["seeds"].shape == (4, 33)


def test_when_a_site_has_lost_its_memory_or_the_attempt_is_over_then_it_says_so() -> None:
    circle = Circle()
    for attempt in ("one", "two", "three"):
        circle.ready(attempt=attempt)
    with pytest.raises(SecureSumError, match="has no keys for this sum"):
        circle.ask("reveal", "s0", attempt="one", arrived=["s0", "s1", "s2", "s3"], missing=[])
    circle.memories["s0"].clear()
    with pytest.raises(SecureSumError, match="has no keys for this sum"):
        circle.ask("reveal", "s0", attempt="three", arrived=["s0", "s1", "s2", "s3"], missing=[])


@pytest.mark.parametrize(
    "meta",
    [
        {"stage": "open"},
        {"stage": 5},
        {"attempt": None},
        {"run": "other"},
        {"stage": "shares", "sites": "s0"},
        {"stage": "shares", "sites": ["s1", "s0"], "threshold": 3, "total": 9},
        {"stage": "shares", "sites": ["s0", "s1", "s2", "s3"], "threshold": True, "total": 9},
        {"stage": "shares", "sites": ["s0", "s1", "s2", "s3"], "threshold": 3, "total": -1},
        {"stage": "shares", "sites": ["s0", "s1", "s2", "s3"], "threshold": 3, "total": 9},
        {"stage": "reveal", "arrived": [["s0"]], "missing": []},
    ],
)
def test_when_a_task_is_not_as_declared_then_the_site_refuses_it(meta: dict[str, Any]) -> None:
    circle = Circle()
    circle.ready()
    with pytest.raises(SecureSumError):
        circle.ask(**{"stage": "keys", "site": "s0", **meta})


@pytest.mark.parametrize(
    ("method", "guards", "sections", "says"),
    [
        ("scaffold", None, {}, "needs each site's own"),
        ("feddyn", None, {}, "needs each site's own"),
        ("fedavg_encoder", None, {}, r"more than shared weights \(private\)"),
        ("fedavg", [{"name": "secure_sum"}, {"name": "clip"}], {}, "list 'clip' before 'secure_sum'"),
        ("fedavg", [{"name": "screen"}, {"name": "secure_sum"}], {}, r"'screen' (cannot look|reads single replies)"),
        ("fedavg", [{"name": "dp", "clipping": "adaptive"}, {"name": "secure_sum"}], EQUAL, "'dp' reads single replies"),
        ("fedavg", [{"name": "secure_sum"}, {"name": "robust"}], {}, "would take each other's place"),
        ("fedavg", None, {"evaluation": {"conflict": 1}}, "evaluation.conflict"),
        ("fedavg", [{"name": "secure_sum"}, {"name": "compress"}], {}, r"'compress' reads single replies"),
        ("fedavg", [{"name": "compress"}, {"name": "secure_sum"}], {}, r"codes do not add up|reads single replies"),
        ("fedavg", [{"name": "secure_sum", "threshold": 0.5}], {}, "greater than 0.5"),
        ("fedavg", [{"name": "secure_sum", "least": 2}], {}, "greater than or equal to 3"),
        ("fedavg", [{"name": "secure_sum", "bits": 16}], {}, "bits"),
    ],
)
def test_when_a_run_would_show_more_than_the_sum_then_it_is_refused(
    method: str, guards: object, sections: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=says):
        pretrain(spec_of(method, guards=guards, **sections), output=tmp_path / "run")


def test_when_two_sites_are_selected_then_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="a round asks 2 of 5 sites, and a secure sum is over at least 3"):
        pretrain(spec_of(federation={"participation": 0.4}), output=tmp_path / "run")


def test_when_the_sites_shorten_their_updates_first_then_the_shortened_ones_are_summed(
    plain: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, wire = wired(monkeypatch, spec_of(guards=[{"name": "clip", "norm": 0.01}, {"name": "secure_sum"}]), tmp_path / "run")
    before = next(task.tensors["shared"] for _, task in plain.tasks if task.kind == "train")
    assert 0 < float(torch.linalg.vector_norm(wire.shared_after() - before)) <= 0.01 * 1.0001
    assert float(torch.linalg.vector_norm(plain.shared_after() - before)) > 0.02


def test_when_noise_is_put_on_the_sum_then_the_round_has_both_guards_accounts(tmp_path: Path) -> None:
    [row] = pretrain(spec_of(guards=[{"name": "dp"}, {"name": "secure_sum"}], **EQUAL), output=tmp_path / "run").rows("round")
    assert row["server"]["secure_sum"] == {"sites": 5, "cut": 0.0}
    assert row["server"]["epsilon"] > 0
    assert {site["weight"] for site in row["sites"].values()} == {0.2}

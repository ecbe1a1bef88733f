"""What every guard may count on: when its hooks run, what they see, and what is kept for them. The guards here are the tests' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.federated.guards.rounds import Recorded, guarded, record
from tests.federations import small_spec, train_small
from torch import Tensor

from fedcast.data.windows import Batch
from fedcast.errors import ScreenError, SpecError, UnknownNameError
from fedcast.federated.guards import Guards
from fedcast.federated.guards.base import GUARDS, Accumulator, Arrival, Declared, Guard, GuardRound, LocalSteps, Outgoing
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.rounds import Silent
from fedcast.methods.base import Mean, build_method
from fedcast.registry import hyper
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import GuardSpec, RunSpec, load_spec, parse_spec

SEEN: list[tuple[Any, ...]] = []


@dataclass(frozen=True)
class Outer(Guard):
    """Notes what it is called with, and puts a tensor of its own around the reply."""

    name: ClassVar[str] = "outer"
    summary: ClassVar[str] = "a test's"

    tag: float = hyper(1.0, "a number that travels")

    def begin(self, round: GuardRound) -> dict[str, dict[str, Tensor]]:
        answers = round.exchange({site: Task("guard", round.number, {}, {"guard": self.name}) for site in round.selected})
        SEEN.append((self.name, "begin", round.number, sorted(answers), {site: reply.meta.get("site") for site, reply in answers.items()}))
        return {site: {"tag": torch.tensor([self.tag])} for site in round.selected}

    def answer(self, task: Task, site: str, memory: dict[str, Any]) -> Reply:
        memory["asked"] = memory.get("asked", 0) + 1
        return Reply(meta={"site": site})

    def encode(self, outgoing: Outgoing) -> None:
        count = outgoing.state.get("count", torch.zeros(1)) + 1
        outgoing.state["count"] = count
        kept = (int(count), outgoing.memory.get("asked"), float(outgoing.rng.random()))
        SEEN.append((self.name, "encode", outgoing.round, outgoing.site, *kept, sorted(outgoing.tensors), outgoing.simulated))
        outgoing.tensors["tag"] = outgoing.received["guard.outer.tag"]
        outgoing.meta["outer"] = int(count)

    def decode(self, arrival: Arrival) -> None:
        SEEN.append((self.name, "decode", arrival.site, sorted(arrival.tensors), arrival.meta["outer"]))
        if "tag" not in arrival.tensors:
            raise ScreenError("it has no tag", hint="send one")
        del arrival.tensors["tag"]

    def inspect(self, arrival: Arrival) -> None:
        SEEN.append((self.name, "inspect", arrival.site))

    def finish(self, round: GuardRound, before: Tensor) -> None:
        server = round.server
        server.tensors["guard.outer.moved"] = (server.shared - before).norm().reshape(1)
        SEEN.append((self.name, "finish", round.number, tuple(round.taken)))


@dataclass(frozen=True)
class Inner(Guard):
    """Notes the order of its hooks."""

    name: ClassVar[str] = "inner"
    summary: ClassVar[str] = "a test's"

    def encode(self, outgoing: Outgoing) -> None:
        SEEN.append((self.name, "encode", outgoing.round, outgoing.site))

    def decode(self, arrival: Arrival) -> None:
        SEEN.append((self.name, "decode", arrival.site))

    def inspect(self, arrival: Arrival) -> None:
        SEEN.append((self.name, "inspect", arrival.site))


class _Sum:
    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sums = {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()}
        self._mass = 0.0

    def add(self, site: str, vectors: Mapping[str, Tensor], weight: float) -> None:
        for name, total in self._sums.items():
            total += vectors[name] * int(weight)
        self._mass += weight

    def means(self) -> dict[str, Tensor]:
        return {name: (total.double() / self._mass / 2**24).float() for name, total in self._sums.items()}


@dataclass(frozen=True)
class Whole(Guard):
    """Sends weights as whole numbers and adds those up."""

    name: ClassVar[str] = "whole"
    summary: ClassVar[str] = "a test's"

    def encode(self, outgoing: Outgoing) -> None:
        outgoing.tensors["shared"] = (outgoing.tensors["shared"].double() * 2**24).round().long()

    def declare(self, shapes: Declared) -> Declared:
        return {name: (shape, torch.int64 if name == "shared" else dtype) for name, (shape, dtype) in shapes.items()}

    def decode(self, arrival: Arrival) -> None:
        raise NotImplementedError("what is added up unseen is not decoded")

    def accumulator(self, round: GuardRound, sizes: Mapping[str, int]) -> Accumulator:
        return _Sum(sizes)


@dataclass(frozen=True)
class Slope(Guard):
    """Takes the training steps itself."""

    name: ClassVar[str] = "slope"
    summary: ClassVar[str] = "a test's"

    scale: float = hyper(1.0, "the gradient is multiplied by this")

    takes_steps: ClassVar[bool] = True

    def backward(self, steps: LocalSteps, batch: Batch) -> Tensor:
        loss = super().backward(steps, batch)
        steps.parameters.gradient.mul_(self.scale)
        return loss


@dataclass(frozen=True)
class Middle(Guard):
    """Sets a rule."""

    name: ClassVar[str] = "middle"
    summary: ClassVar[str] = "a test's"

    def mean(self, round: GuardRound) -> Mean:
        def rule(name: str, vectors: Sequence[Tensor], weights: Sequence[float], sites: Sequence[str]) -> Tensor:
            SEEN.append((self.name, name, tuple(sites), tuple(weights)))
            return torch.stack(list(vectors)).median(0).values

        return rule


OWN = {guard.name: guard for guard in (Outer, Inner, Whole, Slope, Middle)}
for _name in OWN:
    del GUARDS[_name]  # they are known inside these tests alone


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the tests' own guards be chosen by name, and nothing be left of what others noted."""
    for name, guard in OWN.items():
        monkeypatch.setitem(GUARDS, name, guard)
    SEEN.clear()
    yield
    SEEN.clear()


def spec(*guards: dict[str, Any], method: str = "fedavg", **changes: Any) -> RunSpec:
    return guarded(small_spec(method, **{"rounds": 2, "local_steps": 1, "workers": 1, **changes}), guards)


def digest(run: Run) -> str:
    return str(run.results().weights_sha256.iloc[0])


def checked(*guards: dict[str, Any], method: str = "fedavg") -> None:
    run = spec(*guards, method=method)
    plan = Plan(run, build_method(run.method))
    plan.guards.check(plan)


def test_when_a_run_is_guarded_then_every_hook_runs_where_and_when_it_should(tmp_path: Path, recorded: Callable[..., Recorded]) -> None:
    run, plain = record("fedavg", [{"name": "inner"}, {"name": "outer", "tag": 3.0}], tmp_path), recorded("fedavg")
    # They change nothing, so the weights are those of the same run without them.
    assert torch.equal(run.before.shared, plain.before.shared)
    assert float(run.before.tensors["guard.outer.moved"]) > 0
    sites = run.sites
    begins = [event for event in SEEN if event[1] == "begin"]
    assert [event[2:] for event in begins] == [(number, sites, {site: site for site in sites}) for number in (1, 2)]
    # Sites work at the same time: by round and site, the order of the guards is what is left.
    encodes = sorted((event for event in SEEN if event[1] == "encode"), key=lambda event: (event[2], event[3]))
    assert [event[0] for event in encodes] == ["inner", "outer"] * 6
    for event in encodes[1::2]:
        _, _, number, _, count, asked, _, tensors, simulated = event
        assert (count, asked, tensors, simulated) == (number, number, ["shared"], True)
    assert len({event[6] for event in encodes[1::2]}) == 6, "each site and round has draws of its own"
    for site in sites:
        order = [event[:2] for event in SEEN if site in event[2:3] and event[1] in ("decode", "inspect")]
        assert order == [("outer", "decode"), ("inner", "decode"), ("inner", "inspect"), ("outer", "inspect")] * 2
    assert [event[2:] for event in SEEN if event[1] == "finish"] == [(number, tuple(sites)) for number in (1, 2)]
    # What travelled counts: a number more a site, each way.
    for row, without in zip(run.rows, plain.rows, strict=True):
        assert row["dropped"] == {}
        assert row["bytes_up"] == without["bytes_up"] + 3 * 4
        assert row["bytes_down"] == without["bytes_down"] + 3 * 4


@pytest.mark.slow
def test_when_a_guarded_run_is_stopped_and_resumed_then_guards_go_on_from_their_state(tmp_path: Path) -> None:
    run = spec({"name": "outer"}, rounds=3)
    whole = train_small(run, tmp_path / "whole")
    asked = [event for event in SEEN if event[:2] == ("outer", "encode")]

    class Stops(Silent):
        def phase(self, name: str, round: int) -> None:
            if (name, round) == ("aggregate", 2):
                raise KeyboardInterrupt

    SEEN.clear()
    with pytest.raises(KeyboardInterrupt):
        pretrain(run, output=tmp_path / "stopped", observer=Stops())
    resumed = pretrain(run, output=tmp_path / "stopped")
    assert digest(resumed) == digest(whole)
    again = [event for event in SEEN if event[:2] == ("outer", "encode")]
    # The count is state, on disk; so are the draws, which come from seeds. What is in memory is not: it begins anew.
    without_memory = [(*event[:5], *event[6:]) for event in asked]
    assert [(*event[:5], *event[6:]) for event in again] == without_memory[:6] + without_memory[3:]


@pytest.mark.slow
def test_when_sites_adapt_alone_then_nothing_passes_a_guard(tmp_path: Path) -> None:
    train_small(spec({"name": "outer"}, {"name": "slope", "scale": 0.0}, method="fedla", rounds=3), tmp_path)
    assert {event[2] for event in SEEN if event[1] == "encode"} == {1, 2}
    assert {event[2] for event in SEEN if event[1] == "begin"} == {1, 2}


def test_when_a_guard_takes_the_steps_then_its_gradient_counts(tmp_path: Path) -> None:
    moved = []
    for scale in (1.0, 0.0):
        run = record("fedavg", [{"name": "slope", "scale": scale}], tmp_path / str(scale))
        moved.append(float((Reply.decode(run.replies["energy"]).tensors["shared"] - run.before.shared).norm()))
    # Without a gradient, weight decay alone is left.
    assert moved[0] > 10 * moved[1]


def test_when_a_guard_adds_replies_up_then_they_come_as_declared_and_give_the_mean(recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedavg")
    guard = [{"name": "inner"}, {"name": "whole"}]
    coded = {}
    for site, payload in round_.replies.items():
        reply = Reply.decode(payload)
        shared = (reply.tensors["shared"].double() * 2**24).round().long()
        coded[site] = Reply({"shared": shared}, reply.meta, None, reply.task).encode()
    after, row = round_.play(coded, guard)
    plain, _ = round_.play(round_.replies, [])
    assert row["dropped"] == {}
    assert torch.allclose(after.shared, plain.shared, atol=2**-22)
    assert row["sites"]["energy"]["weight"] > 0
    # Weights as they are without the guard are not what was declared; guards before it in the list judge nothing.
    _, row = round_.play({**coded, "health": round_.replies["health"]}, guard)
    assert row["dropped"] == {"health": f"shared is float32 ({len(plain.shared)},), declared is int64 ({len(plain.shared)},)"}
    assert not [event for event in SEEN if event[:2] == ("inner", "inspect")]


def test_when_a_guard_sets_a_rule_then_it_takes_the_place_of_every_mean(recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedper")
    after, _ = round_.play(round_.replies, [{"name": "middle"}])
    replies = [Reply.decode(round_.replies[site]).tensors for site in round_.sites]
    assert torch.equal(after.shared, torch.stack([tensors["shared"] for tensors in replies]).median(0).values)
    assert {event[1] for event in SEEN if event[0] == "middle"} == {name for name in ("shared", "private") if name in replies[0]}


def test_when_decoding_finds_a_fault_then_the_reply_is_dropped_and_named(recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedavg")
    replies = {}
    for site, payload in round_.replies.items():
        reply = Reply.decode(payload)
        tag = {} if site == "health" else {"tag": torch.ones(1)}
        replies[site] = Reply({**reply.tensors, **tag}, {**reply.meta, "outer": 1}, None, reply.task).encode()
    _, row = round_.play(replies, [{"name": "outer"}])
    assert row["dropped"] == {"health": "it has no tag"}


def test_when_a_site_has_no_such_guard_then_its_task_is_answered_with_an_error() -> None:
    with pytest.raises(ScreenError, match="for a guard that this run has not"):
        Guards((Inner(),)).named("outer")
    assert Inner().answer(Task("guard", 1), "a", {}).error == "the guard inner asks nothing of sites"


def test_when_a_guard_or_an_option_is_unknown_then_it_is_named() -> None:
    with pytest.raises(UnknownNameError, match="unknown guard 'scren'") as error:
        Guards.of([GuardSpec(name="scren")])
    assert "did you mean 'screen'?" in str(error.value)
    with pytest.raises(UnknownNameError, match="lenght"):
        Guards.of([GuardSpec(name="screen", options={"lenght": 1})])


@pytest.mark.parametrize(
    ("guards", "method", "message"),
    [
        ([{"name": "screen"}, {"name": "screen"}], "fedavg", "'screen' is listed twice"),
        ([{"name": "middle"}, {"name": "whole"}], "fedavg", "middle and whole would take each other's place"),
        ([{"name": "middle"}, {"name": "robust"}], "fedavg", "middle and robust would take each other's place"),
        ([{"name": "whole"}], "fedtrl", "adds replies up unseen, and method 'fedtrl' needs each site's own"),
        ([{"name": "whole"}], "local", "adds replies up unseen, and method 'local' needs each site's own"),
    ],
)
def test_when_guards_do_not_go_together_then_the_spec_is_refused(guards: list[dict[str, Any]], method: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        checked(*guards, method=method)


def test_when_there_are_no_guards_then_a_spec_has_the_fingerprint_it_always_had() -> None:
    document = small_spec("fedavg").to_dict()
    assert document.pop("guards") == []
    assert parse_spec(document).fingerprint() == small_spec("fedavg").fingerprint()
    assert spec({"name": "screen"}).fingerprint() != spec().fingerprint()
    assert spec({"name": "clip"}, {"name": "screen"}).fingerprint() != spec({"name": "screen"}, {"name": "clip"}).fingerprint()


def test_when_a_spec_with_guards_is_written_then_it_reads_back_the_same(tmp_path: Path) -> None:
    run = spec({"name": "screen", "norm": 2.0}, {"name": "clip"})
    path = tmp_path / "spec.toml"
    path.write_text(run.to_toml(), encoding="utf-8")
    assert load_spec(path) == run
    assert RunSpec.model_validate(run.model_dump(mode="json")) == run

"""One honest round of a real federation, recorded so that it can be played again with something wrong in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tests.federations import DOMAINS, small_spec

from fedcast.errors import WireError
from fedcast.federated.checkpoint import Checkpoints, Progress
from fedcast.federated.fleet import Fleet
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.rounds import RoundLoop, Silent
from fedcast.methods.base import Server, build_method, empty
from fedcast.run.folder import RunFolder
from fedcast.run.prepare import Prepared, prepare, start_fleet
from fedcast.spec import GuardSpec, RunSpec

ROUND = 2
# Options under which a method that does much beside its steps is quick; enough rounds for two that travel.
_QUICK: dict[str, dict[str, Any]] = {"fedal": {"match_steps": 1, "coreset": 4, "tune_epochs": 1}}
_ROUNDS = {"fedla": 3}


class Recorder:
    """A real fleet whose training replies are kept as bytes."""

    simulated = True

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.replies: dict[int, dict[str, bytes]] = {}

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return self._fleet.sites()

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run the tasks and keep the replies."""
        for site, reply in self._fleet.run(tasks, deadline_s):
            task = tasks[site]
            if task.kind == "train":
                self.replies.setdefault(task.round, {})[site] = reply.encode()
            yield site, reply

    def close(self) -> None:
        """Close the fleet."""
        self._fleet.close()


class Player:
    """A fleet that answers training tasks with given bytes, read as every fleet reads them, and scores nothing."""

    simulated = True

    def __init__(self, replies: Mapping[str, bytes]) -> None:
        self._replies = replies

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return sorted(self._replies)

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Answer; a site without bytes never does."""
        for site, task in tasks.items():
            if task.kind == "evaluate":
                yield site, Reply(meta={"loss": 1.0}, task=task.id)
            elif site in self._replies:
                try:
                    reply = Reply.decode(self._replies[site])
                except WireError as error:
                    reply = Reply(error=error.message)
                yield site, replace(reply, task=task.id)

    def close(self) -> None:
        """Do nothing."""


class _Snapshot(Silent):
    """Keeps the server's state as it was before a round."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.before = server

    def phase(self, name: str, round: int) -> None:
        if name == "select" and round == ROUND:
            self.before = copy.deepcopy(self._server)


@dataclass
class Recorded:
    """A federation before its second round, what its sites answered in it, and the rows of both rounds."""

    spec: RunSpec
    prepared: Prepared
    before: Server
    replies: dict[str, bytes]
    rows: list[dict[str, Any]]
    folder: Path
    sites: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.sites = sorted(self.replies)

    def play(self, replies: Mapping[str, bytes], guards: Sequence[Mapping[str, Any]] | None = None) -> tuple[Server, dict[str, Any]]:
        """Play the round with these replies, maybe under other guards; return the server's state after it and its row."""
        spec = self.spec if guards is None else guarded(self.spec, guards)
        server = copy.deepcopy(self.before)
        server.round, rows = ROUND - 1, list[dict[str, Any]]()
        loop = _loop(spec, self.prepared, server, Player(replies), self.folder, Silent(), rows)
        loop.run(Progress())
        (row,) = [row for row in rows if row["kind"] == "round"]
        return server, row


def guarded(spec: RunSpec, guards: Sequence[Mapping[str, Any]]) -> RunSpec:
    """Return a spec with other guards."""
    return spec.model_copy(update={"guards": tuple(GuardSpec.model_validate(guard) for guard in guards)})


def record(method: str, guards: Sequence[Mapping[str, Any]], folder: Path, domains: Sequence[str] = DOMAINS) -> Recorded:
    """Train a small federation for two rounds, and keep what its sites answered in the second one."""
    spec = small_spec(method, rounds=_ROUNDS.get(method, ROUND), local_steps=2, **_QUICK.get(method, {}))
    changes = {
        "data": spec.data.model_copy(update={"domains": tuple(domains)}),
        "evaluation": spec.evaluation.model_copy(update={"every": 1}),
    }
    spec = guarded(spec.model_copy(update=changes), guards)
    plan = Plan(spec, build_method(spec.method))
    plan.guards.check(plan)
    prepared = prepare(spec, plan.method)
    layout = plan.layout
    server = Server(
        layout=layout,
        shared=plan.initial[: layout.shared_size].clone(),
        private=empty(),
        tensors={},
        round=0,
        rounds=ROUND,
        sites=sum(role.trains for role in prepared.roles.values()),
        config=plan.config,
        parts=plan.parts,
    )
    fleet, snapshot, rows = Recorder(start_fleet(plan, prepared, RunFolder(folder))), _Snapshot(server), list[dict[str, Any]]()
    try:
        _loop(spec, prepared, server, fleet, folder, snapshot, rows).run(Progress())
    finally:
        fleet.close()
    return Recorded(spec, prepared, snapshot.before, fleet.replies[ROUND], [row for row in rows if row["kind"] == "round"], folder)


def same(one: Server, other: Server) -> bool:
    """Return whether all that a server keeps is equal bit for bit."""
    groups = [(one.tensors, other.tensors), (one.own, other.own), (one.experts, other.experts)]
    groups.append(({"shared": one.shared, "private": one.private}, {"shared": other.shared, "private": other.private}))
    return one.log == other.log and all(a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a) for a, b in groups)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def _loop(
    spec: RunSpec, prepared: Prepared, server: Server, fleet: Any, folder: Path, observer: Silent, rows: list[dict[str, Any]]
) -> RoundLoop:
    return RoundLoop(
        plan=Plan(spec, build_method(spec.method)),
        fleet=fleet,
        roles=prepared.roles,
        samples=prepared.samples,
        server=server,
        checkpoints=Checkpoints(folder / "checkpoints"),
        log=rows.append,
        keep_best=lambda _: None,
        observer=observer,
    )

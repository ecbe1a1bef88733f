"""Sites and fleets that stand in for real ones, below the real round loop: sites that hang, fleets that lose, repeat and reorder."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import strategies as st
from tests.federations import small_spec

from fedcast.errors import QuorumError
from fedcast.federated.checkpoint import Checkpoints, Progress
from fedcast.federated.fleet import Fleet
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.rounds import RoundLoop, Silent
from fedcast.federated.site import SiteRole
from fedcast.methods.base import Server, build_method, empty
from fedcast.spec import RunSpec

TEN = [f"site{number}" for number in range(10)]


def federated(spec: RunSpec, **federation: object) -> RunSpec:
    return spec.model_copy(update={"federation": spec.federation.model_copy(update=federation)})


@cache
def plan(rounds: int, deadline_s: float | None = None) -> Plan:
    """Return the plan of a federation whose sites are stand-ins: everything else is real."""
    spec = federated(small_spec("fedavg", rounds=rounds), deadline_s=deadline_s)
    return Plan(spec, build_method(spec.method))


def trained(site: str, task: Task) -> Reply:
    """Return what a stand-in answers to a task: a change of the weights that depends on site and round alone."""
    if task.kind == "evaluate":
        return Reply(meta={"loss": 1.0}, task=task.id)
    value = 1e-3 * task.round * (1 + TEN.index(site))
    meta = {"samples": 1 + TEN.index(site), "steps": 1, "loss": 1.0, "seconds": 0.0, "compute_seconds": 0.0, "metrics": {}}
    return Reply({"shared": task.tensors["shared"] + value}, meta, task=task.id)


@dataclass
class StandIn:
    """A site of the thread fleet that adds a number to the weights: at once, after a while, or never."""

    name: str
    seconds: float = 0.0
    rounds: tuple[int, ...] = (1, 2, 3)
    deaf: bool = True
    samples: int = 1
    role: SiteRole = field(default_factory=lambda: SiteRole("site"))
    stopped: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def run(self, task: Task, workspaces: object) -> Reply:
        """Answer, in its own time."""
        if task.kind == "train" and task.round in self.rounds:
            (self.released if self.deaf else self.stopped).wait(self.seconds)
        return trained(self.name, task)

    def give_up(self, task: str) -> None:
        """Hear, if at all, that the round is over."""
        self.stopped.set()


class Watch(Silent):
    """Takes the time at which rounds open and close."""

    def __init__(self) -> None:
        self.open: dict[int, float] = {}
        self.closed: dict[int, float] = {}

    def phase(self, name: str, round: int) -> None:
        """Take the time of a phase."""
        if name == "client":
            self.open[round] = time.monotonic()
        if name == "aggregate":
            self.closed[round] = time.monotonic()


def looped(
    fleet: Fleet, rounds: int, sites: Sequence[str] = TEN, *, deadline_s: float | None = None, watch: Silent | None = None
) -> tuple[Server, list[dict[str, Any]]]:
    """Run the real loop over a fleet of stand-ins; return the server and the log's rows."""
    ours, rows = plan(rounds, deadline_s), []  # type: ignore[var-annotated]
    server = Server(ours.layout, ours.initial.clone(), empty(), {}, 0, rounds, len(sites))
    roles = {site: SiteRole(site) for site in sites}
    samples = {site: 1 + TEN.index(site) for site in sites}
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        loop = RoundLoop(ours, fleet, roles, samples, server, checkpoints, rows.append, lambda _: None, watch or Silent())
        try:
            loop.run(Progress())
        except QuorumError as error:
            server.log["error"] = error
    return server, rows


class Bus:
    """A fleet that delivers replies as a script says: in another order, some twice, some again in later rounds, some under other names.

    Parameters
    ----------
    late
        Pairs of round and site whose reply arrives in the next round instead.
    shuffle
        Draws an order.
    extra
        Draws which replies of this and earlier rounds are delivered once more, or under another site's name.
    """

    simulated = True

    def __init__(self, late: set[tuple[int, str]], script: Any = None) -> None:
        self._late, self._script = late, script
        self._past: list[tuple[str, Reply]] = []
        self._held: list[tuple[str, Reply]] = []

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return TEN

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Deliver."""
        replies = [(site, trained(site, task)) for site, task in tasks.items()]
        training = next(iter(tasks.values())).kind == "train"
        number = next(iter(tasks.values())).round
        now = [pair for pair in replies if not (training and (number, pair[0]) in self._late)]
        held, self._held = self._held, [pair for pair in replies if pair not in now]
        if self._script is not None:
            again = self._script(st.lists(st.sampled_from([*self._past, *now]), max_size=6)) if now else []
            names = self._script(st.lists(st.sampled_from([*tasks, "nobody"]), max_size=3))
            stray = [(name, reply) for name, (_, reply) in zip(names, reversed(now), strict=False)]
            now = self._script(st.permutations([*now, *held, *again, *stray]))
        self._past += replies
        yield from now

    def close(self) -> None:
        """Do nothing."""


class Losing:
    """A real fleet some of whose training replies are lost on their way.

    Parameters
    ----------
    fleet
        The fleet.
    lost
        Pairs of round and site.
    """

    simulated = True

    def __init__(self, fleet: Fleet, lost: set[tuple[int, str]]) -> None:
        self._fleet, self._lost = fleet, lost
        self.sites, self.close = fleet.sites, fleet.close

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run the tasks and lose replies."""
        for site, reply in self._fleet.run(tasks, deadline_s):
            if tasks[site].kind != "train" or (tasks[site].round, site) not in self._lost:
                yield site, reply

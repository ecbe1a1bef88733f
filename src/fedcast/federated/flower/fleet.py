"""The fleet of a consortium's sites, reached through Flower. Nothing here imports flwr."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcast.errors import QuorumError, SiteError, UnknownNameError, WireError
from fedcast.federated.flower.frames import LinkError
from fedcast.federated.flower.link import Link, unreachable
from fedcast.federated.messages import Reply, Task

_POLL_S = 0.5
_AGAIN_S = 3.0
"""After this time a task is sent again to a site that could not take it."""
PATIENCE_S = 240.0
"""How long Flower or a site may be away before it is given up; a SuperNode that is restarted is refused for about a minute."""
_LEAST_S = 2.0
_CONNECT_S = 30.0
_LONGEST_S = 7 * 24 * 3600.0
_SPARE_S = 30.0
"""A task is still worth delivering this long after the deadline, as far as Flower is concerned: its clocks may differ."""


class FlowerFleet:
    """Sites of a consortium, each a process of its own on a machine of its own.

    Flower carries bytes and says which node they came from; nodes are bound to sites by the keys that the coordinator registered. What
    is lost on the way is sent again: a site answers the same task with the same bytes.

    Parameters
    ----------
    home
        ``FLWR_HOME`` of the coordinator, with a connection to its SuperLink.
    nodes
        Flower's node of each site: what binds a site's name to the key that is registered for it.
    run
        Fingerprint of the run, by which sites keep several apart.
    patience_s
        How long Flower or a site may be away before it is given up.

    Attributes
    ----------
    carried
        For the audit log: bytes and SHA-256 of each task that was sent, and of the reply to it, by the id of the task.
    """

    simulated = False

    def __init__(self, home: Path, nodes: Mapping[str, int], run: str, *, patience_s: float = PATIENCE_S) -> None:
        self._home, self._nodes, self._run, self._patience_s = home, dict(nodes), run, patience_s
        self._names = sorted(nodes)
        self.carried: dict[str, dict[str, Any]] = {}
        self._link: Link | None = None

    def sites(self) -> list[str]:
        """Return the names of the sites, sorted: those of the run once it began, else all that are registered."""
        return list(self._names)

    def await_sites(self, names: Sequence[str], wait_s: float, note: Callable[[str], None] | None = None) -> None:
        """Wait until all of these sites are online; from then on they are the fleet's.

        Parameters
        ----------
        names
            The sites of the run.
        wait_s
            How long.
        note
            Hears, once, for whom it waits.

        Raises
        ------
        UnknownNameError
            When a site is not registered.
        QuorumError
            When one is still missing then; all that are missing are named.
        UnreachableError
            When Flower cannot be reached.
        """
        for name in names:
            if name not in self._nodes:
                raise UnknownNameError.of("site", name, self._nodes)
        begin, told = time.monotonic(), False
        end = begin + wait_s
        while True:
            online, error = self._online(max(end, begin + _CONNECT_S))
            missing = sorted(set(names) - online)
            if not missing:
                self._names = sorted(names)
                return
            if time.monotonic() >= end:
                if error is not None:
                    raise unreachable(error, wait_s)
                raise QuorumError(
                    f"not online after {wait_s:.0f} s: {', '.join(missing)}",
                    hint="these sites run `fedcast site start`; see `fedcast consortium status`, and --wait to wait longer",
                )
            if note is not None and not told:
                told = True
                note(f"waiting for {', '.join(missing)}")
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def _online(self, end: float) -> tuple[set[str], LinkError | None]:
        """Return the sites that are online, or why that is not known."""
        try:
            nodes = self._connected(end).nodes(max(_LEAST_S, end - time.monotonic()))
        except LinkError as error:
            self._drop(stop=False)
            return set(), error
        return {name for name, node in self._nodes.items() if node in nodes}, None

    def ask(self, tasks: Mapping[str, Task]) -> dict[str, Reply]:
        """Send one task a site and return all replies.

        Raises
        ------
        SiteError
            When a site refuses, fails or does not answer.
        """
        replies = dict(self.run(tasks, None))
        for name in sorted(tasks):
            error = replies[name].error if name in replies else "no reply"
            if error is not None:
                raise SiteError(f"site {name}: {error}", hint="see the site's own log, or leave the site out of data.domains")
        return replies

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Send one task a site and yield (site, reply) as they arrive; see :class:`~fedcast.federated.fleet.Fleet`.

        Without a deadline a site that cannot be reached for longer than the fleet's patience answers with an error.

        Raises
        ------
        UnreachableError
            When Flower itself cannot be reached for that long.
        """
        begin = time.monotonic()
        end = begin + (_LONGEST_S if deadline_s is None else deadline_s)
        patience_s = None if deadline_s is not None else self._patience_s
        self.carried.clear()
        round_ = _Exchange(self._run, self._nodes, tasks, end, patience_s, self.carried)
        fine = begin
        while round_.open and time.monotonic() < end:
            try:
                link = self._connected(end)
                answered = round_.push(link) or round_.pull(link)
                fine = time.monotonic()
            except LinkError as error:
                # Whatever was on its way may be lost with it: all that is unanswered is sent again.
                self._drop(stop=False)
                round_.forget()
                if time.monotonic() - fine >= self._patience_s:
                    raise unreachable(error, self._patience_s) from error
                continue
            yield from answered
            if not answered and round_.open:
                time.sleep(min(_POLL_S, max(0.0, end - time.monotonic())))

    def close(self) -> None:
        """End the Flower run."""
        self._drop(stop=True)

    def _connected(self, end: float) -> Link:
        """Return the link, making one where there is none.

        Raises
        ------
        UnreachableError
            When none can be made for as long as the fleet's patience lasts.
        LinkError
            When the deadline passes first.
        """
        begin = time.monotonic()
        while self._link is None:
            left = min(end, begin + self._patience_s) - time.monotonic()
            try:
                self._link = Link(self._home, max(1.0, left))
            except LinkError as error:
                if time.monotonic() - begin >= self._patience_s:
                    raise unreachable(error, self._patience_s) from error
                if time.monotonic() >= end:
                    raise
                time.sleep(min(2.0, max(0.0, end - time.monotonic())))
        return self._link

    def _drop(self, *, stop: bool) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close(stop=stop)


class _Exchange:
    """One task a site, and what has become of it."""

    def __init__(
        self,
        run: str,
        nodes: Mapping[str, int],
        tasks: Mapping[str, Task],
        end: float,
        patience_s: float | None,
        carried: dict[str, dict[str, Any]],
    ) -> None:
        self._run, self._nodes, self._end, self._patience_s, self._carried = run, nodes, end, patience_s, carried
        self._tasks = dict(tasks)
        # When each unanswered task is sent next, and which messages carry those that were sent.
        self._due = dict.fromkeys(sorted(tasks), 0.0)
        self._sent: dict[str, str] = {}
        self._failing: dict[str, float] = {}

    @property
    def open(self) -> bool:
        """Whether an answer is missing."""
        return bool(self._tasks)

    def forget(self) -> None:
        """Send everything again that is not answered."""
        self._sent.clear()
        self._due = dict.fromkeys(sorted(self._tasks), 0.0)

    def push(self, link: Link) -> list[tuple[str, Reply]]:
        """Send what is due; return the answers of sites that are given up."""
        given_up = []
        for site, when in list(self._due.items()):
            left = self._end - time.monotonic()
            if when > time.monotonic() or left <= 0:
                continue
            payload = self._tasks[site].encode()
            self._carried[self._tasks[site].id] = _seal("task", payload)
            message = link.push(self._nodes[site], self._run, payload, left + _SPARE_S, left)
            if message is None:
                given_up += self._failed(site, "Flower does not take the task")
            else:
                del self._due[site]
                self._sent[message] = site
        return given_up

    def pull(self, link: Link) -> list[tuple[str, Reply]]:
        """Return the next answer, if one has arrived."""
        arrived = link.pull(list(self._sent), max(_LEAST_S, self._end - time.monotonic()))
        if arrived is None or arrived.message not in self._sent:
            return []
        site = self._sent.pop(arrived.message)
        if arrived.error is not None:
            return self._failed(site, arrived.error)
        if arrived.node != self._nodes[site]:
            # Not from the node that was asked: whoever it is does not speak for the site.
            return self._failed(site, f"node {arrived.node} answered in its place")
        task = self._tasks.pop(site)
        self._carried.setdefault(task.id, {}).update(_seal("reply", arrived.payload))
        try:
            return [(site, Reply.decode(arrived.payload, task.kind))]
        except WireError as error:
            return [(site, Reply(error=f"{error.code}: {error.message}", task=task.id))]

    def _failed(self, site: str, why: str) -> list[tuple[str, Reply]]:
        """Send a task again that did not reach its site, or give the site up."""
        now = time.monotonic()
        since = self._failing.setdefault(site, now)
        if self._patience_s is not None and now - since >= self._patience_s:
            self._due.pop(site, None)
            return [(site, Reply(error=f"not reached for {now - since:.0f} s: {why}", task=self._tasks.pop(site).id))]
        self._due[site] = now + _AGAIN_S
        return []


def _seal(name: str, payload: bytes) -> dict[str, Any]:
    return {f"{name}_bytes": len(payload), f"{name}_sha256": hashlib.sha256(payload).hexdigest()}

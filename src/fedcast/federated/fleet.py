"""How tasks reach sites: the Fleet contract, and the fleet of worker threads in this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol

from fedcast.federated.messages import Reply, Task
from fedcast.federated.site import Site
from fedcast.federated.workspace import Workspaces

_LOG = logging.getLogger(__name__)
_PATIENCE_S = 5.0
_POLL_S, _LONGEST_S = 0.05, 3600.0


class Fleet(Protocol):
    """Carries tasks to sites and brings replies back as they arrive.

    Attributes
    ----------
    simulated
        Whether all sites are on this machine: guards then draw noise from seeds, so that runs can be repeated.
    """

    simulated: bool

    def sites(self) -> list[str]:
        """Return the names of the sites at hand, sorted."""
        ...

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run one task a site and yield (site, reply) as they arrive; stop at the deadline, in seconds from the call."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class _Worker(Thread):
    """A thread that works through tasks until it is let go.

    A daemon: Python waits for other threads at its end, and nothing ends a thread from outside, so that a site that never returns
    would keep the process for ever.
    """

    def __init__(self, fleet: ThreadFleet) -> None:
        super().__init__(name="fedcast-worker", daemon=True)
        self._fleet = fleet
        self.call: _Call | None = None
        self.site = ""
        self.let_go = False

    def run(self) -> None:
        """Take tasks until there are no more, or until a deadline has passed this worker by."""
        while not self.let_go and (job := self._fleet.jobs.get()) is not None:
            self._do(*job)
            del job  # or the idle thread would keep what was sent

    def _do(self, call: _Call, site: str) -> None:
        self.site, self.call = site, call
        reply = None if call.over else self._fleet.work(site, call.tasks[site])
        self.site, self.call = "", None
        if reply is not None:
            call.replies.put((site, reply))


class _Call:
    """One call of :meth:`ThreadFleet.run`: its tasks, the replies so far, and whether anybody still waits for more."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self.tasks = tasks
        self.replies: SimpleQueue[tuple[str, Reply]] = SimpleQueue()
        self.over = False


class ThreadFleet:
    """Sites in this process, worked on by threads of one core each.

    A client-parallel thread beats two threads on one small matrix product, and since every site's arithmetic runs on one core its
    bytes do not depend on how many workers there are. At a deadline a site is told to give up and its worker is replaced; a site that
    does not even hear that keeps its thread, and gets no further task before it returns.
    """

    simulated = True

    def __init__(self, sites: Mapping[str, Site], workers: int) -> None:
        self._sites = dict(sites)
        self._workspaces = Workspaces()
        self._size = workers
        self._workers: list[_Worker] = []
        self._late: list[_Worker] = []
        self.jobs: SimpleQueue[tuple[_Call, str] | None] = SimpleQueue()

    def sites(self) -> list[str]:
        """Return the names of the sites, sorted."""
        return sorted(self._sites)

    def work(self, site: str, task: Task) -> Reply:
        """Let a site run a task; called by the worker threads."""
        try:
            return self._sites[site].run(task, self._workspaces)
        except Exception as error:  # or nobody would learn of it, and the round would wait for this thread
            return Reply(error=f"{type(error).__name__} at site {site}", task=task.id)

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run one task a site; see :class:`Fleet`. Replies that miss the deadline are never delivered."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        self._fill()
        # The largest sites first: the last worker to finish then waits least.
        queue = sorted(tasks, key=lambda name: (-self._sites[name].samples * self._sites[name].role.step_multiplier, name))
        call, pending = _Call(tasks), 0
        try:
            while queue or pending:
                # Two tasks a worker: none is idle, and no more replies than that lie about when the caller is slower than the sites.
                while pending < 2 * self._size and (name := self._next(queue)) is not None:
                    self.jobs.put((call, name))
                    pending += 1
                left = float("inf") if end is None else end - time.monotonic()
                # Where only sites are left that are still at work for an earlier call, none of them will say when it is free.
                longest = _POLL_S if queue and pending < 2 * self._size else _LONGEST_S
                try:
                    reply = call.replies.get(timeout=max(0.0, min(left, longest)))
                except Empty:
                    if left <= 0:
                        return
                    continue
                pending -= 1
                # Nothing here may keep the reply while the next one is awaited.
                yield reply
                del reply
        finally:
            self._end(call)

    def _next(self, queue: list[str]) -> str | None:
        """Take the first site off the queue that is not at work for an earlier call."""
        busy = {worker.site for worker in self._late}
        for name in queue:
            if name not in busy:
                queue.remove(name)
                return name
        return None

    def _fill(self) -> None:
        self._late = [worker for worker in self._late if worker.is_alive()]
        while len(self._workers) < self._size:
            self._workers.append(_Worker(self))
            self._workers[-1].start()

    def _end(self, call: _Call) -> None:
        """Stop what is still at work for a call."""
        call.over = True
        for worker in [worker for worker in (*self._workers, *self._late) if worker.call is call]:
            worker.let_go = True
            if site := worker.site:
                self._sites[site].give_up(call.tasks[site].id)
            if worker in self._workers:
                self._workers.remove(worker)
                self._late.append(worker)

    def close(self) -> None:
        """Let the threads end, and wait for them a few seconds: a site still at work could write into the run folder afterwards."""
        workers = [*self._workers, *self._late]
        # One each: a worker that was let go just after its last task waits for the next one as the others do.
        for worker in workers:
            worker.let_go = True
            self.jobs.put(None)
        end = time.monotonic() + _PATIENCE_S
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
        for site in sorted(site for worker in workers if worker.is_alive() and (site := worker.site)):
            _LOG.warning("site %s has not returned from its last task and is left behind; its work does not count", site)
        self._workers, self._late, self.jobs = [], [], SimpleQueue()

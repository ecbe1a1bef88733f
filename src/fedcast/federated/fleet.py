"""How tasks reach sites: the Fleet contract, and the fleet of worker threads in this process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from fedcast.federated.messages import Reply, Task
from fedcast.federated.site import Site
from fedcast.federated.workspace import Workspaces


class Fleet(Protocol):
    """Carries tasks to sites and brings replies back as they arrive."""

    def sites(self) -> list[str]:
        """Return the names of the sites at hand, sorted."""
        ...

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run one task a site and yield (site, reply) as they arrive; stop at the deadline, in seconds from the call."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class ThreadFleet:
    """Sites in this process, worked on by threads of one core each.

    A client-parallel thread beats two threads on one small matrix product, and since every site's arithmetic runs on one core its
    bytes do not depend on how many workers there are.
    """

    def __init__(self, sites: Mapping[str, Site], workers: int) -> None:
        self._sites = dict(sites)
        self._workspaces = Workspaces()
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fedcast-worker")

    def sites(self) -> list[str]:
        """Return the names of the sites, sorted."""
        return sorted(self._sites)

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run one task a site; see :class:`Fleet`. Replies that miss the deadline are never delivered."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        # The largest sites first: the last worker to finish then waits least.
        order = sorted(tasks, key=lambda name: (-self._sites[name].samples * self._sites[name].role.step_multiplier, name))
        queue, pending = deque(order), dict[Future[Reply], str]()
        while queue or pending:
            # Two tasks a worker: none is idle, and no more replies than that lie about when the caller is slower than the sites.
            while queue and len(pending) < 2 * self._workers and (end is None or time.monotonic() < end):
                name = queue.popleft()
                pending[self._pool.submit(self._sites[name].run, tasks[name], self._workspaces)] = name
            left = None if end is None else max(0.0, end - time.monotonic())
            done, _ = wait(pending, timeout=left, return_when=FIRST_COMPLETED)
            if not done:
                for future in pending:
                    future.cancel()
                return
            while done:
                # Nothing here may keep the reply while the next one is awaited.
                yield _answer(done.pop(), pending)

    def close(self) -> None:
        """Wait for the threads to end: a site still at work would write into the run folder after it was let go."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _answer(future: Future[Reply], pending: dict[Future[Reply], str]) -> tuple[str, Reply]:
    return pending.pop(future), future.result()

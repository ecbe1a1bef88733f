"""Every task has effect exactly once: it has a name of its own, a reply says which task it answers, and the first one counts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from fedcast.federated.audit import unrecorded
from fedcast.federated.fleet import Fleet
from fedcast.federated.messages import Reply, Task


class Once:
    """Sends tasks through a fleet and lets through the first reply to each of them, whatever else arrives.

    A task's id is a digest of the run, of what counted in its past rounds, of what is asked of which site, and of what guards send
    along. Nothing else in it is random: a run that is resumed asks for the same work under the same id, so that what a site did before
    counts. Work for a history that was given up has other ids.

    Parameters
    ----------
    fleet
        The fleet.
    run
        Fingerprint of the run.
    record
        Hears of every task that is sent and every reply that comes (:meth:`fedcast.federated.audit.AuditLog.append`).

    Attributes
    ----------
    history
        Digest of what counted so far; see :func:`grown`.
    """

    def __init__(self, fleet: Fleet, run: str, record: Callable[..., None] = unrecorded) -> None:
        self._fleet, self._run, self._record = fleet, run, record
        self._asked: Counter[str] = Counter()
        self._now = ("", 0)
        self._ignored: dict[str, Counter[str]] = {}
        self.history = ""

    def ask(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Send one task a site and yield the first reply to each as it arrives, until the deadline, in seconds from the call."""
        sent = {site: replace(task, id=self._id(site, task)) for site, task in tasks.items()}
        awaited = {site: task.id for site, task in sent.items()}
        for site, task in sorted(sent.items()):
            self._record("task-sent", site=site, round=task.round, kind=task.kind, task=task.id, tensor_bytes=task.nbytes)
        for site, reply in self._fleet.run(sent, deadline_s):
            if site in awaited and reply.task == awaited[site]:
                del awaited[site]
                # Bytes and SHA-256 of task and reply, from a fleet whose messages cross a network.
                carried = getattr(self._fleet, "carried", {}).pop(reply.task, {})
                self._record("reply-received", site=site, task=reply.task, tensor_bytes=reply.nbytes, error=reply.error, **carried)
                yield site, reply
            else:
                asked = sent.get(site)
                reason = "not asked" if asked is None else "twice" if reply.task == asked.id else "to another task"
                self._ignored.setdefault(reason, Counter())[site] += 1
                self._record("reply-ignored", site=site, task=reply.task, reason=reason)
            # Or it would be kept while the next one is awaited.
            del reply

    def ignored(self) -> dict[str, dict[str, int]]:
        """Return how many replies had no effect since the last call, by reason and by the site they came from."""
        ignored = {reason: dict(sorted(sites.items())) for reason, sites in sorted(self._ignored.items())}
        self._ignored = {}
        return ignored

    def _id(self, site: str, task: Task) -> str:
        now = (self.history, task.round)
        if now != self._now:
            self._now, self._asked = now, Counter()
        what = json.dumps([self._run, *now, task.kind, site, dict(task.meta)], sort_keys=True)
        self._asked[what] += 1  # the same question again, such as the score of another site's model, is another task
        hasher = hashlib.sha256(f"{what} {self._asked[what]}".encode())
        for name, tensor in sorted(task.tensors.items()):
            if name.startswith("guard."):
                # What a guard draws anew each time, such as keys, makes a repeated round another one.
                hasher.update(name.encode())
                hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return f"{task.kind}-{task.round}-{hasher.hexdigest()[:32]}"


def grown(history: str, round_: int, sites: Sequence[str]) -> str:
    """Return the digest of a history after a round in which the replies of these sites counted."""
    return hashlib.sha256(json.dumps([history, round_, sorted(sites)]).encode()).hexdigest()

"""The fleet of worker processes: the same sites, each in a process of its own core, reached by bytes.

Tasks and replies cross the process boundary as safetensors, just as they would cross a network, so this fleet also proves that
no object of a site is shared with the coordinator.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fedcast.methods  # noqa: F401 - registers the methods in a worker process
from fedcast.data.store import SeriesStore
from fedcast.errors import FedcastError, WireError
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.site import Site, SiteRole
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.spec import RunSpec
from fedcast.training.backend import Backend

_PATIENCE_S = 5.0


@dataclass
class _Worker:
    """A worker process.

    Attributes
    ----------
    process, connection
        The process, and the connection to it.
    ready
        Whether it has said that it can take a task.
    sender
        The thread that sends it a task.
    undelivered
        Whether that failed.
    fresh
        Whether it took the place of one that died without a task, and has answered nothing yet.
    """

    process: BaseProcess
    connection: Connection
    ready: bool = False
    sender: threading.Thread = field(default_factory=threading.Thread)
    undelivered: bool = False
    fresh: bool = False


class ProcessFleet:
    """Sites dealt out to worker processes; a site stays with its worker.

    Parameters
    ----------
    roles
        The sites.
    stores
        Folder of each site's saved store; workers map it into memory.
    spec
        The run.
    folder
        Folder below which every site has its own.
    workers
        Number of processes.
    """

    simulated = True

    def __init__(self, roles: Sequence[SiteRole], stores: Mapping[str, Path], spec: RunSpec, folder: Path, workers: int) -> None:
        self._roles = {role.name: role for role in roles}
        self._stores, self._spec, self._folder = dict(stores), spec, folder
        self._owner = {name: index % workers for index, name in enumerate(sorted(self._roles))}
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker | None] = [None] * workers

    def sites(self) -> list[str]:
        """Return the names of the sites, sorted."""
        return sorted(self._roles)

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run one task a site; see :class:`Fleet`. A worker that dies answers for its site with an error and is replaced."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        queues: dict[int, list[str]] = {}
        for name in sorted(tasks):
            queues.setdefault(self._owner[name], []).append(name)
        # All at once, since each takes seconds to start.
        starting = [index for index in queues if not self._worker(index).ready]
        for index in queues.keys() - starting:
            self._send(index, queues[index][0], tasks)
        try:
            while queues:
                connections: dict[Any, int] = {self._worker(index).connection: index for index in queues}
                left = None if end is None else max(0.0, end - time.monotonic())
                heard = wait(list(connections), timeout=left)
                if not heard:
                    return
                for index in (connections[connection] for connection in heard):
                    if self._worker(index).ready:
                        yield from self._receive(index, queues[index], tasks, end)
                    else:
                        yield from self._greet(index, queues[index], tasks)
                    if not queues[index]:
                        del queues[index]
                    elif self._worker(index).ready:
                        # One task at a time: with two on the way, both ends of the pipe could wait for each other.
                        self._send(index, queues[index][0], tasks)
        finally:
            self._miss(queues)

    def _miss(self, late: Iterable[int]) -> None:
        """Replace workers that missed a deadline, so that no late reply meets a later round; one that still starts has no task yet."""
        for index in late:
            if self._worker(index).ready:
                self._stop(index)

    @contextmanager
    def _limited(self, worker: _Worker, end: float | None) -> Iterator[None]:
        """Kill a worker at the deadline: where it stands still in the middle of a reply, reading it would never end."""
        timer = None if end is None else threading.Timer(max(0.0, end - time.monotonic()), worker.process.kill)
        if timer is not None:
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _send(self, index: int, name: str, tasks: Mapping[str, Task]) -> None:
        worker, task = self._worker(index), tasks[name]
        worker.undelivered = False

        def deliver() -> None:
            try:
                worker.connection.send_bytes(name.encode())
                worker.connection.send_bytes(task.encode())
            except OSError:
                worker.undelivered = True

        # A process that stands still does not read, and nobody else is to wait for it.
        worker.sender = threading.Thread(target=deliver, daemon=True)
        worker.sender.start()

    def _greet(self, index: int, names: list[str], tasks: Mapping[str, Task]) -> Iterator[tuple[str, Reply]]:
        """Hear that a worker is ready, or that it died before."""
        worker = self._worker(index)
        try:
            worker.connection.recv_bytes()
            worker.ready = True
        except (EOFError, OSError):
            self._stop(index)
            name = names.pop(0)
            yield name, Reply(error=f"the worker process of site {name} died while it started", task=tasks[name].id)

    def _receive(self, index: int, names: list[str], tasks: Mapping[str, Task], end: float | None) -> Iterator[tuple[str, Reply]]:
        worker, name = self._worker(index), names.pop(0)
        task = tasks[name]
        try:
            with self._limited(worker, end):
                payload = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._stop(index)
            if worker.undelivered and not worker.fresh:
                # It died while it had nothing to do: a new one takes its place, and is sent the task when it is ready.
                names.insert(0, name)
                self._worker(index).fresh = True
            else:
                yield name, Reply(error=f"the worker process of site {name} died", task=task.id)
            return
        worker.fresh = False
        try:
            reply = Reply.decode(payload, task.kind)
        except WireError as error:
            reply = Reply(error=error.message, task=task.id)
        yield name, reply

    def close(self) -> None:
        """Stop the worker processes."""
        for index in range(len(self._workers)):
            self._stop(index)

    def _worker(self, index: int) -> _Worker:
        worker = self._workers[index]
        if worker is None:
            ours, theirs = self._context.Pipe()
            mine = [asdict(self._roles[name]) for name, owner in sorted(self._owner.items()) if owner == index]
            stores = {role["name"]: str(self._stores[role["name"]]) for role in mine}
            process = self._context.Process(
                target=_work, args=(theirs, self._spec.model_dump(mode="json"), mine, stores, str(self._folder)), daemon=True
            )
            process.start()
            theirs.close()
            worker = self._workers[index] = _Worker(process, ours)
        return worker

    def _stop(self, index: int) -> None:
        worker = self._workers[index]
        if worker is not None:
            # What a site writes it writes aside and renames, so that this loses nothing; a process that stands still hears no other.
            worker.process.kill()
            worker.process.join(_PATIENCE_S)
            if worker.sender.is_alive():
                worker.sender.join(_PATIENCE_S)  # it hears that nobody reads any more
            worker.connection.close()
            self._workers[index] = None


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _work(connection: Connection, spec: dict[str, Any], roles: list[dict[str, Any]], stores: dict[str, str], folder: str) -> None:
    """Serve tasks in a worker process until the connection closes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        # When the coordinator is killed, its workers must not go on writing into the run folder.
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    run_spec = RunSpec.model_validate(spec)
    Backend.resolve(run_spec.training).use()
    plan = Plan(run_spec, build_method(run_spec.method))
    known = {role["name"]: SiteRole(**role) for role in roles}
    sites: dict[str, Site] = {}
    workspaces = Workspaces()
    connection.send_bytes(b"ready")
    while True:
        try:
            name = connection.recv_bytes().decode()
            payload = connection.recv_bytes()
        except (EOFError, OSError):
            return
        answers = ""
        try:
            task = Task.decode(payload)
            answers = task.id
            if name not in sites:
                sites[name] = Site(known[name], SeriesStore.open(Path(stores[name])), plan, Path(folder) / name, simulated=True)
            answer = sites[name].run(task, workspaces).encode()
        except FedcastError as error:
            answer = Reply(error=f"{error.code}: {error.message}", task=answers).encode()
        except Exception as error:  # a site that cannot even be opened must answer too, without its data
            answer = Reply(error=f"{type(error).__name__} at site {name}", task=answers).encode()
        connection.send_bytes(answer)

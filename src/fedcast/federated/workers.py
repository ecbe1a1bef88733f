"""The fleet of worker processes: the same sites, each in a process of its own core, reached by bytes.

Tasks and replies cross the process boundary as safetensors, just as they would cross a network, so this fleet also proves that
no object of a site is shared with the coordinator.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fedcast.methods  # noqa: F401 - registers the methods in a worker process
from fedcast.data.store import SeriesStore
from fedcast.errors import FedcastError, SiteError, WireError
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.site import Site, SiteRole
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.spec import RunSpec
from fedcast.training.backend import Backend


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

    def __init__(self, roles: Sequence[SiteRole], stores: Mapping[str, Path], spec: RunSpec, folder: Path, workers: int) -> None:
        self._roles = {role.name: role for role in roles}
        self._stores, self._spec, self._folder = dict(stores), spec, folder
        self._owner = {name: index % workers for index, name in enumerate(sorted(self._roles))}
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[BaseProcess, Connection] | None] = [None] * workers

    def sites(self) -> list[str]:
        """Return the names of the sites, sorted."""
        return sorted(self._roles)

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run one task a site; see :class:`Fleet`. A worker that dies answers for its sites with an error and is replaced."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        queues: dict[int, list[str]] = {}
        for name in sorted(tasks):
            queues.setdefault(self._owner[name], []).append(name)
        for index, names in queues.items():
            self._send(index, names[0], tasks)
        while queues:
            connections: dict[Any, int] = {self._worker(index)[1]: index for index in queues}
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = wait(list(connections), timeout=left)
            if not ready:
                # A worker that missed the deadline may still be at work: replace it, so that its late reply meets no later round.
                for index in queues:
                    self._stop(index)
                return
            for connection in ready:
                index = connections[connection]
                yield from self._receive(index, queues[index])
                if queues[index]:
                    # One task at a time: with two on the way, both ends of the pipe could wait for each other.
                    self._send(index, queues[index][0], tasks)
                else:
                    del queues[index]

    def _send(self, index: int, name: str, tasks: Mapping[str, Task]) -> None:
        for last in (False, True):
            _, connection = self._worker(index)
            try:
                connection.send_bytes(name.encode())
                connection.send_bytes(tasks[name].encode())
            except OSError as error:
                # It died while it had nothing to do: a new one takes its place.
                self._stop(index)
                if last:
                    raise SiteError(
                        f"the worker of site {name} cannot be reached", hint="run the same command again: it resumes"
                    ) from error
            else:
                return

    def _receive(self, index: int, names: list[str]) -> Iterator[tuple[str, Reply]]:
        try:
            payload = self._worker(index)[1].recv_bytes()
        except (EOFError, OSError):
            self._stop(index)
            name = names.pop(0)
            yield name, Reply(error=f"the worker process of site {name} died")
            return
        name = names.pop(0)
        try:
            reply = Reply.decode(payload)
        except WireError as error:
            reply = Reply(error=error.message)
        yield name, reply

    def close(self) -> None:
        """Stop the worker processes."""
        for index in range(len(self._workers)):
            self._stop(index)

    def _worker(self, index: int) -> tuple[BaseProcess, Connection]:
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
            worker = self._workers[index] = (process, ours)
        return worker

    def _stop(self, index: int) -> None:
        worker = self._workers[index]
        if worker is not None:
            process, connection = worker
            connection.close()
            process.terminate()
            process.join()
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
    while True:
        try:
            name = connection.recv_bytes().decode()
            payload = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            if name not in sites:
                sites[name] = Site(known[name], SeriesStore.open(Path(stores[name])), plan, Path(folder) / name)
            reply = sites[name].run(Task.decode(payload), workspaces)
        except FedcastError as error:
            reply = Reply(error=f"{error.code}: {error.message}")
        except Exception as error:  # a site that cannot even be opened must answer too, without its data
            reply = Reply(error=f"{type(error).__name__} at site {name}")
        connection.send_bytes(reply.encode())

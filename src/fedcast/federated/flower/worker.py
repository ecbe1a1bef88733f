"""A site's worker: the process that holds its data, its private state and its models, and does what tasks ask, one at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import fedcast.methods  # noqa: F401 - registers the methods
from fedcast.data.frames import domain_files, read_frame
from fedcast.data.readers import stem
from fedcast.data.store import SeriesStore
from fedcast.errors import AuditError, FedcastError, ScreenError, SourceError, SpecError, WireError
from fedcast.federated.audit import NAME, AuditLog
from fedcast.federated.flower.policy import Policy
from fedcast.federated.messages import Reply, Task, is_local
from fedcast.federated.plan import Plan
from fedcast.federated.silo import check_ranks
from fedcast.federated.site import Site, SiteRole
from fedcast.federated.survey import Survey, survey
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.models.checkpoints import weights_digest
from fedcast.spec import DataSpec, RunSpec, TrainingSpec
from fedcast.training.backend import Backend

_LOG = logging.getLogger(__name__)
_RUN = re.compile(r"[0-9a-f]{64}")
_OPEN_RUNS = 2
"""Runs whose models stay in memory; of others a site keeps the files."""


@dataclass
class _Open:
    """A run whose model and windows are in memory."""

    plan: Plan
    site: Site
    backend: Backend
    survey: Survey
    workspaces: Workspaces


class Worker:
    """What a site does with tasks, for any number of runs.

    Parameters
    ----------
    name
        The site's own name.
    data
        Its data: a file, or a folder of files, one dataset each.
    folder
        Its private folder. Every run has a folder of its own in it, by its fingerprint, which covers federation, method and model;
        the audit log of all of them says what was asked and what left.
    policy
        What the site allows.
    """

    def __init__(self, name: str, data: Path, folder: Path, policy: Policy) -> None:
        self._name, self._data, self._folder, self._policy = name, data, folder, policy
        self._audit = AuditLog(folder / NAME)
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._stores: dict[tuple[str | None, ...], SeriesStore] = {}
        self._last: dict[str, tuple[str, bytes]] = {}
        self._current: tuple[str, str, Site] | None = None

    def answer(self, run: str, payload: bytes) -> bytes:
        """Do what a task asks and return the reply's bytes; the same task has the same bytes for an answer, however often it comes.

        No exception but the end of the process leaves this; a reply says what went wrong in one sentence, without the site's data. What
        cannot be written into the site's audit log is not done, or does not leave.
        """
        try:
            self._audit.open()
            return self._answer(run, payload)
        except (AuditError, OSError) as error:
            _LOG.error("site %s refuses its tasks: %s", self._name, error)
            why = f"{AuditError.code}: site {self._name} cannot keep its audit log, and does nothing without it"
            return Reply(error=why, task=_id_of(payload)).encode()

    def _answer(self, run: str, payload: bytes) -> bytes:
        digest = hashlib.sha256(payload).hexdigest()
        held = self._last.get(run)
        if held is not None and held[0] == digest:
            self._audit.append("task-repeated", run=run, task_sha256=digest)
            return held[1]
        identity = ""
        try:
            task = Task.decode(payload)
            identity = task.id
            if not _RUN.fullmatch(run):
                raise WireError("the task belongs to no run", hint="check that both sides run the same version of fedcast")
            reply = self._describe(run, task) if task.kind == "describe" else self._work(run, task)
            answer = replace(reply, task=identity).encode()
        except FedcastError as error:
            return self._failed(run, f"{error.code}: {error.message}", identity, digest)
        except Exception as error:  # a site must answer whatever happens, without its data
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self._folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
            return self._failed(
                run, f"{type(error).__name__} at site {self._name}; details are in the site's own error.log", identity, digest
            )
        if reply.error is None:
            self._last[run] = (digest, answer)
        self._audit.append(
            "task-answered",
            run=run,
            task=identity,
            kind=task.kind,
            round=task.round,
            error=reply.error,
            tensors=sorted(reply.tensors),
            task_bytes=len(payload),
            task_sha256=digest,
            reply_bytes=len(answer),
            reply_sha256=hashlib.sha256(answer).hexdigest(),
        )
        return answer

    def overtaken(self, run: str, payload: bytes) -> None:
        """Hear, from another thread, that a task has arrived: training for an older task of its run then ends at the next step."""
        current = self._current
        if current is None or current[0] != run:
            return
        try:
            task = Task.decode(payload)
        except WireError:
            return
        if task.kind == "train" and task.id != current[1]:
            current[2].give_up(current[1])

    def close(self) -> None:
        """Close the audit log."""
        self._audit.close()

    def _failed(self, run: str, why: str, identity: str, digest: str) -> bytes:
        self._audit.append("task-refused", run=run[:64], task=identity, task_sha256=digest, error=why)
        return Reply(error=why, task=identity).encode()

    def _describe(self, run: str, task: Task) -> Reply:
        """Take part in a run, or refuse; answer what the site has for it."""
        opened = self._take(run, task.meta)
        folder = self._run_folder(run)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = folder / "run.json.aside"
        aside.write_text(json.dumps(dict(task.meta)), encoding="utf-8")
        os.replace(aside, folder / "run.json")
        found = opened.survey
        checkpoint = opened.plan.spec.model.checkpoint
        return Reply(
            meta={
                "samples": found.samples,
                "series": found.series,
                "left_out": found.left_out,
                "fingerprint": found.fingerprint,
                "checkpoint": None if checkpoint is None else weights_digest(checkpoint),
            }
        )

    def _work(self, run: str, task: Task) -> Reply:
        opened = self._opened(run)
        if task.round > opened.plan.spec.federation.rounds:
            raise ScreenError(f"the run has no round {task.round}", hint="check that both sides run the same spec")
        self._current = (run, task.id, opened.site) if task.kind == "train" else None
        try:
            with opened.backend.in_use():
                reply = opened.site.run(task, opened.workspaces)
        finally:
            self._current = None
        undeclared = sorted(reply.tensors.keys() - self._declared(opened.plan, task))
        if task.kind != "guard" and undeclared:
            raise ScreenError(f"the reply would hold {', '.join(undeclared)}, which is not declared", hint="nothing left the site")
        return reply

    def _declared(self, plan: Plan, task: Task) -> set[str]:
        """Return the names of the tensors that may leave the site in answer to a task."""
        if task.kind == "evaluate":
            return {"gradient"} if plan.spec.evaluation.conflict else set()
        if is_local(task):
            return set()
        shapes = {"shared": (plan.layout.shared_size,), **plan.method.reply_shapes(plan.shape), **plan.answer_shapes}
        if plan.method.exports() != "never" and self._policy.decoders:
            shapes["private"] = (plan.layout.private_size,)
        declared = {name: (shape, torch.float32) for name, shape in shapes.items()}
        for guard in plan.guards:
            declared = guard.declare(declared)
        return set(declared)

    def _opened(self, run: str) -> _Open:
        """Return a run that the site takes part in; after a restart it knows it from its own folder."""
        if run in self._open:
            self._open.move_to_end(run)
            return self._open[run]
        path = self._run_folder(run) / "run.json"
        if not path.is_file():
            raise SpecError("the site takes no part in this run", hint="run the same command again: it asks the site first")
        return self._take(run, json.loads(path.read_text(encoding="utf-8")))

    def _take(self, run: str, meta: Mapping[str, Any]) -> _Open:
        spec, role = self._agreed(run, meta)
        plan = Plan(spec, build_method(spec.method))
        plan.guards.check(plan)
        check_ranks(plan)
        self._policy.check(plan)
        backend = Backend.resolve(spec.training)
        plan = plan.computing_with(backend.written_into(spec.training))
        held = self._open.get(run)
        if held is not None and held.plan.spec == plan.spec and held.site.role == role:
            return held
        store = self._store(spec.data)
        found = survey(role, store, spec)
        site = Site(role, store, plan, self._run_folder(run) / "site", simulated=False)
        self._open[run] = _Open(plan, site, backend, found, Workspaces())
        while len(self._open) > _OPEN_RUNS:
            gone, _ = self._open.popitem(last=False)
            self._last.pop(gone, None)
        return self._open[run]

    def _agreed(self, run: str, meta: Mapping[str, Any]) -> tuple[RunSpec, SiteRole]:
        """Return the spec as this site runs it, and its role, from what a coordinator sent.

        The spec must be the one that the run's fingerprint was taken of. Of its data section only names of columns, the frequency and
        shares count: where the data lie is the site's own business. Its training section comes once more as all sites compute it: what
        the spec leaves to the machines is chosen there, and nothing else differs.
        """
        try:
            spec = RunSpec.model_validate(meta["spec"])
            training = TrainingSpec.model_validate(meta["training"])
            asked = meta["role"]
            role = SiteRole(self._name, trains=asked["trains"] is True, evaluates=True, held_out=asked["held_out"] is True)
        except (ValidationError, KeyError, TypeError) as error:
            raise SpecError("the run's spec cannot be read", hint="check that both sides run the same version of fedcast") from error
        if asked["name"] != self._name:
            raise SpecError(
                f"the run calls this site {asked['name']!r}, and its kit {self._name!r}", hint="see the coordinator's nodes.json"
            )
        if spec.fingerprint() != run:
            raise SpecError("the spec is not that of the run", hint="check that both sides run the same version of fedcast")
        _check_chosen(spec.training, training)
        data = spec.data.model_copy(update={"source": str(self._data), "domains": (), "held_out": (), "partition": "domain"})
        return spec.model_copy(update={"data": data, "training": training}), role

    def _store(self, data: DataSpec) -> SeriesStore:
        columns = {"time": data.time, "id": data.id, "target": data.target, "freq": data.freq}
        key = tuple(columns.values())
        if key not in self._stores:
            self._stores[key] = load_site(self._name, self._data, **columns)
        return self._stores[key]

    def _run_folder(self, run: str) -> Path:
        return self._folder / "runs" / run


def _id_of(payload: bytes) -> str:
    try:
        return Task.decode(payload).id
    except WireError:
        return ""


def _check_chosen(asked: TrainingSpec, chosen: TrainingSpec) -> None:
    """Refuse a training section that is not the run's own with a back end in place of ``"auto"``."""
    values = {key.name: getattr(chosen, key.name) for key in fields(Backend) if getattr(asked, key.name) == "auto"}
    if asked.model_copy(update=values) != chosen:
        raise SpecError("what is to be computed with is not that of the run", hint="check that both sides run the same version of fedcast")


def load_site(name: str, data: Path, **columns: str | None) -> SeriesStore:
    """Read a site's data as one domain.

    Parameters
    ----------
    name
        The site's name, which the domain takes.
    data
        A file, or a folder of files, each a dataset of the domain.
    columns
        ``time``, ``id``, ``target`` and ``freq``; see :func:`fedcast.data.frames.read_frame`.

    Raises
    ------
    SourceError, FrameError
        When it cannot be read.
    """
    if data.is_file():
        files = {stem(data): data}
    else:
        files = {}
        for dataset, file in ((stem(file), file) for datasets in domain_files(data).values() for file in datasets.values()):
            if dataset in files:
                raise SourceError(f"{file} would be dataset {dataset!r} of site {name!r} a second time", hint="rename one of the two files")
            files[dataset] = file
    return SeriesStore.from_frames(name, {dataset: read_frame(file, **columns) for dataset, file in sorted(files.items())})

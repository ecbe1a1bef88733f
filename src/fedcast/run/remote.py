"""A run over the sites of a consortium: what is asked of them before it starts, in place of reading their data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedcast.consortium.kits import CoordinatorKit
from fedcast.data.catalogue import split_domains
from fedcast.errors import ConsortiumError, SiteError, SpecError
from fedcast.federated.flower.fleet import FlowerFleet
from fedcast.federated.messages import Task
from fedcast.federated.plan import Plan
from fedcast.federated.site import SiteRole
from fedcast.methods.base import Method
from fedcast.models.checkpoints import weights_digest
from fedcast.run.prepare import Prepared, prepare
from fedcast.spec import RunSpec, TrainingSpec

KIT = Path("coordinator")
"""Where a coordinator's kit is looked for when none is named."""


@dataclass(frozen=True)
class Consortium:
    """Where the sites of a run are.

    Attributes
    ----------
    kit
        Folder of the coordinator's kit, on the machine where its SuperLink runs.
    wait_s
        How long to wait, in seconds, until all sites of the run are online.
    note
        Tells a person something.
    """

    kit: Path = KIT
    wait_s: float = 120.0
    note: Callable[[str], None] | None = None


@contextmanager
def gathered(spec: RunSpec, method: Method, consortium: Consortium | None) -> Iterator[Callable[[Plan, TrainingSpec], Prepared]]:
    """Reach the sites of a run while the block lasts, and give what prepares them for a plan and a resolved training section.

    Sites in this process or beside it are prepared at once; those of a consortium when they are asked.

    Raises
    ------
    SpecError
        When the spec asks for a consortium's sites, and none is named, or for what only data in one place allow.
    UnknownNameError
        When the consortium has no site of a name.
    ConsortiumError
        When its kit is damaged, or no site is registered yet.
    DataError
        See :func:`~fedcast.run.prepare.prepare`.
    """
    if spec.federation.fleet != "flower":
        prepared = prepare(spec, method)
        yield lambda _plan, _training: prepared
        return
    if consortium is None:
        raise SpecError("the sites of a consortium are reached through its coordinator's kit", hint="use `fedcast run SPEC.toml --kit DIR`")
    _check(spec, pooled=method.pooled)
    kit = CoordinatorKit.open(consortium.kit)
    nodes = kit.nodes()
    if not nodes:
        raise ConsortiumError(f"{kit.folder} has no site that is registered", hint="`fedcast coordinator start` registers them")
    split_domains(spec.data, nodes)  # an unknown site is named before anything is started
    fleet = FlowerFleet(kit.flower, nodes, spec.fingerprint())
    try:
        yield lambda plan, training: prepare_remote(plan, training, fleet, consortium)
    finally:
        fleet.close()


def prepare_remote(plan: Plan, training: TrainingSpec, fleet: FlowerFleet, consortium: Consortium) -> Prepared:
    """Wait for the run's sites and ask each what it has for the run.

    Parameters
    ----------
    plan
        The run.
    training
        Its training section, with what all sites compute with.
    fleet, consortium
        The sites.

    Raises
    ------
    QuorumError
        When a site is not online in time.
    SiteError
        When a site refuses the run, cannot take part, or has another checkpoint.
    """
    spec, method = plan.spec, plan.method
    training_sites, held_out = split_domains(spec.data, fleet.sites())
    roles = {name: SiteRole(name) for name in training_sites}
    roles |= {name: SiteRole(name, trains=False, held_out=True) for name in held_out}
    method.check(sorted(training_sites))
    fleet.await_sites(sorted(roles), consortium.wait_s, consortium.note)
    told = {"spec": spec.model_dump(mode="json"), "training": training.model_dump(mode="json")}
    replies = fleet.ask({name: Task("describe", 0, {}, {**told, "role": asdict(role)}) for name, role in roles.items()})
    answers = {name: _read(name, reply.meta) for name, reply in replies.items()}
    _check_checkpoints(plan, answers)
    hasher = hashlib.sha256()
    for name in sorted(answers):
        hasher.update(f"{name}:{answers[name].fingerprint}\n".encode())
    samples = {name: answers[name].samples for name, role in roles.items() if role.trains}
    left_out = {name: answers[name].left_out for name in roles if answers[name].left_out}
    return Prepared(roles, {}, samples, left_out, hasher.hexdigest(), fleet)


def _check(spec: RunSpec, *, pooled: bool) -> None:
    if pooled:
        raise SpecError(f"method {spec.method.name!r} pools the data of all sites, which do not leave them", hint="choose another method")
    if spec.data.partition != "domain":
        raise SpecError(
            f"data.partition = {spec.data.partition!r} deals series out to clients, and here sites hold their own",
            hint="leave data.partition at 'domain'",
        )


@dataclass(frozen=True)
class _Answer:
    samples: int
    left_out: int
    fingerprint: str
    checkpoint: str | None


def _read(site: str, meta: Mapping[str, Any]) -> _Answer:
    samples, left_out, fingerprint, checkpoint = (meta.get(name) for name in ("samples", "left_out", "fingerprint", "checkpoint"))
    counts = type(samples) is int and samples >= 1 and type(left_out) is int and left_out >= 0
    if not counts or not isinstance(fingerprint, str) or not isinstance(checkpoint, str | None):
        raise SiteError(f"site {site} does not say what it has", hint="check that both sides run the same version of fedcast")
    return _Answer(meta["samples"], meta["left_out"], fingerprint[:64], checkpoint)


def _check_checkpoints(plan: Plan, answers: Mapping[str, _Answer]) -> None:
    """Frozen weights do not travel, so every site must have them, and the same ones."""
    if plan.spec.model.checkpoint is None:
        return
    own = weights_digest(plan.folder)
    for name, answer in sorted(answers.items()):
        if answer.checkpoint != own:
            raise SiteError(
                f"site {name} has other weights than the coordinator under {plan.spec.model.checkpoint}",
                hint="every site reads the checkpoint itself: pin a revision (owner/name@commit), or copy the same folder to all sites",
            )

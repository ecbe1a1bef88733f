"""From a spec to sites: load domains, deal their series out to clients, and start the fleet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedcast.data.catalogue import load_domains, split_domains
from fedcast.data.partition import partition
from fedcast.data.store import SeriesStore
from fedcast.errors import SpecError
from fedcast.federated.conflict import check_reportable
from fedcast.federated.fleet import Fleet, ThreadFleet
from fedcast.federated.plan import Plan
from fedcast.federated.site import Site, SiteRole
from fedcast.federated.survey import survey
from fedcast.federated.workers import ProcessFleet
from fedcast.methods.base import Method
from fedcast.run.folder import RunFolder
from fedcast.spec import DataSpec, RunSpec

POOL = "pool"


@dataclass(frozen=True)
class Prepared:
    """The sites of a run.

    Attributes
    ----------
    roles, stores
        Role and series of each site.
    samples
        Training points of each site that trains, or 1 where all weigh alike: what the screen lets it claim at most.
    left_out
        How many series of a site are too short to be split, or to be trained on at the site's share of them, where any are.
    fingerprint
        SHA-256 over the data of all sites.
    fleet
        The fleet, where the sites are on other machines.
    """

    roles: dict[str, SiteRole]
    stores: dict[str, SeriesStore]
    samples: dict[str, int]
    left_out: dict[str, int]
    fingerprint: str
    fleet: Fleet | None = None


def prepare(spec: RunSpec, method: Method) -> Prepared:
    """Load the spec's domains and deal them out.

    Raises
    ------
    SpecError
        When no domain is left to train on, one is both trained on and held out, or gradients are to be compared and cannot be.
    UnknownNameError
        When the source has no domain of that name.
    SplitError
        When a site has no series to train on.
    """
    training, held_out = split_domains(spec.data)
    loaded = load_domains(spec.data, [*training, *held_out])
    data = spec.data
    clients = partition(
        {name: loaded[name] for name in training},
        data.partition,
        clients=data.clients,
        concentration=data.concentration,
        imbalance=data.imbalance,
        seed=spec.seed,
    )
    roles = {name: SiteRole(name, trains=not method.pooled) for name in clients}
    stores = dict(clients)
    if data.partition != "domain":
        # Clients cut across domains, scores do not: the domains themselves evaluate.
        roles = {name: replace(role, evaluates=False) for name, role in roles.items()}
        others = {name: SiteRole(name, trains=False) for name in training}
    else:
        others = {}
    others |= {name: SiteRole(name, trains=False, held_out=True) for name in held_out}
    if method.pooled:
        stores[POOL] = SeriesStore.concat([(store, np.arange(len(store.ids))) for _, store in sorted(clients.items())])
        # As many steps as the selected sites of a federation would take together.
        selected = spec.federation.selected(len(clients))
        others[POOL] = SiteRole(POOL, evaluates=False, step_multiplier=selected, epoch_share=selected / len(clients))
    clash = set(roles) & set(others)
    if clash:
        raise SpecError(f"{', '.join(sorted(clash))} names both a client and something else", hint="rename that domain's file or folder")
    roles |= others
    stores |= {name: loaded[name] for name in others if name != POOL}
    method.check(sorted(name for name, role in roles.items() if role.trains))
    surveys = {name: survey(role, stores[name], spec) for name, role in sorted(roles.items())}
    if spec.evaluation.conflict:
        trains = {name: role.trains for name, role in roles.items() if role.evaluates and not role.held_out}
        check_reportable(spec, method, trains, {name: each.sampler for name, each in surveys.items()})
    samples = {name: surveys[name].samples for name, role in roles.items() if role.trains}
    left_out = {name: surveys[name].left_out for name in roles}
    hasher = hashlib.sha256()
    for name in sorted({*training, *held_out}):
        hasher.update(f"{name}:{loaded[name].fingerprint}\n".encode())
    return Prepared(roles, stores, samples, {name: count for name, count in left_out.items() if count}, hasher.hexdigest())


def load_training(data: DataSpec) -> dict[str, SeriesStore]:
    """Return the series of the domains that a spec trains on."""
    training, _ = split_domains(data)
    return load_domains(data, training)


def start_fleet(plan: Plan, prepared: Prepared, folder: RunFolder) -> Fleet:
    """Start the fleet a spec asks for."""
    spec = plan.spec
    workers = spec.federation.workers
    if prepared.fleet is not None:
        return prepared.fleet
    if spec.federation.fleet == "threads":
        sites = {
            name: Site(role, prepared.stores[name], plan, folder.sites / name, simulated=True) for name, role in prepared.roles.items()
        }
        return ThreadFleet(sites, workers)
    stores = _save_stores(prepared.stores, folder.stores)
    return ProcessFleet(list(prepared.roles.values()), stores, spec, folder.sites, workers)


def _save_stores(stores: Mapping[str, SeriesStore], folder: Path) -> dict[str, Path]:
    paths = {}
    for name, store in stores.items():
        paths[name] = folder / name
        if not paths[name].is_dir():
            store.save(paths[name])
    return paths

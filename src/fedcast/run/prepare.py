"""From a spec to sites: load domains, deal their series out to clients, and start the fleet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedcast.data.catalogue import domain_names, load_domains
from fedcast.data.partition import partition
from fedcast.data.splits import split_by_time
from fedcast.data.store import SeriesStore
from fedcast.data.windows import WindowSampler
from fedcast.errors import SpecError, UnknownNameError
from fedcast.federated.fleet import Fleet, ThreadFleet
from fedcast.federated.site import Site, SiteRole
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
        Training points of each site that trains: what the screen lets it claim at most.
    fingerprint
        SHA-256 over the data of all sites.
    """

    roles: dict[str, SiteRole]
    stores: dict[str, SeriesStore]
    samples: dict[str, int]
    fingerprint: str


def prepare(spec: RunSpec, method: Method) -> Prepared:
    """Load the spec's domains and deal them out.

    Raises
    ------
    SpecError
        When no domain is left to train on, or one is both trained on and held out.
    UnknownNameError
        When the source has no domain of that name.
    """
    training, held_out = choose_domains(spec.data)
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
    clash = set(clients) & ({*held_out} | ({POOL} if method.pooled else set()))
    if clash:
        raise SpecError(f"{', '.join(sorted(clash))} names both a client and something else", hint="rename that domain's file or folder")
    roles = {name: SiteRole(name, trains=not method.pooled) for name in clients}
    stores = dict(clients)
    if method.pooled:
        stores[POOL] = SeriesStore.concat([(store, np.arange(len(store.ids))) for _, store in sorted(clients.items())])
        # As many steps as the selected sites of a federation would take together.
        selected = max(1, round(spec.federation.participation * len(clients)))
        roles[POOL] = SiteRole(POOL, trains=True, evaluates=False, step_multiplier=selected)
    for name in held_out:
        stores[name] = loaded[name]
        roles[name] = SiteRole(name, trains=False, held_out=True)
    samples = {name: _points(stores[name], spec) for name, role in roles.items() if role.trains}
    hasher = hashlib.sha256()
    for name in sorted({*training, *held_out}):
        hasher.update(f"{name}:{loaded[name].fingerprint}\n".encode())
    return Prepared(roles, stores, samples, hasher.hexdigest())


def choose_domains(data: DataSpec) -> tuple[list[str], list[str]]:
    """Return the names of the domains to train on and of those held out."""
    known = domain_names(data.source)
    held_out = list(data.held_out)
    for name in [*held_out, *data.domains]:
        if name not in known:
            raise UnknownNameError.of("domain", name, known)
    training = list(data.domains) or [name for name in known if name not in held_out]
    both = sorted(set(training) & set(held_out))
    if both:
        raise SpecError(
            f"{', '.join(both)} is both trained on and held out", hint="name it in data.domains or in data.held_out, not in both"
        )
    if not training:
        raise SpecError(f"{data.source} leaves no domain to train on", hint="hold out fewer domains, or add data")
    return training, held_out


def load_training(data: DataSpec) -> dict[str, SeriesStore]:
    """Return the series of the domains that a spec trains on."""
    training, _ = choose_domains(data)
    return load_domains(data, training)


def _points(store: SeriesStore, spec: RunSpec) -> int:
    splits = split_by_time(store, horizon=spec.model.horizon, validation=spec.data.validation, test=spec.data.test)
    return WindowSampler(store, splits, context=spec.model.context, horizon=spec.model.horizon).n_points


def start_fleet(spec: RunSpec, method: Method, prepared: Prepared, folder: RunFolder) -> Fleet:
    """Start the fleet a spec asks for."""
    workers = spec.federation.workers
    if spec.federation.fleet == "threads":
        sites = {name: Site(role, prepared.stores[name], spec, method, folder.sites / name) for name, role in prepared.roles.items()}
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

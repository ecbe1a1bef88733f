"""From a spec to sites: load domains, deal their series out to clients, and start the fleet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedcast.data.catalogue import load_domains, split_domains
from fedcast.data.partition import partition
from fedcast.data.splits import MIN_CONTEXT, Splits, split_store
from fedcast.data.store import SeriesStore
from fedcast.data.windows import WindowSampler
from fedcast.errors import SpecError, SplitError
from fedcast.federated.conflict import check_reportable
from fedcast.federated.fleet import Fleet, ThreadFleet
from fedcast.federated.plan import Plan
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
        Training points of each site that trains, or 1 where all weigh alike: what the screen lets it claim at most.
    left_out
        How many series of a site are too short to be split, or to be trained on at the site's share of them, where any are.
    fingerprint
        SHA-256 over the data of all sites.
    """

    roles: dict[str, SiteRole]
    stores: dict[str, SeriesStore]
    samples: dict[str, int]
    left_out: dict[str, int]
    fingerprint: str


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
    samplers = {name: _sampler(name, stores[name], spec) for name in roles}
    _check_sites(spec, method, roles, stores, samplers)
    equal = spec.federation.weights == "equal"
    samples = {name: 1 if equal else samplers[name].n_points for name, role in roles.items() if role.trains}
    used = {name: sampler.splits.trained if _learns_from(roles[name]) else sampler.splits.kept for name, sampler in samplers.items()}
    left_out = {name: int((~(part | samplers[name].splits.only_tested)).sum()) for name, part in used.items()}
    hasher = hashlib.sha256()
    for name in sorted({*training, *held_out}):
        hasher.update(f"{name}:{loaded[name].fingerprint}\n".encode())
    return Prepared(roles, stores, samples, {name: count for name, count in left_out.items() if count}, hasher.hexdigest())


def load_training(data: DataSpec) -> dict[str, SeriesStore]:
    """Return the series of the domains that a spec trains on."""
    training, _ = split_domains(data)
    return load_domains(data, training)


def _sampler(site: str, store: SeriesStore, spec: RunSpec) -> WindowSampler:
    try:
        splits = split_store(store, spec.data, spec.model.horizon)
    except SplitError as error:
        raise SplitError(f"site {site}: {error.message}", hint=error.hint) from error
    return WindowSampler(store, splits, context=spec.model.context, horizon=spec.model.horizon)


def _learns_from(role: SiteRole) -> bool:
    return role.trains or role.name == POOL


def _check_sites(
    spec: RunSpec,
    method: Method,
    roles: Mapping[str, SiteRole],
    stores: Mapping[str, SeriesStore],
    samplers: Mapping[str, WindowSampler],
) -> None:
    """Look at every site before anything trains: a domain that is too short must not fail at the end of a long run."""
    for name, role in sorted(roles.items()):
        if role.evaluates:
            _check_scored(name, stores[name], samplers[name].splits, spec)
        if _learns_from(role) and spec.data.share < 1:
            _check_used(name, samplers[name], spec)
    if spec.evaluation.conflict:
        trains = {name: role.trains for name, role in roles.items() if role.evaluates and not role.held_out}
        check_reportable(spec, method, trains, samplers)


def _check_scored(site: str, store: SeriesStore, splits: Splits, spec: RunSpec) -> None:
    for horizon in spec.evaluation.horizons:
        if not len(WindowSampler(store, splits, context=spec.model.context, horizon=horizon).evaluation("test", 1)):
            raise SplitError(
                f"site {site}: no test part holds {horizon} steps",
                hint="take that horizon out of evaluation.horizons, or raise model.horizon or data.test",
            )


def _check_used(site: str, sampler: WindowSampler, spec: RunSpec) -> None:
    if not sampler.n_windows:
        splits = sampler.splits
        raise SplitError(
            f"site {site}: no series has a window to train on in the latest {spec.data.share:g} of its train part "
            f"(the longest train part has {int(splits.train_end[splits.kept].max())} steps, a window {spec.model.horizon + MIN_CONTEXT})",
            hint="raise data.share, lower model.horizon, or leave that domain out of data.domains",
        )


def start_fleet(plan: Plan, prepared: Prepared, folder: RunFolder) -> Fleet:
    """Start the fleet a spec asks for."""
    spec = plan.spec
    workers = spec.federation.workers
    if spec.federation.fleet == "threads":
        sites = {name: Site(role, prepared.stores[name], plan, folder.sites / name) for name, role in prepared.roles.items()}
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

"""How series are spread over clients; every series lands at exactly one client, whole.

=============  =======================================================================================================
``domain``     every store is a site under its own name, unchanged
``series``     neighbouring series are dealt out in equal blocks; one series a client when no number of clients is given
``iid``        series are shuffled and dealt out evenly
``dirichlet``  for each domain, client shares are drawn from a symmetric Dirichlet distribution and its shuffled series
               are cut by them (Yurochkin et al. 2019, arXiv:1905.12022, over domains instead of classes); a client
               left empty takes one series from the client that has most
``long_tail``  shuffled series are dealt out so that client ``i`` of ``K`` has
               ``n_i = n_max * imbalance ** (i / (K - 1))`` of them (Cui et al. 2019, arXiv:1901.05555, over clients
               instead of classes), where ``n_max`` makes the sizes sum to the number of series; sizes are rounded by
               largest remainder and are at least 1
=============  =======================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from fedcast.data.store import SeriesStore
from fedcast.errors import DataError, UnknownNameError
from fedcast.spec import DataSpec

SCHEMES: tuple[str, ...] = get_args(DataSpec.model_fields["partition"].annotation)
_STREAM = 0x70617274
_Ints = NDArray[np.int64]


def partition(
    stores: Mapping[str, SeriesStore],
    scheme: str,
    *,
    clients: int | None = None,
    concentration: float = 0.5,
    imbalance: float = 0.1,
    seed: int = 0,
) -> dict[str, SeriesStore]:
    """Spread the series of several domains over clients; each series lands at exactly one of them, whole.

    Parameters
    ----------
    stores
        Domain name to its store. The result does not depend on their order: they are taken by name.
    scheme
        One of the table above.
    clients
        Number of clients ``K``; not used by ``"domain"``.
    concentration
        Dirichlet concentration; small values give each domain to few clients.
    imbalance
        Smallest client over largest, in (0, 1].
    seed
        The only source of randomness.

    Returns
    -------
    dict
        Site name to store. Sites of all schemes but ``"domain"`` are called ``site-000`` onwards, and their series keep the order
        of domain and store.

    Raises
    ------
    UnknownNameError
        When the scheme is unknown.
    DataError
        When there are no stores, fewer series than clients, or a parameter is out of range.
    """
    if scheme not in SCHEMES:
        raise UnknownNameError.of("partition", scheme, SCHEMES)
    if not stores:
        raise DataError("there are no domains to spread over clients", hint="give at least one domain")
    if scheme == "domain":
        return dict(stores)
    ordered = [stores[name] for name in sorted(stores)]
    total = sum(len(store) for store in ordered)
    if clients is None:
        if scheme != "series":
            raise DataError(f"partition {scheme!r} needs a number of clients", hint="set data.clients")
        clients = total
    _check(ordered, total, clients, concentration, imbalance)
    dealt = _deal(ordered, scheme, clients, concentration, imbalance, np.random.default_rng([seed, _STREAM]))
    width = max(3, len(str(clients - 1)))
    return {f"site-{i:0{width}d}": _gather(ordered, np.sort(chosen)) for i, chosen in enumerate(dealt)}


def _deal(
    stores: list[SeriesStore], scheme: str, clients: int, concentration: float, imbalance: float, rng: np.random.Generator
) -> list[_Ints]:
    """Return the series of each client, counted through all stores."""
    total = sum(len(store) for store in stores)
    if scheme == "series":
        return np.array_split(np.arange(total), clients)
    if scheme == "iid":
        return np.array_split(rng.permutation(total), clients)
    if scheme == "long_tail":
        return np.split(rng.permutation(total), np.cumsum(long_tail_sizes(total, clients, imbalance))[:-1])
    return _dirichlet(_domains(stores), clients, concentration, rng)


def long_tail_sizes(total: int, clients: int, imbalance: float) -> _Ints:
    """Return the number of series of each client under ``"long_tail"``, int64 ``[clients]``, largest first, summing to ``total``.

    Parameters
    ----------
    total
        Number of series, at least ``clients``.
    clients
        Number of clients.
    imbalance
        Smallest client over largest, in (0, 1], before rounding.
    """
    weights: NDArray[np.float64] = np.power(imbalance, np.arange(clients) / max(clients - 1, 1))
    ideal = total * weights / weights.sum()
    sizes: _Ints = np.maximum(np.floor(ideal).astype(np.int64), 1)
    rest = total - int(sizes.sum())
    if rest > 0:
        sizes[np.argsort(sizes - ideal, kind="stable")[:rest]] += 1
    for _ in range(-rest):  # the floor of 1 took too many: the last of the largest gives one back, so sizes stay in order
        sizes[np.flatnonzero(sizes == sizes[0])[-1]] -= 1
    return sizes


def _check(stores: list[SeriesStore], total: int, clients: int, concentration: float, imbalance: float) -> None:
    if clients < 1:
        raise DataError(f"{clients} clients cannot share data", hint="set data.clients to at least 1")
    if not (concentration > 0 and np.isfinite(concentration)):
        raise DataError(f"a Dirichlet concentration of {concentration} is not positive", hint="set data.concentration, such as 0.5")
    if not 0 < imbalance <= 1:
        raise DataError(f"an imbalance of {imbalance} is outside (0, 1]", hint="set data.imbalance, such as 0.1")
    if total < clients:
        typical = int(np.median(np.concatenate([store.lengths for store in stores])))
        hint = f"set data.clients to at most {total}, or data.partition to 'domain'"
        if typical >= 1000:
            hint += (
                f"; the series are few but long ({typical} steps in the middle one): cut each into several series, then there are enough"
            )
        raise DataError(f"{total} series cannot be spread over {clients} clients without splitting one", hint=hint)


def _domains(stores: list[SeriesStore]) -> _Ints:
    """Number the domains of all series through, int64 ``[total]``."""
    names: dict[str, int] = {}
    labels = []
    for store in stores:
        numbers = np.array([names.setdefault(name, len(names)) for name in store.domain_names], dtype=np.int64)
        labels.append(numbers[store.domain])
    return np.concatenate(labels)


def _dirichlet(domains: _Ints, clients: int, concentration: float, rng: np.random.Generator) -> list[_Ints]:
    client = np.empty(len(domains), dtype=np.int64)
    for domain in np.unique(domains):
        series = rng.permutation(np.flatnonzero(domains == domain))
        shares = rng.dirichlet(np.full(clients, concentration))
        if not np.isfinite(shares).all():  # a concentration so small that every gamma draw underflows: one client takes all
            shares = np.eye(clients)[rng.integers(clients)]
        cuts = np.rint(np.cumsum(shares) * len(series)).astype(np.int64)
        cuts[-1] = len(series)
        client[series] = np.searchsorted(cuts, np.arange(len(series)), side="right")
    sizes = np.bincount(client, minlength=clients)
    for empty in np.flatnonzero(sizes == 0):
        giver = int(sizes.argmax())
        client[np.flatnonzero(client == giver)[-1]] = empty
        sizes[giver] -= 1
        sizes[empty] = 1
    by_client = np.argsort(client, kind="stable")
    return np.split(by_client, np.cumsum(sizes)[:-1])


def _gather(stores: list[SeriesStore], chosen: _Ints) -> SeriesStore:
    """Build one client's store from sorted numbers of series, counted through all stores."""
    edges = np.cumsum([0] + [len(store) for store in stores])
    cuts = np.searchsorted(chosen, edges)
    parts = zip(stores, edges[:-1].tolist(), cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
    return SeriesStore.concat([(store, chosen[start:stop] - edge) for store, edge, start, stop in parts if stop > start])

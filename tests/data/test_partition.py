"""Partitions: every series lands at exactly one client, by the scheme's rule and by nothing but the seed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcast.data.catalogue import load_domains
from fedcast.data.partition import SCHEMES, long_tail_sizes, partition
from fedcast.data.store import SeriesStore
from fedcast.errors import DataError, UnknownNameError
from fedcast.spec import DataSpec


def _store(name: str, n: int, length: int = 3) -> SeriesStore:
    zeros = np.zeros(n, dtype=np.int32)
    values = np.arange(n * length, dtype=np.float32)
    ids = [f"{name}{i}" for i in range(n)]
    return SeriesStore(values, np.arange(n + 1) * length, ids, ["0"] * n, zeros, ["main"], ["h"], np.array([24]), zeros, [name])


def _labels(stores: dict[str, SeriesStore]) -> list[tuple[str, str, bytes]]:
    return [
        (store.domain_names[store.domain[i]], store.ids[i], store.series(i).tobytes())
        for store in stores.values()
        for i in range(len(store))
    ]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    scheme=st.sampled_from(SCHEMES),
    clients=st.integers(1, 30),
    concentration=st.sampled_from([1e-300, 1e-3, 0.1, 0.5, 10.0, 1e6]),
    imbalance=st.sampled_from([1e-9, 0.01, 0.1, 0.3, 1.0]),
    seed=st.integers(0, 2**31 - 1),
)
def test_when_series_are_dealt_out_then_each_lands_at_exactly_one_client(
    sizes: list[int], scheme: str, clients: int, concentration: float, imbalance: float, seed: int
) -> None:
    stores = {f"dom{i}": _store(f"dom{i}", n) for i, n in enumerate(sizes)}

    def deal(given: dict[str, SeriesStore]) -> dict[str, SeriesStore]:
        return partition(given, scheme, clients=clients, concentration=concentration, imbalance=imbalance, seed=seed)

    if scheme == "domain":
        assert deal(stores) == stores
        return
    if sum(sizes) < clients:
        with pytest.raises(DataError, match="cannot be spread"):
            deal(stores)
        return
    sites = deal(stores)
    assert list(sites) == [f"site-{i:03d}" for i in range(clients)]
    assert all(len(store) > 0 for store in sites.values())
    assert sorted(_labels(sites)) == sorted(_labels(stores))
    again = deal(dict(reversed(stores.items())))
    assert [site.fingerprint for site in again.values()] == [site.fingerprint for site in sites.values()]


@pytest.fixture(scope="module")
def three() -> dict[str, SeriesStore]:
    """Three domains of 100 series each."""
    return {name: _store(name, 100) for name in ("a", "b", "c")}


def _table(sites: dict[str, SeriesStore]) -> np.ndarray:
    """Count series, one row a site, one column a domain."""
    return np.array([[sum(name == store.domain_names[d] for d in store.domain) for name in "abc"] for store in sites.values()])


def test_when_series_are_dealt_by_order_then_blocks_are_even_and_neighbours_stay_together(three: dict[str, SeriesStore]) -> None:
    sites = partition(three, "series", clients=7)
    assert {len(store) for store in sites.values()} == {42, 43}
    assert [i for store in sites.values() for i in store.ids] == [i for store in three.values() for i in store.ids]


def test_when_no_clients_are_given_then_each_series_is_a_client(three: dict[str, SeriesStore]) -> None:
    sites = partition(three, "series", clients=None)
    assert len(sites) == 300
    assert all(len(store) == 1 for store in sites.values())
    with pytest.raises(DataError, match="number of clients"):
        partition(three, "iid", clients=None)


def test_when_there_are_a_thousand_sites_or_more_then_names_still_sort_in_order() -> None:
    sites = partition({"a": _store("a", 1200)}, "series")
    assert list(sites) == sorted(sites)
    assert list(sites)[-1] == "site-1199"


def test_when_series_are_dealt_evenly_at_random_then_domains_mix(three: dict[str, SeriesStore]) -> None:
    table = _table(partition(three, "iid", clients=4, seed=1))
    assert table.sum(axis=1).tolist() == [75] * 4
    assert (table > 10).all()


def test_when_the_concentration_falls_then_domains_gather_at_fewer_clients(three: dict[str, SeriesStore]) -> None:
    def largest(concentration: float) -> float:
        tables = [_table(partition(three, "dirichlet", clients=5, concentration=concentration, seed=seed)) for seed in range(20)]
        return float(np.mean([table.max(axis=0) / 100 for table in tables]))

    assert largest(1000.0) < 0.26
    assert 0.35 < largest(0.5) < 0.8
    assert largest(0.01) > 0.85


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "long_tail"])
def test_when_the_seed_changes_then_the_deal_changes(three: dict[str, SeriesStore], scheme: str) -> None:
    first, second = (partition(three, scheme, clients=5, seed=seed) for seed in (0, 1))
    assert [site.ids for site in first.values()] != [site.ids for site in second.values()]


@given(clients=st.integers(1, 60), more=st.integers(0, 5000), imbalance=st.floats(1e-6, 1))
def test_when_sizes_have_a_long_tail_then_they_fall_in_proportion_and_sum_up(clients: int, more: int, imbalance: float) -> None:
    total = clients + more
    sizes = long_tail_sizes(total, clients, imbalance)
    assert sizes.sum() == total
    assert sizes.min() >= 1
    assert (np.diff(sizes) <= 0).all()
    ideal = imbalance ** (np.arange(clients) / max(clients - 1, 1))
    ideal *= total / ideal.sum()
    if ideal.min() >= 1:
        assert (abs(sizes - ideal) < 1).all()


def test_when_sizes_have_a_long_tail_then_the_last_over_the_first_is_the_imbalance(three: dict[str, SeriesStore]) -> None:
    sizes = [len(store) for store in partition(three, "long_tail", clients=8, imbalance=0.1, seed=0).values()]
    assert sizes == sorted(sizes, reverse=True)
    assert abs(sizes[-1] / sizes[0] - 0.1) < 0.01
    ratios = [b / a for a, b in itertools.pairwise(sizes)]
    np.testing.assert_allclose(ratios, 0.1 ** (1 / 7), rtol=0.08)


def test_when_series_are_few_but_long_then_the_hint_says_so() -> None:
    with pytest.raises(DataError) as caught:
        partition({"a": _store("a", 3, length=5000)}, "iid", clients=8)
    assert "few but long (5000 steps" in caught.value.hint
    with pytest.raises(DataError) as caught:
        partition({"a": _store("a", 3, length=50)}, "iid", clients=8)
    assert "long" not in caught.value.hint
    assert "at most 3" in caught.value.hint


def test_when_arguments_make_no_sense_then_they_are_refused(three: dict[str, SeriesStore]) -> None:
    with pytest.raises(UnknownNameError, match="iidd"):
        partition(three, "iidd", clients=2)
    for wrong in ({"clients": 0}, {"concentration": 0.0}, {"concentration": float("nan")}, {"imbalance": 0.0}, {"imbalance": 1.5}):
        with pytest.raises(DataError):
            partition(three, "iid", **({"clients": 2} | wrong))
    with pytest.raises(DataError, match="no domains"):
        partition({}, "iid", clients=2)


def test_when_bundled_domains_are_dealt_out_then_domain_labels_survive() -> None:
    stores = load_domains(DataSpec())
    total = sum(len(store) for store in stores.values())
    sites = partition(stores, "dirichlet", clients=8, seed=0)
    assert sum(len(store) for store in sites.values()) == total
    assert {name for store in sites.values() for name in store.domain_names} == set(stores)

"""Windows: which exist, how they are drawn, chosen and gathered, and that none looks ahead."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcast.data.catalogue import load_domains
from fedcast.data.splits import Splits, split_by_time
from fedcast.data.store import SeriesStore
from fedcast.data.windows import Balance, Part, Windows, WindowSampler
from fedcast.errors import SplitError
from fedcast.spec import DataSpec


def _store(series: list[np.ndarray], dataset: list[int] | None = None, domain: list[int] | None = None) -> SeriesStore:
    n = len(series)
    dataset, domain = dataset or [0] * n, domain or [0] * n
    names = [f"d{i}" for i in range(max(dataset) + 1)]
    return SeriesStore(
        values=np.concatenate(series),
        offsets=np.cumsum([0] + [len(values) for values in series]),
        ids=[f"s{i}" for i in range(n)],
        starts=["0"] * n,
        dataset=np.array(dataset),
        dataset_names=names,
        freqs=["h"] * len(names),
        season_lengths=np.full(len(names), 24),
        domain=np.array(domain),
        domain_names=[f"domain{i}" for i in range(max(domain) + 1)],
    )


@st.composite
def stores(draw: st.DrawFn) -> tuple[SeriesStore, Splits]:
    """Series with gaps of any length, cut anywhere, some of them not kept."""
    series: list[np.ndarray] = []
    ends = []
    for _ in range(draw(st.integers(1, 5))):
        pieces = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 30)), min_size=1, max_size=7))
        observed = np.concatenate([np.full(length, seen) for seen, length in pieces])
        values = np.arange(1, len(observed) + 1, dtype=np.float32) + 1000 * len(series)
        series.append(np.where(observed, values, np.float32(np.nan)))
        ends.append(sorted(draw(st.tuples(*[st.integers(0, len(observed))] * 2))))
    dataset = [draw(st.integers(0, 2)) for _ in series]
    kept = np.array([draw(st.integers(0, 4)) > 0 for _ in series])
    train_end, validation_end = np.array(ends).T
    return _store(series, dataset, dataset), Splits(train_end, validation_end, kept)


@st.composite
def late_stores(draw: st.DrawFn) -> tuple[SeriesStore, Splits]:
    """The same, trained on from anywhere in the train part on."""
    store, splits = draw(stores())
    start = np.array([draw(st.integers(0, int(end))) for end in splits.train_end])
    return store, dataclasses.replace(splits, train_start=start)


def _valid(store: SeriesStore, splits: Splits, part: Part, context: int, horizon: int) -> list[tuple[int, int]]:
    """Every valid window of a part, by looking at each place."""
    found = []
    for i in np.flatnonzero(splits.kept).tolist():
        values, edges = store.series(i), (0, splits.train_end[i], splits.validation_end[i], len(store.series(i)))
        start, stop = {"train": edges[:2], "validation": edges[1:3], "test": edges[2:]}[part]
        room = stop - horizon
        shortest = min(16, context) if room >= min(16, context) else room
        for end in range(max(start, shortest, 8), room + 1):
            seen = np.isfinite(values)
            if seen[end : end + horizon].any() and seen[max(end - context, 0) : end].any():
                found.append((i, end))
    return found


def _pairs(windows: Windows) -> list[tuple[int, int]]:
    return list(zip(windows.series.tolist(), windows.end.tolist(), strict=True))


@given(case=stores(), context=st.integers(8, 40), horizon=st.integers(1, 20), balance=st.sampled_from(["none", "dataset", "domain"]))
def test_when_windows_are_drawn_then_they_are_valid_train_windows(
    case: tuple[SeriesStore, Splits], context: int, horizon: int, balance: Balance
) -> None:
    store, splits = case
    sampler = WindowSampler(store, splits, context=context, horizon=horizon, balance=balance)
    valid = _valid(store, splits, "train", context, horizon)
    assert sampler.n_windows == len(valid)
    if not valid:
        with pytest.raises(SplitError, match="no train window"):
            sampler.draw(4, np.random.default_rng(0))
        return
    drawn = sampler.draw(200, np.random.default_rng(0))
    assert set(_pairs(drawn)) <= set(valid)
    assert (drawn.end + horizon <= splits.train_end[drawn.series]).all()
    assert drawn.series.dtype == drawn.end.dtype == np.int64
    if len(valid) <= 8:
        assert set(_pairs(drawn)) == set(valid)
    for limit in (3, 10**6):
        spread = _pairs(sampler.evenly(limit))
        assert len(spread) == len(set(spread)) == min(limit, len(valid))
        assert set(spread) <= set(valid)


@given(case=stores(), context=st.integers(8, 40), horizon=st.integers(1, 20), limit=st.integers(1, 60))
def test_when_windows_are_chosen_for_evaluation_then_they_lie_in_their_part_evenly(
    case: tuple[SeriesStore, Splits], context: int, horizon: int, limit: int
) -> None:
    store, splits = case
    sampler = WindowSampler(store, splits, context=context, horizon=horizon)
    for part in ("validation", "test"):
        valid = _valid(store, splits, part, context, horizon)
        pairs = _pairs(sampler.evaluation(part, limit))
        assert len(pairs) == len(set(pairs)) == min(limit, len(valid))
        assert set(pairs) <= set(valid)
        assert pairs == sorted(pairs, key=lambda pair: (store.dataset[pair[0]], pair))
        for label in (lambda pair: store.dataset[pair[0]], lambda pair: (store.dataset[pair[0]], pair[0])):
            _is_even({key: len(list(group)) for key, group in itertools.groupby(pairs, label)}, valid, label)


def _is_even(taken: dict, valid: list[tuple[int, int]], label) -> None:  # type: ignore[type-arg, no-untyped-def]
    """Where a place got two fewer than another of its parent, it gave all that it has."""
    rooms: dict[object, int] = {}
    for pair in valid:
        rooms[label(pair)] = rooms.get(label(pair), 0) + 1
    for a, b in itertools.permutations(rooms, 2):
        same_parent = not isinstance(a, tuple) or a[0] == b[0]  # type: ignore[index]
        if same_parent and taken.get(a, 0) < taken.get(b, 0) - 1:
            assert taken.get(a, 0) == rooms[a]


@given(case=stores(), context=st.integers(8, 60), horizon=st.integers(1, 20), seed=st.integers(0, 99))
def test_when_windows_are_gathered_then_they_equal_slices_with_padding(
    case: tuple[SeriesStore, Splits], context: int, horizon: int, seed: int
) -> None:
    store, splits = case
    rng = np.random.default_rng(seed)
    series = rng.integers(0, len(store), 12)
    end = rng.integers(0, store.lengths[series] + 1)  # any place, also where series start and end
    batch = WindowSampler(store, splits, context=context, horizon=horizon).gather(Windows(series, end))
    for row, (i, e) in enumerate(zip(series, end, strict=True)):
        padded = np.concatenate([np.full(context, np.nan), store.series(i), np.full(horizon, np.nan)])
        for got, mask, wanted in (
            (batch.context[row], batch.mask[row], padded[e : e + context]),
            (batch.target[row], batch.target_mask[row], padded[e + context : e + context + horizon]),
        ):
            np.testing.assert_array_equal(mask.numpy(), np.isfinite(wanted))
            np.testing.assert_array_equal(got.numpy(), np.nan_to_num(wanted))
    assert batch.context.dtype == batch.target.dtype == torch.float32
    assert batch.mask.dtype == batch.target_mask.dtype == torch.bool
    assert batch.context.is_contiguous()
    assert batch.dataset.tolist() == store.dataset[series].tolist()
    assert batch.domain.tolist() == store.domain[series].tolist()


@given(case=stores())
def test_when_points_are_counted_then_only_observed_train_values_of_kept_series_count(case: tuple[SeriesStore, Splits]) -> None:
    store, splits = case
    sampler = WindowSampler(store, splits, context=16, horizon=4)
    wanted = sum(int(np.isfinite(store.series(i)[: splits.train_end[i]]).sum()) for i in np.flatnonzero(splits.kept).tolist())
    assert sampler.n_points == wanted


@given(case=late_stores(), context=st.integers(8, 40), horizon=st.integers(1, 20))
def test_when_training_begins_late_then_it_is_as_if_series_had_nothing_before(
    case: tuple[SeriesStore, Splits], context: int, horizon: int
) -> None:
    store, splits = case
    cut = _store([store.series(i)[start:] for i, start in enumerate(splits.train_start)], store.dataset.tolist(), store.domain.tolist())
    ends = (splits.train_end - splits.train_start, splits.validation_end - splits.train_start)
    late = WindowSampler(store, splits, context=context, horizon=horizon, balance="dataset")
    short = WindowSampler(cut, Splits(*ends, splits.kept), context=context, horizon=horizon, balance="dataset")
    assert (late.n_windows, late.n_points) == (short.n_windows, short.n_points)
    if late.n_windows:
        drawn, same = (sampler.draw(50, np.random.default_rng(0)) for sampler in (late, short))
        np.testing.assert_array_equal(drawn.end, same.end + splits.train_start[drawn.series])
        ours, theirs = late.gather(drawn), short.gather(same)
        for name in ("context", "mask", "target", "target_mask"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


@given(case=late_stores(), context=st.integers(8, 40), horizon=st.integers(1, 20))
def test_when_training_begins_late_then_evaluation_windows_are_the_same(
    case: tuple[SeriesStore, Splits], context: int, horizon: int
) -> None:
    store, splits = case
    whole = dataclasses.replace(splits, train_start=np.zeros_like(splits.train_end))
    for part in ("validation", "test"):
        ours, theirs = (
            sampler.gather(sampler.evaluation(part, 20))
            for sampler in (WindowSampler(store, each, context=context, horizon=horizon) for each in (splits, whole))
        )
        assert _pairs(ours.windows) == _pairs(theirs.windows)
        assert torch.equal(ours.context, theirs.context)
        assert torch.equal(ours.mask, theirs.mask)


def _uneven() -> tuple[SeriesStore, Splits]:
    rng = np.random.default_rng(3)
    lengths = [2000, 1000, 300, 200, 200]
    store = _store([rng.normal(size=length).astype(np.float32) for length in lengths], [0, 0, 1, 2, 2], [0, 0, 0, 1, 1])
    return store, split_by_time(store, horizon=24, validation=0.1, test=0.2)


@pytest.mark.parametrize("balance", ["none", "dataset", "domain"])
def test_when_draws_are_balanced_then_each_group_has_its_share(balance: Balance) -> None:
    store, splits = _uneven()
    sampler = WindowSampler(store, splits, context=64, horizon=24, balance=balance)
    size = 30_000
    drawn = sampler.draw(size, np.random.default_rng(0))
    rooms = (splits.train_end - 24 - 16 + 1).astype(float)
    labels = np.zeros(5, dtype=int) if balance == "none" else store.dataset
    # Of two domains, the first has two datasets.
    shares = {"none": np.ones(1), "dataset": np.full(3, 1 / 3), "domain": np.array([1 / 4, 1 / 4, 1 / 2])}[balance]
    wanted = rooms / np.bincount(labels, rooms)[labels] * shares[labels]
    got = np.bincount(drawn.series, minlength=5) / size
    np.testing.assert_allclose(got, wanted, atol=5 * np.sqrt(0.25 / size))
    assert abs(drawn.end[drawn.series == 0].mean() - (16 + splits.train_end[0] - 24) / 2) < 20


@pytest.mark.parametrize("balance", ["none", "dataset", "domain"])
def test_when_windows_are_drawn_independently_then_each_has_its_groups_chance_and_none_comes_twice(balance: Balance) -> None:
    store, splits = _uneven()
    sampler, rng = WindowSampler(store, splits, context=64, horizon=24, balance=balance), np.random.default_rng(1)
    batches = [_pairs(sampler.poisson(40, rng)) for _ in range(2000)]
    assert all(len(set(batch)) == len(batch) for batch in batches)
    sizes = np.array([len(batch) for batch in batches])
    rates = sampler.rates(40)
    rooms = {series: int(splits.train_end[series] - 24 - 16 + 1) for series in range(5)}
    members = {"none": [[0, 1, 2, 3, 4]], "dataset": [[0, 1], [2], [3, 4]], "domain": [[0, 1], [2], [3, 4]]}[balance]
    expected = [sum(rooms[series] for series in group) * rate for group, rate in zip(members, rates, strict=True)]
    assert sum(expected) == pytest.approx(40)
    # The size of a batch is a sum of independent draws: its mean and its variance.
    variance = sum(count * (1 - rate) for count, rate in zip(expected, rates, strict=True))
    assert abs(sizes.mean() - 40) < 5 * (variance / len(sizes)) ** 0.5
    assert abs(sizes.var() / variance - 1) < 5 * (2 / len(sizes)) ** 0.5
    # Two windows of one group come together as often as independent ones do.
    group, rate = members[-1], rates[-1]
    first, second = ((series, 16 + at) for series, at in ((group[0], 3), (group[-1], 5)))
    together = np.mean([first in batch and second in batch for batch in batches])
    assert abs(together - rate**2) < 5 * (rate**2 / len(batches)) ** 0.5 + 1e-3


def test_when_there_are_fewer_windows_than_asked_for_then_an_independent_draw_takes_all_of_them() -> None:
    store, splits = _uneven()
    sampler = WindowSampler(store, splits, context=64, horizon=24)
    assert sampler.rates(10**9).tolist() == [1.0]
    assert len(sampler.poisson(10**9, np.random.default_rng(0))) == sampler.n_windows
    assert len(sampler.gather(sampler.poisson(10**9, np.random.default_rng(0))).windows) == sampler.n_windows


def test_when_the_seed_is_the_same_then_the_draw_is_the_same() -> None:
    store, splits = _uneven()
    first, second = (WindowSampler(store, splits, context=64, horizon=24, balance="dataset") for _ in range(2))
    a, b = first.draw(64, np.random.default_rng(5)), second.draw(64, np.random.default_rng(5))
    assert _pairs(a) == _pairs(b)
    assert torch.equal(first.gather(a).context, second.gather(b).context)
    assert _pairs(first.evaluation("test", 9)) == _pairs(second.evaluation("test", 9))


def test_when_later_parts_are_changed_then_train_batches_are_not() -> None:
    store, splits = _uneven()
    values = store.values.copy()
    for i, end in enumerate(splits.train_end):
        values[store.offsets[i] + end : store.offsets[i + 1]] = 1e9
    other = _store([values[a:b] for a, b in itertools.pairwise(store.offsets)], [0, 0, 1, 2, 2], [0, 0, 0, 1, 1])
    batches = []
    for each in (store, other):
        sampler = WindowSampler(each, splits, context=64, horizon=24)
        batches.append(sampler.gather(sampler.draw(500, np.random.default_rng(0))))
    assert torch.equal(batches[0].context, batches[1].context)
    assert torch.equal(batches[0].target, batches[1].target)


def test_when_evaluation_windows_are_few_then_datasets_series_and_time_are_all_covered() -> None:
    store, splits = _uneven()
    sampler = WindowSampler(store, splits, context=64, horizon=24)
    chosen = sampler.evaluation("test", 30)
    assert np.bincount(store.dataset[chosen.series]).tolist() == [10, 10, 10]
    assert np.bincount(chosen.series).tolist() == [5, 5, 10, 5, 5]
    ends = chosen.end[chosen.series == 0] - splits.validation_end[0]
    assert ends.tolist() == [37, 113, 188, 263, 339]
    assert len(sampler.evaluation("test", 10**9)) == int((store.lengths - splits.validation_end - 24 + 1).sum())


def test_when_there_are_more_series_than_windows_then_series_are_spread_too() -> None:
    store = _store([np.ones(200, dtype=np.float32) for _ in range(100)])
    splits = split_by_time(store, horizon=24, validation=0.1, test=0.2)
    chosen = WindowSampler(store, splits, context=64, horizon=24).evaluation("validation", 4)
    assert chosen.series.tolist() == [12, 37, 62, 87]


def test_when_a_part_has_no_room_then_no_window_is_chosen() -> None:
    store, splits = _uneven()
    assert len(WindowSampler(store, splits, context=64, horizon=1900).evaluation("validation", 5)) == 0


def test_when_arguments_make_no_sense_then_they_are_refused() -> None:
    store, splits = _uneven()
    for wrong in ({"context": 7}, {"horizon": 0}, {"balance": "site"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            WindowSampler(store, splits, **({"context": 64, "horizon": 24} | wrong))
    sampler = WindowSampler(store, splits, context=64, horizon=24)
    with pytest.raises(ValueError, match="part"):
        sampler.evaluation("train", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit"):
        sampler.evaluation("test", 0)


def test_when_bundled_domains_are_sampled_then_every_batch_is_finite_and_has_something_to_learn() -> None:
    for store in load_domains(DataSpec()).values():
        splits = split_by_time(store, horizon=24, validation=0.1, test=0.2)
        sampler = WindowSampler(store, splits, context=128, horizon=24, balance="dataset")
        for windows in (sampler.draw(256, np.random.default_rng(0)), sampler.evaluation("test", 64)):
            batch = sampler.gather(windows)
            assert torch.isfinite(batch.context).all()
            assert torch.isfinite(batch.target).all()
            assert batch.mask.any(dim=1).all()
            assert batch.target_mask.any(dim=1).all()


def test_when_a_batch_is_split_then_the_pieces_are_its_rows() -> None:
    store, splits = _uneven()
    sampler = WindowSampler(store, splits, context=64, horizon=24)
    windows = sampler.draw(12, np.random.default_rng(0))
    pieces = list(sampler.gather(windows).split(5))
    assert [len(piece.windows) for piece in pieces] == [5, 5]
    for index, piece in enumerate(pieces):
        alone = sampler.gather(Windows(windows.series[5 * index : 5 * index + 5], windows.end[5 * index : 5 * index + 5]))
        for name in ("context", "mask", "target", "target_mask", "dataset", "domain"):
            assert torch.equal(getattr(piece, name), getattr(alone, name))

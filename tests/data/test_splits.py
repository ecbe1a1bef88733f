"""Splits by time and scalers of the train part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcast.data.catalogue import load_domains
from fedcast.data.splits import Splits, split_by_time, split_store, train_scale
from fedcast.data.store import SeriesStore
from fedcast.errors import SplitError
from fedcast.spec import DataSpec


def _store(series: list[np.ndarray]) -> SeriesStore:
    n = len(series)
    zeros = np.zeros(n, dtype=np.int32)
    offsets = np.cumsum([0] + [len(values) for values in series])
    values = np.concatenate(series)
    return SeriesStore(values, offsets, [f"s{i}" for i in range(n)], ["0"] * n, zeros, ["main"], ["h"], np.array([24]), zeros, ["demo"])


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    horizon=st.integers(1, 40),
    validation=st.floats(0.01, 0.4),
    test=st.floats(0.01, 0.5),
)
def test_when_series_are_split_then_parts_follow_each_other_and_have_room(
    lengths: list[int], horizon: int, validation: float, test: float
) -> None:
    store = _store([np.ones(length) for length in lengths])
    needed = 16 + horizon + max(round(max(lengths) * test), horizon) + max(round(max(lengths) * validation), horizon)
    if max(lengths) < needed:
        with pytest.raises(SplitError, match=f"longest has {max(lengths)} steps"):
            split_by_time(store, horizon=horizon, validation=validation, test=test)
        return
    splits = split_by_time(store, horizon=horizon, validation=validation, test=test)
    kept = splits.kept
    assert kept.any()
    assert (splits.train_end >= 0).all()
    assert (splits.train_end <= splits.validation_end).all()
    assert (splits.validation_end <= store.lengths).all()
    assert (splits.train_end[kept] >= horizon + 16).all()
    assert ((splits.validation_end - splits.train_end)[kept] >= horizon).all()
    assert ((store.lengths - splits.validation_end)[kept] >= horizon).all()
    assert (abs((store.lengths - splits.validation_end) - np.maximum(store.lengths * test, horizon))[kept] <= 0.5 + 1e-9).all()


def test_when_shares_are_larger_than_the_horizon_then_they_count() -> None:
    splits = split_by_time(_store([np.ones(1000), np.ones(100)]), horizon=24, validation=0.1, test=0.2)
    assert splits.train_end.tolist() == [700, 52]
    assert splits.validation_end.tolist() == [800, 76]
    assert splits.kept.tolist() == [True, True]


def test_when_every_series_is_too_short_then_the_hint_names_the_length_needed() -> None:
    with pytest.raises(SplitError, match=r"demo.*longest has 87 steps") as caught:
        split_by_time(_store([np.ones(87), np.ones(3)]), horizon=24, validation=0.1, test=0.2)
    assert "88 steps" in caught.value.hint
    assert split_by_time(_store([np.ones(88)]), horizon=24, validation=0.1, test=0.2).kept.all()


def test_when_a_train_part_is_wholly_missing_then_the_series_is_not_kept() -> None:
    late = np.full(200, np.nan)
    late[150:] = 1.0
    splits = split_by_time(_store([late, np.ones(200)]), horizon=24, validation=0.1, test=0.2)
    assert splits.kept.tolist() == [False, True]
    with pytest.raises(SplitError, match="observed"):
        split_by_time(_store([late]), horizon=24, validation=0.1, test=0.2)


@given(
    series=st.lists(arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=6),
    data=st.data(),
)
def test_when_scales_are_fitted_then_only_observed_train_values_count(series: list[np.ndarray], data: st.DataObject) -> None:
    ends = np.array([data.draw(st.integers(0, len(values))) for values in series])
    for values in series:
        values[data.draw(arrays(np.bool_, len(values)))] = np.nan
    store = _store(series)
    mean, std = train_scale(store, Splits(ends, store.lengths, np.ones(len(series), dtype=np.bool_)))
    for i, (values, end) in enumerate(zip(series, ends, strict=True)):
        train = values[:end].astype(np.float64)
        train = train[~np.isnan(train)]
        if len(train) == 0 or train.min() == train.max():
            assert std[i] == 1.0
            assert mean[i] == (train[0] if len(train) else 0.0)
        else:
            np.testing.assert_allclose(mean[i], train.mean(), rtol=1e-12, atol=1e-9)
            np.testing.assert_allclose(std[i], train.std(), rtol=1e-9)


def test_when_later_parts_change_then_scales_do_not() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=300).astype(np.float32)
    changed = values.copy()
    splits = split_by_time(_store([values]), horizon=24, validation=0.1, test=0.2)
    changed[splits.train_end[0] :] = 1e9
    assert train_scale(_store([values]), splits) == train_scale(_store([changed]), splits)


def test_when_series_span_several_blocks_then_scales_are_still_those_of_each() -> None:
    rng = np.random.default_rng(1)
    series = [rng.normal(i, 1 + i, size).astype(np.float32) for i, size in enumerate([3_000_000, 50, 2_000_000, 70, 900])]
    store = _store(series)
    ends = np.array([2_500_000, 0, 2_000_000, 70, 400])
    assert len(list(store.blocks())) > 1
    mean, std = train_scale(store, Splits(ends, store.lengths, ends > 0))
    for i in (0, 2, 3, 4):
        train = series[i][: ends[i]].astype(np.float64)
        np.testing.assert_allclose([mean[i], std[i]], [train.mean(), train.std()], rtol=1e-10)
    assert (mean[1], std[1]) == (0.0, 1.0)


@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=6),
    share=st.floats(0.01, 1.0),
    horizon=st.integers(1, 40),
)
def test_when_a_share_is_trained_on_then_it_is_the_latest_and_nothing_else_changes(lengths: list[int], share: float, horizon: int) -> None:
    store = _store([np.ones(length) for length in [*lengths, 900]])
    whole = split_store(store, DataSpec(), horizon)
    splits = split_store(store, DataSpec(share=share), horizon)
    for name in ("train_end", "validation_end", "kept"):
        np.testing.assert_array_equal(getattr(splits, name), getattr(whole, name))
    assert not whole.train_start.any()
    used = splits.train_end - splits.train_start
    wanted = np.rint(share * splits.train_end)
    room = wanted >= horizon + 16
    np.testing.assert_array_equal(used[splits.kept], np.where(room, wanted, 0)[splits.kept])
    np.testing.assert_array_equal(splits.trained, splits.kept & room)
    np.testing.assert_array_equal(train_scale(store, splits), train_scale(store, whole))


def test_when_bundled_domains_are_split_then_every_domain_keeps_series() -> None:
    for store in load_domains(DataSpec()).values():
        splits = split_by_time(store, horizon=24, validation=0.1, test=0.2)
        mean, std = train_scale(store, splits)
        assert splits.kept.any()
        assert np.isfinite(mean).all()
        assert (std > 0).all()

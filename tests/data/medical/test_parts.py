"""Train and test parts: cut at 60 %, scaled by themselves, test windows inside the test part alone."""

from __future__ import annotations

import numpy as np
import pytest

from fedcast.data.medical.parts import CONTEXT, cut, is_test, scaled, split_parts, whole
from fedcast.data.sources import Series, long_frame
from fedcast.data.splits import split_store, train_scale
from fedcast.data.store import SeriesStore
from fedcast.data.windows import WindowSampler
from fedcast.errors import SpecError, SplitError
from fedcast.evaluate.windows import evaluation_set
from fedcast.spec import DataSpec

DATA = DataSpec(source="medical-real")
VALUES = np.random.default_rng(0).normal(size=3000).cumsum()


def _store(series: list[Series]) -> SeriesStore:
    return SeriesStore.from_frames("client", {"ecg_500hz": long_frame(series, 1, "test")})


def test_when_values_are_scaled_then_they_span_zero_to_one() -> None:
    assert scaled(np.array([2.0, np.nan, 4.0, 3.0])).tolist()[::2] == [0.0, 1.0]
    assert scaled(np.array([5.0, 5.0])).tolist() == [0.0, 0.0]


def test_when_a_recording_is_cut_then_each_part_is_scaled_by_its_own_values() -> None:
    train, test = cut("a", VALUES, 500.0)
    assert (train.id, test.id, len(train.values), len(test.values)) == ("a:train", "a:test", 1800, 1200)
    assert np.allclose(train.values, scaled(VALUES[:1800]))
    assert np.allclose(test.values, scaled(VALUES[1800:]))


def test_when_a_rate_is_asked_for_then_parts_are_resampled_one_by_one() -> None:
    train, _ = cut("a", VALUES, 500.0, 250.0)
    changed = VALUES.copy()
    changed[1800:] = 1e6
    assert len(train.values) == 900
    assert np.array_equal(cut("a", changed, 500.0, 250.0)[0].values, train.values)


def test_when_a_store_is_split_then_half_of_a_recording_is_trained_on_and_a_tenth_validated_on() -> None:
    store = _store(cut("a", VALUES, 500.0))
    splits = split_store(store, DATA, 64)
    test = is_test(store)
    assert test.tolist() == [True, False]
    assert splits.train_end.tolist() == [0, 1500]
    assert splits.validation_end.tolist() == [0, 1800]
    assert splits.only_tested.tolist() == [True, False]
    assert splits.trained.tolist() == [False, True]


def test_when_windows_are_cut_then_no_test_window_sees_a_train_value_and_none_is_padded() -> None:
    store = _store(cut("a", VALUES, 500.0))
    splits = split_store(store, DATA, 64)
    test = evaluation_set(store, splits, "test", context=CONTEXT, horizon=64, limit=10_000)
    assert set(test.ids) == {"a:test"}
    assert len(test) == 1200 - CONTEXT - 64 + 1
    assert test.end.min() == CONTEXT
    assert np.isfinite(test.context).all()
    sampler = WindowSampler(store, splits, context=CONTEXT, horizon=64)
    drawn = sampler.draw(200, np.random.default_rng(0))
    assert {store.ids[i] for i in drawn.series} == {"a:train"}
    assert drawn.end.max() + 64 <= 1500
    assert sampler.n_points == 1500
    assert {store.ids[i] for i in sampler.evaluation("validation", 50).series} == {"a:train"}


def test_when_test_parts_are_scored_then_their_scale_is_their_own() -> None:
    store = _store(cut("a", VALUES, 500.0))
    loc, scale = train_scale(store, split_store(store, DATA, 64))
    assert (loc[0], scale[0]) == (0.0, 1.0)


def test_when_a_share_is_trained_on_then_the_test_part_stays() -> None:
    store = _store(cut("a", VALUES, 500.0))
    splits = split_store(store, DATA.model_copy(update={"share": 0.5}), 64)
    assert splits.train_start.tolist() == [0, 750]
    assert splits.test_start.tolist() == [CONTEXT, 1800]


def test_when_records_are_whole_then_validation_is_a_share_of_each() -> None:
    store = _store([whole("a", VALUES[:1000], 500.0, test=False), whole("b", VALUES[:1000], 500.0, test=True)])
    splits = split_store(store, DataSpec(source="medical-sites"), 64)
    assert splits.train_end.tolist() == [900, 0]


def test_when_a_spec_asks_for_another_split_then_it_is_refused() -> None:
    store = _store(cut("a", VALUES, 500.0))
    with pytest.raises(SpecError, match=r"data.test is 0.3"):
        split_store(store, DATA.model_copy(update={"test": 0.3}), 64)
    assert split_store(store, DATA.model_copy(update={"test": 0.4}), 64).kept.all()


def test_when_a_part_is_too_short_then_the_error_says_which() -> None:
    with pytest.raises(SplitError, match=r"no test part .* has 400"):
        split_parts(_store(cut("a", VALUES[:1000], 500.0)), DATA, 64)
    with pytest.raises(SplitError, match="no train part"):
        split_parts(_store([whole("a", VALUES[:100], 500.0, test=False), whole("b", VALUES, 500.0, test=True)]), DATA, 64)

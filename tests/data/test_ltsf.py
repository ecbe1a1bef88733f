"""The LTSF benchmark: the split and the scale of the papers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedcast.data.catalogue import domain_names, load_raw
from fedcast.data.sources.ltsf import LTSF, VALIDATION
from fedcast.data.splits import split_store
from fedcast.data.store import SeriesStore
from fedcast.errors import SpecError
from fedcast.spec import DataSpec

DATA = DataSpec(source="ltsf")


def _store(domain: str, values: np.ndarray) -> SeriesStore:
    zeros, offsets = np.zeros(1, dtype=np.int32), np.array([0, len(values)])
    return SeriesStore(values.astype(np.float32), offsets, ["a"], ["0"], zeros, ["main"], ["h"], np.array([24]), zeros, [domain])


def test_when_the_source_is_named_then_its_seven_sets_are_known() -> None:
    assert domain_names("ltsf") == ["electricity", "etth1", "etth2", "ettm1", "ettm2", "exchange", "weather"]
    assert "substitute" in next(d.taken for d in LTSF if d.domain == "electricity")


@pytest.mark.parametrize(("domain", "train", "validation"), [("etth1", 8640, 11520), ("exchange", 5311, 6070)])
def test_when_a_set_is_loaded_then_its_split_and_scale_are_the_benchmarks(
    domain: str, train: int, validation: int, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path))

    store = load_raw("ltsf", domain)

    splits = split_store(store, DATA, 96)
    # 70 % of 7588 days is 5311.6: Autoformer's loader cuts at 5311, test at the last 1517.
    assert set(splits.train_end) == {train}
    assert abs(int(splits.validation_end[0]) - validation) <= 1
    for number in range(len(store)):
        part = store.series(number)[:train].astype(np.float64)
        assert abs(part.mean()) < 1e-5
        assert abs(part.std() - 1) < 1e-5


def test_when_sets_are_pooled_then_each_series_keeps_the_split_of_its_own_set() -> None:
    rng = np.random.default_rng(0)
    names = ("etth1", "exchange")
    stores = [_store(name, rng.normal(size=1000)) for name in names]
    pool = SeriesStore.concat([(store, np.arange(1)) for store in stores])

    splits = split_store(pool, DATA, 24)

    assert VALIDATION["etth1"] == 0.2
    assert splits.train_end.tolist() == [600, 700]
    assert splits.validation_end.tolist() == [800, 800]


def test_when_a_spec_asks_for_another_split_of_the_benchmark_then_it_is_refused() -> None:
    store = _store("etth1", np.arange(1000.0))

    with pytest.raises(SpecError, match="split of its benchmark"):
        split_store(store, DataSpec(source="ltsf", test=0.3), 24)

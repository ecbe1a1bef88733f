"""The series store: building, round trips to disk, damage, joining."""

from __future__ import annotations

import json
from mmap import mmap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcast.data.catalogue import load_domains
from fedcast.data.frames import read_frame
from fedcast.data.store import SeriesStore, season_length
from fedcast.errors import DataError, SourceError
from fedcast.spec import DataSpec

SEASONS: dict[int, tuple[str | int, ...]] = {
    1440: ("min", "1min"),
    288: ("5min",),
    144: ("10T", "10min"),
    96: ("15min",),
    48: ("30min",),
    24: ("h", "H", "60min", "3600s"),
    12: ("2h", "MS", "M", "ME"),
    7: ("D",),
    6: ("2MS",),
    5: ("B",),
    52: ("W", "W-SUN", "7D"),
    4: ("QS-OCT", "QE-DEC", "3MS"),
    1: ("Y", "YS-JAN", "s", "10s", "ms", "7min", "5h", "2D", "0h", "", "1", 1, 60),
}
ARRAYS = ("values", "offsets", "dataset", "domain", "season_lengths")
LISTS = ("ids", "starts", "dataset_names", "freqs", "domain_names")


def _store(series: list[np.ndarray], *, name: str = "demo", dataset: str = "main", freq: str = "h") -> SeriesStore:
    n = len(series)
    return SeriesStore(
        values=np.concatenate(series).astype(np.float32),
        offsets=np.cumsum([0] + [len(values) for values in series]),
        ids=[f"s{i}" for i in range(n)],
        starts=["2024-01-01T00:00:00"] * n,
        dataset=np.zeros(n, dtype=np.int32),
        dataset_names=[dataset],
        freqs=[freq],
        season_lengths=np.array([season_length(freq)], dtype=np.int32),
        domain=np.zeros(n, dtype=np.int32),
        domain_names=[name],
    )


many_series = st.lists(arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32, allow_infinity=False)), min_size=1, max_size=6)


def _same(a: SeriesStore, b: SeriesStore) -> None:
    for name in ARRAYS:
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes()
    for name in LISTS:
        assert getattr(a, name) == getattr(b, name)


def _is_mapped(values: object) -> bool:
    while values is not None and not isinstance(values, mmap):
        values = getattr(values, "base", None)
    return values is not None


@pytest.fixture(scope="module")
def two() -> SeriesStore:
    """A domain of an hourly dataset with a gap and a monthly one."""
    hourly = pd.DataFrame(
        {
            "unique_id": ["b", "b", "b", "a", "a"],
            "ds": pd.to_datetime(["2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 03:00", "2024-01-02 05:00", "2024-01-02 06:00"]),
            "y": [1.0, 2.0, 4.0, 5.0, 6.0],
        }
    )
    monthly = pd.DataFrame({"unique_id": "m", "ds": pd.date_range("2020-01-01", periods=5, freq="MS"), "y": np.arange(5.0)})
    return SeriesStore.from_frames("demo", {"hourly": read_frame(hourly), "monthly": read_frame(monthly)})


def test_when_frames_are_stored_then_series_lie_end_to_end_with_labels(two: SeriesStore) -> None:
    assert two.ids == ["a", "b", "m"]
    np.testing.assert_array_equal(two.series(0), [5, 6])
    np.testing.assert_array_equal(two.series(1), [1, 2, np.nan, 4])
    np.testing.assert_array_equal(two.lengths, [2, 4, 5])
    assert two.starts[0] == "2024-01-02T05:00:00"
    assert two.dataset.tolist() == [0, 0, 1]
    assert two.dataset_names == ["hourly", "monthly"]
    assert two.season_lengths.tolist() == [24, 12]
    assert two.domain_names == ["demo"]
    assert len(two) == 3


def test_when_an_index_is_outside_then_series_refuses_it(two: SeriesStore) -> None:
    np.testing.assert_array_equal(two.series(-1), two.series(2))
    with pytest.raises(IndexError):
        two.series(3)


def test_when_stamps_are_whole_numbers_then_starts_are_text() -> None:
    frame = pd.DataFrame({"unique_id": "a", "ds": np.arange(7, 12), "y": np.arange(5.0)})
    store = SeriesStore.from_frames("demo", {"steps": read_frame(frame)})
    assert store.starts == ["7"]
    assert store.season_lengths.tolist() == [1]


def test_when_there_is_no_series_then_it_is_refused() -> None:
    with pytest.raises(DataError, match="no series"):
        SeriesStore.from_frames("demo", {})


def test_when_a_value_does_not_fit_float32_then_dataset_and_row_are_named() -> None:
    frame = read_frame(pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2024", periods=3, freq="D"), "y": [1.0, 2.0, 3.0]}))
    frame.frame["y"] = [1.0, 1e39, 3.0]
    with pytest.raises(DataError, match=r"demo/big .*row 1"):
        SeriesStore.from_frames("demo", {"big": frame})


def test_when_the_store_is_written_to_then_it_refuses(two: SeriesStore) -> None:
    with pytest.raises(ValueError, match="read-only"):
        two.values[0] = 1.0


def test_when_parts_do_not_fit_then_the_store_is_refused(two: SeriesStore) -> None:
    parts = {name: getattr(two, name) for name in (*ARRAYS, *LISTS)}
    changes: list[dict[str, object]] = [
        {"offsets": np.array([0, 2, 6, 10])},
        {"offsets": np.array([0, 6, 2, 11])},
        {"ids": []},
        {"starts": ["x"]},
        {"dataset": np.array([0, 0, 2])},
        {"freqs": ["h"]},
    ]
    for change in changes:
        with pytest.raises(DataError, match="does not hold together"):
            SeriesStore(**(parts | change))


@settings(max_examples=20)
@given(series=many_series)
def test_when_a_store_is_saved_and_opened_then_every_byte_is_the_same(
    series: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = _store(series)
    folder = tmp_path_factory.mktemp("store") / "inner" / "one"
    store.save(folder)
    opened = SeriesStore.open(folder, verify=True)
    _same(store, opened)
    assert _is_mapped(opened.values)
    assert not _is_mapped(store.values)
    assert opened.fingerprint == store.fingerprint
    assert sorted(path.name for path in folder.parent.iterdir()) == ["one"]


@given(series=many_series, data=st.data())
def test_when_one_value_changes_then_the_fingerprint_changes(series: list[np.ndarray], data: st.DataObject) -> None:
    store = _store(series)
    values = store.values.copy()
    at = data.draw(st.integers(0, len(values) - 1))
    values[at] = 1.0 if np.isnan(values[at]) or values[at] == 0 else np.nextafter(values[at], np.float32(0))
    cut = np.cumsum([len(s) for s in series])[:-1]
    assert _store(np.split(values, cut)).fingerprint != store.fingerprint
    assert _store(np.split(store.values, cut)).fingerprint == store.fingerprint


def test_when_values_stay_and_borders_or_ids_move_then_the_fingerprint_changes() -> None:
    a, b = _store([np.ones(3), np.ones(4)]), _store([np.ones(4), np.ones(3)])
    assert a.fingerprint != b.fingerprint
    renamed = SeriesStore(**({name: getattr(a, name) for name in (*ARRAYS, *LISTS)} | {"ids": ["s0", "other"]}))
    assert renamed.fingerprint != a.fingerprint


def test_when_a_store_is_saved_over_another_then_it_replaces_it_and_open_maps_stay(tmp_path: Path) -> None:
    first, second = _store([np.arange(5.0)]), _store([np.arange(9.0)])
    first.save(tmp_path / "s")
    opened = SeriesStore.open(tmp_path / "s")
    second.save(tmp_path / "s")
    np.testing.assert_array_equal(opened.values, np.arange(5))
    _same(SeriesStore.open(tmp_path / "s"), second)
    SeriesStore.open(tmp_path / "s").save(tmp_path / "s")
    _same(SeriesStore.open(tmp_path / "s"), second)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_when_the_folder_holds_something_else_then_saving_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me", encoding="utf-8")
    with pytest.raises(SourceError, match="not a series store"):
        _store([np.ones(3)]).save(tmp_path / "letters")
    assert (tmp_path / "letters" / "dear.txt").read_text(encoding="utf-8") == "keep me"


def test_when_writing_fails_then_the_old_store_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _store([np.arange(5.0)])
    first.save(tmp_path / "s")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(SourceError, match="No space left"):
        _store([np.arange(9.0)]).save(tmp_path / "s")
    _same(SeriesStore.open(tmp_path / "s"), first)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_when_a_store_is_missing_or_damaged_then_opening_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no series store"):
        SeriesStore.open(tmp_path / "none")
    folder = tmp_path / "s"

    def fresh() -> dict[str, object]:
        _store([np.arange(5.0), np.arange(3.0)]).save(folder)
        return dict(json.loads((folder / "meta.json").read_text(encoding="utf-8")))

    meta = fresh()
    for change in ({"format": 99}, {"ids": ["a"]}, {"ids": "ab"}, {"ids": [1, 2]}, {"freqs": None}, {"fingerprint": 3}):
        (folder / "meta.json").write_text(json.dumps(meta | change), encoding="utf-8")
        with pytest.raises(SourceError, match="damaged"):
            SeriesStore.open(folder)
    (folder / "meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(SourceError, match="cannot be read"):
        SeriesStore.open(folder)
    fresh()
    np.save(folder / "values.npy", np.arange(8.0))
    with pytest.raises(SourceError, match="float64"):
        SeriesStore.open(folder)
    np.save(folder / "values.npy", np.arange(8, dtype=np.float32))
    SeriesStore.open(folder)
    with pytest.raises(SourceError, match="fingerprint"):
        SeriesStore.open(folder, verify=True)
    np.save(folder / "values.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match="cannot be read"):
        SeriesStore.open(folder)
    (folder / "values.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(SourceError, match="cannot be read"):
        SeriesStore.open(folder)


@given(series=many_series, data=st.data())
def test_when_series_are_chosen_then_concat_keeps_each_with_its_labels(series: list[np.ndarray], data: st.DataObject) -> None:
    left, right = _store(series, name="left", freq="h"), _store(series[::-1], name="right", freq="D")
    chosen = st.lists(st.integers(0, len(series) - 1), max_size=8)
    picks = [(left, data.draw(chosen)), (right, data.draw(chosen)), (left, data.draw(chosen))]
    wanted = [(store, i) for store, indices in picks for i in indices]
    if not wanted:
        with pytest.raises(DataError, match="no series is chosen"):
            SeriesStore.concat(picks)
        return
    joined = SeriesStore.concat(picks)
    assert len(joined) == len(wanted)
    for at, (store, i) in enumerate(wanted):
        assert joined.series(at).tobytes() == store.series(i).tobytes()
        assert joined.ids[at] == store.ids[i]
        assert joined.domain_names[joined.domain[at]] == store.domain_names[0]
        assert joined.freqs[joined.dataset[at]] == store.freqs[0]
    assert sorted(set(joined.domain.tolist())) == list(range(len(joined.domain_names)))
    assert sorted(set(joined.dataset.tolist())) == list(range(len(joined.dataset_names)))


def test_when_a_whole_store_is_joined_then_it_is_the_same_store(two: SeriesStore) -> None:
    _same(SeriesStore.concat([(two, [0, 1]), (two, [2])]), two)
    with pytest.raises(IndexError):
        SeriesStore.concat([(two, [3])])


@given(lengths=st.lists(st.integers(1, 3_000_000), min_size=1, max_size=8))
def test_when_a_store_is_cut_into_blocks_then_they_cover_its_series_in_order(lengths: list[int]) -> None:
    offsets = np.cumsum([0, *lengths])
    values = np.broadcast_to(np.float32(0), (int(offsets[-1]),))
    n = len(lengths)
    zeros = np.zeros(n, dtype=np.int32)
    store = SeriesStore(values, offsets, ["x"] * n, ["0"] * n, zeros, ["d"], ["h"], np.array([24]), zeros, ["d"])
    blocks = list(store.blocks())
    assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(n))
    assert all(offsets[block.stop - 1] - offsets[block.start] < 1 << 22 for block in blocks)


@pytest.mark.parametrize(("freq", "season"), [(freq, season) for season, freqs in SEASONS.items() for freq in freqs])
def test_when_a_frequency_is_given_then_its_season_is_known(freq: str | int, season: int) -> None:
    assert season_length(freq) == season


def test_when_bundled_domains_are_stored_then_they_round_trip(tmp_path: Path) -> None:
    stores = load_domains(DataSpec())
    assert len(stores) >= 8
    for name, store in stores.items():
        store.save(tmp_path / name)
        _same(SeriesStore.open(tmp_path / name, verify=True), store)

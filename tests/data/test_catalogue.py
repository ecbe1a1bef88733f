"""Domains from the bundle, the catalogue and a folder; the catalogue's cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedcast.cache import cache_folder
from fedcast.data import catalogue
from fedcast.data.catalogue import (
    DEFAULT_HELD_OUT,
    domain_names,
    load_domains,
    load_raw,
    raw_frames,
    split_domains,
)
from fedcast.data.sources import CLEAN_LICENCES, DATASETS, NOT_SHIPPED
from fedcast.errors import FrameError, SourceError, SpecError, UnknownNameError
from fedcast.spec import DataSpec

needs_data = pytest.mark.skipif(not os.environ.get("FEDCAST_DATA"), reason="FEDCAST_DATA is not set: no raw recordings")


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw folder that holds only the telemetry, tiny, and an empty cache."""
    root = tmp_path / "raw"
    (root / "anomaly").mkdir(parents=True)
    _write_telemetry(root, 0.0)
    monkeypatch.setenv("FEDCAST_DATA", str(root))
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path / "cache"))
    return root


def _write_telemetry(root: Path, shift: float) -> None:
    channels: dict[str, Any] = {f"train__{name}__telemetry": np.arange(40, dtype=np.float32) + shift for name in ("B", "A")}
    for name in ("smap", "msl"):
        np.savez(root / f"anomaly/nasa_{name}.npz", **channels, train__A__commands=np.zeros((40, 3), np.uint8), flat__telemetry=np.ones(40))


# names and splits


@pytest.mark.parametrize("source", ["bundled", "catalogue"])
def test_when_domains_are_held_out_by_default_then_they_are_known_and_ten_are_left_to_train_on(source: str) -> None:
    training, held_out = split_domains(DataSpec(source=source, held_out=DEFAULT_HELD_OUT[source]))
    assert sorted(training + held_out) == domain_names(source)
    assert len(training) >= 10
    assert len(held_out) >= 4


def test_when_names_are_given_then_only_those_are_loaded_in_that_order() -> None:
    stores = load_domains(DataSpec(), ["web", "health", "web"])
    assert list(stores) == ["web", "health"]
    assert stores["health"].dataset_names == ["flu_states", "flu_national", "births"]
    assert stores["health"].season_lengths.tolist() == [52, 52, 7]


def test_when_no_names_are_given_then_the_spec_says_what_is_loaded() -> None:
    stores = load_domains(DataSpec(domains=("nature",), held_out=("web",)))
    assert list(stores) == ["nature", "web"]


def test_when_a_domain_is_loaded_twice_then_its_fingerprint_is_the_same() -> None:
    first, second = (load_domains(DataSpec(), ["nature"])["nature"].fingerprint for _ in range(2))
    assert first == second


@pytest.mark.parametrize("source", ["bundled", "catalogue"])
def test_when_a_name_is_unknown_then_the_error_suggests_the_nearest(source: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown domain 'wether'") as error:
        load_domains(DataSpec(source=source), ["wether"])
    assert "weather" in error.value.hint


def test_when_a_spec_names_an_unknown_held_out_domain_then_it_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="'nowhere'"):
        load_domains(DataSpec(held_out=("nowhere",)))


def test_when_a_spec_contradicts_itself_then_the_domain_is_named() -> None:
    with pytest.raises(SpecError, match="'web' is in both"):
        split_domains(DataSpec(domains=("web", "wind"), held_out=("web",)))
    with pytest.raises(SpecError, match="every domain is held out"):
        split_domains(DataSpec(held_out=("a", "b")), ["a", "b"])


def test_when_nothing_is_named_then_all_domains_are_trained_on() -> None:
    assert split_domains(DataSpec()) == (domain_names("bundled"), [])
    assert split_domains(DataSpec(held_out=("b",)), ["c", "b", "a"]) == (["a", "c"], ["b"])


# folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two domains, one of them with two datasets."""
    frame = pd.DataFrame({"unique_id": "s", "ds": pd.date_range("2024-01-01", periods=40, freq="h"), "y": np.arange(40.0)})
    (tmp_path / "ward").mkdir()
    frame.to_csv(tmp_path / "shop.csv", index=False)
    frame.to_parquet(tmp_path / "ward" / "north.parquet")
    frame.to_csv(tmp_path / "ward" / "south.csv", index=False)
    return tmp_path


def test_when_the_source_is_a_folder_then_files_and_sub_folders_are_domains(folder: Path) -> None:
    stores = load_domains(DataSpec(source=str(folder)))
    assert sorted(stores) == domain_names(str(folder)) == ["shop", "ward"]
    assert stores["ward"].dataset_names == ["north", "south"]
    assert np.array_equal(stores["shop"].series(0), np.arange(40, dtype=np.float32))


def test_when_a_domain_is_not_wanted_then_its_files_are_not_read(folder: Path) -> None:
    (folder / "broken.csv").write_text("no,table\n", encoding="utf-8")
    assert list(load_domains(DataSpec(source=str(folder)), ["ward"])) == ["ward"]
    with pytest.raises(FrameError, match="broken"):
        load_domains(DataSpec(source=str(folder)))


def test_when_a_folder_lacks_the_domain_then_its_own_domains_are_suggested(folder: Path) -> None:
    with pytest.raises(UnknownNameError) as error:
        load_domains(DataSpec(source=str(folder)), ["shops"])
    assert "shop" in error.value.hint


def test_when_the_folder_does_not_exist_then_the_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        load_domains(DataSpec(source=str(tmp_path / "nowhere")))


# the catalogue's table


def test_when_the_table_is_read_then_every_row_is_complete_and_names_are_unique() -> None:
    keys = [(d.domain, d.name) for d in DATASETS]
    assert len(set(keys)) == len(keys)
    for dataset in DATASETS:
        assert dataset.licence in CLEAN_LICENCES | NOT_SHIPPED
        assert dataset.files
        assert all(not Path(file).is_absolute() and ".." not in file for file in dataset.files)
        assert all((dataset.origin, dataset.attribution, dataset.taken))


# the cache


def test_when_the_variable_is_not_set_then_the_catalogue_says_how_to_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCAST_DATA", raising=False)
    with pytest.raises(SourceError, match="FEDCAST_DATA is not set") as error:
        load_domains(DataSpec(source="catalogue"), ["nature"])
    assert "set FEDCAST_DATA" in error.value.hint


def test_when_the_variable_names_no_folder_then_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDCAST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match="not a folder"):
        load_raw("catalogue", "nature")


def test_when_a_raw_file_is_missing_then_the_dataset_is_named(raw: Path) -> None:
    with pytest.raises(SourceError, match=r"nature/sunspots needs .*sunspot"):
        load_raw("catalogue", "nature")


def test_when_a_domain_is_built_then_it_is_kept_and_opened_the_next_time(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = load_raw("catalogue", "spacecraft")
    assert built.ids == ["train__A", "train__B"] * 2
    assert built.freqs == ["1", "1"]
    monkeypatch.setattr(catalogue, "raw_frames", _fail)
    assert load_raw("catalogue", "spacecraft").fingerprint == built.fingerprint


def _fail(domain: str) -> None:
    raise SourceError(f"{domain} is built again", hint="it should have been opened from the cache")


def test_when_a_raw_file_changes_then_the_domain_is_built_again(raw: Path) -> None:
    before = load_raw("catalogue", "spacecraft").fingerprint
    _write_telemetry(raw, 1.0)
    after = load_raw("catalogue", "spacecraft").fingerprint
    assert before != after
    assert len(list((cache_folder() / "catalogue").iterdir())) == 2


def test_when_a_kept_store_is_damaged_then_it_is_built_again(raw: Path) -> None:
    before = load_raw("catalogue", "spacecraft").fingerprint
    (place,) = (cache_folder() / "catalogue").iterdir()
    (place / "values.npy").write_bytes(b"no array")
    assert load_raw("catalogue", "spacecraft").fingerprint == before


def test_when_the_cache_cannot_be_written_then_the_hint_names_the_variable(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError) as error:
        load_raw("catalogue", "spacecraft")
    assert "FEDCAST_CACHE" in error.value.hint


def test_when_no_cache_folder_is_set_then_it_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDCAST_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fedcast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fedcast"


# the real recordings


@needs_data
@pytest.mark.parametrize(
    ("domain", "series", "points"),
    [("nature", 3, 120_837), ("spacecraft", 108, 474_039), ("web", 25, 173_465), ("activity", 840, 1_464_612)],
)
def test_when_a_small_domain_is_built_from_the_recordings_then_nothing_is_lost(domain: str, series: int, points: int) -> None:
    frames = raw_frames("catalogue", domain)
    assert sum(long.frame["unique_id"].nunique() for long in frames.values()) == series
    assert sum(len(long.frame) for long in frames.values()) == points


@needs_data
def test_when_the_co2_record_is_read_then_its_holes_are_missing_and_its_values_exact() -> None:
    frame = raw_frames("catalogue", "nature")["co2"].frame.set_index("ds")["y"]
    assert 0.2 < frame.isna().mean() < 0.3
    assert 310 < frame.iloc[0] < 320
    assert 410 < frame.iloc[-1] < 420


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("domain", domain_names("catalogue"))
def test_when_a_domain_is_built_then_it_stays_under_the_cap_and_reopens_the_same(
    domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path))
    built = load_raw("catalogue", domain)
    assert 20_000 <= built.values.size <= 2_100_000
    assert (built.lengths >= 208).any()
    assert load_raw("catalogue", domain).fingerprint == built.fingerprint

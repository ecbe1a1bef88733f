"""The shipped data: what the card says is true, everything may be shipped, and all of it loads fast."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedcast.data.catalogue import DEFAULT_HELD_OUT, bundled_card, bundled_folder, bundled_frames, load_domains
from fedcast.data.check import check_frame
from fedcast.data.sources import CLEAN_LICENCES, DATASETS
from fedcast.data.store import SeriesStore
from fedcast.spec import DataSpec

LIMIT = 8 * 2**20
ENTRIES = [(domain, name, entry) for domain, datasets in bundled_card()["domains"].items() for name, entry in datasets.items()]
IDS = [f"{domain}/{name}" for domain, name, _ in ENTRIES]


def _files() -> dict[str, bytes]:
    folder = Path(str(bundled_folder()))
    return {str(path.relative_to(folder).as_posix()): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("domain", "name", "entry"), ENTRIES, ids=IDS)
def test_when_a_file_is_shipped_then_its_checksum_and_size_are_those_of_the_card(domain: str, name: str, entry: dict[str, Any]) -> None:
    data = (bundled_folder() / entry["file"]).read_bytes()
    assert entry["file"] == f"{domain}/{name}.parquet"
    assert len(data) == entry["bytes"]
    assert hashlib.sha256(data).hexdigest() == entry["sha256"]


def test_when_the_folder_is_listed_then_it_holds_the_card_and_the_datasets_and_stays_under_the_limit() -> None:
    files = _files()
    assert set(files) == {"card.json", "DATA_CARD.md"} | {entry["file"] for *_, entry in ENTRIES}
    assert sum(map(len, files.values())) <= LIMIT


@pytest.mark.parametrize(("domain", "name", "entry"), ENTRIES, ids=IDS)
def test_when_a_dataset_is_shipped_then_its_licence_allows_it_and_its_attribution_is_shown(
    domain: str, name: str, entry: dict[str, Any]
) -> None:
    recipe = next(d for d in DATASETS if (d.domain, d.name) == (domain, name))
    assert entry["licence"] == recipe.licence
    assert entry["licence"] in CLEAN_LICENCES
    text = (bundled_folder() / "DATA_CARD.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| {domain} | {name} |"))
    for part in (entry["licence"], entry["attribution"], entry["origin"], entry["sha256"]):
        assert part
        assert part in row


def test_when_domains_are_counted_then_there_are_enough_to_train_on_and_to_hold_out() -> None:
    domains = {domain for domain, *_ in ENTRIES}
    held_out = DEFAULT_HELD_OUT["bundled"]
    assert set(held_out) <= domains
    assert list(held_out) == bundled_card()["held_out"]
    assert len(domains - set(held_out)) >= 8
    assert len(held_out) >= 4


@pytest.mark.parametrize(("domain", "name", "entry"), ENTRIES, ids=IDS)
def test_when_a_dataset_is_read_then_it_is_a_valid_regular_long_frame_with_the_counts_of_the_card(
    domain: str, name: str, entry: dict[str, Any]
) -> None:
    long = bundled_frames(domain)[name]
    frame = long.frame
    lengths = frame.groupby("unique_id", sort=False).size()
    assert list(lengths.index) == sorted(lengths.index)
    assert (len(lengths), len(frame)) == (entry["series"], entry["points"])
    assert (lengths.min(), lengths.max()) == (entry["shortest"], entry["longest"])
    assert int(frame["y"].isna().sum()) == entry["missing"]
    for _, series in frame.groupby("unique_id", sort=False):
        expected = pd.date_range(series["ds"].iloc[0], periods=len(series), freq=entry["freq"])
        assert np.array_equal(series["ds"].to_numpy(), expected.to_numpy())
        assert np.nanstd(series["y"]) > 0
        assert np.isfinite(series["y"].iloc[[0, -1]]).all()
    assert check_frame(Path(str(bundled_folder() / entry["file"]))) == []


def test_when_all_domains_are_loaded_then_it_takes_under_three_seconds_and_each_has_enough_points() -> None:
    begin = time.perf_counter()
    stores = load_domains(DataSpec())
    seconds = time.perf_counter() - begin
    assert seconds < 3
    for domain, store in stores.items():
        assert isinstance(store, SeriesStore)
        assert store.domain_names == [domain]
        assert 20_000 <= np.isfinite(store.values).sum() <= 250_000
        assert store.lengths.max() >= 256 + 64
        # the default horizon needs 64 points to validate, 64 to test, 64 + 16 to train
        assert (store.lengths >= 208).all()


@pytest.mark.slow
def test_when_the_bundle_is_rebuilt_from_the_raw_recordings_then_the_bytes_are_the_same() -> None:
    if not os.environ.get("FEDCAST_DATA"):
        pytest.skip("FEDCAST_DATA is not set: the bundle cannot be rebuilt")
    path = Path(__file__).parents[2] / "scripts" / "make_bundle.py"
    spec = importlib.util.spec_from_file_location("make_bundle", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["make_bundle"] = script
    spec.loader.exec_module(script)
    files = script.build(Path(os.environ["FEDCAST_DATA"]))
    if json.loads(files["card.json"])["built_with"] != bundled_card()["built_with"]:
        pytest.skip("built with other versions of pyarrow, numpy or scipy: bytes may differ")
    assert files == _files()

"""The partitions: who holds what, which names say synthetic, and stores over real, synthesised and miniature data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedcast.data.catalogue import domain_names, load_raw
from fedcast.data.leakage import exposures, identity
from fedcast.data.medical import MEDICAL_SOURCES
from fedcast.data.medical.recordings import ECG, ICG
from fedcast.data.medical.strategies import medical_domains, site_sizes
from fedcast.data.sources import CLEAN_LICENCES
from fedcast.data.splits import split_store
from fedcast.errors import SourceError, UnknownNameError
from fedcast.evaluate.windows import evaluation_set
from fedcast.spec import DataSpec

STRATEGIES = [source for source in MEDICAL_SOURCES if "real" not in source]


def _held(source: str) -> dict[str, list[str]]:
    return {client: [dataset.name for dataset in datasets] for client, datasets in medical_domains(source).items()}


@pytest.mark.parametrize("source", STRATEGIES)
def test_when_a_partition_is_named_then_it_has_twenty_clients_and_says_what_is_synthetic(source: str) -> None:
    clients = medical_domains(source)
    assert [client.removesuffix("-synthetic") for client in clients] == [f"client_{i:02d}" for i in range(1, 21)]
    assert domain_names(source) == sorted(clients)
    for client, datasets in clients.items():
        made = {not dataset.files for dataset in datasets}
        assert made == {client.endswith("-synthetic")}  # never a real and a synthesised recording at one client
        assert all(dataset.name.endswith("_synthetic") != bool(dataset.files) for dataset in datasets)
        assert all(set(dataset.licence.split(", ")) <= CLEAN_LICENCES for dataset in datasets)


@pytest.mark.parametrize("kind", ["medical-{}", "medical-{}-100hz", "medical-{}-synthetic", "vital-signs-{}"])
def test_when_the_modality_differs_then_it_does_at_client_20_alone(kind: str) -> None:
    subjects, modality = medical_domains(kind.format("subjects")), medical_domains(kind.format("modality"))
    assert [client for client in subjects if subjects[client][0].taken != modality[client][0].taken] == [list(subjects)[-1]]
    odd = list(modality)[-1]
    assert modality[odd][0].name.startswith("icg")
    assert subjects[odd][0].name.startswith("ecg")
    people = [dataset.taken.split(":")[0].split(", ") for client in list(subjects)[:-1] for dataset in subjects[client]]
    assert len({name for held in people for name in held}) == sum(len(held) for held in people)  # nobody is at two clients


def test_when_persons_are_dealt_out_then_the_first_ten_clients_hold_two_each() -> None:
    clients = medical_domains("vital-signs-subjects")
    assert [len(datasets[0].files) for datasets in clients.values()] == [2] * 10 + [1] * 10
    assert clients["client_11"][0].files == ("medical/vital_signs/GDN0021/GDN0021_1_Resting.mat",)


def test_when_only_real_recordings_are_asked_for_then_none_is_synthesised_and_kinds_stand_apart() -> None:
    clients = _held("medical-real")
    assert sorted(clients) == sorted({f"{each.kind}_{each.subject}" for each in (*ECG, *ICG)})
    assert all(name.startswith(client[:3]) and not name.endswith("synthetic") for client, names in clients.items() for name in names)
    # ten seconds are too few at 100 Hz for a test window of 576 steps
    assert not any("ptbxl" in client for client in _held("medical-real-100hz"))


def test_when_sites_are_synthesised_then_their_sizes_fall_from_89_to_1() -> None:
    sizes = site_sizes()
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1], len(sizes)) == (89, 1, 20)


def test_when_a_source_is_unknown_then_the_nearest_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match="medical-subject") as error:
        medical_domains("medical-subject")
    assert "medical-subjects" in error.value.hint


def test_when_a_client_is_synthesised_then_no_raw_folder_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("neurokit2")
    monkeypatch.delenv("FEDCAST_DATA", raising=False)
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path))

    store = load_raw("medical-sites", "client_20-synthetic")

    assert (store.ids, store.dataset_names) == (["site20_0000:train", "site20_0001:test"], ["ecg_500hz_synthetic"])
    assert store.lengths.tolist() == [5000, 5000]
    assert (store.values.min(), store.values.max()) == (0.0, 1.0)
    with pytest.raises(SourceError, match="FEDCAST_DATA"):
        load_raw("medical-subjects", "client_01")


def test_when_a_synthesised_client_was_trained_on_then_it_is_seen_under_any_rate_and_others_are_not() -> None:
    data = DataSpec(source="medical-subjects-synthetic", domains=("client_20-synthetic",))
    found = exposures(data, "medical-subjects-synthetic-100hz", ["client_19-synthetic", "client_20-synthetic"])
    assert list(found.values()) == ["unseen", "seen"]
    assert identity("medical-sites", "client_20-synthetic") != identity("medical-subjects-synthetic", "client_20-synthetic")


def test_when_ptbxl_is_there_then_each_site_is_a_client_by_size_and_folds(ptbxl: Path) -> None:
    store = load_raw("ptbxl-sites", "client_20")
    parts = [name.split(":")[1] for name in store.ids]
    assert (parts.count("train"), parts.count("test")) == (11, 2)  # site 19: site 20 has nothing to test on
    assert set(store.lengths) == {900}
    splits = split_store(store, DataSpec(source="ptbxl-sites"), 64)
    assert splits.kept.all()


def test_when_ptbxl_has_too_few_sites_then_the_client_is_named(ptbxl: Path) -> None:
    path = ptbxl / "medical/ptbxl/ptbxl_database.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:60]))
    with pytest.raises(SourceError, match="no client 20"):
        load_raw("ptbxl-sites", "client_20")


@pytest.mark.parametrize(("source", "lengths"), [("vital-signs-subjects", [2000, 3000]), ("vital-signs-modality", [1000, 1500])])
def test_when_vital_signs_are_there_then_client_20_has_the_rate_of_its_kind(
    source: str, lengths: list[int], vital_signs_folder: Path
) -> None:
    assert load_raw(source, "client_20").lengths.tolist() == lengths
    first = load_raw(source, "client_01")
    assert first.dataset_names == ["ecg_2000hz"]
    assert first.ids == ["GDN0001_ecg:test", "GDN0001_ecg:train", "GDN0002_ecg:test", "GDN0002_ecg:train"]
    assert int(np.isnan(first.series(1)).sum()) == 20


def test_when_vital_signs_are_not_whole_then_the_missing_file_is_named(vital_signs_folder: Path) -> None:
    with pytest.raises(SourceError, match="GDN0003_1_Resting"):
        load_raw("vital-signs-subjects", "client_02")


@pytest.mark.parametrize("client", list(medical_domains("medical-real")))
def test_when_a_real_recording_is_loaded_then_it_has_the_length_and_the_windows_that_the_table_says(
    client: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wfdb")
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path))

    store = load_raw("medical-real", client)

    held = [each for each in (*ECG, *ICG) if f"{each.kind}_{each.subject}" == client]
    assert int(store.lengths.sum()) == sum(round(each.seconds * each.rate) for each in held)
    assert (np.nanmin(store.values), np.nanmax(store.values)) == (0.0, 1.0)
    assert np.isnan(store.values).mean() < 0.001
    splits = split_store(store, DataSpec(source="medical-real"), 64)
    assert splits.kept.all()
    test = evaluation_set(store, splits, "test", context=512, horizon=64, limit=32)
    assert len(test) == 32
    assert np.isfinite(test.context).mean() > 0.999

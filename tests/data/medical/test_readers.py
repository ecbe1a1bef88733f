"""Readers of medical recordings, over files that the libraries write."""

from __future__ import annotations

import gzip
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat
from tests.medical_records import wave, write_record

from fedcast.data.medical import readers
from fedcast.errors import MissingExtraError, SourceError


def test_when_a_record_is_read_then_each_wanted_channel_comes_with_its_rate(tmp_path: Path) -> None:
    signals = {"I": wave(800), "II": wave(800, 1)}
    write_record(tmp_path, "r1", 250, signals)

    found = readers.read_record(tmp_path, "r1", ["II"])

    assert list(found) == ["II"]
    assert found["II"].rate == 250.0
    assert np.allclose(found["II"].values, signals["II"], atol=1e-3)
    assert list(readers.read_record(tmp_path, "r1")) == ["I", "II"]


def test_when_a_signal_file_is_compressed_then_the_values_are_the_same(tmp_path: Path) -> None:
    write_record(tmp_path, "r1", 250, {"II": wave(800)})
    before = readers.read_record(tmp_path, "r1")["II"].values
    packed = gzip.compress((tmp_path / "r1.dat").read_bytes())
    (tmp_path / "r1.dat").unlink()
    (tmp_path / "r1.dat.gz").write_bytes(packed)

    assert np.array_equal(readers.read_record(tmp_path, "r1")["II"].values, before)


def test_when_a_record_lies_in_an_archive_then_it_is_read_from_there(tmp_path: Path) -> None:
    write_record(tmp_path, "00007_hr", 500, {"II": wave(800)})
    with tarfile.open(tmp_path / "some.tar.xz", "w:xz") as tar:
        for suffix in ("hea", "dat"):
            tar.add(tmp_path / f"00007_hr.{suffix}", f"00007_hr.{suffix}")

    found = readers.read_archived_record(tmp_path / "some.tar.xz", "00007_hr", ["II"])["II"]

    assert (found.rate, len(found.values)) == (500.0, 800)
    with pytest.raises(SourceError, match="no WFDB record '00008_hr'"):
        readers.read_archived_record(tmp_path / "some.tar.xz", "00008_hr")


def test_when_a_record_cannot_be_used_then_the_error_names_it(tmp_path: Path) -> None:
    write_record(tmp_path, "r1", 250, {"II": wave(800)})
    with pytest.raises(SourceError, match="no channel 'V9'") as error:
        readers.read_record(tmp_path, "r1", ["V9"])
    assert "II" in error.value.hint
    with pytest.raises(SourceError, match=r"no WFDB record .*r2"):
        readers.read_record(tmp_path, "r2")
    (tmp_path / "r1.dat").unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        readers.read_record(tmp_path, "r1")


def test_when_the_library_is_missing_then_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wfdb", None)
    with pytest.raises(MissingExtraError) as error:
        readers.read_record(tmp_path, "r1")
    assert "fedcast[medical]" in error.value.hint


def test_when_ptbxl_is_listed_then_records_without_a_site_are_left_out(ptbxl: Path) -> None:
    records = readers.ptbxl_records(ptbxl / "medical/ptbxl")
    assert list(records.columns) == ["ecg_id", "site", "strat_fold", "filename_hr"]
    assert len(records) == sum(30 - site for site in range(21)) + 40
    values = readers.ptbxl_lead(ptbxl / "medical/ptbxl", records[records["site"] == 19]["filename_hr"].iloc[0])
    assert values.shape == (900,)


def test_when_ptbxl_is_not_whole_then_the_error_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"ptbxl_database\.csv is missing"):
        readers.ptbxl_records(tmp_path)
    pd.DataFrame({"ecg_id": [1]}).to_csv(tmp_path / "ptbxl_database.csv")
    with pytest.raises(SourceError, match="not PTB-XL's list"):
        readers.ptbxl_records(tmp_path)
    write_record(tmp_path, "00001_lr", 100, {"II": wave(1000)})
    with pytest.raises(SourceError, match="100 Hz, not 500"):
        readers.ptbxl_lead(tmp_path, "00001_lr")


def test_when_vital_signs_are_read_then_both_waveforms_keep_their_rates(vital_signs_folder: Path) -> None:
    path = vital_signs_folder / "medical/vital_signs/GDN0001/GDN0001_1_Resting.mat"
    ecg, icg = readers.vital_signs(path, "ecg"), readers.vital_signs(path, "icg")
    assert (ecg.rate, ecg.values.shape, icg.rate, icg.values.shape) == (2000.0, (5000,), 1000.0, (2500,))
    assert np.isnan(ecg.values[700:720]).all()


def test_when_a_vital_signs_file_lacks_a_waveform_then_it_is_named(tmp_path: Path) -> None:
    savemat(tmp_path / "x.mat", {"tfm_ecg1": np.ones(3)})
    with pytest.raises(SourceError, match="'tfm_ecg2'"):
        readers.vital_signs(tmp_path / "x.mat", "ecg")


def test_when_small_text_files_are_read_then_their_values_are_given(tmp_path: Path) -> None:
    (tmp_path / "ecg.csv").write_text("date,ecg\na,1.5\nb,2.5\n")
    assert readers.read_text_column(tmp_path / "ecg.csv").tolist() == [1.5, 2.5]
    (tmp_path / "ecg.txt").write_text("# Sampling Rate (Hz):= 1000.00\n2044.0\n2045.0\n")
    with tarfile.open(tmp_path / "b.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "ecg.txt", "ecg.txt")
    assert readers.read_biosppy(tmp_path / "b.tar.xz", "ecg.txt").tolist() == [2044.0, 2045.0]
    with pytest.raises(SourceError, match=r"no 'eda.txt'"):
        readers.read_biosppy(tmp_path / "b.tar.xz", "eda.txt")

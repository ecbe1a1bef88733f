"""Miniature data sets in the layout of the true ones, written by the libraries that the true ones were written by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import savemat
from tests.medical_records import wave, write_record


@pytest.fixture
def ptbxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw folder with 20 sites of PTB-XL: site ``s`` has 30 - s records in folds 1 to 8 and two later ones; site 20 has none later."""
    root = tmp_path / "raw"
    rows, number = [], 0
    for site in range(21):
        for k in range(30 - site):
            rows.append((number, float(site), 1 + k % 8))
            number += 1
        for fold in (9, 10) if site < 20 else ():
            rows.append((number, float(site), fold))
            number += 1
    table = pd.DataFrame(rows, columns=["ecg_id", "site", "strat_fold"])
    table.loc[len(table)] = [number, np.nan, 3]
    table["filename_hr"] = [f"records500/00000/{i:05.0f}_hr" for i in table["ecg_id"]]
    folder = root / "medical" / "ptbxl"
    for i in table.index[table["site"] == 19]:
        write_record(folder / "records500/00000", f"{i:05d}_hr", 500, {"I": wave(900, i), "II": wave(900, i + 1000)})
    table.to_csv(folder / "ptbxl_database.csv", index=False)
    monkeypatch.setenv("FEDCAST_DATA", str(root))
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path / "cache"))
    return root


@pytest.fixture
def vital_signs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A raw folder with subjects 1, 2 and 30 of Vital Signs, two and a half seconds of each."""
    root = tmp_path / "raw"
    for number in (1, 2, 30):
        name = f"GDN{number:04d}"
        folder = root / "medical" / "vital_signs" / name
        folder.mkdir(parents=True)
        ecg, icg = wave(5000, number), wave(2500, 100 + number)
        ecg[700:720] = np.nan
        content = {"tfm_ecg2": ecg[:, None], "tfm_icg": icg[:, None], "fs_ecg": 2000, "fs_icg": 1000}
        savemat(folder / f"{name}_1_Resting.mat", content)
    monkeypatch.setenv("FEDCAST_DATA", str(root))
    monkeypatch.setenv("FEDCAST_CACHE", str(tmp_path / "cache"))
    return root

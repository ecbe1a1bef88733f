"""Small WFDB records for tests, written by the library ``wfdb``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray


def write_record(folder: Path, name: str, rate: float, signals: dict[str, NDArray[np.float64]]) -> None:
    """Write a WFDB record of format 16."""
    wfdb = pytest.importorskip("wfdb")
    folder.mkdir(parents=True, exist_ok=True)
    wfdb.wrsamp(
        name,
        fs=rate,
        units=["mV"] * len(signals),
        sig_name=list(signals),
        p_signal=np.stack(list(signals.values()), axis=1),
        fmt=["16"] * len(signals),
        write_dir=str(folder),
    )


def wave(length: int, seed: int = 0) -> NDArray[np.float64]:
    """Return a wave with noise, in mV."""
    noise = np.random.default_rng(seed).normal(0, 0.05, length)
    return np.sin(np.arange(length) / 20) + noise

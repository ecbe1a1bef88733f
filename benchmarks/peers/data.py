"""The data of ``round_time.py``: random walks with a daily season, one series a client, and windows cut from them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.peers.common import Setting

LENGTH = 20_000
TRAINING, TEST = 0.7, 0.8  # fedcast trains on the first 70 % of a series, and tests on its last 20 %


def write_data(setting: Setting) -> None:
    """Write the series for fedcast, and for its peers as many windows as one round of local steps reads: an epoch of theirs.

    PFLlib keeps a quarter of its windows for tests, so there are a third as many test windows as training windows.
    """
    rng = np.random.default_rng(0)
    setting.series.mkdir(parents=True)
    training = setting.batch * setting.steps
    for client in range(setting.clients):
        season = np.sin(2 * np.pi * np.arange(LENGTH) / 24)
        values = (np.cumsum(rng.standard_normal(LENGTH)) + 3 * season + 50).astype(np.float32)
        frame = pd.DataFrame({"ds": pd.date_range("2020-01-01", periods=LENGTH, freq="h"), "y": values})
        frame.to_parquet(setting.series / f"client{client:03d}.parquet")
        cut = {"train": values[: int(TRAINING * LENGTH)], "test": values[int(TEST * LENGTH) :]}
        for part, count in {"train": training, "test": max(1, training // 3)}.items():
            contexts, targets = _windows(cut[part], count, setting, rng)
            np.savez(setting.windows(client, part), contexts=contexts, targets=targets)


def _windows(
    values: NDArray[np.float32], count: int, setting: Setting, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    width = setting.context + setting.horizon
    starts = rng.integers(0, len(values) - width + 1, count)
    rows = np.lib.stride_tricks.sliding_window_view(values, width)[starts]
    return np.ascontiguousarray(rows[:, : setting.context]), np.ascontiguousarray(rows[:, setting.context :])

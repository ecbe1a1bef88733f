from __future__ import annotations

import numpy as np

from fedcast.training.memory import peak_bytes, reset_peak


def test_when_memory_is_taken_and_given_back_then_the_peak_remembers_it() -> None:
    reset_peak()
    before = peak_bytes()
    held = np.ones(2**25)  # 256 MiB
    assert held.sum() == 2**25
    del held
    assert peak_bytes() >= before + 2**27

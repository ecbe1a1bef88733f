from __future__ import annotations

import pytest

from fedcast.spec import TrainingSpec
from fedcast.training.loop import learning_rate


def test_when_training_goes_on_then_the_rate_rises_and_then_falls_to_its_floor() -> None:
    training = TrainingSpec(learning_rate=1.0, warmup=0.1, final_rate=0.05)
    rates = [learning_rate(training, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


def test_when_the_schedule_is_constant_then_the_rate_stays() -> None:
    training = TrainingSpec(learning_rate=2.0, warmup=0.0, schedule="constant")
    assert {learning_rate(training, step, 10) for step in range(10)} == {2.0}

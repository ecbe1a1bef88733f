"""The loss around final models."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.federations import small_spec, train_small

from fedcast.errors import RunError
from fedcast.run.landscape import surroundings


def test_when_the_loss_around_runs_is_asked_for_then_progress_is_told_and_the_middle_is_the_loss(tmp_path: Path) -> None:
    runs = [train_small(small_spec("zero_shot"), tmp_path / name).folder for name in ("a", "b")]
    told: list[int] = []
    one, two = surroundings(runs, windows=4, grid=3, progress=told.append)
    assert told == list(range(1, 2 * (3**2 + 2) + 1))
    assert one.landscape is not None
    assert one.landscape.losses[1, 1] == pytest.approx(one.loss, rel=1e-6)
    assert (one.loss, one.sharpness) == (two.loss, two.sharpness)


def test_when_a_run_ends_in_a_mixture_then_it_is_refused(tmp_path: Path) -> None:
    run = train_small(small_spec("fedtrl", rounds=1, local_steps=1), tmp_path / "run").folder
    with pytest.raises(RunError, match="mixture of models"):
        surroundings([run])

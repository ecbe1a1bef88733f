from __future__ import annotations

import json
from pathlib import Path

import torch
from benchmarks.step import Trainee, full_batch

from benchmarks import floor, stacked


def test_when_stacks_and_workers_run_quickly_then_each_way_has_a_rate_and_the_conclusion_follows_from_them(tmp_path: Path, capsys) -> None:
    path = tmp_path / "out.json"

    stacked.main(["--quick", "--output", str(path)])

    document = json.loads(path.read_text())
    row = document["rows"][0]
    rates = row["rates"]
    workers = max(rate for name, rate in rates.items() if name.startswith("workers"))
    stacks = max(rate for name, rate in rates.items() if not name.startswith("workers"))
    assert min(rates.values()) > 0
    assert len(rates) >= 3
    assert row["stacked_over_workers"] == stacks / workers
    assert bool(document["wins"]) == (stacks > workers)
    assert f"in {len(document['wins'])} of 1 settings" in capsys.readouterr().out


def test_when_clients_are_stacked_then_each_has_the_gradient_it_has_alone() -> None:
    config = floor.configuration("nano", 64, 32)
    batch = full_batch(3, 64, 32)
    alone = Trainee(stacked.TORCH, config, batch).gradient()
    stack = stacked.Stack(config, batch, 2)

    first, second = stack.gradients().clone()

    assert float((first - alone).norm() / alone.norm()) < 0.03
    assert not torch.equal(first, second)


def test_when_a_stack_takes_steps_then_every_client_learns_its_own_windows() -> None:
    config = floor.configuration("nano", 64, 16)
    stack = stacked.Stack(config, full_batch(2, 64, 16), 2)
    before = stack.weights.clone()

    for _ in range(2):
        stack()

    assert bool((stack.weights != before).any(dim=1).all())
    assert bool(stack.weights.isfinite().all())

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from benchmarks.peers import fedcast_rounds
from benchmarks.peers.common import Gate, Network, Setting, heldout_loss
from benchmarks.peers.data import write_data
from benchmarks.peers.pfllib import PFLlib
from benchmarks.peers.plain import Plain
from benchmarks.peers.processes import Contestant, Running
from torch import Tensor

from fedcast.models.patch import PatchTransformer


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    found = Setting(str(tmp_path), size="nano", batch=16, steps=6, clients=2, context=64, horizon=16, rounds=3)
    write_data(found)
    return found


def update(model: PatchTransformer, setting: Setting) -> Tensor:
    """Return how far training has moved the weights, as one vector."""
    start = PatchTransformer(setting.config(), seed=0)
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return torch.cat([(mine.detach() - theirs.detach()).reshape(-1) for mine, theirs in pairs])


def distance(mine: Tensor, theirs: Tensor) -> float:
    """Return the relative distance of two updates."""
    return float((mine - theirs).norm() / theirs.norm())


def test_when_windows_come_in_the_same_order_then_pfllibs_loop_gives_the_plain_loops_model(setting: Setting) -> None:
    plain = Plain(setting, shuffle=False)
    pfllib = PFLlib(setting, shuffle=False)
    shipped = PFLlib(setting, shuffle=False, shipped=True)

    for loop in (plain, pfllib, shipped):
        loop.round()

    assert distance(update(pfllib.network.model, setting), update(plain.network.model, setting)) < 1e-3
    assert distance(update(shipped.network.model, setting), update(plain.network.model, setting)) < 1e-3


@pytest.mark.parametrize("loop", [Plain, PFLlib])
def test_when_a_peer_runs_rounds_then_the_loss_on_other_windows_falls(loop: type[Plain | PFLlib], setting: Setting) -> None:
    torch.manual_seed(0)  # of the order of windows
    before = heldout_loss(Network(setting).model, setting)
    peer = loop(setting)

    for _ in range(setting.rounds):
        peer.round()

    assert heldout_loss(peer.network.model, setting) < before


def write_single_window(setting: Setting) -> None:
    """Write series with room for one training window only, so that every draw of every loop is that window."""
    rng = np.random.default_rng(0)
    setting.series.mkdir(parents=True)
    for client in range(setting.clients):
        values = np.cumsum(rng.standard_normal(64)).astype(np.float32)  # 32 steps to train on, then 16 and 16
        frame = pd.DataFrame({"ds": pd.date_range("2020-01-01", periods=64, freq="h"), "y": values})
        frame.to_parquet(setting.series / f"client{client:03d}.parquet")
        context = np.concatenate([np.full(setting.context - 16, np.nan, dtype=np.float32), values[:16]])
        rows = setting.batch * setting.steps
        windows = {"contexts": np.tile(context, (rows, 1)), "targets": np.tile(values[16:32], (rows, 1))}
        for part in ("train", "test"):
            np.savez(setting.windows(client, part), **windows)


def test_when_every_draw_is_the_same_window_then_fedcasts_rounds_give_the_plain_loops_model(tmp_path: Path) -> None:
    # Small patches: a context of one patch has nothing to attend to, and AdamW would blow its gradients' rounding up to full steps.
    setting = Setting(str(tmp_path), size="nano", batch=4, steps=3, clients=2, context=64, horizon=16, rounds=2, patch=4)
    write_single_window(setting)
    plain = Plain(setting)
    reading, words = os.pipe()
    reports, writing = os.pipe()
    with os.fdopen(words, "w") as mouth:
        mouth.write("round\n" * setting.rounds)
    gate = Gate(reading, writing)
    threads = torch.get_num_threads()

    model = fedcast_rounds.run(setting, gate, overrides=["training.precision=float32"])
    torch.set_num_threads(threads)
    for _ in range(setting.rounds):
        plain.round()

    gate.close()
    os.close(reports)
    assert distance(update(model, setting), update(plain.network.model, setting)) < 1e-3


@pytest.mark.slow
@pytest.mark.skipif("PFL_PYTHON" not in os.environ, reason="PFL_PYTHON names no python with pfl")
def test_when_pfl_research_runs_a_round_then_its_model_is_the_plain_loops(setting: Setting) -> None:
    plain = Plain(setting, shuffle=False)
    plain.round()

    process = Running(Contestant("pfl", "pfl-research", python=os.environ["PFL_PYTHON"]), setting)
    try:
        process.wait()
        process.round()
        last = process.stop()
    finally:
        process.close()

    assert last["heldout_loss"] == pytest.approx(heldout_loss(plain.network.model, setting), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif("FLOWER_PYTHON" not in os.environ, reason="FLOWER_PYTHON names no python with flwr[simulation]")
def test_when_flower_runs_rounds_then_the_loss_falls(setting: Setting) -> None:
    process = Running(Contestant("flower", "flower", {"cpus": 1}, python=os.environ["FLOWER_PYTHON"]), setting)
    try:
        process.wait()
        reports = [process.round() for _ in range(setting.rounds)]
        last = process.stop()
    finally:
        process.close()

    assert all(report["seconds"] > 0 for report in reports)
    assert last["heldout_loss"] < heldout_loss(Network(setting).model, setting)

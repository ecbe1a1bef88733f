"""Clipping: at the site, at the server where the site did not, and in a run on both fleets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.federated.guards.rounds import Recorded, guarded
from tests.federations import small_spec, train_small
from torch import Tensor

from fedcast.federated.guards.base import Arrival, Outgoing
from fedcast.federated.guards.clip import Clip


def outgoing(shared: Tensor, received: Tensor) -> Outgoing:
    return Outgoing("a", 1, {"shared": shared}, {"shared": received}, 1, {}, {}, {}, np.random.default_rng(0), simulated=True)


@given(
    length=st.floats(1e-3, 1e6),
    bound=st.floats(1e-2, 1e3),
    seed=st.integers(0, 1000),
)
def test_when_an_update_is_clipped_then_its_length_is_within_the_bound_and_its_direction_the_same(
    length: float, bound: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(64, generator=generator)
    direction /= direction.norm()
    sent = outgoing(direction * length, torch.zeros(64))
    Clip(norm=bound).encode(sent)
    got = sent.tensors["shared"]
    assert float(got.norm()) == pytest.approx(min(length, bound), rel=1e-4)
    assert float(got @ direction) == pytest.approx(float(got.norm()), rel=1e-4)


def test_when_an_update_is_short_enough_then_no_byte_of_it_changes() -> None:
    shared, began = torch.randn(1000), torch.randn(1000)
    came = Arrival("a", {"shared": shared}, {}, {"shared": began}, 1)
    Clip(norm=float((shared - began).norm()) + 1).inspect(came)
    assert came.tensors["shared"] is shared


def test_when_a_site_has_clipped_then_the_server_changes_no_byte() -> None:
    began = torch.randn(5000)
    sent = outgoing(began + torch.randn(5000), began)
    Clip(norm=2.0).encode(sent)
    came = Arrival("a", dict(sent.tensors), {}, {"shared": began}, 1)
    Clip(norm=2.0).inspect(came)
    assert came.tensors["shared"] is sent.tensors["shared"]


def test_when_a_site_does_not_clip_then_the_server_does() -> None:
    began = torch.zeros(4)
    came = Arrival("a", {"shared": torch.full((4,), 1e30)}, {}, {"shared": began}, 1)
    Clip(norm=1.0).inspect(came)
    assert torch.allclose(came.tensors["shared"], torch.full((4,), 0.5))


def test_when_a_site_adapts_alone_then_there_is_nothing_to_clip() -> None:
    sent = Outgoing("a", 1, {}, {}, 1, {}, {}, {}, np.random.default_rng(0), simulated=True)
    Clip().encode(sent)
    assert sent.tensors == {}


def test_when_updates_are_longer_than_the_bound_then_the_model_moves_no_farther(recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedavg")
    free, _ = round_.play(round_.replies, [])
    bound = float((free.shared - round_.before.shared).norm()) / 2
    after, row = round_.play(round_.replies, [{"name": "clip", "norm": bound}])
    assert row["dropped"] == {}
    assert 0 < float((after.shared - round_.before.shared).norm()) <= bound * (1 + 1e-4)


@pytest.mark.slow
def test_when_a_run_clips_then_threads_and_processes_give_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for fleet in ("threads", "processes"):
        spec = guarded(small_spec("fedavg", rounds=2, fleet=fleet), [{"name": "clip", "norm": 1e-3}, {"name": "screen"}])
        digests.add(train_small(spec, tmp_path / fleet).results().weights_sha256.iloc[0])
    assert len(digests) == 1
    free = train_small(small_spec("fedavg", rounds=2), tmp_path / "free")
    assert free.results().weights_sha256.iloc[0] not in digests

"""FedProx, SCAFFOLD and FedDyn: their terms are there, and they remove the bias that FedAvg keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federations import small_spec, train_small
from torch import Tensor, nn

from fedcast.methods.base import Client, Method, Server, Update, build_method
from fedcast.spec import MethodSpec
from fedcast.training.flat import FlatParameters, Layout

# Two sites with one-dimensional quadratic losses a_k / 2 (w - b_k)^2 of unlike curvature: the minimum of their mean is not the mean
# of their minima, and several local steps pull FedAvg to the latter.
CURVATURE, MINIMUM = (1.0, 8.0), (-1.0, 2.0)
OPTIMUM = sum(a * b for a, b in zip(CURVATURE, MINIMUM, strict=True)) / sum(CURVATURE)
STEPS, RATE = 20, 0.05


@dataclass
class _Site:
    """A site of the toy federation, with the state that a method keeps there."""

    curvature: float
    minimum: float
    state: dict[str, Tensor] = field(default_factory=dict)

    def train(self, method: Method, received: dict[str, Tensor]) -> dict[str, Tensor]:
        module = nn.Linear(1, 1, bias=False)
        layout = Layout.of({"weight": module.weight}, lambda name: True)
        parameters = FlatParameters({"weight": module.weight}, layout, torch.float32)
        parameters.vector.copy_(received["shared"])
        unused: Any = None
        client = Client("a", 1, 1, unused, nn.ModuleDict(), unused, parameters, received, unused, self.state, np.random.default_rng(0))
        for _ in range(STEPS):
            parameters.gradient.copy_(self.curvature * (parameters.vector - self.minimum))
            correction = method.correction(client)
            step = parameters.gradient if correction is None else parameters.gradient + correction
            parameters.vector.sub_(RATE * step)
        reply = method.reply(client)
        return {"shared": parameters.vector.clone(), **reply}


def _limit(name: str, rounds: int = 300, **options: float) -> float:
    """Where the server's weight ends up."""
    method = build_method(MethodSpec(name=name, options=options))
    sites = [_Site(a, b) for a, b in zip(CURVATURE, MINIMUM, strict=True)]
    server = Server(Layout(("weight",), ((1, 1),), 1), torch.zeros(1), torch.zeros(0), {}, 0, rounds, sites=2)
    for number in range(1, rounds + 1):
        server.round, server.log = number, {}
        replies = [site.train(method, method.message(server, "a")) for site in sites]
        method.aggregate(server, [Update(str(i), reply, 1) for i, reply in enumerate(replies)])
    return float(server.shared)


def test_when_sites_differ_then_fedavg_is_biased_and_scaffold_and_feddyn_are_not() -> None:
    bias = abs(_limit("fedavg") - OPTIMUM)
    assert bias > 0.3
    assert abs(_limit("scaffold") - OPTIMUM) < 1e-3
    assert abs(_limit("feddyn", alpha=1.0) - OPTIMUM) < 1e-3
    assert abs(_limit("fedprox", mu=4.0) - OPTIMUM) < 0.6 * bias


def test_when_fedprox_trains_then_its_term_is_not_zero_and_pulls_to_the_received_weights(tmp_path: Path) -> None:
    near, far, released = (
        train_small(small_spec("fedprox", rounds=1, local_steps=20, **options), tmp_path / name)
        for name, options in (("near", {"mu": 100.0}), ("far", {"mu": 1e-6}), ("released", {"as_released": True}))
    )
    drift = [next(iter(run.rows("round")[0]["sites"].values())).get("proximal") for run in (near, far, released)]
    assert drift[0] is not None
    assert drift[1] is not None
    assert 0 < drift[0] < 0.5 * drift[1]
    assert drift[2] is None


def test_when_mu_is_zero_then_fedprox_is_fedavg(tmp_path: Path) -> None:
    prox = train_small(small_spec("fedprox", mu=0.0), tmp_path / "prox")
    avg = train_small(small_spec("fedavg"), tmp_path / "avg")
    assert prox.results().weights_sha256.iloc[0] == avg.results().weights_sha256.iloc[0]


@pytest.mark.parametrize(("method", "factor"), [("fedprox", 1), ("feddyn", 1), ("scaffold", 2)])
def test_when_a_round_is_over_then_as_many_bytes_travelled_as_the_method_says(method: str, factor: int, tmp_path: Path) -> None:
    own, avg = (train_small(small_spec(name, rounds=1, local_steps=1), tmp_path / name).rows("round")[0] for name in (method, "fedavg"))
    assert own["bytes_up"] == factor * avg["bytes_up"]
    assert own["bytes_down"] == factor * avg["bytes_down"]


def test_when_fedper_trains_then_only_the_heads_stay(tmp_path: Path) -> None:
    run = train_small(small_spec("fedper", rounds=1, local_steps=1), tmp_path / "fedper")
    avg = train_small(small_spec("fedavg", rounds=1, local_steps=1), tmp_path / "fedavg")
    heads = 128 * 16 * 10 + 16 * 10
    assert avg.rows("round")[0]["bytes_down"] - run.rows("round")[0]["bytes_down"] == 3 * 4 * heads

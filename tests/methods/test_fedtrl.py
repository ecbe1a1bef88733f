from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcast.methods.base import Server, Update
from fedcast.methods.fedtrl import FedTRL, align, entropic_weights, reverse_gradient
from fedcast.training.flat import Layout


def vectors(clients: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(clients, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 8), st.integers(0, 10_000), st.floats(0.01, 10))
def test_when_weights_are_entropic_then_they_solve_the_regularised_problem(clients: int, seed: int, tau: float) -> None:
    prototypes = vectors(clients, 6, seed)
    prior = torch.rand(clients, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    weights, distances, used = entropic_weights(prototypes, prior, tau=tau)
    assert used == tau
    assert weights.sum().item() == pytest.approx(1)

    def objective(w: torch.Tensor) -> float:
        return float((w * distances).sum() + tau * (w * (w / (prior / prior.sum())).log()).sum())

    best = objective(weights)
    for other in torch.distributions.Dirichlet(torch.ones(clients, dtype=torch.float64)).sample((50,)):
        assert best <= objective(0.9 * weights + 0.1 * other) + 1e-9


def test_when_tau_is_huge_and_gamma_one_then_the_weights_are_fedavgs() -> None:
    samples = torch.tensor([100.0, 300.0, 600.0], dtype=torch.float64)
    weights, _, _ = entropic_weights(vectors(3, 8, 0), samples, tau=1e9)
    assert torch.allclose(weights, samples / samples.sum())


def test_when_one_prototype_is_far_then_its_weight_is_smallest() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.95, 0.05], [-1.0, 0.2]], dtype=torch.float64)
    weights, distances, _ = entropic_weights(prototypes, torch.ones(4, dtype=torch.float64))
    assert weights.argmin().item() == 3
    assert distances.argmax().item() == 3


def test_when_barycentre_is_wasserstein_then_distances_are_those_of_diagonal_gaussians() -> None:
    prototypes, deviations = vectors(3, 4, 1), vectors(3, 4, 2).abs()
    weights, distances, _ = entropic_weights(prototypes, torch.ones(3, dtype=torch.float64), tau=1e9, deviations=deviations)
    mean, deviation = prototypes.mean(0), deviations.mean(0)
    expected = (prototypes - mean).square().sum(1) + (deviations - deviation).square().sum(1)
    assert torch.allclose(weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.allclose(distances, expected)


def test_when_gradient_is_reversed_then_forward_is_identity_and_backward_is_minus_strength() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = reverse_gradient(x, 0.5)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, -0.5))


def test_when_aligning_then_the_loss_is_the_mean_over_sub_domains_present() -> None:
    means = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]], requires_grad=True)
    labels = torch.tensor([5, 5, 2])
    prototype = torch.tensor([10.0, 0.0], requires_grad=True)
    loss = align(means, labels, prototype)
    # Sub-domain 5 points along the barycentre (distance 0), sub-domain 2 at a right angle (squared distance 2).
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    assert prototype.grad is None
    assert means.grad is not None


def server_of(width: int) -> Server:
    layout = Layout(("encoder.a", "decoder.b"), ((width,), (2,)), 1)
    return Server(layout, torch.zeros(width), torch.zeros(0), {}, 1, 10)


def updates_of(prototypes: torch.Tensor, samples: list[int]) -> list[Update]:
    return [
        Update(f"s{i}", {"shared": torch.full((3,), float(i)), "private": torch.full((2,), float(i)), "prototype": p.float()}, n)
        for i, (p, n) in enumerate(zip(prototypes, samples, strict=True))
    ]


@pytest.mark.parametrize(("aggregation", "expected"), [("uniform", 0.5), ("samples", 0.9)])
def test_when_aggregation_is_an_ablation_then_the_mean_has_its_weights(aggregation: str, expected: float) -> None:
    server = server_of(3)
    FedTRL(aggregation=aggregation).aggregate(server, updates_of(vectors(2, 3, 0), [10, 90]))
    assert server.shared.tolist() == pytest.approx([expected] * 3)
    # The shadow decoder for unseen domains has the same weights.
    assert server.private.tolist() == pytest.approx([expected] * 2)
    assert server.log["weights"] == pytest.approx({"s0": 1 - expected, "s1": expected})


def test_when_aggregating_then_barycentre_and_similarity_are_kept() -> None:
    server, prototypes = server_of(3), vectors(4, 3, 3)
    method = FedTRL()
    method.aggregate(server, updates_of(prototypes, [10, 20, 30, 40]))
    weights = torch.tensor(list(server.log["weights"].values()), dtype=torch.float64)
    assert torch.allclose(server.tensors["prototype"].double(), weights @ prototypes, atol=1e-6)
    assert torch.allclose(torch.tensor(server.log["similarity"]).diagonal(), torch.ones(4))
    assert set(method.message(server, "s0")) == {"shared", "prototype"}
    assert math.isclose(weights.sum().item(), 1)


def test_when_sites_are_many_then_the_row_of_a_round_does_not_grow_with_their_square() -> None:
    server = server_of(3)
    FedTRL().aggregate(server, updates_of(vectors(65, 3, 0), [10] * 65))
    assert "similarity" not in server.log
    assert len(server.log["distances"]) == len(server.log["weights"]) == 65


def test_when_only_the_encoder_travels_then_nothing_else_is_shared() -> None:
    assert FedTRL().shares("encoder.blocks.0.weight")
    assert not FedTRL().shares("decoder.queries")
    assert FedTRL(travels="all").shares("decoder.queries")

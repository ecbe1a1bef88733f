"""The plane of losses through a model's weights, and how sharply the loss bends there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.batches import batch_of
from torch import Tensor, nn

from fedcast.data.windows import Batch
from fedcast.errors import ModelError
from fedcast.models.base import ModelConfig
from fedcast.models.patch import PatchTransformer
from fedcast.tasks.forecast import ForecastTask
from fedcast.training.landscape import loss_landscape, sharpness

EIGENVALUES = (-1.0, 0.5, 2.0, 3.5)


class Bowl(nn.Module):
    """A quadratic ``w^T H w / 2`` with known eigenvalues, beside a weight that the loss is linear in and one that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
        self.hessian = turn @ torch.diag(torch.tensor(EIGENVALUES)) @ turn.T
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        self.slope = nn.Parameter(torch.ones(2))
        self.unread = nn.Parameter(torch.ones(3))

    def loss(self) -> Tensor:
        return self.weight @ self.hessian @ self.weight / 2 + self.slope.sum()


class Net(nn.Module):
    """Nineteen weights and a curved loss."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.second = nn.Parameter(torch.randn(7, generator=generator)[:4])
        self.bias = nn.Parameter(torch.zeros(3))
        self.x = torch.randn(32, 3, generator=generator)
        self.y = torch.randn(32, generator=generator)

    def loss(self) -> Tensor:
        return self.of(self.first, self.second, self.bias)

    def of(self, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
        return (torch.tanh((self.x + bias) @ first) @ second - self.y).square().mean()

    def hessian(self) -> Tensor:
        weights = tuple(p.detach() for p in (self.first, self.second, self.bias))
        blocks = torch.autograd.functional.hessian(self.of, weights)  # type: ignore[no-untyped-call]
        rows = [torch.cat([block.reshape(w.numel(), -1) for block in row], dim=1) for w, row in zip(weights, blocks, strict=True)]
        return torch.cat(rows)


def tiny() -> PatchTransformer:
    return PatchTransformer(ModelConfig(16, 2, 1, 1, context=32, horizon=8, patch=8), seed=3)


def windows() -> Batch:
    generator = torch.Generator().manual_seed(2)
    return batch_of(torch.cat([torch.randn(4, 32, generator=generator), torch.randn(4, 8, generator=generator)], dim=1), 32)


def test_when_the_loss_is_quadratic_then_its_eigenvalues_come_out() -> None:
    bowl = Bowl()
    found = sharpness(bowl, bowl.loss, probes=4000)
    assert found.largest == pytest.approx(max(EIGENVALUES), rel=1e-4)
    assert found.trace == pytest.approx(sum(EIGENVALUES), rel=0.03)
    assert found.frobenius == pytest.approx(float(np.linalg.norm(EIGENVALUES)), rel=0.03)
    assert found.ratio == found.trace / found.frobenius
    off = bowl.hessian - torch.diag(bowl.hessian.diagonal())  # its squares, twice, are the variance of one probe
    assert found.trace_error == pytest.approx((2 * off.square().sum().item() / 4000) ** 0.5, rel=0.05)


def test_when_the_largest_eigenvalue_in_size_is_negative_then_the_largest_is_still_found() -> None:
    bowl = Bowl()
    bowl.hessian = -bowl.hessian
    assert sharpness(bowl, bowl.loss, probes=1).largest == pytest.approx(1.0, rel=1e-4)


def test_when_a_network_is_probed_then_its_full_hessian_agrees() -> None:
    net = Net()
    hessian = net.hessian()
    found = sharpness(net, net.loss, probes=3000)
    assert found.largest == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)
    assert found.trace == pytest.approx(hessian.trace().item(), rel=0.03)
    assert found.frobenius == pytest.approx(hessian.norm().item(), rel=0.03)


def test_when_the_hessian_is_diagonal_then_one_probe_is_exact() -> None:
    layer = nn.Linear(3, 1, bias=False)
    scales = torch.tensor([1.0, 4.0, -2.0])
    found = sharpness(layer, lambda: (scales * layer.weight.square()).sum() / 2, probes=1)
    assert found.trace == pytest.approx(3.0)
    assert found.frobenius == pytest.approx(21**0.5)
    assert np.isnan(found.trace_error)


def test_when_the_loss_is_flat_then_nothing_bends() -> None:
    layer = nn.Linear(3, 1)
    found = sharpness(layer, lambda: layer.weight.sum() + layer.bias.sum(), probes=2)
    assert (found.trace, found.frobenius, found.largest, found.ratio) == (0.0, 0.0, 0.0, 0.0)


def test_when_there_is_one_weight_then_its_bend_is_the_largest_eigenvalue() -> None:
    layer = nn.Linear(1, 1, bias=False)
    assert sharpness(layer, lambda: 3 * layer.weight.square().sum(), probes=1).largest == pytest.approx(6.0)


def test_when_a_transformer_is_probed_then_attention_is_differentiated_twice_and_nothing_changes() -> None:
    model, batch = tiny(), windows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss() -> Tensor:
        return ForecastTask().step(model, batch, torch.Generator)[0]

    found = sharpness(model, loss, probes=2, seed=5)
    assert found == sharpness(model, loss, probes=2, seed=5)
    assert found != sharpness(model, loss, probes=2, seed=6)
    assert found.largest > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_when_a_plane_is_drawn_then_its_losses_are_those_at_its_points() -> None:
    bowl = Bowl()
    plane = loss_landscape(bowl, bowl.loss, grid=5, span=0.5, seed=7)
    assert plane.coordinates.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert plane.losses[2, 2] == bowl.loss().item()
    # A quadratic is known on a line by three of its points.
    for line in (plane.losses[2], plane.losses[:, 2], plane.losses.diagonal()):
        fitted = np.polyfit(plane.coordinates[[0, 2, 4]], line[[0, 2, 4]], 2)
        assert np.polyval(fitted, plane.coordinates) == pytest.approx(line, rel=1e-5)


def test_when_a_plane_is_drawn_then_a_step_along_it_is_as_long_as_each_tensor() -> None:
    bowl, seen = Bowl(), []

    def loss() -> Tensor:
        seen.append([p.detach().clone() for p in bowl.parameters()])
        return bowl.loss()

    loss_landscape(bowl, loss, grid=3, span=1.0, seed=7)
    for at in (5, 7):  # one step along the first direction, one along the second
        for moved, weight in zip(seen[at], bowl.parameters(), strict=True):
            assert (moved - weight).norm().item() == pytest.approx(weight.norm().item(), rel=1e-5)
    assert not torch.equal(seen[5][0], seen[7][0])


def test_when_a_plane_is_drawn_then_the_weights_are_restored_to_the_bit_even_after_a_failure() -> None:
    model, batch = tiny(), windows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = loss_landscape(model, lambda: ForecastTask().step(model, batch, torch.Generator)[0], grid=3, seed=1)
    again = loss_landscape(model, lambda: ForecastTask().step(model, batch, torch.Generator)[0], grid=3, seed=1)
    assert np.array_equal(first.losses, again.losses)

    def failing() -> Tensor:
        raise ModelError("no loss", hint="none")

    with pytest.raises(ModelError, match="no loss"):
        loss_landscape(model, failing, grid=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_when_nothing_can_be_drawn_then_it_is_refused() -> None:
    bowl = Bowl()
    with pytest.raises(ModelError, match="a grid of 1 points"):
        loss_landscape(bowl, bowl.loss, grid=1)
    with pytest.raises(ModelError, match="0 probes"):
        sharpness(bowl, bowl.loss, probes=0)
    bowl.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of Bowl"):
        loss_landscape(bowl, bowl.loss)

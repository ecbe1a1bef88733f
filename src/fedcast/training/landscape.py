"""The loss around a model's weights: a plane through them, and how sharply the loss bends there.

Found in SFF's released code (arXiv 2606.08578; sff.md A2): the two directions of the plane. Its measures of sharpness are the largest
eigenvalue of the Hessian and ``tr(H) / ||H||_F``, which is large where many eigenvalues are even and positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedcast.errors import ModelError

_TOLERANCE = 1e-4  # of the eigenvalue, relative; Hessian-vector products in float32 are hardly more exact


@dataclass(frozen=True)
class Landscape:
    """The loss on a plane through a model's weights w.

    Attributes
    ----------
    coordinates
        float64 [G], from ``-span`` to ``span``.
    losses
        float64 [G, G]: ``losses[i, j]`` is the loss at ``w + coordinates[j] d1 + coordinates[i] d2``.
    """

    coordinates: NDArray[np.float64]
    losses: NDArray[np.float64]


@dataclass(frozen=True)
class Sharpness:
    """How sharply the loss bends around a model's weights; H is the Hessian of the loss.

    Attributes
    ----------
    trace, frobenius
        Estimates of ``tr(H)`` and of ``||H||_F``.
    largest
        The largest eigenvalue of H.
    trace_error
        Standard error of the trace over the probes; NaN for a single one.
    """

    trace: float
    frobenius: float
    largest: float
    trace_error: float

    @property
    def ratio(self) -> float:
        """``tr(H) / ||H||_F``; 0 where the loss does not bend at all."""
        return self.trace / self.frobenius if self.frobenius > 0 else 0.0


def loss_landscape(model: nn.Module, loss: Callable[[], Tensor], grid: int = 21, span: float = 1.0, seed: int = 0) -> Landscape:
    """Return the loss on a plane through the model's weights; these are afterwards what they were, to the bit.

    Each of the two directions is drawn from ``sqrt(8) N(0, 1) + 1``, and rescaled, tensor by tensor, to the norm of the weights.

    Parameters
    ----------
    model
        The plane lies in the space of its parameters that require a gradient.
    loss
        Gives the scalar loss of the model as it stands, always on the same windows.
    grid
        Points G along each direction, at least 2; an odd number has the weights themselves in the middle.
    span
        How far the plane reaches to each side, in norms of the weights.
    seed
        Seed of the directions.

    Raises
    ------
    ModelError
        When the grid is smaller, or no parameter requires a gradient.
    """
    if grid < 2:
        raise ModelError(f"a grid of {grid} points is no plane", hint="give at least 2 points along each direction")
    weights = _trainable(model)
    generator = torch.Generator().manual_seed(seed)
    centre = [weight.detach().clone() for weight in weights]
    across, along = ([_direction(weight, generator) for weight in centre] for _ in range(2))
    coordinates = np.linspace(-span, span, grid)
    losses = np.empty((grid, grid))
    try:
        with torch.no_grad():
            for i, y in enumerate(coordinates):
                for j, x in enumerate(coordinates):
                    for weight, start, one, two in zip(weights, centre, across, along, strict=True):
                        weight.copy_(start).add_(one, alpha=x).add_(two, alpha=y)
                    losses[i, j] = loss().item()
    finally:
        with torch.no_grad():
            for weight, start in zip(weights, centre, strict=True):
                weight.copy_(start)
    return Landscape(coordinates, losses)


def sharpness(model: nn.Module, loss: Callable[[], Tensor], probes: int = 32, seed: int = 0) -> Sharpness:
    """Return how sharply the loss bends around the model's weights, by products of its Hessian with vectors (double backward).

    Trace and norm are Hutchinson's estimates, ``E[v^T H v]`` and ``E[|H v|^2]`` over vectors v of random signs; the largest eigenvalue
    is that of Lanczos' method, which holds about 20 vectors of the model's size.

    Parameters
    ----------
    model
        The Hessian is over its parameters that require a gradient, in float32, and computed without native kernels.
    loss
        Gives the scalar loss of the model as it stands.
    probes
        Random vectors, at least 1.
    seed
        Seed of the vectors.

    Raises
    ------
    ModelError
        When there is no probe, or no parameter requires a gradient.
    """
    if probes < 1:
        raise ModelError(f"{probes} probes estimate nothing", hint="give at least 1 probe")
    weights = _trainable(model)
    size = sum(weight.numel() for weight in weights)
    generator = torch.Generator().manual_seed(seed)
    with _products(weights, loss) as product:
        traces, squares = np.empty(probes), np.empty(probes)
        for probe in range(probes):
            vector = torch.randint(0, 2, (size,), generator=generator).float().mul_(2).sub_(1)
            image = product(vector).double()
            traces[probe], squares[probe] = (vector.double() @ image).item(), image.square().sum().item()
        largest = _largest(product, torch.randn(size, generator=generator)) if squares.any() else 0.0
        error = float(traces.std(ddof=1)) / probes**0.5 if probes > 1 else math.nan
        return Sharpness(float(traces.mean()), float(squares.mean()) ** 0.5, largest, error)


def _largest(product: Callable[[Tensor], Tensor], start: Tensor) -> float:
    """Return the largest eigenvalue of a symmetric matrix that is known by its products with vectors."""
    size = len(start)
    if size == 1:
        return product(torch.ones(1)).item()
    matrix = LinearOperator((size, size), matvec=lambda v: product(torch.from_numpy(v).float().view(-1)).numpy(), dtype=np.float32)
    return float(eigsh(matrix, k=1, which="LA", v0=start.numpy(), tol=_TOLERANCE, return_eigenvectors=False)[0])


@contextmanager
def _products(weights: list[nn.Parameter], loss: Callable[[], Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give the product of the loss's Hessian with a vector [size], both on the CPU, in the order of the weights."""
    shapes = [weight.shape for weight in weights]
    sizes = [weight.numel() for weight in weights]
    # The fused kernels of attention cannot be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss(), weights, create_graph=True, materialize_grads=True)
        # In a weight that the loss is linear in, and in one that it does not read, the gradient is constant.
        bending = [g.requires_grad for g in gradients]

        def product(vector: Tensor) -> Tensor:
            if not any(bending):
                return torch.zeros_like(vector)
            pieces = [piece.view(shape).to(g) for piece, shape, g in zip(torch.split(vector, sizes), shapes, gradients, strict=True)]
            images = torch.autograd.grad(
                list(compress(gradients, bending)), weights, list(compress(pieces, bending)), retain_graph=True, materialize_grads=True
            )
            return torch.cat([image.reshape(-1).float().cpu() for image in images])

        yield product


def _direction(weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn = (torch.randn(weight.shape, generator=generator) * 8**0.5 + 1).to(weight)
    direction: Tensor = drawn * (torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(drawn))
    return direction


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, tied ones once."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not weights:
        raise ModelError(f"no parameter of {type(model).__name__} requires a gradient", hint="call requires_grad_(True) first")
    return weights

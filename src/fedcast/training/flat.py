"""A model's parameters as one vector.

Every trainable parameter is a view into one contiguous vector and every gradient a view into another, so that receiving a model
is one copy, a client's update one subtraction, and the optimiser one fused pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from fedcast.kernels.library import kernels


@dataclass(frozen=True)
class Layout:
    """Where each named parameter lies in the flat vector: the shared ones first, then the private ones.

    Attributes
    ----------
    names
        Parameter names, in the order of the vector.
    shapes
        Their shapes.
    shared
        How many of them, from the start, travel.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shared: int

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], shares: Callable[[str], bool]) -> Layout:
        """Lay out named parameters; ``shares`` says which of them travel."""
        names = [name for name in parameters if shares(name)]
        shared = len(names)
        names += [name for name in parameters if not shares(name)]
        return cls(tuple(names), tuple(tuple(parameters[name].shape) for name in names), shared)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each parameter in the vector, and the vector's length at the end."""
        total, offsets = 0, [0]
        for shape in self.shapes:
            total += prod(shape)
            offsets.append(total)
        return tuple(offsets)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.offsets[-1]

    @property
    def shared_size(self) -> int:
        """Length of the part that travels."""
        return self.offsets[self.shared]

    @property
    def private_size(self) -> int:
        """Length of the part that stays at its site."""
        return self.size - self.shared_size

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, shapes and what travels: two peers agree on a vector's meaning when their digests agree."""
        return hashlib.sha256(repr((self.names, self.shapes, self.shared)).encode()).hexdigest()

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the named parameters as views into a vector ``[size]``."""
        return {
            name: vector[start : start + prod(shape)].view(shape)
            for name, shape, start in zip(self.names, self.shapes, self.offsets, strict=False)
        }

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return named parameters as one new float32 vector ``[size]``."""
        pieces = [parameters[name].detach().reshape(-1).float() for name in self.names]
        return torch.cat(pieces) if pieces else torch.zeros(0)


class FlatParameters:
    """Binds modules to one float32 master vector, one compute vector and one gradient vector.

    Parameters
    ----------
    parameters
        Named parameters of the modules to bind; their data and gradients become views.
    layout
        Where each of them goes.
    dtype
        Compute dtype. With ``torch.float32`` the compute vector is the master vector itself.

    Attributes
    ----------
    vector
        Master weights, float32 ``[size]``.
    compute
        The weights that modules compute with, in the compute dtype ``[size]``.
    gradient
        Gradient in the compute dtype ``[size]``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], layout: Layout, dtype: torch.dtype) -> None:
        self.layout = layout
        self.vector = layout.flatten(parameters)
        self.compute = self.vector if dtype == torch.float32 else self.vector.to(dtype)
        self.gradient = torch.zeros_like(self.compute)
        views, gradients = layout.views(self.compute), layout.views(self.gradient)
        for name in layout.names:
            parameters[name].data = views[name]
            parameters[name].grad = gradients[name]

    @property
    def shared(self) -> Tensor:
        """The part of the master vector that travels, as a view ``[shared_size]``."""
        return self.vector[: self.layout.shared_size]

    @property
    def private(self) -> Tensor:
        """The part of the master vector that stays, as a view ``[private_size]``."""
        return self.vector[self.layout.shared_size :]

    def publish(self) -> None:
        """Copy the master weights into the compute vector; call after every change of ``vector``."""
        if self.compute is not self.vector:
            self.compute.copy_(self.vector)

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let another module's parameters be views of the master weights (a float32 twin for evaluation)."""
        views = self.layout.views(self.vector)
        for name, parameter in parameters.items():
            parameter.data = views[name]
            parameter.requires_grad_(False)


class FlatAdamW:
    """AdamW on the master vector in one fused pass, with gradient clipping by norm.

    Parameters
    ----------
    parameters
        What to train.
    beta1, beta2, weight_decay
        As in AdamW (Loshchilov and Hutter, 2019).
    clip_norm
        Largest Euclidean norm of the gradient.
    native
        Whether clipping, step and publishing run as one native pass (bfloat16 gradients on the CPU; :mod:`fedcast.kernels`).
    """

    def __init__(
        self,
        parameters: FlatParameters,
        *,
        beta1: float,
        beta2: float,
        weight_decay: float,
        clip_norm: float,
        native: bool = False,
    ) -> None:
        self._flat = parameters
        self._clip_norm = clip_norm
        self._native = native and parameters.gradient.dtype == torch.bfloat16 and parameters.gradient.device.type == "cpu"
        self._weight = nn.Parameter(parameters.vector, requires_grad=True)
        same = parameters.gradient.dtype == torch.float32
        self._gradient = parameters.gradient if same else torch.zeros_like(parameters.vector)
        self._weight.grad = self._gradient
        self._adamw = torch.optim.AdamW([self._weight], lr=0.0, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)
        self._moments: dict[str, Tensor] = {
            "exp_avg": torch.zeros_like(parameters.vector),
            "exp_avg_sq": torch.zeros_like(parameters.vector),
            "step": torch.zeros((), device=parameters.vector.device),
        }
        self._adamw.state[self._weight] = self._moments

    def step(self, rate: float, correction: Tensor | None = None) -> None:
        """Take one step with learning rate ``rate`` and publish the new weights.

        Parameters
        ----------
        rate
            Learning rate.
        correction
            Added to the gradient before it is clipped, in float32 ``[size]``: in bfloat16 what is small beside the gradient would
            be rounded away.
        """
        if self._native and correction is None:
            self._native_step(rate)
            return
        if self._gradient is not self._flat.gradient:
            self._gradient.copy_(self._flat.gradient)
        if correction is not None:
            self._gradient.add_(correction)
        norm = torch.linalg.vector_norm(self._gradient)
        self._gradient.mul_((self._clip_norm / (norm + 1e-6)).clamp_(max=1.0))
        self._adamw.param_groups[0]["lr"] = rate
        self._adamw.step()
        self._flat.publish()

    def _native_step(self, rate: float) -> None:
        flat, moments, settings = self._flat, self._moments, self._adamw.param_groups[0]
        step = int(moments["step"].add_(1).item())
        norm = kernels().sum_of_squares(flat.gradient.data_ptr(), flat.gradient.numel()) ** 0.5
        scale = min(1.0, self._clip_norm / (norm + 1e-6))
        beta1, beta2 = settings["betas"]
        kernels().adamw(
            *(t.data_ptr() for t in (flat.gradient, flat.vector, moments["exp_avg"], moments["exp_avg_sq"], flat.compute)),
            flat.vector.numel(),
            *(scale, rate, beta1, beta2, settings["eps"], settings["weight_decay"], 1 - beta1**step, 1 - beta2**step),
        )

    def reset(self) -> None:
        """Forget the moments."""
        for moment in self._moments.values():
            moment.zero_()

    def forget_shared(self) -> None:
        """Forget the moments of the shared weights."""
        for name in ("exp_avg", "exp_avg_sq"):
            self._moments[name][: self._flat.layout.shared_size].zero_()

    def state(self) -> dict[str, Tensor]:
        """Return copies of the moments."""
        return {name: moment.clone() for name, moment in self._moments.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take moments over, as :meth:`state` gave them."""
        for name, moment in self._moments.items():
            moment.copy_(state[name])

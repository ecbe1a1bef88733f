"""Smoothed full fine-tuning (SFF, arXiv 2606.08578): every weight trains, from a mixture of pre-trained and random weights.

``theta = alpha * pre-trained + (1 - alpha) * random``, once, before the first step; nothing else differs from full fine-tuning. The
paper's motive: pre-trained weights lie in sharp minima of the loss, random ones in flat regions.

Found in the released code (sff.md A2): every learnable tensor is mixed, norms and biases too, tied ones once; buffers are not; the random
model is drawn as its library draws a new one; alpha is 0.7, or of 0.3, 0.5, 0.7 and 0.9 the one with the smallest validation loss.
Reconstructed (A6): the two controls, which tell shrinking from perturbing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedcast.errors import SpecError
from fedcast.models.contract import Model
from fedcast.registry import hyper
from fedcast.tuning.base import Tuning

GRID = (0.3, 0.5, 0.7, 0.9)
"""The alphas among which the validation loss chooses."""

_NOISE = 0x5FF << 32  # the noise must not repeat the draws of the random model, whose spread it has


@dataclass(frozen=True)
class SFF(Tuning):
    """Every weight trains, from a mixture of pre-trained and random weights."""

    name: ClassVar[str] = "sff"
    summary: ClassVar[str] = "every weight trains, from a mixture of pre-trained and random weights (smoothed full fine-tuning)"

    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["validation"] = hyper(
        0.7, "share of the pre-trained weights, 0 to 1; 'validation' tries 0.3, 0.5, 0.7 and 0.9"
    )
    control: Literal["none", "noise", "shrink"] = hyper(
        "none", "instead of mixing, add 'noise' of the random weights' spread, or only 'shrink' the pre-trained weights"
    )

    def prepare(self, model: Model, seed: int) -> Model:
        """Mix the weights, in place.

        Raises
        ------
        SpecError
            When alpha is still to be chosen; see :meth:`candidates`.
        """
        if isinstance(self.alpha, str):
            raise SpecError("SFF's alpha is still to be chosen", hint="prepare one of its candidates, or set tuning.alpha to a number")
        with torch.no_grad():
            for parameter, other in self._pairs(model, seed):
                parameter.mul_(1.0 if self.control == "noise" else self.alpha)
                if self.control != "shrink":
                    parameter.add_(other.to(parameter), alpha=1 - self.alpha)
        return model

    def _pairs(self, model: Model, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each learnable tensor, tied ones once, and what is mixed into it, of the same shape."""
        twin: dict[str, Tensor] = dict(model.fresh(seed).named_parameters())
        generator = torch.Generator().manual_seed(seed ^ _NOISE)
        for name, parameter in model.named_parameters():
            other: Tensor = twin.pop(name)
            if self.control == "noise":
                other = other.std(correction=0) * torch.randn(other.shape, generator=generator)
            yield parameter, other

    def candidates(self) -> Sequence[SFF]:
        """Return the tunings among which the validation loss chooses: one an alpha of :data:`GRID`, or itself."""
        return tuple(dataclasses.replace(self, alpha=alpha) for alpha in GRID) if self.alpha == "validation" else (self,)

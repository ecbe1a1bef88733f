"""Updates as integers modulo 2^bits, on a grid as fine as the sum of all sites allows: sums are exact and cannot wrap.

A site of weight ``w`` sends ``scale * w * delta``, rounded towards 0, for each value of its update, and after them ``w`` and the share of
the values that were cut to the bound, in parts of 10,000. So no update grows longer, which differential privacy counts on. With ``scale``
the largest power of two for which ``scale * bound * total`` is at most ``2^(bits - 2)``, a sum over any of the sites lies within
``2^(bits - 1)``, half of the integers there are. Divided by ``scale`` and by the sum of weights ``W`` it is the weighted mean of the cut
updates, but for the rounding of ``n`` sites: at most ``n / (scale * W)`` a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedcast.errors import SecureSumError, SpecError
from fedcast.federated.secure.masks import Words

BESIDE = 2
"""Integers that travel beside those of the update: the weight, and how much was cut."""
_PARTS = 10_000
_CHUNK = 2**16


@dataclass(frozen=True)
class Opened:
    """What a sum of integers says.

    Attributes
    ----------
    steps
        The sum of the updates, in steps of the grid times their weights, signed ``[n]``.
    unit
        How many such steps make one.
    weight
        The sum of the weights.
    cut
        Share of the values that were cut, mean over the sites; a site with any counts at least 0.0001.
    """

    steps: npt.NDArray[np.signedinteger]
    unit: float
    weight: int
    cut: float

    def added_to(self, before: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return ``before + mean`` of the cut updates, float32 ``[n]``, computed in float64."""
        after = np.empty_like(before)
        for start in range(0, before.size, _CHUNK):
            stop = start + _CHUNK
            after[start:stop] = before[start:stop].astype(np.float64) + self.steps[start:stop] / self.unit
        return after


@dataclass(frozen=True)
class Grid:
    """How updates become integers.

    Attributes
    ----------
    bits
        32 or 64: integers are taken modulo 2^bits.
    bound
        Largest magnitude of a value of an update; values beyond it are cut.
    sites, total
        At most so many sites take part, and their weights sum to at most so much.
    """

    bits: int
    bound: float
    sites: int
    total: int

    def __post_init__(self) -> None:
        """Refuse by :class:`~fedcast.errors.SpecError` what might wrap."""
        room = 2 ** (self.bits - 2)
        # Weights, and the shares that were cut, are summed as they are.
        if self.total > room or self.sites * _PARTS > room or not 0 < self.bound < math.inf:
            raise SpecError(
                f"the sum of {self.sites} sites of weight {self.total} in all may wrap modulo 2^{self.bits}",
                hint="set the guard's bits = 64, or federation.weights = 'equal'",
            )

    @property
    def scale(self) -> float:
        """Steps of the grid a unit, a power of two."""
        fraction, exponent = math.frexp(self.bound * self.total)  # fraction * 2^exponent, 0.5 <= fraction < 1
        return math.ldexp(1.0, self.bits - 2 - exponent + (fraction == 0.5))

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The type of the integers."""
        return np.dtype(f"<u{self.bits // 8}")

    @property
    def _signed(self) -> np.dtype[np.signedinteger]:
        return np.dtype(f"<i{self.bits // 8}")

    def error(self, sites: int, weight: int) -> float:
        """Return how far a mean over so many sites, of that weight in all, may be off the mean of the cut updates."""
        return sites / (self.scale * weight)

    def quantise(self, update: npt.NDArray[np.float32], weight: int) -> Words:
        """Return the integers ``[n + 2]`` of an update ``[n]`` and its weight.

        Raises
        ------
        SecureSumError
            When a value is not a number, or the weight not from 1 to the total.
        """
        if not 1 <= weight <= self.total:
            raise SecureSumError(f"a weight of {weight} is not within the {self.total} of all sites", hint="check the site's data")
        words = np.empty(update.size + BESIDE, dtype=self.dtype)
        steps, cut = self.scale * weight, 0
        for start in range(0, update.size, _CHUNK):
            part = update[start : start + _CHUNK].astype(np.float64)
            values = np.clip(part, -self.bound, self.bound)
            if np.isnan(values).any():
                raise SecureSumError("an update is not a number and cannot be masked", hint="lower training.learning_rate")
            cut += int(np.count_nonzero(values != part))
            words[start : start + part.size] = np.trunc(values * steps).astype(self._signed).view(self.dtype)
        words[-BESIDE:] = weight, -(-_PARTS * cut // max(update.size, 1))
        return words

    def open(self, total: Words, weights: int, sites: int) -> Opened:
        """Return what a sum of integers ``[n + 2]`` says.

        Parameters
        ----------
        total
            The sum of what so many ``sites`` made of their updates.
        weights
            The most that those sites may weigh.

        Raises
        ------
        SecureSumError
            When it is no such sum: a value or the weight is beyond what the sites could have sent.
        """
        signed = total.view(self._signed)
        values, weight, cut = signed[:-BESIDE], int(signed[-2]), int(signed[-1])
        limit = self.scale * self.bound * weight * (1 + 2**-50)  # a product of floats may be rounded up
        within = not values.size or max(-int(values.min()), int(values.max())) <= limit
        if not (within and sites <= weight <= weights and 0 <= cut <= sites * _PARTS):
            raise SecureSumError(
                "the opened sum is beyond what its sites could have sent: a share or a masked update was wrong",
                hint="the model is unchanged; run the same command again, and if it comes back look for the site that is at fault",
            )
        return Opened(values, self.scale * weight, weight, cut / (sites * _PARTS))

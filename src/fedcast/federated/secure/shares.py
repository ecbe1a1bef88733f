"""Shares of a secret: any ``threshold`` of them give it back, fewer say nothing about it (Shamir, Communications of the ACM 22, 1979).

The secrets here are 32 bytes. They are numbers below 2^256 in the field of the smallest prime above it, so that one polynomial carries
a whole secret. This takes Python's integers alone: the library that has the ciphers (cryptography) has no Shamir, and pycryptodome, which
has one, works on 16 bytes at a time and would be one more thing to install for thirty lines.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from fedcast.errors import SecureSumError

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, points: int, threshold: int) -> list[bytes]:
    """Return the shares of a secret at 1, 2, ... ``points``, each of :data:`SHARE_BYTES` bytes.

    The secret is the value at 0 of a polynomial of degree ``threshold - 1`` whose other coefficients the operating system draws.

    Parameters
    ----------
    secret
        :data:`SECRET_BYTES` bytes.
    points
        How many shares.
    threshold
        How many of them give the secret back.

    Raises
    ------
    SecureSumError
        When the secret has another length, or the threshold is not from 1 to ``points``.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= points:
        raise SecureSumError(
            f"a secret of {len(secret)} bytes cannot be split into {points} shares with a threshold of {threshold}",
            hint=f"give {SECRET_BYTES} bytes and a threshold from 1 to the number of shares",
        )
    return evaluate([int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))], points)


def evaluate(coefficients: Sequence[int], points: int) -> list[bytes]:
    """Return the values of a polynomial, lowest coefficient first, at 1, 2, ... ``points``."""
    values = []
    for point in range(1, points + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        values.append(value.to_bytes(SHARE_BYTES))
    return values


def lagrange(points: Sequence[int]) -> list[int]:
    """Return what the value at each of the distinct points counts in the value at 0."""
    weights = []
    for point in points:
        numerator, denominator = 1, 1
        for other in points:
            if other != point:
                numerator, denominator = numerator * other % PRIME, denominator * (other - point) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return weights


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret, of :data:`SECRET_BYTES` bytes, from exactly as many shares as its threshold, by point.

    Raises
    ------
    SecureSumError
        When they are not shares of one secret; where they are shares of another one, that other one is returned.
    """
    weights = lagrange(list(shares))
    value = sum(weight * int.from_bytes(share) for weight, share in zip(weights, shares.values(), strict=True)) % PRIME
    if value >= 2**256:
        raise SecureSumError("shares do not belong together", hint="a site revealed a wrong share: run the same command again")
    return value.to_bytes(SECRET_BYTES)

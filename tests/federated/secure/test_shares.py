"""Shamir's shares: known answers, any threshold of them, and nothing from fewer."""

from __future__ import annotations

import secrets
from itertools import combinations

import pytest

from fedcast.errors import SecureSumError
from fedcast.federated.secure.shares import PRIME, SHARE_BYTES, evaluate, join, lagrange, split


def test_when_the_prime_is_tested_by_miller_and_rabin_then_it_is_one_and_the_numbers_between_it_and_the_secrets_are_none() -> None:
    def probably_prime(n: int) -> bool:
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in range(2, 42):
            powers = [pow(base, odd << step, n) for step in range(twos)]
            if powers[0] != 1 and n - 1 not in powers:
                return False
        return True

    assert probably_prime(PRIME)
    assert not any(probably_prime(n) for n in range(2**256 + 1, PRIME, 2))


def test_when_a_polynomial_is_evaluated_then_its_values_are_those_of_the_published_example() -> None:
    # 1234 + 166 x + 94 x^2 at 1, 2, ... 6: the worked example of the article "Shamir's secret sharing" in Wikipedia.
    values = [int.from_bytes(share) for share in evaluate([1234, 166, 94], 6)]
    assert values == [1494, 1942, 2578, 3402, 4414, 5614]
    assert int.from_bytes(join({2: (1942).to_bytes(33), 4: (3402).to_bytes(33), 5: (4414).to_bytes(33)})) == 1234


def test_when_points_are_one_to_three_then_the_weights_at_zero_are_the_binomials_with_signs() -> None:
    assert lagrange([1, 2, 3]) == [3, PRIME - 3, 1]


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32))])
def test_when_any_threshold_of_the_shares_is_joined_then_the_secret_comes_back(secret: bytes) -> None:
    shares = split(secret, 6, 4)
    for chosen in combinations(range(1, 7), 4):
        assert join({point: shares[point - 1] for point in chosen}) == secret


def test_when_one_share_is_missing_then_every_secret_is_still_possible() -> None:
    shares = split(secrets.token_bytes(32), 5, 3)
    known = {1: shares[0], 2: shares[1]}
    for other in (bytes(32), b"\x01" * 32, b"\xff" * 32):
        # The third share that would make `other` the secret exists: the first two rule nothing out.
        weights = lagrange([1, 2, 3])
        rest = sum(weight * int.from_bytes(share) for weight, share in zip(weights, known.values(), strict=False))
        third = (int.from_bytes(other) - rest) * pow(weights[2], -1, PRIME) % PRIME
        assert join({**known, 3: third.to_bytes(SHARE_BYTES)}) == other


def test_when_a_secret_is_split_twice_then_no_share_comes_back() -> None:
    secret = secrets.token_bytes(32)
    assert not set(split(secret, 5, 3)) & set(split(secret, 5, 3))


@pytest.mark.parametrize(("secret", "points", "threshold"), [(bytes(31), 3, 2), (bytes(32), 3, 4), (bytes(32), 3, 0)])
def test_when_a_split_makes_no_sense_then_it_is_refused(secret: bytes, points: int, threshold: int) -> None:
    with pytest.raises(SecureSumError, match="cannot be split"):
        split(secret, points, threshold)


def test_when_shares_are_of_no_secret_then_that_is_said() -> None:
    with pytest.raises(SecureSumError, match="do not belong together"):
        join({1: (2**256 + 5).to_bytes(SHARE_BYTES)})

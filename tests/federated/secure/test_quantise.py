"""Updates as integers: the bound of the rounding, sums that cannot wrap, and sums that cannot be."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcast.errors import SecureSumError, SpecError
from fedcast.federated.secure.masks import Words
from fedcast.federated.secure.quantise import Grid

BOUNDS = st.sampled_from([2.0**-10, 0.1, 1.0, 7.3, 1000.0])


def summed(grid: Grid, updates: list[list[float]], weights: list[int]) -> Words:
    words = [grid.quantise(np.array(update, dtype=np.float32), weight) for update, weight in zip(updates, weights, strict=True)]
    return np.sum(words, axis=0, dtype=grid.dtype)


@given(
    st.sampled_from([32, 64]),
    BOUNDS,
    st.lists(st.tuples(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), st.integers(1, 10**6)), min_size=1, max_size=8),
    st.integers(0, 3),
)
def test_when_any_sites_are_summed_then_the_mean_is_off_by_at_most_the_stated_bound(
    bits: int, bound: float, sites: list[tuple[list[float], int]], absent: int
) -> None:
    updates, weights = [[bound * v for v in update] for update, _ in sites], [weight for _, weight in sites]
    grid = Grid(bits, bound, len(sites) + absent, sum(weights) + absent * 10**6)
    opened = grid.open(summed(grid, updates, weights), sum(weights), len(sites))
    for column in range(3):
        # In exact arithmetic, from what a float32 holds of the values.
        clipped = [min(max(Fraction(float(np.float32(u[column]))), -Fraction(bound)), Fraction(bound)) for u in updates]
        exact = sum(w * value for w, value in zip(weights, clipped, strict=True)) / sum(weights)
        tolerance = Fraction(grid.error(len(sites), sum(weights))) + Fraction(bound) * Fraction(len(sites) + 2, 2**52)
        assert abs(Fraction(int(opened.steps[column])) / Fraction(opened.unit) - exact) <= tolerance


@given(st.sampled_from([32, 64]), BOUNDS, st.lists(st.integers(1, 2**24), min_size=1, max_size=40), st.booleans())
def test_when_all_sites_send_the_largest_update_then_the_sum_does_not_wrap(bits: int, bound: float, weights: list[int], low: bool) -> None:
    grid = Grid(bits, bound, len(weights), sum(weights))
    value = -1e30 if low else 1e30
    words = [grid.quantise(np.array([value], dtype=np.float32), weight) for weight in weights]
    signed = [int(word.view(f"<i{bits // 8}")[0]) for word in words]
    assert abs(sum(signed)) < 2 ** (bits - 1)
    assert int(np.sum(words, axis=0, dtype=grid.dtype).view(f"<i{bits // 8}")[0]) == sum(signed)


@given(BOUNDS, st.integers(1, 2**28))
def test_when_the_grid_is_made_then_no_finer_one_fits(bound: float, total: int) -> None:
    scale = Fraction(Grid(32, bound, 3, total).scale)
    assert scale * Fraction(bound) * total <= 2**30 * (1 + Fraction(1, 2**52))
    assert 2 * scale * Fraction(bound) * total > 2**30 * (1 - Fraction(1, 2**52))


@pytest.mark.parametrize("options", [(32, 1.0, 3, 2**31), (32, 1.0, 2**31, 5), (32, 0.0, 3, 5), (64, float("inf"), 3, 5), (64, -1.0, 3, 5)])
def test_when_a_sum_could_wrap_then_the_grid_is_refused(options: tuple[int, float, int, int]) -> None:
    with pytest.raises(SpecError, match="may wrap"):
        Grid(*options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_when_an_update_is_not_finite_then_it_is_cut_or_refused(value: float) -> None:
    grid = Grid(32, 1.0, 3, 100)
    if value == float("inf"):
        assert grid.quantise(np.array([value], dtype=np.float32), 1)[0] == grid.quantise(np.array([1], dtype=np.float32), 1)[0]
    else:
        with pytest.raises(SecureSumError, match="not a number"):
            grid.quantise(np.array([0.0, value], dtype=np.float32), 1)


@pytest.mark.parametrize("weight", [0, -59, 101])
def test_when_a_weight_is_not_among_those_declared_then_it_is_not_masked(weight: int) -> None:
    with pytest.raises(SecureSumError, match="weight"):
        Grid(32, 1.0, 3, 100).quantise(np.zeros(2, dtype=np.float32), weight)


@pytest.mark.parametrize("bits", [32, 64])
def test_when_a_sum_is_noise_then_it_is_no_mean(bits: int) -> None:
    grid = Grid(bits, 1.0, 20, 2**24)
    rng = np.random.default_rng(0)
    for _ in range(50):
        noise = np.frombuffer(rng.bytes(101 * bits // 8), dtype=grid.dtype)
        with pytest.raises(SecureSumError, match="beyond what its sites could have sent"):
            grid.open(noise, 2**24, 20)


def test_when_values_are_cut_then_the_sum_says_how_many() -> None:
    grid = Grid(32, 1.0, 2, 4)
    updates = [[0.5, 2.0, -3.0, 1.0], [0.0, 0.0, 0.0, -1.0]]
    opened = grid.open(summed(grid, updates, [1, 3]), 4, 2)
    assert opened.cut == 0.25
    assert opened.weight == 4
    np.testing.assert_allclose(opened.added_to(np.ones(4, dtype=np.float32)), [1.125, 1.25, 0.75, 0.5], atol=grid.error(2, 4))


def test_when_one_value_of_many_is_cut_then_it_still_shows() -> None:
    grid = Grid(32, 1.0, 1, 1)
    update = np.zeros(300_000, dtype=np.float32)
    update[-1] = 1.5
    assert grid.open(grid.quantise(update, 1), 1, 1).cut == 1e-4


@given(st.sampled_from([32, 64]), BOUNDS, st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=5), st.integers(1, 10**6))
def test_when_an_update_becomes_integers_then_no_value_grows(bits: int, bound: float, values: list[float], weight: int) -> None:
    grid = Grid(bits, bound, 3, 2 * weight)
    update = np.array([bound * value for value in values], dtype=np.float32)
    opened = grid.open(grid.quantise(update, weight), weight, 1)
    for before, steps in zip(update, opened.steps, strict=True):
        grown = Fraction(1) + Fraction(1, 2**52)  # a product of floats may be rounded up
        assert abs(Fraction(int(steps)) / Fraction(opened.unit)) <= abs(Fraction(float(before))) * grown
        assert int(steps) * float(before) >= 0

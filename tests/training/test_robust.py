"""Robust rules against plain definitions, and what they promise whatever the vectors are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from fedcast.errors import SpecError
from fedcast.training.aggregate import Vectors, krum, median, trimmed_mean
from fedcast.training.robust import bulyan, fltrust, geometric_median

RULES = {
    "median": median,
    "trimmed_mean": lambda rows: trimmed_mean(rows, 1.5 / rows.n),
    "krum": lambda rows: krum(rows, 1)[0],
    "multi_krum": lambda rows: krum(rows, 1, rows.n - 1)[0],
    "bulyan": lambda rows: bulyan(rows, 1)[0],
    "geometric_median": geometric_median,
}
# Values on a coarse grid: sums are exact, and ties occur.
vectors = st.integers(1, 5).flatmap(
    lambda size: st.lists(st.lists(st.integers(-64, 64), min_size=size, max_size=size), min_size=7, max_size=9)
)


def drawn(n: int, size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(n)]


def rows(values: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.float32) / 4 for row in values]


@pytest.mark.parametrize("rule", RULES)
@given(values=vectors)
@settings(max_examples=30)
def test_when_vectors_are_anything_then_the_result_lies_within_their_hull(rule: str, values: list[list[int]]) -> None:
    given_ = torch.stack(rows(values))
    found = RULES[rule](Vectors(list(given_)))
    slack = 1e-4 * (1 + given_.abs().max())
    assert bool((found >= given_.amin(0) - slack).all())
    assert bool((found <= given_.amax(0) + slack).all())


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"krum", "multi_krum", "bulyan"}))
@given(values=vectors, order=st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_when_vectors_come_in_another_order_then_the_result_is_the_same(rule: str, values: list[list[int]], order: object) -> None:
    given_ = rows(values)
    shuffled = list(given_)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert torch.allclose(RULES[rule](Vectors(given_)), RULES[rule](Vectors(shuffled)), atol=1e-3)


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 10**6), n=st.integers(7, 10))
@settings(max_examples=20)
def test_when_no_two_scores_are_equal_then_the_order_does_not_matter_to_any_rule(rule: str, seed: int, n: int) -> None:
    given_ = drawn(n, 20, seed)
    assert torch.allclose(RULES[rule](Vectors(given_)), RULES[rule](Vectors(given_[::-1])), atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 10**6), shift=st.integers(-8, 8))
@settings(max_examples=20)
def test_when_all_vectors_move_then_the_result_moves_with_them(rule: str, seed: int, shift: int) -> None:
    given_ = drawn(7, 20, seed)
    moved = [vector + shift for vector in given_]
    assert torch.allclose(RULES[rule](Vectors(moved)), RULES[rule](Vectors(given_)) + shift, atol=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [-10.0, 1e3, 1e6])
def test_when_one_of_seven_is_far_away_then_the_result_stays_near_the_others(rule: str, scale: float) -> None:
    centre = torch.linspace(-1, 1, 2000)
    honest = [centre + 0.1 * noise for noise in drawn(6, 2000, 3)]
    found = RULES[rule](Vectors([*honest, scale * (1 + centre)]))
    plain = torch.stack([*honest, scale * (1 + centre)]).mean(0)
    mean = torch.stack(honest).mean(0)
    spread = max(float((vector - mean).norm()) for vector in honest)
    assert float((found - mean).norm()) < spread
    assert float((plain - mean).norm()) > 10 * spread


def test_when_bulyan_is_computed_by_its_definition_then_it_is_the_same() -> None:
    given_ = torch.stack(drawn(11, 50, 5))
    malicious, left, chosen = 2, list(range(11)), []
    while len(chosen) < 11 - 2 * malicious:
        scores = {}
        for one in left:
            distances = sorted(float((given_[one] - given_[other]).double().square().sum()) for other in left if other != one)
            scores[one] = sum(distances[: max(2, len(left) - malicious - 2)])
        best = min(scores, key=lambda number: scores[number])
        left.remove(best)
        chosen.append(best)
    picked = given_[chosen].double().numpy()
    middle = np.median(picked, axis=0)
    order = np.argsort(np.abs(picked - middle), axis=0)[: 11 - 4 * malicious]
    found, numbers = bulyan(Vectors(list(given_)), malicious)
    assert numbers == sorted(chosen)
    assert np.allclose(found.numpy(), np.take_along_axis(picked, order, axis=0).mean(0), atol=1e-6)


def test_when_the_geometric_median_is_sought_by_another_optimiser_then_it_is_the_same_point() -> None:
    given_ = torch.stack(drawn(9, 6, 2)).double().numpy()
    found = geometric_median(Vectors([torch.from_numpy(row).float() for row in given_])).numpy()

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(given_ - point, axis=1).sum())

    other = minimize(
        total, given_.mean(0), method="Nelder-Mead", options={"maxiter": 20000, "maxfev": 20000, "fatol": 1e-14, "xatol": 1e-10}
    )
    assert total(found) <= other.fun + 1e-6
    assert np.allclose(found, other.x, atol=1e-3)


@pytest.mark.parametrize("rule", ["multi_krum", "bulyan", "geometric_median"])
def test_when_one_huge_vector_could_hide_another_one_then_the_result_stays_near_the_others(rule: str) -> None:
    began = 0.02 * torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    honest = [began + 1e-3 * update for update in drawn(9, 200_000, 2)]
    malicious = [began - 100e-3 * drawn(1, 200_000, 3)[0].sign(), torch.full_like(began, 65535.0)]
    rules = {
        "multi_krum": lambda rows: krum(rows, 2, 9)[0],
        "bulyan": lambda rows: bulyan(rows, 2)[0],
        "geometric_median": geometric_median,
    }
    mean = torch.stack(honest).mean(0)
    farthest = max(float((vector - mean).norm()) for vector in honest)
    assert float((rules[rule](Vectors([*malicious, *honest])) - mean).norm()) < farthest


def test_when_most_vectors_are_one_point_then_the_geometric_median_is_that_point() -> None:
    point = torch.tensor([1.0, -2.0, 3.0])
    found = geometric_median(Vectors([point, point, point, torch.full((3,), 100.0), torch.zeros(3)]))
    assert torch.allclose(found, point, atol=1e-3)
    assert torch.equal(geometric_median(Vectors([point] * 4)), point)


def test_when_fltrust_is_computed_by_its_equations_then_it_is_the_same() -> None:
    began, given_ = torch.randn(300, generator=torch.Generator().manual_seed(9)), drawn(5, 300, 4)
    given_ = [began + 0.1 * (update + 0.5) for update in given_]
    updates = [vector - began for vector in given_]
    trust = [max(0.0, float(torch.cosine_similarity(update, updates[2], dim=0))) for update in updates]
    scaled = [t * update * updates[2].norm() / update.norm() for t, update in zip(trust, updates, strict=True)]
    found, got = fltrust(Vectors(given_), 2, began)
    assert got == pytest.approx(trust, abs=1e-5)
    assert torch.allclose(found, began + sum(scaled) / math.fsum(trust), atol=1e-5)


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([-100.0, -10.0, 10.0, 1e4]))
@settings(max_examples=30)
def test_when_a_vector_is_scaled_then_fltrust_moves_no_farther_than_the_trusted_one(seed: int, scale: float) -> None:
    began = torch.zeros(30)
    given_ = drawn(5, 30, seed)
    given_[4] = scale * given_[4]
    found, trust = fltrust(Vectors(given_), 0, began)
    assert trust[0] == pytest.approx(1)
    assert float(found.norm()) <= float(given_[0].norm()) * (1 + 1e-5)


def test_when_the_trusted_site_did_not_move_then_nothing_does() -> None:
    began = torch.ones(4)
    found, trust = fltrust(Vectors([began, began + 1, began - 1]), 0, began)
    assert torch.equal(found, began)
    assert trust == [0, 0, 0]


def test_when_vectors_oppose_the_trusted_one_then_they_count_nothing() -> None:
    began, right = torch.zeros(2), torch.tensor([1.0, 0.0])
    found, trust = fltrust(Vectors([right, -5 * right, torch.tensor([0.0, 3.0])]), 0, began)
    assert trust == [1, 0, 0]
    assert torch.equal(found, right)


def test_when_there_are_too_few_vectors_then_they_are_refused() -> None:
    with pytest.raises(SpecError, match="needs 7, there are 6"):
        bulyan(Vectors(drawn(6, 3)), 1)
    with pytest.raises(SpecError, match="no rows"):
        geometric_median(Vectors([]))


def test_when_columns_need_several_blocks_then_every_block_is_right() -> None:
    given_ = drawn(7, 2**17 + 3)
    for rule in ("bulyan", "geometric_median"):
        whole = RULES[rule](Vectors(given_))
        for start, stop in itertools.pairwise((0, 2**16, 2**17, 2**17 + 3)):
            assert bool(torch.isfinite(whole[start:stop]).all())
            assert float((whole[start:stop] - torch.stack(given_)[:, start:stop].mean(0)).abs().mean()) < 1

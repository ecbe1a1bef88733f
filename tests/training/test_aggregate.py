"""Means that stream, robust rules on blocks, sketches: against numpy, scipy and the definitions."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist

from fedcast.errors import FederationError, ScreenError, SpecError
from fedcast.training import aggregate
from fedcast.training.aggregate import (
    LARGEST_VALUE,
    Rows,
    Sketch,
    Spool,
    StreamingMean,
    Vectors,
    krum,
    length,
    median,
    pairwise_cosines,
    pairwise_distances,
    trimmed_mean,
    weighted_mean,
)

seeds = st.integers(0, 2**31 - 1)
# Both ways of ordering a column, a block boundary in the network's case, and the smallest cases.
counts = st.one_of(st.integers(1, 9), st.sampled_from([20, aggregate._NETWORK_ROWS, aggregate._NETWORK_ROWS + 1, 130]))


def matrix(n: int, size: int, seed: int, *, ties: bool = False) -> np.ndarray:
    """Return rows as float64 numbers that float32 holds."""
    values = np.random.default_rng(seed).normal(size=(n, size)) * 3
    return (values.round() if ties else values).astype(np.float32).astype(np.float64)


def rows_of(values: np.ndarray) -> Vectors:
    return Vectors(list(torch.from_numpy(values.astype(np.float32))))


def stream(vectors: list[torch.Tensor], weights: list[float], order: list[int]) -> torch.Tensor:
    mean = StreamingMean({"shared": vectors[0].numel()}, sum(weights))
    for index in order:
        mean.add({"shared": vectors[index]}, weights[index])
    return mean.means()["shared"]


@settings(deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 7, 65537]), st.integers(-12, 15), seeds, st.randoms(use_true_random=False))
def test_when_vectors_arrive_in_any_order_then_the_streamed_mean_is_the_same_bytes_and_right(
    n: int, size: int, exponent: int, seed: int, random: object
) -> None:
    rng = np.random.default_rng(seed)
    vectors = [torch.from_numpy((rng.uniform(-2, 2, size) * 2.0**exponent).astype(np.float32)) for _ in range(n)]
    weights = [float(weight) for weight in rng.integers(1, 10**6, n)]
    first = stream(vectors, weights, list(range(n)))
    shuffled = list(range(n))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert torch.equal(stream(vectors, weights, shuffled).view(torch.int32), first.view(torch.int32))
    exact = np.average(np.stack([v.numpy() for v in vectors]).astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(first.numpy(), exact, rtol=2.0**-23, atol=1e-10)


def test_when_some_sites_drop_out_then_the_mean_is_over_the_rest() -> None:
    mean = StreamingMean({"shared": 3, "private": 2}, total=100)
    mean.add({"shared": torch.ones(3), "private": torch.zeros(2), "prototype": torch.ones(5)}, 10)
    mean.add({"shared": torch.full((3,), 4.0), "private": torch.ones(2)}, 20)
    means = mean.means()
    assert means["shared"].tolist() == pytest.approx([3.0] * 3)
    assert means["private"].tolist() == pytest.approx([2 / 3] * 2)


@pytest.mark.parametrize("value", [LARGEST_VALUE, -LARGEST_VALUE, float("inf"), float("nan")])
def test_when_a_value_is_beyond_the_exact_range_then_nothing_of_that_reply_is_added(value: float) -> None:
    mean = StreamingMean({"shared": 3, "private": 2}, total=2)
    mean.add({"shared": torch.ones(3), "private": torch.ones(2)}, 1)
    with pytest.raises(ScreenError, match="private has a value beyond 65536"):
        mean.add({"shared": torch.zeros(3), "private": torch.tensor([0.0, value])}, 1)
    assert mean.means()["shared"].tolist() == [1.0] * 3


def test_when_all_values_are_at_the_edge_of_the_range_then_the_sum_is_still_exact() -> None:
    edge = float(np.nextafter(np.float32(LARGEST_VALUE), np.float32(0)))
    vectors = [torch.tensor([edge, -edge, 2.0**-30]) for _ in range(50)]
    assert stream(vectors, [1.0] * 50, list(range(50))).tolist() == pytest.approx([edge, -edge, 2.0**-30], rel=1e-7, abs=50 * 2.0**-37)


def test_when_a_streamed_mean_is_misused_then_it_says_so() -> None:
    mean = StreamingMean({"shared": 3}, total=2)
    with pytest.raises(FederationError, match="sum to 0"):
        mean.means()
    with pytest.raises(ScreenError, match=r"expected is float32 \(3,\)"):
        mean.add({"shared": torch.ones(4)}, 1)
    with pytest.raises(ScreenError, match="expected is float32"):
        mean.add({"shared": torch.ones(3, dtype=torch.float64)}, 1)
    mean.add({"shared": torch.ones(3)}, 1.5)
    with pytest.raises(ScreenError, match="exceeds what is left"):
        mean.add({"shared": torch.ones(3)}, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.sampled_from([1, 40, 70_000]), seeds)
def test_when_averaging_then_it_is_the_weighted_mean_in_float64(n: int, size: int, seed: int) -> None:
    values = matrix(n, size, seed) * 10.0 ** np.arange(n)[:, None]
    weights = np.random.default_rng(seed).uniform(0.1, 1, n)
    expected = np.average(values.astype(np.float32).astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(weighted_mean(rows_of(values), weights.tolist()).numpy(), expected, rtol=1e-7, atol=1e-30)


def test_when_no_row_has_a_weight_then_there_is_no_mean() -> None:
    with pytest.raises(FederationError, match="sum to 0"):
        weighted_mean(Vectors([]), [])
    with pytest.raises(FederationError, match="sum to 0"):
        weighted_mean(rows_of(matrix(2, 3, 0)), [0.0, 0.0])


@settings(deadline=None)
@given(counts, st.sampled_from([1, 50]), st.floats(0, 0.499), st.booleans(), seeds)
def test_when_trimming_then_it_is_scipys_trimmed_mean(n: int, size: int, share: float, ties: bool, seed: int) -> None:
    values = matrix(n, size, seed, ties=ties)
    np.testing.assert_allclose(trimmed_mean(rows_of(values), share).numpy(), stats.trim_mean(values, share, axis=0), rtol=1e-6, atol=1e-7)


@settings(deadline=None)
@given(counts, st.sampled_from([1, 50]), st.booleans(), seeds)
def test_when_taking_the_median_then_it_is_numpys(n: int, size: int, ties: bool, seed: int) -> None:
    values = matrix(n, size, seed, ties=ties)
    np.testing.assert_allclose(median(rows_of(values)).numpy(), np.median(values, axis=0), rtol=1e-7)


def test_when_columns_need_several_blocks_then_every_block_is_right() -> None:
    values = matrix(20, 3 * 2**16 + 5, 1)
    np.testing.assert_allclose(median(rows_of(values)).numpy(), np.median(values, axis=0), rtol=1e-6)
    many = matrix(60, 2**15, 2)
    np.testing.assert_allclose(trimmed_mean(rows_of(many), 0.2).numpy(), stats.trim_mean(many, 0.2, axis=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", range(1, 15))
def test_when_the_network_sorts_zeros_and_ones_then_every_rank_is_right(n: int) -> None:
    # A network that sorts all columns of zeros and ones sorts everything (Knuth's 0-1 principle).
    columns = (torch.arange(2**n)[None, :] >> torch.arange(n)[:, None] & 1).float()
    for low, high in [*pairwise(range(n + 1)), (0, n)]:
        expected = columns.sort(dim=0).values[low:high].double().mean(0)
        assert torch.equal(aggregate._by_network(columns.clone(), low, high), expected)


@pytest.mark.parametrize(("share", "n"), [(0.5, 4), (0.5, 300), (-0.1, 5), (0.0, 0)])
def test_when_trimming_leaves_nothing_then_it_is_refused(share: float, n: int) -> None:
    with pytest.raises(SpecError, match="leaves nothing"):
        trimmed_mean(rows_of(matrix(n, 2, 0)), share)


def test_when_there_are_no_rows_then_there_is_no_median() -> None:
    with pytest.raises(SpecError, match="no rows"):
        median(Vectors([]))


@settings(deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 30]), seeds)
def test_when_comparing_rows_then_cosines_and_distances_are_scipys(n: int, size: int, seed: int) -> None:
    values = matrix(n, size, seed)
    np.testing.assert_allclose(pairwise_cosines(rows_of(values)).numpy(), 1 - cdist(values, values, "cosine"), atol=1e-5)
    np.testing.assert_allclose(pairwise_distances(rows_of(values)).numpy(), cdist(values, values), rtol=1e-4, atol=1e-3)


def test_when_rows_hardly_differ_then_their_distances_keep_their_digits() -> None:
    base, steps = matrix(1, 100_000, 0), matrix(6, 100_000, 1) * 1e-4
    values = (base + steps).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(pairwise_distances(rows_of(values)).numpy(), cdist(values, values), rtol=1e-4)


def test_when_a_row_is_zero_then_its_cosines_are_zero() -> None:
    cosines = pairwise_cosines(Vectors([torch.zeros(4), torch.ones(4)]))
    assert cosines.tolist() == [[0.0, 0.0], [0.0, pytest.approx(1.0)]]


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 4), st.integers(1, 3), seeds)
def test_when_krum_chooses_then_the_scores_are_those_of_the_definition(malicious: int, more: int, keep: int, seed: int) -> None:
    n = 2 * malicious + 3 + more
    values = matrix(n, 40, seed)
    squares = np.sort(cdist(values, values, "sqeuclidean"), axis=1)[:, 1 : n - malicious - 1]
    expected = sorted(np.argsort(squares.sum(1), kind="stable")[:keep].tolist())
    mean, chosen = krum(rows_of(values), malicious, keep)
    assert chosen == expected
    np.testing.assert_allclose(mean.numpy(), values[expected].mean(0), rtol=1e-6, atol=1e-7)


def test_when_rows_are_far_away_then_krum_leaves_them_out() -> None:
    values = matrix(9, 100, 0)
    values[[2, 5]] += 50
    _, chosen = krum(rows_of(values), malicious=2, keep=7)
    assert chosen == [0, 1, 3, 4, 6, 7, 8]


@pytest.mark.parametrize(("n", "malicious", "keep"), [(4, 1, 1), (5, -1, 1), (5, 1, 0), (5, 1, 5)])
def test_when_krum_cannot_hold_then_it_is_refused(n: int, malicious: int, keep: int) -> None:
    with pytest.raises(SpecError, match="Krum"):
        krum(rows_of(matrix(n, 3, 0)), malicious, keep)


def test_when_rows_are_spooled_in_any_order_then_the_rules_give_the_same_bytes_as_in_memory(tmp_path: Path) -> None:
    values = matrix(7, 70_001, 3)
    memory, names = rows_of(values), [f"site-{index}" for index in range(7)]
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    with Spool(tmp_path, 70_001) as spool:
        for index in (4, 0, 6, 2, 1, 5, 3):
            spool.append(names[index], torch.from_numpy(values[index].astype(np.float32)))
        assert spool.names == names
        rules = (lambda rows: weighted_mean(rows, weights), lambda rows: trimmed_mean(rows, 0.2), median, pairwise_cosines)
        for rule in rules:
            assert torch.equal(rule(spool), rule(memory))
        assert krum(spool, 1)[1] == krum(memory, 1)[1]
    assert list(tmp_path.iterdir()) == []


def test_when_a_row_does_not_fit_then_the_spool_refuses_it(tmp_path: Path) -> None:
    with Spool(tmp_path, 3) as spool:
        spool.append("a", torch.ones(3))
        with pytest.raises(ScreenError, match="has a row already"):
            spool.append("a", torch.ones(3))
        with pytest.raises(ScreenError, match="expected is float32"):
            spool.append("b", torch.ones(4))
        rows: Rows = spool
        assert rows.n == 1


def test_when_vectors_differ_in_length_then_they_are_no_rows() -> None:
    with pytest.raises(ScreenError, match="expected is float32"):
        Vectors([torch.ones(3), torch.ones(4)])


def test_when_vectors_are_sketched_then_their_cosines_stay_about_the_same() -> None:
    # Unequal energy along the vector, as between layers, and a common part that makes the cosines differ.
    scale = np.repeat([3.0, 0.1, 1.0, 0.01], 50_000)
    values = (matrix(10, 200_000, 0) + matrix(1, 200_000, 1) * np.linspace(0, 2, 10)[:, None]) * scale
    rows = rows_of(values)
    sketch = Sketch(200_000)
    small = Vectors([sketch(vector) for vector in torch.from_numpy(values.astype(np.float32))])
    assert small.size == 2**14
    error = pairwise_cosines(small) - pairwise_cosines(rows)
    assert error.abs().max() < 5 / 2**7
    assert 0.001 < error[~torch.eye(10, dtype=torch.bool)].square().mean().sqrt() < 2 / 2**7


def test_when_sketching_then_it_is_linear_and_fixed_by_the_seed() -> None:
    a, b = torch.randn(1000), torch.randn(1000)
    sketch = Sketch(1000, dims=64, seed=3)
    assert torch.allclose(sketch(a) + 2 * sketch(b), sketch(a + 2 * b), atol=1e-4)
    assert torch.equal(Sketch(1000, dims=64, seed=3)(a), sketch(a))
    assert not torch.equal(Sketch(1000, dims=64, seed=4)(a), sketch(a))
    with pytest.raises(ScreenError, match="expected is float32"):
        sketch(torch.ones(999))


def test_when_the_mean_is_taken_then_it_lies_in_no_more_memory_than_it_needs() -> None:
    mean = StreamingMean({"shared": 1_000_001}, total=1)
    mean.add({"shared": torch.full((1_000_001,), 0.1)}, 1)
    vector = mean.means()["shared"]
    assert vector.untyped_storage().nbytes() == 4 * 1_000_001
    assert vector.eq(0.1).all()


@pytest.mark.parametrize("size", [0, 1, 2**16, 2**21 + 5])
def test_when_a_vector_is_long_then_its_length_is_right_to_six_digits(size: int) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(1))
    assert length(vector) == pytest.approx(float(np.linalg.norm(vector.double().numpy())), rel=1e-6)
    assert length(vector * 1e30) == pytest.approx(1e30 * length(vector), rel=1e-5)

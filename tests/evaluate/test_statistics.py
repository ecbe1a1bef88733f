from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from fedcast.errors import RunError
from fedcast.evaluate.statistics import geometric_mean, paired_difference, relative


def _rows(model: str, values: dict[tuple[int, str], float], metric: str = "mse") -> pd.DataFrame:
    return pd.DataFrame(
        [{"kind": "result", "model": model, "seed": seed, "domain": domain, metric: v} for (seed, domain), v in values.items()]
    )


def _grid(model: str, matrix: NDArray[np.float64]) -> pd.DataFrame:
    return _rows(model, {(s, f"d{d}"): float(matrix[s, d]) for s in range(matrix.shape[0]) for d in range(matrix.shape[1])})


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_when_values_are_positive_then_the_geometric_mean_is_scipys(values: list[float]) -> None:
    assert geometric_mean(values) == pytest.approx(float(stats.gmean(values)))


@pytest.mark.parametrize(("values", "expected"), [([], np.nan), ([1.0, np.nan], np.nan), ([-1.0, 2.0], np.nan), ([0.0, 5.0], 0.0)])
def test_when_the_geometric_mean_is_undefined_then_it_is_nan(values: list[float], expected: float) -> None:
    assert geometric_mean(values) == pytest.approx(expected, nan_ok=True)


def test_when_scores_are_relative_then_each_is_divided_by_its_own_seed_and_domain() -> None:
    rows = pd.concat(
        [
            _rows("fedtrl", {(0, "a"): 1.0, (1, "a"): 3.0, (2, "a"): 5.0, (0, "b"): 7.0, (0, "c"): 1.0}),
            _rows("seasonal_naive", {(0, "a"): 2.0, (1, "a"): 4.0, (0, "b"): 0.0}),
        ],
        ignore_index=True,
    )
    made = relative(rows, metrics=["mse"])
    # seed 2 takes the mean of the reference's seeds; b's reference is 0, c has none
    np.testing.assert_allclose(made["mse"][:5], [0.5, 0.75, 5 / 3, np.nan, np.nan])
    assert rows["mse"].iloc[0] == 1.0


def test_when_the_reference_comes_from_two_runs_then_it_counts_once() -> None:
    naive = _rows("seasonal_naive", {(0, "a"): 2.0})
    rows = pd.concat([naive, naive, _rows("fedavg", {(0, "a"): 1.0})], ignore_index=True)
    assert relative(rows, metrics=["mse"])["mse"].tolist() == [1.0, 1.0, 0.5]


def test_when_the_reference_has_no_row_then_everything_is_nan() -> None:
    rows = _rows("fedavg", {(0, "a"): 1.0, (1, "b"): 2.0})
    assert relative(rows, metrics=["mse"])["mse"].isna().all()
    made = paired_difference(rows, rows[rows["model"] == "nobody"])
    assert (made.pairs, made.missing) == (0, 2)
    assert np.isnan(made.mean)


def test_when_one_pair_has_two_scores_then_it_is_refused_by_name() -> None:
    rows = pd.concat([_rows("m", {(0, "a"): 1.0}), _rows("m", {(0, "a"): 2.0})])
    with pytest.raises(RunError, match=r"mse has several values for seed 0 and domain 'a': 1 to 2"):
        paired_difference(rows, rows)


def test_when_one_model_is_ten_percent_better_everywhere_then_the_interval_is_that_point() -> None:
    matrix = np.random.default_rng(0).uniform(0.5, 2, size=(3, 5))
    made = paired_difference(_grid("a", 0.9 * matrix), _grid("b", matrix))
    assert made.ratio == pytest.approx(0.9)
    assert [made.low, made.high] == pytest.approx([np.log(0.9)] * 2)
    assert (made.wins, made.losses, made.ties, made.pairs, made.seeds, made.domains, made.missing) == (15, 0, 0, 15, 3, 5, 0)


def test_when_compared_then_the_t_intervals_are_scipys() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.5, 2, size=(4, 6)), rng.uniform(0.5, 2, size=(4, 6))
    made = paired_difference(_grid("a", a), _grid("b", b))
    logs = np.log(a / b)
    seeds = stats.ttest_1samp(logs.mean(axis=1), 0).confidence_interval(0.95)
    domains = stats.ttest_1samp(logs.mean(axis=0), 0).confidence_interval(0.95)
    assert made.mean == pytest.approx(logs.mean())
    assert [made.seed_low, made.seed_high] == pytest.approx([seeds.low, seeds.high])
    assert [made.domain_low, made.domain_high] == pytest.approx([domains.low, domains.high])
    plain = paired_difference(_grid("a", a), _grid("b", b), kind="difference")
    assert plain.mean == pytest.approx((a - b).mean())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_when_the_models_are_swapped_then_the_difference_changes_its_sign(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = _grid("a", rng.uniform(0.5, 2, size=(3, 4))), _grid("b", rng.uniform(0.5, 2, size=(3, 4)))
    there, back = paired_difference(a, b, draws=500), paired_difference(b, a, draws=500)
    assert there.mean == pytest.approx(-back.mean)
    assert [there.low, there.high] == pytest.approx([-back.high, -back.low])
    assert there.low <= there.mean <= there.high
    assert (there.wins, there.losses) == (back.losses, back.wins)


def test_when_domains_vary_then_the_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered, excluded = 0, 0
    for _ in range(200):
        logs = 0.3 + 0.2 * rng.normal(size=(1, 12)) + 0.05 * rng.normal(size=(5, 1)) + 0.05 * rng.normal(size=(5, 12))
        made = paired_difference(_grid("a", np.exp(logs)), _grid("b", np.ones((5, 12))), draws=500)
        covered += made.low <= 0.3 <= made.high
        excluded += made.low > 0
    assert 0.86 <= covered / 200 <= 1.0
    assert excluded / 200 > 0.9


def test_when_pairs_are_missing_then_they_are_left_out_and_counted() -> None:
    a = _rows("a", {(0, "x"): 1.0, (0, "y"): 2.0, (1, "x"): np.nan, (1, "y"): 0.0})
    b = _rows("b", {(0, "x"): 2.0, (0, "y"): 2.0, (1, "x"): 1.0, (1, "y"): 1.0, (0, "z"): 1.0})
    made = paired_difference(a, b)
    assert (made.pairs, made.missing, made.wins, made.ties) == (2, 3, 1, 1)
    assert made.mean == pytest.approx(np.log(0.5) / 2)
    assert (made.seeds, made.domains) == (1, 2)
    assert np.isnan(made.seed_low)


def test_when_only_one_pair_is_left_then_the_interval_is_nan_not_a_point() -> None:
    made = paired_difference(_rows("a", {(0, "x"): 1.0}), _rows("b", {(0, "x"): 2.0}))
    assert made.mean == pytest.approx(np.log(0.5))
    assert np.isnan([made.low, made.high, made.seed_low, made.domain_low]).all()


def test_when_nothing_is_shared_then_everything_is_nan() -> None:
    made = paired_difference(_rows("a", {(0, "x"): 1.0}), _rows("b", {(1, "y"): 2.0}))
    assert np.isnan([made.mean, made.low, made.high]).all()
    assert (made.pairs, made.missing) == (0, 2)

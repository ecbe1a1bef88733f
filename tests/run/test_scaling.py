"""Scaling curves: what may be compared along a number, where the points lie, and what a fit says of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.federations import small_spec, train_small
from tests.scaling_runs import POINTS, SHARES, curve, prox_runs, share_runs, share_spec, write_run

from fedcast.errors import RunError, SplitError, UnknownNameError
from fedcast.run.compare import compare
from fedcast.run.scaling import MIN_EXPONENT, fit_power_law, scaling
from fedcast.spec import RunSpec, parse_spec


def _spread(clients: int, steps: int, **data: object) -> RunSpec:
    spec = small_spec("fedavg", local_steps=steps).to_dict()
    spec["data"] |= {"partition": "dirichlet", "clients": clients, **data}
    return parse_spec(spec)


@given(
    e_inf=st.floats(0.2, 1.0),
    fall=st.floats(0.2, 3.0),
    p=st.floats(0.1, 1.5),
    centre=st.floats(1.0, 1e6),
)
def test_when_errors_lie_on_a_curve_then_it_is_found(e_inf: float, fall: float, p: float, centre: float) -> None:
    x = centre * np.array([0.05, 0.1, 0.25, 0.5, 1.0])
    a = fall * centre**p
    fit = fit_power_law(x, e_inf + a * x**-p, draws=50)
    np.testing.assert_allclose(fit(x), e_inf + a * x**-p, rtol=1e-4)
    assert fit.p == pytest.approx(p, rel=0.05)
    assert fit.e_inf == pytest.approx(e_inf, abs=0.05 * (e_inf + fall))
    assert fit.r2 > 0.9999


@given(x=st.lists(st.floats(0.01, 1e6), min_size=4, max_size=12, unique=True), data=st.data())
def test_when_errors_are_anything_then_the_fit_keeps_its_bounds_and_beats_the_mean(x: list[float], data: st.DataObject) -> None:
    error = np.array([data.draw(st.floats(0.01, 10)) for _ in x])
    fit = fit_power_law(np.array(x), error, draws=50)
    assert fit.e_inf >= 0
    assert fit.a >= 0
    assert math.isnan(fit.p) == (fit.a == 0)
    assert math.isnan(fit.r2) or -1e-9 <= fit.r2 <= 1
    for name, interval in fit.intervals.items():
        assert interval is None or interval[0] <= interval[1], name


def test_when_the_error_does_not_fall_then_the_curve_is_flat_and_has_no_exponent() -> None:
    x = np.array([4.0, 8.0, 16.0, 32.0])
    fit = fit_power_law(x, 0.8 + 0.01 * x)
    assert fit.a == 0
    assert fit(x).tolist() == pytest.approx([0.95] * 4)
    assert fit.intervals["p"] is None
    assert fit.intervals["a"] is None


def test_when_noise_hides_the_curve_then_its_exponent_is_not_identified() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat([1.0, 2.0, 4.0, 8.0], 3)
    clear = fit_power_law(x, 0.5 + 0.5 / x + rng.normal(0, 0.002, 12))
    assert clear.intervals["p"] is not None
    assert MIN_EXPONENT < clear.intervals["p"][0] < 1 < clear.intervals["p"][1]
    assert fit_power_law(x, 0.5 + 0.02 / x + rng.normal(0, 0.1, 12)).intervals["p"] is None
    with pytest.raises(RunError, match="3 values are too few"):
        fit_power_law(x[:9], x[:9])
    for points in ((x - 1, x), (x, x - 2)):
        with pytest.raises(RunError, match="positive values"):
            fit_power_law(*points)


def test_when_a_value_is_zero_then_the_scores_stand_without_a_curve(tmp_path: Path) -> None:
    found = scaling(prox_runs(tmp_path), "method.mu")
    assert found.points["x"].tolist() == [0, 0.01, 0.1, 1] * 2
    assert set(found.fits.values()) == {None}
    assert found.notes == ("no curve is fitted: x^-p has no value at method.mu = 0",)


def test_when_runs_differ_in_their_share_then_points_and_curve_are_over_training_points(tmp_path: Path) -> None:
    found = scaling(share_runs(tmp_path), "data.share")
    assert found.axis == "training points"
    assert len(found.points) == 2 * 2 * len(SHARES)
    assert sorted(set(found.points["x"])) == [POINTS * share for share in SHARES]
    for held_out in (True, False):
        fit = found.fits[held_out]
        assert fit is not None
        assert fit.points == 2 * len(SHARES)
        assert fit.p == pytest.approx(0.5, abs=0.03)
        interval = fit.intervals["e_inf"]
        assert interval is not None
        assert interval[0] < 0.5 < interval[1]
    assert found.points["score"].to_numpy() == pytest.approx([curve(x) for x in found.points["x"]], abs=0.002)
    assert found.notes == ()


def test_when_values_are_few_or_domains_lack_a_score_then_that_is_noted(tmp_path: Path) -> None:
    found = scaling(share_runs(tmp_path, (0.5, 1.0)), "data.share", metric="mase")
    assert set(found.fits.values()) == {None}
    assert found.points["domains"].max() == 2
    assert "energy" in found.notes[0]
    assert "needs 4" in found.notes[1]


def test_when_runs_differ_in_clients_then_local_steps_may_follow_at_equal_work(tmp_path: Path) -> None:
    four = write_run(tmp_path / "4", _spread(4, 8), 0.9, steps=96)
    eight = write_run(tmp_path / "8", _spread(8, 4), 0.8, steps=96)
    more = write_run(tmp_path / "9", _spread(9, 5), 0.8, steps=135)
    same = write_run(tmp_path / "16", _spread(16, 8), 0.8, steps=384)
    assert scaling([four, eight], "data.clients").points["x"].tolist() == [4, 8, 4, 8]
    assert set(compare([four, eight])["model"]) == {str(four), str(eight), "seasonal_naive"}
    with pytest.raises(RunError, match=r"not at equal work: 96 to 135"):
        scaling([four, eight, more], "data.clients")
    assert "96 to 384 gradient steps" in scaling([four, same], "data.clients").notes[-1]
    with pytest.raises(RunError, match=r"federation\.local_steps"):
        scaling([four, write_run(tmp_path / "t", _spread(4, 4, concentration=2.0), 0.8)], "data.concentration")


def test_when_runs_cannot_be_compared_then_the_error_names_what_differs(tmp_path: Path) -> None:
    runs = share_runs(tmp_path, seeds=1)
    bad = {
        "training.batch_size is 8 and 16": write_run(tmp_path / "b", share_spec(0.7, batch_size=16), 0.8),
        "data_fingerprint": write_run(tmp_path / "d", share_spec(0.7), 0.8, data="other"),
        "seasonal naive": write_run(tmp_path / "n", share_spec(0.7), 0.8, naive=False),
        "both have data.share = 0.5 and seed 0": write_run(tmp_path / "s", share_spec(0.5), 0.8),
        "no spec.toml": tmp_path,
    }
    for words, run in bad.items():
        with pytest.raises(RunError, match=words):
            scaling([*runs, run], "data.share")
    with pytest.raises(RunError, match=r"at least two values of data\.share"):
        scaling(runs[:1], "data.share")
    with pytest.raises(RunError, match=r"all runs have training\.batch_size = 8"):
        scaling(runs, "training.batch_size")
    for key, words in {"data.partition": "'domain', no number", "seed": "in seed: it is no axis", "data.clients": "says nothing"}.items():
        with pytest.raises(RunError, match=words) as refused:
            scaling(runs, key)
        assert ("`fedcast init --keys` lists all" in refused.value.hint) == (key != "data.clients")
    with pytest.raises(UnknownNameError) as caught:
        scaling(runs, "data.shares")
    assert caught.value.hint == "did you mean 'data.share'?"
    with pytest.raises(UnknownNameError) as caught:
        scaling(runs, "zzz")
    assert caught.value.hint == "name a numeric key, such as data.share; `fedcast init --keys` lists all"
    with pytest.raises(UnknownNameError, match="coverage80 is no error relative to seasonal naive") as caught:
        scaling(runs, "data.share", metric="coverage80")
    assert caught.value.hint == "choose one of mse, mae, mase, smape, wql"


def test_when_a_run_trains_on_a_share_then_only_that_is_counted_and_the_same_windows_are_scored(tmp_path: Path) -> None:
    specs = [
        spec.model_copy(update={"federation": spec.federation.model_copy(update={"rounds": 1})}) for spec in map(share_spec, (0.5, 1.0))
    ]
    half, whole = (train_small(spec, tmp_path / f"{spec.data.share}") for spec in specs)
    points = scaling([half.folder, whole.folder], "data.share").points.groupby("value")["x"].first()
    assert points[0.5] == pytest.approx(points[1.0] / 2, rel=0.02)
    ours, theirs = (run.results().query("model == 'seasonal_naive'").set_index("domain") for run in (half, whole))
    for name in ("windows", "mse", "mase"):
        assert ours[name].tolist() == theirs[name].tolist()
    with pytest.raises(SplitError, match=r"site \w+: no series has a window to train on in the latest 0.001"):
        train_small(share_spec(0.001), tmp_path / "none")


def test_when_runs_are_validated_after_other_rounds_then_they_still_compare(tmp_path: Path) -> None:
    specs = [share_spec(share) for share in SHARES]
    often = specs[0].model_copy(update={"evaluation": specs[0].evaluation.model_copy(update={"every": 1, "conflict": 5})})
    runs = [write_run(tmp_path / str(number), spec, 0.9) for number, spec in enumerate([often, *specs[1:]])]

    assert len(scaling(runs, "data.share").points) == 2 * len(SHARES)

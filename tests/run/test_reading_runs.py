"""What is read from finished runs: comparison, evaluation of a saved model, diagnosis, and the model folders themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.federations import DOMAINS, small_spec, train_small

from fedcast.data.catalogue import bundled_folder, split_domains
from fedcast.errors import RunError, SpecError, UnknownNameError
from fedcast.models.forecaster import Forecaster
from fedcast.models.mixture import DomainMixture
from fedcast.run.compare import compare
from fedcast.run.diagnose import gradient_conflict
from fedcast.run.evaluate import evaluate
from fedcast.run.folder import RunFolder
from fedcast.run.pretrain import Run
from fedcast.run.serving import serve_otherwise
from fedcast.spec import DataSpec


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    specs = {
        "fedtrl": small_spec("fedtrl"),
        "shadow": small_spec("fedtrl", serving="shadow"),
        "fedavg": small_spec("fedavg"),
        "local": small_spec("local"),
    }
    return {name: train_small(spec.model_copy(update={"name": name}), folder / name) for name, spec in specs.items()}


def test_when_runs_are_compared_then_every_model_stands_once_a_domain(runs: dict[str, Run]) -> None:
    rows = compare([run.folder for run in runs.values()])
    assert set(rows.model) == {"fedtrl", "shadow", "fedavg", "local", "seasonal_naive"}
    assert not rows.duplicated(["model", "domain"]).any()
    ours = rows[(rows.model == "shadow") & ~rows.held_out].set_index("domain").mse
    theirs = rows[(rows.model == "fedtrl") & ~rows.held_out].set_index("domain").mse
    # How unseen domains are served changes nothing for the domains that were trained on.
    pd.testing.assert_series_equal(ours, theirs)


def test_when_runs_have_other_data_then_they_are_not_compared(runs: dict[str, Run], tmp_path: Path) -> None:
    spec = small_spec("fedavg", rounds=1)
    other = train_small(spec.model_copy(update={"data": spec.data.model_copy(update={"held_out": ()})}), tmp_path)
    with pytest.raises(RunError, match="data_fingerprint"):
        compare([runs["fedavg"].folder, other.folder])
    with pytest.raises(RunError, match="no spec"):
        compare([tmp_path])


def test_when_a_result_row_is_read_then_it_describes_itself(runs: dict[str, Run]) -> None:
    row = runs["fedtrl"].results().iloc[0]
    for key in ("task", "data_fingerprint", "spec_fingerprint", "seed", "code", "version", "wall_seconds", "bytes_total", "gradient_steps"):
        assert row[key] not in (None, ""), key
    assert row.bytes_total > 0
    assert row.wall_seconds > 0
    for baseline in runs["fedtrl"].results().model.unique():
        assert baseline in ("fedtrl", "seasonal_naive")


def test_when_rows_are_read_then_they_say_what_the_model_has_seen(runs: dict[str, Run]) -> None:
    for run in runs.values():
        rows = run.results()
        ours = rows.model == rows.method
        assert dict(zip(rows[ours].domain, rows[ours].exposure, strict=True)) == dict.fromkeys(DOMAINS, "seen") | {"transport": "unseen"}
        assert set(rows[~ours].exposure) == {"unseen"}  # baselines train on nothing
    again = evaluate(runs["fedavg"].folder, "bundled", domains=["health", "wind"], windows=4).set_index(["model", "domain"]).exposure
    assert again["model"].to_dict() == {"health": "seen", "wind": "unseen"}
    assert set(again["seasonal_naive"]) == {"unseen"}
    births = bundled_folder() / "health" / "births.parquet"
    for model in (runs["fedavg"].folder, runs["fedavg"].final):
        rows = evaluate(model, births, windows=4, horizon=16, baselines=())
        assert set(rows.exposure) == {"unknown"}  # a file of a person's own, or a model without its run


def test_when_the_held_out_domain_is_scored_again_from_the_saved_model_then_the_scores_are_the_same(runs: dict[str, Run]) -> None:
    results = runs["fedtrl"].results().set_index(["model", "domain"])
    rows = evaluate(runs["fedtrl"].folder, "bundled", domains=["transport"], windows=8).set_index("model")
    assert rows.held_out.all()
    for metric in ("mse", "mae", "wql", "smape"):
        assert rows.loc["model", metric] == pytest.approx(results.loc[("fedtrl", "transport"), metric], rel=1e-4)
        assert rows.loc["seasonal_naive", metric] == pytest.approx(results.loc[("seasonal_naive", "transport"), metric], rel=1e-6)


def test_when_one_file_is_evaluated_then_it_is_one_domain(runs: dict[str, Run]) -> None:
    rows = evaluate(runs["fedavg"].final, bundled_folder() / "health" / "births.parquet", windows=4, horizon=20)
    assert set(rows.domain) == {"births"}
    assert set(rows.horizon) == {20}
    with pytest.raises(UnknownNameError, match="deaths"):
        evaluate(runs["fedavg"].final, bundled_folder() / "health" / "births.parquet", domains=["deaths"])


def test_when_the_ltsf_benchmark_is_evaluated_then_its_own_split_and_scale_hold(runs: dict[str, Run], real_data: Path) -> None:
    rows = evaluate(runs["fedavg"].folder, "ltsf", domains=["etth2"], windows=4).set_index("model")
    naive = rows.loc["seasonal_naive"]
    # The last of four windows ends with the test part, which is the last 2880 of 14400 hours; series are standardised already.
    assert naive.windows == 4
    assert 0.01 < naive.mse < 3
    assert naive.held_out is None
    assert rows.loc["model"].exposure == "unseen"


def test_when_a_run_is_loaded_then_the_kind_of_model_follows_the_method(runs: dict[str, Run]) -> None:
    assert isinstance(Forecaster.from_pretrained(runs["fedtrl"].folder).model, DomainMixture)
    assert not isinstance(Forecaster.from_pretrained(runs["fedavg"].final).model, DomainMixture)
    # A method without a model for all leaves one a site, and every site its own.
    assert sorted(path.name for path in runs["local"].final.iterdir()) == sorted(DOMAINS)
    for site in DOMAINS:
        own = Forecaster.from_pretrained(runs["local"].folder / "sites" / site / "model")
        exported = Forecaster.from_pretrained(runs["local"].final / site)
        context = np.sin(np.arange(64.0))[None]
        assert np.array_equal(own.predict_arrays(context, 16).point, exported.predict_arrays(context, 16).point)


@pytest.mark.parametrize("name", ["fedavg", "fedtrl"])
def test_when_gradients_are_compared_then_share_and_cosine_are_in_range(name: str, runs: dict[str, Run]) -> None:
    share, cosine = gradient_conflict(RunFolder(runs[name].folder))
    assert 0 <= share <= 1
    assert -1 <= cosine <= 1


def test_when_domains_are_chosen_then_overlaps_and_unknown_names_are_refused() -> None:
    assert split_domains(DataSpec(domains=("energy",), held_out=("web",))) == (["energy"], ["web"])
    with pytest.raises(SpecError, match="both"):
        split_domains(DataSpec(domains=("energy",), held_out=("energy",)))
    with pytest.raises(UnknownNameError, match="enrgy"):
        split_domains(DataSpec(domains=("enrgy",)))


def test_when_a_run_is_served_otherwise_then_it_scores_as_if_it_had_been_trained_so(runs: dict[str, Run]) -> None:
    again = serve_otherwise(RunFolder(runs["fedtrl"].folder), "shadow").set_index("domain")
    shadow = runs["shadow"].results().query("model == 'fedtrl'").set_index("domain")
    for metric in ("mse", "wql"):
        assert again[metric].astype(float).tolist() == pytest.approx(shadow[metric].astype(float).tolist(), rel=1e-3)
    with pytest.raises(RunError, match="no mixture"):
        serve_otherwise(RunFolder(runs["fedavg"].folder), "each")


def test_when_several_horizons_are_served_otherwise_then_each_row_keeps_its_own(tmp_path: Path) -> None:
    spec = small_spec("fedtrl", rounds=1)
    run = train_small(spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"horizons": (8, 16)})}), tmp_path)

    again, rows = serve_otherwise(RunFolder(run.folder), "mixture"), run.results()

    own = rows[rows.model == rows.method].reset_index(drop=True)
    assert np.allclose(again.mse.astype(float), own.mse.astype(float), rtol=1e-4)
    with pytest.raises(RunError, match="quantise nothing"):
        serve_otherwise(RunFolder(run.folder), "quantisation")


def test_when_the_best_expert_is_known_by_its_test_error_then_it_is_at_most_their_mean(runs: dict[str, Run], tmp_path: Path) -> None:
    memories = train_small(small_spec("fedpm", rounds=1), tmp_path)
    for run in (runs["fedtrl"], memories):
        each, oracle = (serve_otherwise(RunFolder(run.folder), serving) for serving in ("each", "oracle"))
        held = each.held_out.astype(bool)
        assert (oracle.mse[held].astype(float) < each.mse[held].astype(float)).all()
        pd.testing.assert_series_equal(oracle.mse[~held], each.mse[~held])
    # Of FedTRL's experts the mixture is what serves anyway; FedPM's are chosen by another error.
    for run, alike in ((runs["fedtrl"], True), (memories, False)):
        mixed, rows = serve_otherwise(RunFolder(run.folder), "mixture"), run.results()
        own = rows[rows.model == rows.method].reset_index(drop=True)
        assert np.allclose(mixed.mse.astype(float), own.mse.astype(float), rtol=1e-4) is alike
    with pytest.raises(RunError, match="another order"):
        serve_otherwise(RunFolder(memories.folder), "shadow")

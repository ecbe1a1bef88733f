from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.scaling_runs import share_runs

from fedcast.cli.predict import parse_levels
from fedcast.cli.starter import fit_lengths
from fedcast.cli.train import check_run_folder
from fedcast.data.catalogue import DEFAULT_HELD_OUT
from fedcast.errors import QuantileError
from fedcast.methods.base import METHODS
from fedcast.spec import load_spec

COLUMNS = ("--time", "date", "--id", "shop", "--target", "sales")
SMALL = (
    *("--federation.rounds", "1", "--federation.local_steps", "2", "--training.batch_size", "4", "--seed", "3"),
    *("--evaluation.windows", "4", "--evaluation.validation_windows", "4", "--evaluation.baselines", "seasonal_naive"),
)
Call = Callable[..., Any]


@pytest.fixture
def run_folder(fedcast: Call, own_data: Path, tmp_path: Path) -> Path:
    """A run on a person's own data, as small as can be."""
    spec = tmp_path / "my-spec.toml"
    assert fedcast("init", spec, "--data", own_data, *COLUMNS).code == 0
    answer = fedcast("pretrain", spec, "-o", tmp_path / "run", "--data.held_out", "west", "--data.domains", "north,south", *SMALL)
    assert answer.code == 0, answer.err
    assert "report.html" in answer.out
    return tmp_path / "run"


def test_when_data_is_usable_then_each_file_is_said_to_be(fedcast: Call, own_data: Path) -> None:
    answer = fedcast("check", own_data, *COLUMNS)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.count(": usable, ") == 3
    answer = fedcast("check", own_data / "north.csv", *COLUMNS, "--json")
    assert answer.json()["usable"]
    assert answer.json()["files"][0]["problems"] == []


def test_when_a_file_has_a_problem_then_it_is_named_and_the_exit_code_is_the_frame_errors(fedcast: Call, own_data: Path) -> None:
    (own_data / "broken.csv").write_text("date,shop,sales\n2024-01-01,a,1\n2024-01-01,a,2\n", encoding="utf-8")
    answer = fedcast("check", own_data, *COLUMNS)
    assert answer.code == 21
    assert "broken.csv" in answer.out
    assert answer.out.count(": usable, ") == 3
    found = fedcast("check", own_data, *COLUMNS, "--json")
    assert found.code == 21
    assert [file["source"].endswith("broken.csv") for file in found.json()["files"] if file["problems"]] == [True]


@pytest.mark.parametrize("name", ["nowhere", "nowhere.csv"])
def test_when_there_is_nothing_to_check_then_the_source_is_named(fedcast: Call, tmp_path: Path, name: str) -> None:
    answer = fedcast("check", tmp_path / name)
    assert answer.code == 22
    assert name in answer.err


def test_when_a_spec_is_started_from_own_data_then_it_is_valid_and_fits(fedcast: Call, own_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "my spec!.toml"
    assert fedcast("init", path, "--data", own_data, *COLUMNS, "--json").json() == {"spec": str(path)}
    spec = load_spec(path)
    assert spec.data.domains == ("north", "south", "west")
    assert (spec.data.source, spec.data.time, spec.data.id, spec.data.target) == (str(own_data), "date", "shop", "sales")
    assert spec.name == "my-spec-"
    assert spec.model.horizon <= 24
    assert spec.model.context % spec.model.patch == 0
    assert "# " in path.read_text(encoding="utf-8")


def test_when_a_spec_is_started_without_data_then_it_is_valid(fedcast: Call, tmp_path: Path) -> None:
    assert fedcast("init", tmp_path / "a.toml").code == 0
    data = load_spec(tmp_path / "a.toml").data
    assert (data.source, data.domains, data.held_out) == ("bundled", (), DEFAULT_HELD_OUT["bundled"])


def test_when_the_spec_is_there_already_then_it_is_kept_unless_forced(fedcast: Call, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("mine", encoding="utf-8")
    assert fedcast("init", path).code == 10
    assert path.read_text(encoding="utf-8") == "mine"
    assert fedcast("init", path, "--force").code == 0
    assert path.read_text(encoding="utf-8") != "mine"


def test_when_keys_are_asked_for_then_all_are_printed(fedcast: Call) -> None:
    assert "federation.rounds" in fedcast("init", "--keys").out
    assert {"key", "type", "default", "description"} == set(fedcast("init", "--keys", "--json").json()[0])


@pytest.mark.parametrize(("typical", "context", "horizon"), [(10, 16, 1), (120, 48, 12), (240, 112, 24), (100_000, 256, 64)])
def test_when_series_are_short_then_so_are_context_and_horizon(typical: int, context: int, horizon: int) -> None:
    lengths = fit_lengths(typical)
    assert (lengths.context, lengths.horizon) == (context, horizon)


def test_when_methods_are_listed_then_each_is_there(fedcast: Call) -> None:
    answer = fedcast("methods")
    assert all(name in answer.out for name in METHODS)
    assert [method["name"] for method in fedcast("methods", "--json").json()] == sorted(METHODS)
    assert [method["name"] for method in fedcast("methods", "fedtrl", "--json").json()] == ["fedtrl"]


def test_when_a_method_is_misspelt_then_the_right_one_is_suggested(fedcast: Call) -> None:
    answer = fedcast("methods", "fedtlr")
    assert (answer.code, answer.err.splitlines()[1]) == (11, "hint: did you mean 'fedtrl'?")


def test_when_a_hyper_parameter_does_not_exist_then_it_is_refused(fedcast: Call, tmp_path: Path) -> None:
    fedcast("init", tmp_path / "a.toml")
    answer = fedcast("pretrain", tmp_path / "a.toml", "--method.no_such_thing", "1", "-o", tmp_path / "run")
    assert answer.code == 11
    assert "no_such_thing" in answer.err
    assert not (tmp_path / "run").exists()


def test_when_a_model_is_trained_then_it_forecasts_evaluates_compares_and_reports(
    fedcast: Call, own_data: Path, run_folder: Path, tmp_path: Path
) -> None:
    data = own_data / "north.csv"
    model = ("--model", run_folder / "best")
    answer = fedcast("forecast", *model, "--data", data, *COLUMNS, "--horizon", "5", "--quantiles", "0.2,0.8")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[0] == "shop,date,forecast,q0.2,q0.8"
    assert len(answer.out.splitlines()) == 1 + 2 * 5
    files = ("-o", tmp_path / "out" / "f.parquet", "--plot", tmp_path / "f.html")
    assert fedcast("forecast", *model, "--data", data, *COLUMNS, "--horizon", "40", *files, "--json").json()["rows"] == 80
    frame = pd.read_parquet(tmp_path / "out" / "f.parquet")
    assert list(frame.columns) == ["shop", "date", "forecast", "q0.1", "q0.5", "q0.9"]
    assert np.isfinite(frame.iloc[:, 2:].to_numpy()).all()
    assert "north-0" in (tmp_path / "f.html").read_text(encoding="utf-8")

    rows = fedcast("evaluate", *model, "--data", own_data, *COLUMNS, "--domain", "west", "--windows", "4", "--json").json()
    assert {row["domain"] for row in rows} == {"west"}
    assert {"mse", "wql"} <= set(rows[0])
    assert fedcast("evaluate", *model, "--data", own_data, *COLUMNS, "--windows", "4", "-o", tmp_path / "scores.csv").code == 0
    assert set(pd.read_csv(tmp_path / "scores.csv")["domain"]) == {"north", "south", "west"}

    table = fedcast("evaluate", "--model", run_folder, "--data", data, *COLUMNS, "--windows", "4", "--horizon", "7")
    assert (table.code, table.err) == (0, "")
    assert "north" in table.out
    assert "held-out" not in table.out

    compared = fedcast("compare", run_folder, "--json")
    assert {row["domain"] for row in compared.json()} == {"north", "south", "west"}
    assert fedcast("compare", run_folder).code == 0
    assert fedcast("report", run_folder, "-o", tmp_path / "page.html").out == f"wrote {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").stat().st_size > 10_000
    answer = fedcast("report", run_folder, "-o", own_data)
    assert (answer.code, answer.err.splitlines()[1]) == (22, "hint: choose another file with -o")


def test_when_each_site_keeps_a_model_then_the_run_folder_says_which_there_are(fedcast: Call, own_data: Path, tmp_path: Path) -> None:
    fedcast("init", tmp_path / "a.toml", "--data", own_data, *COLUMNS)
    assert fedcast("pretrain", tmp_path / "a.toml", "-o", tmp_path / "run", *SMALL, "--method.name", "local").code == 0
    words = ("--data", own_data / "north.csv", *COLUMNS, "--horizon", "3")
    answer = fedcast("forecast", "--model", tmp_path / "run", *words)
    assert answer.code == 31
    assert "one model a site: north, south, west" in answer.err
    assert fedcast("forecast", "--model", tmp_path / "run" / "final" / "north", *words).code == 0


def test_when_the_output_is_no_run_folder_then_training_is_refused(fedcast: Call, own_data: Path, tmp_path: Path) -> None:
    fedcast("init", tmp_path / "a.toml", "--data", own_data, *COLUMNS)
    for place, words in ((own_data, "holds north.csv"), (tmp_path / "a.toml", "is a file")):
        answer = fedcast("pretrain", tmp_path / "a.toml", "-o", place, *SMALL)
        assert answer.code == 50
        assert words in answer.err
    assert sorted(file.name for file in own_data.iterdir()) == ["north.csv", "south.csv", "west.csv"]


def test_when_a_run_was_stopped_before_its_first_round_then_its_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "spec.toml").touch()
    check_run_folder(tmp_path)
    check_run_folder(tmp_path / "new")


def test_when_training_is_asked_for_json_then_stdout_is_json(fedcast: Call, own_data: Path, tmp_path: Path) -> None:
    fedcast("init", tmp_path / "a.toml", "--data", own_data, *COLUMNS)
    answer = fedcast("pretrain", tmp_path / "a.toml", "-o", tmp_path / "run", *SMALL, "--json")
    assert answer.code == 0, answer.err
    document = answer.json()
    assert set(document) == {"run", "final", "best", "report", "results"}
    assert all(Path(document[key]).exists() for key in ("run", "final", "best", "report"))
    assert {row["model"] for row in document["results"]} == {"fedtrl", "seasonal_naive"}


@pytest.mark.parametrize("text", ["", "a", "0.1,,0.5", "0", "1", "1.5", "nan", "-0.1"])
def test_when_a_level_is_none_then_it_is_refused(text: str) -> None:
    with pytest.raises(QuantileError):
        parse_levels(text)


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_when_a_run_is_not_there_then_that_is_said(fedcast: Call, tmp_path: Path, verb: str) -> None:
    answer = fedcast(verb, tmp_path / "nowhere")
    assert 10 <= answer.code < 128
    assert "nowhere" in answer.err


def test_when_a_model_is_not_there_then_that_is_said(fedcast: Call, own_data: Path, tmp_path: Path) -> None:
    answer = fedcast("forecast", "--model", tmp_path / "nowhere", "--data", own_data / "north.csv", *COLUMNS, "--horizon", "3")
    assert answer.code == 31
    assert "nowhere" in answer.err
    answer = fedcast("forecast", "--model", "nowhere", "--data", "nowhere", "--horizon", "3", "--plot", tmp_path / "f.pdf")
    assert (answer.code, answer.err.splitlines()[1]) == (22, "hint: use .html")


@pytest.mark.parametrize("words", [("compare", "nowhere"), ("evaluate", "--model", "nowhere", "--data", "bundled")])
def test_when_an_ending_or_metric_is_unknown_then_it_is_refused_first(fedcast: Call, tmp_path: Path, words: tuple[str, ...]) -> None:
    answer = fedcast(*words, "-o", tmp_path / "f.xlsx")
    assert answer.code == 22
    assert ".parquet" in answer.err
    answer = fedcast(*words, "--metric", "mes")
    assert (answer.code, answer.err.splitlines()[1]) == (11, "hint: did you mean 'mse'?")


def test_when_runs_are_compared_over_a_key_then_the_curve_is_printed_written_and_drawn(fedcast: Call, tmp_path: Path) -> None:
    runs = share_runs(tmp_path / "runs")
    answer = fedcast("compare", *runs, "--over", "data.share", "--html", tmp_path / "s.html", "-o", tmp_path / "rows.csv")
    assert (answer.code, answer.err) == (0, "")
    assert "training points" in answer.out
    assert "held-out" in answer.out
    assert {"run", "value", "x", "mse"} <= set(pd.read_csv(tmp_path / "rows.csv").columns)
    assert (tmp_path / "s.html").stat().st_size > 10_000
    found = fedcast("compare", *runs, "--over", "data.share", "--json").json()
    assert len(found["rows"]) == 2 * len(runs)
    assert {fit["held_out"] for fit in found["fit"]} == {True, False}
    assert set(found["fit"][0]["intervals"]) == {"e_inf", "a", "p"}
    for words, code in ((("--html", tmp_path / "s.html"), 10), (("--over", "data.shares"), 11), (("--over", "seed"), 50)):
        assert fedcast("compare", *runs, *words).code == code

"""The verbs ``finetune``, ``tunings`` and ``landscape``, on a native checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedcast.federated.rounds import Silent
from fedcast.methods.base import build_method
from fedcast.models.base import ModelConfig
from fedcast.models.checkpoints import load_checkpoint
from fedcast.models.patch import PatchTransformer
from fedcast.models.published.base import Library
from fedcast.models.published.chronos_bolt import ChronosBolt
from fedcast.report import console
from fedcast.spec import load_spec
from fedcast.tuning.base import TUNINGS, build_tuning

COLUMNS = ("--time", "date", "--id", "shop", "--target", "sales")
SMALL = (
    *("--federation.rounds", "1", "--federation.local_steps", "1", "--training.batch_size", "4", "--data.domains", "north,south"),
    *("--evaluation.windows", "4", "--evaluation.validation_windows", "4", "--data.held_out", "west"),
)
Call = Callable[..., Any]


@pytest.fixture
def spec(fedcast: Call, own_data: Path, tmp_path: Path) -> Path:
    """A spec that fine-tunes a native model over a person's own data."""
    config = ModelConfig(d_model=16, n_heads=2, encoder_layers=1, decoder_layers=1, context=48, horizon=8, patch=8)
    PatchTransformer(config, seed=4).save_pretrained(tmp_path / "model")
    path = tmp_path / "fine.toml"
    answer = fedcast("init", path, "--data", own_data, *COLUMNS, "--checkpoint", tmp_path / "model")
    assert answer.err.splitlines() == ["next: read it, then train", f"hint: fedcast finetune {path}"]
    return path


def test_when_a_spec_is_started_from_a_checkpoint_then_it_fits_model_and_data(fedcast: Call, spec: Path, tmp_path: Path) -> None:
    started = load_spec(spec)
    assert (started.model.checkpoint, started.model.context, started.model.horizon) == (str(tmp_path / "model"), 48, 8)
    assert (started.method.name, started.tuning.name, started.training.learning_rate) == ("fedavg", "full", 1e-4)
    assert "size" not in spec.read_text(encoding="utf-8").replace("batch_size", "").replace("its size", "")
    assert fedcast("init", tmp_path / "b.toml", "--checkpoint", tmp_path / "model").code == 0
    assert (load_spec(tmp_path / "b.toml").model.context, load_spec(tmp_path / "b.toml").data.source) == (48, "bundled")
    assert fedcast("init", tmp_path / "c.toml", "--checkpoint", tmp_path / "nowhere").code == 31
    assert not (tmp_path / "c.toml").exists()


def test_when_a_checkpoint_is_fine_tuned_then_runs_compare_and_their_loss_is_drawn(fedcast: Call, spec: Path, tmp_path: Path) -> None:
    document = fedcast("finetune", spec, "-o", tmp_path / "full", "--name", "full", *SMALL, "--json").json()
    assert set(document) == {"run", "final", "best", "report", "results"}
    words = ("--tuning.name", "head", "--name", "head", "-o", tmp_path / "head")
    assert fedcast("finetune", spec, *words, *SMALL).code == 0
    assert fedcast("finetune", spec, *words, *SMALL).code == 0  # it is finished, and says so again
    rows = fedcast("compare", tmp_path / "full", tmp_path / "head", "--json").json()
    assert {row["model"] for row in rows} == {"full", "head", "seasonal_naive"}
    assert {row["tuning"] for row in rows} == {"full", "head"}

    page = tmp_path / "land.html"
    answer = fedcast("landscape", tmp_path / "full", tmp_path / "head", "--html", page, "--grid", "3", "--windows", "4")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines()[-1] == f"wrote {page}"
    assert page.stat().st_size > 10_000
    words = ("--domain", "west", "--part", "validation", "--windows", "4", "--json")
    (row,) = fedcast("landscape", tmp_path / "full", *words).json()["runs"]
    assert (row["domain"], row["ratio"]) == ("west", pytest.approx(row["trace"] / row["frobenius"]))
    assert row["loss"] > 0


def test_when_runs_have_different_windows_then_no_landscape_is_drawn(fedcast: Call, spec: Path, tmp_path: Path) -> None:
    zero = ("finetune", spec, *SMALL, "--method.name", "zero_shot")
    assert fedcast(*zero, "-o", tmp_path / "a").code == 0
    assert fedcast(*zero, "-o", tmp_path / "b", "--model.horizon", "4").code == 0
    answer = fedcast("landscape", tmp_path / "a", tmp_path / "b")
    assert (answer.code, answer.err.splitlines()[0]) == (50, "error[run]: the runs differ in data, context or horizon")
    assert fedcast("landscape", tmp_path / "a", "--domain", "wset").code == 11


class Stopped(Silent):
    """Presses Ctrl-C when a search comes to its second candidate."""

    def row(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "candidate" and "0.5" in row["label"]:
            raise KeyboardInterrupt


def test_when_a_search_was_stopped_then_it_goes_on_where_it_was(
    fedcast: Call, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("finetune", spec, "--tuning.name", "sff", "--tuning.alpha", "validation", *SMALL)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(console, "ProgressObserver", Stopped)
        assert fedcast(*words, "-o", run).code == 130
    (first,) = (run / "candidates").iterdir()
    written = (first / "metrics.jsonl").stat().st_mtime_ns
    assert fedcast(*words, "-o", run).code == 0
    assert len(json.loads((run / "candidates.json").read_text(encoding="utf-8"))) == 4
    assert (first / "metrics.jsonl").stat().st_mtime_ns == written


def test_when_verb_and_checkpoint_do_not_fit_then_the_other_verb_is_named(fedcast: Call, spec: Path, tmp_path: Path) -> None:
    answer = fedcast("pretrain", spec, "-o", tmp_path / "run")
    assert answer.code == 10
    assert "`fedcast finetune`" in answer.err
    scratch = tmp_path / "scratch.toml"
    scratch.write_text("", encoding="utf-8")
    answer = fedcast("finetune", scratch, "-o", tmp_path / "run")
    assert answer.code == 10
    assert "set model.checkpoint" in answer.err
    assert not (tmp_path / "run").exists()


def test_when_a_checkpoint_cannot_be_used_then_that_is_said_before_anything_is_written(
    fedcast: Call, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    foreign, damaged = tmp_path / "foreign", tmp_path / "damaged"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"architectures": ["Llama"]}', encoding="utf-8")
    load_checkpoint(tmp_path / "model").save_pretrained(damaged)
    (damaged / "model.safetensors").write_bytes(b"")
    places = {"nowhere": "nowhere", foreign: "no adapter", damaged: "damaged", "no-such-owner/no-such-model": "cannot be had"}
    for checkpoint, words in places.items():
        answer = fedcast("finetune", spec, "-o", tmp_path / "run", "--model.checkpoint", checkpoint)
        assert answer.code == 31, checkpoint
        assert words in answer.err
        assert "Traceback" not in answer.err
    assert not (tmp_path / "run").exists()


def test_when_the_library_is_not_installed_then_the_command_that_installs_it_is_named(
    fedcast: Call, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChronosBolt, "library", Library("chronos-forecasting", "no_such_module", "pip install chronos-forecasting"))
    folder = tmp_path / "bolt"
    folder.mkdir()
    config = {"architectures": ["ChronosBoltModelForForecasting"], "chronos_config": {}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    answer = fedcast("finetune", spec, "-o", tmp_path / "run", "--model.checkpoint", folder)
    assert answer.code == 60
    assert answer.err.splitlines()[1] == "hint: pip install chronos-forecasting"
    assert fedcast("models", "chronos-bolt", "--random", tmp_path / "tiny").code == 60
    assert "not installed: pip install chronos-forecasting" in fedcast("models").out


def test_when_tunings_are_listed_then_each_is_there(fedcast: Call) -> None:
    assert all(name in fedcast("tunings").out for name in TUNINGS)
    assert [row["name"] for row in fedcast("tunings", "--json").json()] == sorted(TUNINGS)
    (row,) = fedcast("tunings", "sff", "--json").json()
    assert {"name": "alpha", "type": "float | validation"}.items() <= row["parameters"][0].items()
    answer = fedcast("tunings", "sfff")
    assert (answer.code, answer.err.splitlines()) == (11, ["error[unknown-name]: unknown tuning 'sfff'", "hint: did you mean 'sff'?"])


def test_when_the_example_is_read_then_method_and_tuning_take_its_options(repository: Path) -> None:
    example = load_spec(repository / "examples" / "finetune.toml")
    assert example.model.checkpoint in ChronosBolt.hub
    assert (build_method(example.method).name, build_tuning(example.tuning).name) == ("fedavg", "lora")

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.federations import small_spec, train_small
from tests.run.test_resume import Killer

from fedcast import Forecaster, compare, finetune
from fedcast.errors import CheckpointError, ResumeError, SpecError
from fedcast.federated.messages import Task
from fedcast.federated.plan import Plan
from fedcast.federated.site import Site
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.models.checkpoints import load_checkpoint
from fedcast.run.prepare import prepare
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec, parse_spec

HEADER = 4096
"""Most bytes of a message that are not its tensors: names, shapes, numbers of the round."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(small_spec("fedavg"), tmp_path_factory.mktemp("base"))


def tuned(base: Run, method: str = "fedavg", tuning: dict[str, Any] | None = None, **options: Any) -> RunSpec:
    document = small_spec(method, **options).to_dict()
    document["model"]["checkpoint"] = str(base.final)
    document["tuning"] = tuning or {"name": "full"}
    return parse_spec(document)


def scores(run: Run, method: str) -> list[float]:
    results = run.results()
    return [float(value) for value in results[results.model == method].sort_values("domain").mse]


def test_when_nothing_is_trained_then_the_checkpoint_itself_is_scored_and_nothing_travels(base: Run, tmp_path: Path) -> None:
    run = finetune(tuned(base, "zero_shot"), output=tmp_path / "run")
    assert scores(run, "zero_shot") == scores(base, "fedavg")
    row = run.rows("result")[0]
    assert (row["gradient_steps"], row["bytes_total"], row["parameters_trained"], row["parameters_sent"]) == (0, 0, 0, 0)
    for folder in (run.final, run.best):
        state = load_checkpoint(folder).state_dict()
        assert all(torch.equal(state[name], value) for name, value in load_checkpoint(base.final).state_dict().items())


@pytest.mark.parametrize("tuning", [{"name": "lora", "rank": 2}, {"name": "head"}], ids=["lora", "head"])
def test_when_only_some_weights_train_then_only_their_bytes_travel(base: Run, tuning: dict[str, Any], tmp_path: Path) -> None:
    spec = tuned(base, tuning=tuning, rounds=2)
    plan = Plan(spec, build_method(spec.method))
    size = plan.layout.shared_size
    assert 0 < size < 0.1 * plan.parameters
    run = finetune(spec, output=tmp_path / "run")
    for row in run.rows("round"):
        assert row["bytes_up"] == row["bytes_down"] == 3 * 4 * size
    prepared = prepare(spec, plan.method)
    site = Site(prepared.roles["energy"], prepared.stores["energy"], plan, tmp_path / "site")
    task = Task("train", 1, {"shared": plan.initial[:size]})
    reply = site.run(task, Workspaces())
    for message in (task.encode(), reply.encode()):
        assert 4 * size < len(message) < 4 * size + HEADER


def test_when_weights_are_frozen_then_they_leave_the_run_as_they_came(base: Run, tmp_path: Path) -> None:
    run = finetune(tuned(base, tuning={"name": "head"}, rounds=2), output=tmp_path / "run")
    before, after = load_checkpoint(base.final).state_dict(), load_checkpoint(run.final).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("heads.")}


def test_when_a_fine_tuned_run_is_repeated_with_one_worker_then_the_bytes_are_the_same(base: Run, tmp_path: Path) -> None:
    digests = {
        finetune(tuned(base, tuning={"name": "lora"}, rounds=2, workers=workers), output=tmp_path / str(workers)).rows("result")[0][
            "weights_sha256"
        ]
        for workers in (1, 2)
    }
    assert len(digests) == 1


def test_when_sites_adapt_after_the_federation_then_nothing_travels_and_they_are_scored_with_their_own_weights(
    base: Run, tmp_path: Path
) -> None:
    run = finetune(tuned(base, "fedla", rounds=3), output=tmp_path / "run")
    rounds = run.rows("round")
    assert [row["bytes_up"] > 0 for row in rounds] == [True, True, False]
    assert rounds[2]["bytes_down"] == rounds[1]["bytes_down"]  # the federation's model, once more: where they start from
    federated = finetune(tuned(base, "fedavg", rounds=3), output=tmp_path / "federated")
    own = {site: load_checkpoint(run.folder / "sites" / site / "model").state_dict() for site in ("energy", "health")}
    shared = load_checkpoint(run.final).state_dict()
    name = "heads.point.weight"
    assert not torch.equal(own["energy"][name], own["health"][name])
    assert not torch.equal(own["energy"][name], shared[name])
    # what stands in the middle of the run is FedAvg's: the same windows, steps and means
    assert [row["sites"]["energy"]["loss"] for row in rounds[:2]] == [row["sites"]["energy"]["loss"] for row in federated.rows("round")[:2]]


@pytest.mark.parametrize(
    ("keys", "tuning", "match"),
    [
        ({"federation": {"rounds": 2}}, "trace", "second round"),
        ({"method": {"name": "local"}}, "trace", "nothing travels"),
        ({"training": {"compile": True}}, "lora", "training.compile"),
        ({"model": {"objective": "reconstruct"}}, "full", "trains the architecture 'causal'"),
    ],
)
def test_when_a_key_does_not_fit_the_tuning_then_that_is_said_before_data_are_read(
    base: Run, keys: dict[str, dict[str, Any]], tuning: str, match: str, tmp_path: Path
) -> None:
    document = tuned(base, tuning={"name": tuning}).to_dict()
    for section, values in keys.items():
        document[section] = {**document[section], **values}
    document["data"]["source"] = str(tmp_path / "no-such-data")
    with pytest.raises(SpecError, match=match):
        finetune(parse_spec(document), output=tmp_path / "run")


def test_when_few_sites_take_part_then_all_of_them_adapt_in_the_end(base: Run, tmp_path: Path) -> None:
    document = tuned(base, "fedla", rounds=4, local_steps=1, adapt=0.5).to_dict()
    document["federation"]["participation"] = 0.4
    run = finetune(parse_spec(document), output=tmp_path / "run")
    rounds = run.rows("round")
    assert [len(row["sites"]) for row in rounds] == [2, 2, 3, 3]
    assert [row["dropped"] for row in rounds] == [{}] * 4
    assert [row["bytes_down"] > 0 for row in rounds] == [True, True, True, False]
    assert {path.name for path in (run.folder / "sites").glob("*") if (path / "model").is_dir()} == {"energy", "health", "medical"}


def test_when_sites_are_pulled_hard_then_they_stay_nearer_to_the_federation(base: Run, tmp_path: Path) -> None:
    distances = []
    for mu in (0.0, 100.0):
        run = finetune(tuned(base, "fedla", rounds=3, mu=mu), output=tmp_path / str(mu))
        own, shared = (load_checkpoint(folder).state_dict() for folder in (run.folder / "sites" / "energy" / "model", run.final))
        distances.append(float(sum((own[key] - shared[key]).square().sum() for key in shared)))
    assert 0 < distances[1] < distances[0]


def test_when_fedla_runs_as_released_then_every_round_is_averaged(base: Run, tmp_path: Path) -> None:
    run = finetune(tuned(base, "fedla", rounds=3, as_released=True), output=tmp_path / "run")
    assert all(row["bytes_up"] > 0 for row in run.rows("round"))
    assert not (run.folder / "sites" / "energy" / "model").exists()


def test_when_the_validation_chooses_then_each_candidate_is_a_run_and_the_best_is_kept(base: Run, tmp_path: Path) -> None:
    spec = tuned(base, tuning={"name": "sff", "alpha": "validation"}, rounds=2, local_steps=2)
    run = finetune(spec, output=tmp_path / "run")
    tried = json.loads((run.folder / "candidates.json").read_text())
    assert [each["tuning"]["alpha"] for each in tried] == [0.3, 0.5, 0.7, 0.9]
    best = min(tried, key=lambda each: each["validation_loss"])
    assert json.loads(run.rows("result")[0]["tuning_options"])["alpha"] == best["tuning"]["alpha"]
    assert finetune(spec, output=tmp_path / "run").rows("result") == run.rows("result")


def test_when_the_validation_is_to_choose_then_another_run_is_not_overwritten(base: Run, tmp_path: Path) -> None:
    run = finetune(tuned(base, rounds=1, local_steps=1), output=tmp_path / "run")
    before = (run.folder / "spec.toml").read_bytes()
    with pytest.raises(ResumeError, match="another spec"):
        finetune(tuned(base, tuning={"name": "sff", "alpha": "validation"}, rounds=1), output=run.folder)
    assert (run.folder / "spec.toml").read_bytes() == before


def test_when_runs_of_one_name_and_method_are_compared_then_their_folders_tell_them_apart(base: Run, tmp_path: Path) -> None:
    runs = [
        finetune(tuned(base, tuning=tuning, rounds=1, local_steps=1), output=tmp_path / tuning["name"])
        for tuning in ({"name": "full"}, {"name": "head"})
    ]
    models = set(compare([run.folder for run in runs]).model)
    assert {str(tmp_path / "full"), str(tmp_path / "head")} <= models


def test_when_a_checkpoint_is_scored_then_what_it_saw_is_unknown(base: Run, tmp_path: Path) -> None:
    trained = finetune(tuned(base, rounds=1, local_steps=1), output=tmp_path / "trained").results().query("model == 'fedavg'")
    assert dict(zip(trained.domain, trained.exposure, strict=True)) == {
        **dict.fromkeys(("energy", "health", "medical"), "seen"),
        "transport": "unknown",
    }
    untrained = finetune(tuned(base, "zero_shot"), output=tmp_path / "untrained").results().query("model == 'zero_shot'")
    assert set(untrained.exposure) == {"unknown"}


def test_when_more_steps_are_asked_than_a_pass_gives_then_that_is_said_before_anything_trains(base: Run, tmp_path: Path) -> None:
    document = tuned(base).to_dict()
    document["model"]["horizon"] = 17
    with pytest.raises(SpecError, match="forecasts 16 steps a pass"):
        finetune(parse_spec(document), output=tmp_path / "run")


def test_when_a_checkpoint_changes_under_a_run_then_it_is_not_resumed(base: Run, tmp_path: Path) -> None:
    model = load_checkpoint(base.final)
    model.save_pretrained(tmp_path / "model")
    document = {**tuned(base, rounds=1).to_dict()}
    document["model"] = {**document["model"], "checkpoint": str(tmp_path / "model")}
    finetune(parse_spec(document), output=tmp_path / "run")
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ResumeError, match="another checkpoint"):
        finetune(parse_spec(document), output=tmp_path / "run")


def test_when_spec_and_verb_do_not_go_together_then_the_other_verb_is_named(base: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nothing to fine-tune"):
        finetune(small_spec("fedavg"), output=tmp_path / "run")
    with pytest.raises(SpecError, match="no training from scratch"):
        pretrain(tuned(base), output=tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "tuning", "match"),
    [
        ("ffts", {"name": "full"}, "trains the architecture 'trend'"),
        ("fedtrl", {"name": "lora"}, "mixture of native models"),
        ("fedtrl", {"name": "head"}, "mixture of native models"),
        ("zero_shot", {"name": "sff", "alpha": "validation"}, "trains nothing"),
        ("fedavg", {"name": "lora", "rank": 0}, "rank"),
        ("fedavg", {"name": "prompt"}, "unknown tuning"),
        ("fedgroup", {"name": "full"}, "no site fits the pattern 'hospital"),
    ],
)
def test_when_parts_do_not_fit_then_the_run_is_refused_before_it_trains(
    base: Run, method: str, tuning: dict[str, Any], match: str, tmp_path: Path
) -> None:
    options = {"groups": ["hospital*"]} if method == "fedgroup" else {}
    with pytest.raises(SpecError, match=match):
        finetune(tuned(base, method, tuning, **options), output=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_when_there_is_no_such_checkpoint_then_that_is_said(base: Run, tmp_path: Path) -> None:
    document = tuned(base).to_dict()
    document["model"]["checkpoint"] = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere"):
        finetune(parse_spec(document), output=tmp_path / "run")


def test_when_a_fine_tuned_model_is_saved_then_it_forecasts(base: Run, tmp_path: Path) -> None:
    run = finetune(tuned(base, tuning={"name": "lora"}, rounds=1), output=tmp_path / "run")
    forecast = Forecaster.from_pretrained(run.folder).predict_arrays([[1.0, 2.0, 3.0, 2.0] * 8], 8)
    assert forecast.quantiles.shape == (1, 8, 9)


def demanding(base: Path) -> RunSpec:
    """Fed-LA with TRACE: a mask that the federation agrees on, then a stage in which each site goes on alone."""
    document = small_spec("fedla", rounds=5, local_steps=2, adapt=0.4).to_dict()
    document["model"]["checkpoint"] = str(base)
    document["tuning"] = {"name": "trace", "selections": 1}
    return parse_spec(document)


def die(base: str, folder: str) -> None:
    """Fine-tune until the second site of the last round has answered; run by the test in a process of its own."""
    finetune(demanding(Path(base)), output=folder, observer=Killer("site", 5))


def test_when_killed_while_sites_adapt_then_the_resumed_run_ends_with_the_same_bytes(base: Run, tmp_path: Path) -> None:
    whole = finetune(demanding(base.final), output=tmp_path / "whole")
    script = "import sys; from tests.run.test_finetune import die; die(*sys.argv[1:])"
    command = [sys.executable, "-c", script, str(base.final), str(tmp_path / "run")]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    resumed = finetune(demanding(base.final), output=tmp_path / "run")
    for name in ("final", "sites/energy/model", "sites/medical/model"):
        first, second = ((run.folder / name / "model.safetensors").read_bytes() for run in (whole, resumed))
        assert first == second
    assert scores(resumed, "fedla") == scores(whole, "fedla")

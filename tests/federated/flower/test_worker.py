"""What a site's worker does with bytes, whoever brings them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.federated.flower.deployment import write_data

from fedcast.errors import ConsortiumError, SourceError
from fedcast.federated.audit import verify
from fedcast.federated.flower.policy import Policy
from fedcast.federated.flower.worker import Worker, load_site
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.site import Site, SiteRole
from fedcast.federated.survey import survey
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.spec import RunSpec, parse_spec

NAME = "health"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's folder of files."""
    return write_data(tmp_path_factory.mktemp("data"), (NAME,)) / NAME


def spec_of(method: str = "fedavg", options: dict[str, object] | None = None, **evaluation: object) -> RunSpec:
    """Return a run's spec, as a coordinator has it: its data section names sites."""
    return parse_spec(
        {
            "seed": 3,
            "data": {"source": "wherever", "domains": [NAME]},
            "model": {"size": "nano", "context": 64, "horizon": 16},
            "method": {"name": method, **(options or {})},
            "training": {"batch_size": 4, "precision": "float32", "products": "default", "device": "cpu"},
            "federation": {"rounds": 2, "local_steps": 1, "fleet": "flower"},
            "evaluation": {"windows": 4, "validation_windows": 4, **evaluation},
        }
    )


def describe(spec: RunSpec, changes: dict[str, object] | None = None) -> Task:
    """Return the task by which a coordinator asks a site to take part."""
    training = spec.training.model_copy(update={"kernels": "torch"})
    meta = {"spec": spec.model_dump(mode="json"), "training": training.model_dump(mode="json"), "role": asdict(SiteRole(NAME))}
    return Task("describe", 0, {}, {**meta, **(changes or {})}, id="describe")


def train(spec: RunSpec, round_: int = 1, **meta: object) -> Task:
    """Return a training task."""
    plan = Plan(spec, build_method(spec.method))
    shared = plan.initial[: plan.layout.shared_size]
    return Task("train", round_, {"shared": shared}, {"export": False, **meta}, id=f"train-{round_}")


def asked(worker: Worker, spec: RunSpec, task: Task, run: str | None = None) -> Reply:
    """Return a worker's answer."""
    return Reply.decode(worker.answer(run or spec.fingerprint(), task.encode()), task.kind)


@pytest.fixture
def worker(data: Path, tmp_path: Path) -> Iterator[Worker]:
    """A worker that allows whatever is allowed by default."""
    made = Worker(NAME, data, tmp_path / "state", Policy())
    yield made
    made.close()


def test_when_a_site_is_asked_then_it_says_what_it_has_and_trains_as_a_site_in_this_process_does(
    worker: Worker, data: Path, tmp_path: Path
) -> None:
    spec = spec_of()
    store = load_site(NAME, data)
    role = SiteRole(NAME)
    found = survey(role, store, spec)

    answer = asked(worker, spec, describe(spec))
    assert answer.error is None
    assert (answer.meta["samples"], answer.meta["series"], answer.meta["fingerprint"]) == (found.samples, found.series, store.fingerprint)

    reply = asked(worker, spec, train(spec))
    here = Site(role, store, Plan(spec, build_method(spec.method)), tmp_path / "here").run(train(spec), Workspaces())
    assert reply.task == "train-1"
    assert reply.tensors.keys() == {"shared"}
    assert reply.tensors["shared"].equal(here.tensors["shared"])


def test_when_a_task_comes_twice_then_its_bytes_are_the_same_and_the_work_is_done_once(worker: Worker, tmp_path: Path) -> None:
    spec = spec_of()
    asked(worker, spec, describe(spec))
    first, second = (worker.answer(spec.fingerprint(), train(spec).encode()) for _ in range(2))
    assert first == second
    assert verify(tmp_path / "state" / "audit.jsonl").events == {"task-answered": 2, "task-repeated": 1}


def test_when_a_worker_starts_again_then_it_knows_its_runs_and_repeats_a_round_from_the_same_state(
    worker: Worker, data: Path, tmp_path: Path
) -> None:
    spec = spec_of("fedtrl")
    asked(worker, spec, describe(spec))
    asked(worker, spec, train(spec))
    second = asked(worker, spec, train(spec, 2))
    worker.close()
    again = Worker(NAME, data, tmp_path / "state", Policy())
    repeated = asked(again, spec, train(spec, 2))
    again.close()
    assert repeated.error is None
    assert repeated.tensors["shared"].equal(second.tensors["shared"])


@pytest.mark.parametrize(
    ("rules", "spec", "reason"),
    [
        ({}, spec_of(samples=1), "evaluation.samples = 1"),
        ({}, spec_of(conflict=1), "evaluation.conflict"),
        ({"methods": ["fedprox"]}, spec_of(), "method 'fedavg'"),
        ({"guards": ["clip"]}, spec_of(), "a run without the guard 'clip'"),
        ({"rounds": 1}, spec_of(), "2 rounds"),
        ({"decoders": False}, spec_of("fedtrl"), "private weights"),
    ],
)
def test_when_a_run_breaks_a_rule_of_the_site_then_it_takes_no_part(
    data: Path, tmp_path: Path, rules: dict[str, object], spec: RunSpec, reason: str
) -> None:
    worker = Worker(NAME, data, tmp_path, Policy.read(rules))
    refused, after = asked(worker, spec, describe(spec)), asked(worker, spec, train(spec))
    worker.close()
    assert f"this site does not allow {reason}" in str(refused.error)
    assert "takes no part in this run" in str(after.error)


def test_when_a_rule_is_unknown_then_it_is_named() -> None:
    with pytest.raises(ConsortiumError, match=r"policy\.sample .*"):
        Policy.read({"sample": 1})


def test_when_a_coordinator_asks_for_what_its_method_keeps_then_nothing_leaves_the_site(worker: Worker) -> None:
    # FedAL hands in no private weights: a coordinator that asks for them anyway breaks what the site agreed to.
    spec = spec_of("fedal", {"coreset": 0})
    assert asked(worker, spec, describe(spec)).error is None
    plan = Plan(spec, build_method(spec.method))
    task = replace(train(spec, export=True), tensors=first_message(plan))
    reply = asked(worker, spec, task)
    assert not reply.tensors
    assert "the reply would hold private, which is not declared" in str(reply.error)


def first_message(plan: Plan) -> dict[str, object]:
    """Return what a method's server sends in its first round."""
    from fedcast.methods.base import Server, empty

    layout = plan.layout
    server = Server(
        layout=layout,
        shared=plan.initial[: layout.shared_size],
        private=empty(),
        tensors={},
        round=1,
        rounds=2,
        sites=1,
        config=plan.config,
        parts=plan.parts,
    )
    return dict(plan.method.message(server, NAME))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spec": {"method": {"name": "nothing"}, "unknown": 1}}, "cannot be read"),
        ({"spec": spec_of(windows=5).model_dump(mode="json")}, "not that of the run"),
        ({"role": {"name": "energy", "trains": True, "held_out": False}}, "calls this site 'energy'"),
        ({"role": None}, "cannot be read"),
    ],
)
def test_when_what_a_coordinator_says_does_not_fit_then_the_site_says_so(worker: Worker, change: dict[str, object], reason: str) -> None:
    spec = spec_of()
    assert reason in str(asked(worker, spec, describe(spec, change)).error)


@pytest.mark.parametrize("changes", [{"batch_size": 8}, {"learning_rate": 1.0}, {"ranks": 2}, {"precision": "bfloat16"}])
def test_when_a_coordinator_asks_for_another_training_than_that_of_the_run_then_the_site_refuses(
    worker: Worker, changes: dict[str, object]
) -> None:
    spec = spec_of()
    other = spec.training.model_copy(update={"kernels": "torch", **changes}).model_dump(mode="json")
    assert "is not that of the run" in str(asked(worker, spec, describe(spec, {"training": other})).error)
    assert "takes no part" in str(asked(worker, spec, train(spec)).error)


def test_when_the_audit_log_is_damaged_then_the_site_refuses_says_so_and_does_nothing(
    worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of()
    log = tmp_path / "state" / "audit.jsonl"
    log.parent.mkdir()
    log.write_text("damaged\n")
    refused = asked(worker, spec, describe(spec))
    assert (refused.error, refused.task) == (f"audit: site {NAME} cannot keep its audit log, and does nothing without it", "describe")
    assert "audit.jsonl is damaged" in caplog.text
    assert not (tmp_path / "state" / "runs").exists()
    log.unlink()
    assert asked(worker, spec, describe(spec)).error is None


def test_when_bytes_are_no_task_or_belong_to_no_run_then_the_site_answers_an_error(worker: Worker, tmp_path: Path) -> None:
    spec = spec_of()
    assert str(Reply.decode(worker.answer(spec.fingerprint(), b"\0" * 100)).error).startswith("wire")
    assert "belongs to no run" in str(asked(worker, spec, train(spec), run="../../etc").error)
    assert "takes no part" in str(asked(worker, spec, train(spec), run="0" * 64).error)
    assert not list((tmp_path / "state").glob("runs/*"))


def test_when_two_files_of_a_site_have_one_name_then_it_is_refused(data: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.csv").write_text("ds,y\n2020-01-01,1\n2020-01-02,2\n")
    with pytest.raises(SourceError, match="a second time"):
        load_site(NAME, tmp_path)


def test_when_a_sites_columns_have_names_of_their_own_then_the_runs_spec_names_them(tmp_path: Path) -> None:
    days = pd.date_range("2024-01-01", periods=300, freq="D")
    sales = pd.DataFrame({"date": days, "shop": "one", "sales": np.sin(np.arange(300.0)) + 2})
    sales.to_csv(tmp_path / "sales.csv", index=False)
    columns = {"time": "date", "id": "shop", "target": "sales"}
    spec = spec_of()
    named = spec.model_copy(update={"data": spec.data.model_copy(update=columns)})
    worker = Worker(NAME, tmp_path / "sales.csv", tmp_path / "state", Policy())
    assert str(asked(worker, spec, describe(spec)).error).startswith("frame")
    answer = asked(worker, named, describe(named))
    worker.close()
    assert (answer.error, answer.meta["series"]) == (None, 1)

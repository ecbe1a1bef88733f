"""The round loop over real sites: order of arrival, fleets, participation, bad replies, deadlines."""

from __future__ import annotations

import multiprocessing
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.federations import DOMAINS, model_layout, small_spec, train_small

import fedcast.run.pretrain as pretraining
from fedcast.errors import QuorumError
from fedcast.federated.fleet import Fleet, ThreadFleet
from fedcast.federated.intake import Intake
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.site import Site
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import Method, Server, build_method
from fedcast.methods.fedavg import FedAvg
from fedcast.run.folder import RunFolder
from fedcast.run.prepare import prepare, start_fleet
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import RunSpec
from fedcast.training.flat import Layout


class Meddling:
    """A real fleet with something in the way of its training replies: another order, a delay, a spoilt reply."""

    def __init__(self, fleet: Fleet, *, reverse: bool = False, spoil: Mapping[str, Reply | None] | None = None, round_: int = 2) -> None:
        self._fleet, self._reverse, self._spoil, self._round = fleet, reverse, dict(spoil or {}), round_

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return self._fleet.sites()

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run the tasks and meddle with the replies."""
        replies = sorted(self._fleet.run(tasks, deadline_s), reverse=self._reverse, key=lambda pair: pair[0])
        for site, reply in replies:
            first = next(iter(tasks.values()))
            if first.kind == "train" and first.round == self._round and site in self._spoil:
                spoilt = self._spoil[site]
                if spoilt is not None:
                    yield site, replace(spoilt, task=reply.task)
            else:
                yield site, reply

    def close(self) -> None:
        """Close the fleet."""
        self._fleet.close()


def train_meddled(monkeypatch: pytest.MonkeyPatch, spec: RunSpec, folder: Path, **meddling: object) -> Run:
    start = pretraining.start_fleet
    monkeypatch.setattr(pretraining, "start_fleet", lambda *a: Meddling(start(*a), **meddling))  # type: ignore[arg-type]
    return train_small(spec, folder)


def digest(run: Run) -> str:
    return str(run.results().weights_sha256.iloc[0])


class Watching:
    """A real fleet that counts the vectors of earlier replies that are still in memory when the next one arrives."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.kept: list[int] = []

    def sites(self) -> list[str]:
        """Return the names of the sites."""
        return self._fleet.sites()

    def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
        """Run the tasks and look after the replies."""
        seen: list[weakref.ref[torch.Tensor]] = []
        for site, reply in self._fleet.run(tasks, deadline_s):
            self.kept.append(sum(reference() is not None for reference in seen))
            if "shared" in reply.tensors:
                seen.append(weakref.ref(reply.tensors["shared"]))
            yield site, reply
            del reply
        self.kept.append(sum(reference() is not None for reference in seen))

    def close(self) -> None:
        """Close the fleet."""
        self._fleet.close()


def watched(monkeypatch: pytest.MonkeyPatch, spec: RunSpec, folder: Path) -> tuple[Run, int]:
    """Train; return the run, and the most vectors of earlier replies that were in memory when another one arrived."""
    watching = []
    start = pretraining.start_fleet

    def watch(*arguments: object) -> Watching:
        watching.append(Watching(start(*arguments)))  # type: ignore[arg-type]
        return watching[0]

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "start_fleet", watch)
        run = train_small(spec, folder)
    return run, max(watching[0].kept)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_small(small_spec(), tmp_path_factory.mktemp("plain"))


def test_when_replies_arrive_in_another_order_then_the_bytes_are_the_same(
    plain: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert digest(train_meddled(monkeypatch, small_spec(), tmp_path, reverse=True)) == digest(plain)


@pytest.mark.parametrize("method", ["fedavg", "fedavg_encoder"])
def test_when_replies_are_averaged_as_they_arrive_then_order_does_not_matter_and_the_mean_is_that_of_all_at_once(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = small_spec(method, rounds=1, local_steps=2)
    streamed = train_small(spec, tmp_path / "streamed")
    with monkeypatch.context() as patch:
        assert digest(train_meddled(patch, spec, tmp_path / "reverse", reverse=True)) == digest(streamed)
    cls = type(build_method(spec.method))
    # A method with an `aggregate` of its own gets all updates at once.
    monkeypatch.setattr(cls, "aggregate", lambda self, server, updates: Method.aggregate(self, server, updates))
    assert not build_method(spec.method).streams
    at_once = train_small(spec, tmp_path / "at-once")
    assert at_once.rows("round")[0]["sites"]["energy"]["weight"] == streamed.rows("round")[0]["sites"]["energy"]["weight"]
    a, b = (load_file(run.final / "model.safetensors") for run in (streamed, at_once))
    for name, tensor in a.items():
        assert torch.allclose(tensor, b[name], rtol=0, atol=1e-6)


def test_when_a_method_keeps_the_default_mean_then_no_reply_outlives_its_turn_and_worker_processes_give_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = {}
    for fleet in ("threads", "processes"):
        runs[fleet], kept = watched(monkeypatch, small_spec("fedavg", rounds=2, local_steps=1, fleet=fleet), tmp_path / fleet)
        assert kept == 0
    assert digest(runs["threads"]) == digest(runs["processes"])


def test_when_a_method_combines_updates_itself_then_it_gets_all_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert watched(monkeypatch, small_spec("fedtrl", rounds=1, local_steps=1), tmp_path)[1] == len(DOMAINS)


@pytest.mark.slow  # with private weights; a run in processes that is killed and resumed has them in the quick tests
def test_when_worker_processes_carry_the_tasks_then_the_bytes_are_the_same(plain: Run, tmp_path: Path) -> None:
    assert digest(train_small(small_spec(fleet="processes"), tmp_path)) == digest(plain)


def test_when_a_site_sends_a_bad_reply_then_it_is_dropped_named_and_the_round_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = Reply({"shared": torch.full((3,), float("nan"))}, {"samples": 1})
    run = train_meddled(monkeypatch, small_spec(), tmp_path, spoil={"energy": bad})
    rows = run.rows("round")
    assert list(rows[1]["dropped"]) == ["energy"]
    assert set(rows[1]["sites"]) == {"health", "medical"}
    assert rows[2]["dropped"] == {}
    assert run.results().mse.notna().all()


def test_when_a_site_never_answers_then_the_row_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = train_meddled(monkeypatch, small_spec(), tmp_path, spoil={"energy": None})
    assert run.rows("round")[1]["dropped"] == {"energy": "no reply before the deadline"}


def test_when_too_few_sites_answer_then_quorum_fails_and_the_run_resumes_to_the_same_bytes(
    plain: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(QuorumError, match="1 usable replies and needs 2"):
        train_meddled(patch, small_spec(), tmp_path, spoil=dict.fromkeys(DOMAINS[:2]))
    assert digest(train_small(small_spec(), tmp_path)) == digest(plain)


def test_when_half_of_the_sites_take_part_then_each_round_selects_that_many(tmp_path: Path) -> None:
    spec = small_spec("fedavg", rounds=4)
    spec = spec.model_copy(update={"federation": spec.federation.model_copy(update={"participation": 0.5})})
    run = pretrain(spec, output=tmp_path / "run")
    chosen = [frozenset(row["sites"]) for row in run.rows("round")]
    assert {len(sites) for sites in chosen} == {2}
    assert len(set(chosen)) > 1


def test_when_local_epochs_are_asked_for_then_steps_follow_the_site_size(tmp_path: Path) -> None:
    spec = small_spec("fedavg", rounds=1)
    spec = spec.model_copy(update={"federation": spec.federation.model_copy(update={"local_epochs": 0.01})})
    sites = pretrain(spec, output=tmp_path / "run").rows("round")[0]["sites"]
    for site in sites.values():
        assert site["steps"] == -(-0.01 * site["samples"] // (8 * 16))


def intake() -> Intake:
    return Intake(FedAvg(), {"a": 10, "b": 30}, {"shared": (2,)}, Path())


def answer(value: float, samples: int) -> Reply:
    meta = {"samples": samples, "steps": 1, "loss": 1.0, "seconds": 1.0, "compute_seconds": 1.0, "metrics": {}}
    return Reply({"shared": torch.full((2,), value)}, meta)


def server() -> Server:
    return Server(Layout(("a",), ((2,),), 1), torch.zeros(2), torch.zeros(0), {}, 1, 1)


def test_when_a_site_answers_twice_or_was_not_asked_then_only_its_first_answer_counts() -> None:
    round_, state = intake(), server()
    for site, reply in [("a", answer(1.0, 10)), ("c", answer(9.0, 10)), ("a", answer(9.0, 10)), ("b", answer(5.0, 30))]:
        round_.take(site, reply)
    round_.aggregate(state)
    assert state.shared.tolist() == [4.0, 4.0]
    assert state.log["weights"] == {"a": 0.25, "b": 0.75}
    assert round_.nbytes == 16


def test_when_a_weight_is_beyond_the_range_of_the_exact_mean_then_the_reply_is_dropped() -> None:
    round_, state = intake(), server()
    round_.take("a", answer(1.0, 10))
    round_.take("b", answer(-70_000.0, 30))
    round_.aggregate(state)
    assert round_.dropped == {"b": "shared has a value beyond 65536 in magnitude"}
    assert list(round_.meta) == ["a"]
    assert state.shared.tolist() == [1.0, 1.0]


class Counted:
    """A site that counts its tasks."""

    samples = 1
    runs = 0

    class role:  # noqa: N801 - stands for an attribute
        step_multiplier = 1

    def run(self, task: Task, workspaces: object) -> Reply:
        """Answer at once."""
        Counted.runs += 1
        return Reply(meta={"samples": 1})


def test_when_the_server_is_slower_than_the_sites_then_replies_do_not_pile_up() -> None:
    fleet = ThreadFleet({f"s{i}": Counted() for i in range(9)}, workers=1)  # type: ignore[misc]
    replies = fleet.run({f"s{i}": Task("train", 1) for i in range(9)}, None)
    next(replies)
    time.sleep(0.1)
    assert Counted.runs <= 2
    assert len(list(replies)) == 8
    fleet.close()


class Slow:
    """A site that takes its time."""

    samples = 1

    class role:  # noqa: N801 - stands for an attribute
        step_multiplier = 1

    def run(self, task: Task, workspaces: object) -> Reply:
        """Answer after a second."""
        time.sleep(1.0)
        return Reply(meta={"samples": 1})

    def give_up(self, task: str) -> None:
        """Go on all the same."""


def test_when_the_deadline_passes_then_the_fleet_returns_without_the_late_reply() -> None:
    fleet = ThreadFleet({"slow": Slow()}, workers=1)  # type: ignore[dict-item]
    start = time.monotonic()
    assert list(fleet.run({"slow": Task("train", 1)}, deadline_s=0.1)) == []
    assert time.monotonic() - start < 0.9
    fleet.close()


def test_when_a_worker_is_let_go_just_after_its_task_then_the_fleet_closes_at_once_and_names_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = ThreadFleet({f"s{i}": Counted() for i in range(2)}, workers=2)  # type: ignore[misc]
    tasks = {f"s{i}": Task("train", 1) for i in range(2)}
    assert len(list(fleet.run(tasks, None))) == 2
    time.sleep(0.1)
    # As where a worker ends its task while its call ends: it waits for another one all the same.
    worker = fleet._workers.pop()
    worker.let_go = True
    fleet._late.append(worker)
    start = time.monotonic()
    fleet.close()
    assert time.monotonic() - start < 2
    assert not caplog.text
    assert len(list(fleet.run(tasks, None))) == 2
    fleet.close()


def test_when_an_idle_worker_process_dies_then_a_new_one_takes_its_place(tmp_path: Path) -> None:
    spec = small_spec("fedavg", fleet="processes", workers=1)
    method = build_method(spec.method)
    prepared = prepare(spec, method)
    fleet = start_fleet(Plan(spec, method), prepared, RunFolder(tmp_path))
    layout, initial = model_layout(spec, method)
    task = Task("evaluate", 0, {"shared": initial[: layout.shared_size]}, {"part": "validation"})
    try:
        first = dict(fleet.run({"energy": task}, None))
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        again = dict(fleet.run({"energy": task}, None))
    finally:
        fleet.close()
    assert first["energy"].error is None
    assert again["energy"].meta["loss"] == first["energy"].meta["loss"]


def test_when_a_site_fails_then_its_traceback_stays_with_it(tmp_path: Path) -> None:
    spec = small_spec("fedavg")
    method = build_method(spec.method)
    prepared = prepare(spec, method)
    site = Site(prepared.roles["energy"], prepared.stores["energy"], Plan(spec, method), tmp_path)
    layout, initial = model_layout(spec, method)
    good = Task("train", 1, {"shared": initial[: layout.shared_size]})
    assert site.run(Task("train", 1, {"shared": torch.zeros(1)}), Workspaces()).error == "screen: the task's shared is not as declared"
    site._method = None  # type: ignore[assignment]
    reply = site.run(good, Workspaces())
    assert reply.error is not None
    assert "Traceback" not in reply.error
    assert "Traceback" in (tmp_path / "error.log").read_text()


def test_when_weights_diverge_then_the_site_says_so_and_keeps_its_last_state(tmp_path: Path) -> None:
    spec = small_spec("fedavg")
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"learning_rate": 1e38, "clip_norm": 1e30})})
    method = build_method(spec.method)
    prepared = prepare(spec, method)
    site = Site(prepared.roles["energy"], prepared.stores["energy"], Plan(spec, method), tmp_path)
    layout, initial = model_layout(spec, method)
    reply = site.run(Task("train", 1, {"shared": initial[: layout.shared_size]}), Workspaces())
    assert reply.error is not None
    assert "diverged" in reply.error
    assert not list(tmp_path.glob("state-*"))


@pytest.mark.parametrize("method", ["fedtrl", "scaffold"])
def test_when_replies_are_too_many_for_memory_then_the_bytes_are_the_same_and_no_file_stays(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = train_small(small_spec(method), tmp_path / "memory")
    mapped: list[str] = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda path, **keys: mapped.append(path) or from_file(path, **keys))
    monkeypatch.setattr("fedcast.federated.intake.IN_MEMORY", 0)
    on_disk = train_small(small_spec(method), tmp_path / "disk")
    assert mapped
    assert not any(Path(path).exists() for path in mapped)
    assert on_disk.results().weights_sha256.iloc[0] == in_memory.results().weights_sha256.iloc[0]

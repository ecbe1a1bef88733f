"""A task has effect exactly once, at the server and at its site, whatever else arrives."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.federated.standins import TEN, Bus, looped
from tests.federations import model_layout, small_spec

from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.site import COUNTED, Site
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.run.prepare import prepare


@cache
def undisturbed(late: frozenset[tuple[int, str]]) -> bytes:
    server, rows = looped(Bus(set(late)), 3, TEN[:4])
    assert [len(row["dropped"]) for row in rows if row["kind"] == "round"] == [sum(n == r for n, _ in late) for r in (1, 2, 3)]
    return server.shared.numpy().tobytes()


@settings(max_examples=15)
@given(late=st.frozensets(st.tuples(st.integers(1, 3), st.sampled_from(TEN[:2])), max_size=3), data=st.data())
def test_when_replies_come_twice_late_in_any_order_or_under_other_names_then_each_counts_once(
    late: frozenset[tuple[int, str]], data: st.DataObject
) -> None:
    server, rows = looped(Bus(set(late), data.draw), 3, TEN[:4])
    assert server.shared.numpy().tobytes() == undisturbed(late)
    for row in rows:
        if row["kind"] == "round":
            assert sorted(row["dropped"]) == sorted(site for number, site in late if number == row["round"])


def test_when_replies_have_no_effect_then_the_row_counts_them_by_reason_and_site() -> None:
    class Stray(Bus):
        def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
            for site, reply in super().run(tasks, deadline_s):
                yield site, reply
                yield site, reply
                yield "nobody", reply
                yield site, replace(reply, task="train-1-of-another-run")

    _, rows = looped(Stray(set()), 1, TEN[:2])
    # Both rounds of questions: the training, and the validation after it.
    each = {"site0": 2, "site1": 2}
    ignored = {"not asked": {"nobody": 4}, "to another task": each, "twice": each}
    assert next(row for row in rows if row["kind"] == "round")["ignored"] == ignored


def test_when_a_run_is_resumed_then_its_tasks_have_the_same_ids_and_another_history_has_others() -> None:
    class Listening(Bus):
        def run(self, tasks: Mapping[str, Task], deadline_s: float | None) -> Iterator[tuple[str, Reply]]:
            ids.append(sorted(task.id for task in tasks.values()))
            return super().run(tasks, deadline_s)

    seen = []
    for late in (set(), set(), {(1, "site0")}):
        ids: list[list[str]] = []
        looped(Listening(late), 2, TEN[:3])
        seen.append(ids)
    assert seen[0] == seen[1]
    assert seen[2][0] == seen[0][0]
    assert not {name for group in seen[2][1:] for name in group} & {name for group in seen[0][1:] for name in group}
    assert len({name for group in seen[0] for name in group}) == sum(len(group) for group in seen[0])


# --- a site's own state


def site_of(name: str, folder: Path, method: str = "fedtrl") -> tuple[Site, torch.Tensor]:
    spec = small_spec(method, local_steps=1)
    built = build_method(spec.method)
    prepared = prepare(spec, built)
    layout, initial = model_layout(spec, built)
    return Site(prepared.roles[name], prepared.stores[name], Plan(spec, built), folder, simulated=True), initial[: layout.shared_size]


def answered(reply: Reply) -> dict[str, bytes]:
    assert reply.error is None
    return {name: tensor.numpy().tobytes() for name, tensor in reply.tensors.items()}


def test_when_a_task_comes_again_to_a_restarted_site_then_the_answer_and_the_state_have_the_same_bytes(tmp_path: Path) -> None:
    site, shared = site_of("energy", tmp_path)
    first, second = (Task("train", number, {"shared": shared}, {COUNTED: number - 1, "export": True}) for number in (1, 2))
    site.run(first, Workspaces())
    answer = answered(site.run(second, Workspaces()))
    state = (tmp_path / "state-000002.safetensors").read_bytes()
    restarted, _ = site_of("energy", tmp_path)
    assert answered(restarted.run(second, Workspaces())) == answer
    # An older task that comes once more takes nothing from what counts now.
    assert restarted.run(first, Workspaces()).error is None
    assert (tmp_path / "state-000002.safetensors").read_bytes() == state
    assert answered(restarted.run(replace(second, id="again"), Workspaces())) == answer


def test_when_work_came_too_late_to_count_then_the_site_goes_on_from_what_did(tmp_path: Path) -> None:
    answers = {}
    for name, rounds in {"late": (1, 2), "absent": (1,)}.items():
        site, shared = site_of("energy", tmp_path / name)
        for number in rounds:
            site.run(Task("train", number, {"shared": shared}, {COUNTED: number - 1}), Workspaces())
        answers[name] = answered(site.run(Task("train", 3, {"shared": shared}, {COUNTED: 1, "export": True}), Workspaces()))
        assert sorted(path.name for path in (tmp_path / name).glob("state-*")) == ["state-000001.safetensors", "state-000003.safetensors"]
    assert answers["late"] == answers["absent"]


def test_when_the_state_that_counted_is_gone_then_the_site_says_so_and_does_not_go_on_from_an_older_one(tmp_path: Path) -> None:
    site, shared = site_of("energy", tmp_path)
    for number in (1, 2):
        site.run(Task("train", number, {"shared": shared}, {COUNTED: number - 1}), Workspaces())
    (tmp_path / "state-000002.safetensors").unlink()
    error = site.run(Task("train", 3, {"shared": shared}, {COUNTED: 2}), Workspaces()).error
    assert error is not None
    assert "state of round 2 is gone" in error


def test_when_a_task_lets_a_site_go_on_alone_out_of_turn_then_the_site_refuses(tmp_path: Path) -> None:
    site, shared = site_of("energy", tmp_path)
    error = site.run(Task("train", 1, {"shared": shared}, {"stage": "local"}), Workspaces()).error
    assert error is not None
    assert "in round 1 the site goes on with the others" in error
    assert not list(tmp_path.glob("state-*"))


def test_when_the_round_is_over_then_training_ends_at_its_next_step_and_leaves_no_state(tmp_path: Path) -> None:
    site, shared = site_of("energy", tmp_path)
    site._steps = lambda: 100_000  # type: ignore[method-assign]
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(site.run(Task("train", 1, {"shared": shared}), Workspaces())))
    thread.start()
    while not site._busy.locked():
        time.sleep(0.01)
    time.sleep(0.3)
    site.give_up("")
    thread.join(20)
    assert replies[0].error == "site: the round is over"
    assert not list(tmp_path.glob("state-*"))


def test_when_a_task_is_given_up_before_it_begins_then_it_alone_is_not_done_and_once(tmp_path: Path) -> None:
    site, shared = site_of("energy", tmp_path)
    first, second = (Task("train", 1, {"shared": shared}, id=name) for name in ("first", "second"))
    site.give_up("first")
    assert site.run(first, Workspaces()).error == "round 1 is over"
    assert site.run(first, Workspaces()).error is None
    site.give_up("first")  # after it
    assert site.run(second, Workspaces()).error is None

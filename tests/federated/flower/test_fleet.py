"""What the fleet makes of what comes back, with a link that says what a test tells it to: a real one cannot be made to lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedcast.errors import UnreachableError
from fedcast.federated.flower import fleet as module
from fedcast.federated.flower.fleet import FlowerFleet
from fedcast.federated.flower.frames import LinkError
from fedcast.federated.flower.link import Arrived
from fedcast.federated.messages import Reply, Task

NODES = {"a": 1, "b": 2}
TASKS = {site: Task("train", 1, id=f"train-{site}") for site in NODES}


class Scripted:
    """A link whose answers are made up from what was pushed."""

    def __init__(self) -> None:
        self.pushed: list[tuple[int, str]] = []
        self.waiting: list[str] = []

    def push(self, node: int, run: str, payload: bytes, ttl_s: float, within_s: float) -> str | None:
        """Take a task."""
        message = f"{node}-{len(self.pushed)}"
        self.pushed.append((node, Task.decode(payload).id))
        self.waiting.append(message)
        return message

    def pull(self, messages: Sequence[str], within_s: float) -> Arrived | None:
        """Answer the oldest task."""
        assert set(self.waiting) <= set(messages)
        return self.answer(self.waiting.pop(0)) if self.waiting else None

    def answer(self, message: str) -> Arrived | None:
        """Answer as the site that was asked."""
        node = int(message.partition("-")[0])
        task = next(task for number, task in self.pushed if number == node)
        return Arrived(message, node, Reply(meta={"node": node}, task=task).encode(), None)

    def close(self, *, stop: bool = True) -> None:
        """Do nothing."""


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerFleet:
    """A fleet of two sites that sends again at once and is patient for a moment."""
    monkeypatch.setattr(module, "_AGAIN_S", 0.01)
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    return FlowerFleet(tmp_path, NODES, "0" * 64, patience_s=0.1)


def linked(monkeypatch: pytest.MonkeyPatch, *links: Scripted) -> None:
    """Let the fleet's links be these, one after another."""
    left = list(links)
    monkeypatch.setattr(module, "Link", lambda *_: left.pop(0))


def test_when_replies_arrive_then_each_is_its_sites_and_what_crossed_the_wire_is_known(
    fleet: FlowerFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked(monkeypatch, Scripted())
    replies = dict(fleet.run(TASKS, 5.0))
    assert {site: reply.meta["node"] for site, reply in replies.items()} == NODES
    assert {site: reply.task for site, reply in replies.items()} == {"a": "train-a", "b": "train-b"}
    assert fleet.carried["train-a"]["task_bytes"] == len(TASKS["a"].encode())


def test_when_another_node_answers_in_a_sites_place_then_it_is_not_believed(fleet: FlowerFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Impostor(Scripted):
        def answer(self, message: str) -> Arrived | None:
            answer = super().answer(message)
            return Arrived(message, 2, Reply(meta={"node": "impostor"}).encode(), None) if message == "1-0" else answer

    link = Impostor()
    linked(monkeypatch, link)
    replies = dict(fleet.run(TASKS, 5.0))
    assert replies["a"].meta == {"node": 1}
    assert link.pushed.count((1, "train-a")) == 2


def test_when_a_site_cannot_be_reached_then_it_is_given_up_after_a_while_and_the_others_are_not(
    fleet: FlowerFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(Scripted):
        def answer(self, message: str) -> Arrived | None:
            return Arrived(message, 0, b"", "Node Unavailable") if message.startswith("2-") else super().answer(message)

    linked(monkeypatch, Away())
    replies = dict(fleet.run(TASKS, None))
    assert replies["a"].error is None
    assert "Node Unavailable" in str(replies["b"].error)
    assert replies["b"].task == "train-b"


def test_when_a_deadline_passes_then_what_has_not_come_does_not_come(fleet: FlowerFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Scripted):
        def answer(self, message: str) -> Arrived | None:
            return None if message.startswith("2-") else super().answer(message)

    linked(monkeypatch, Slow())
    assert dict(fleet.run(TASKS, 0.3)).keys() == {"a"}


def test_when_the_link_breaks_then_what_is_unanswered_is_sent_again_on_another(fleet: FlowerFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(Scripted):
        def answer(self, message: str) -> Arrived | None:
            if message.startswith("2-"):
                raise LinkError("gone")
            return super().answer(message)

    second = Scripted()
    linked(monkeypatch, Breaking(), second)
    replies = dict(fleet.run(TASKS, None))
    assert replies.keys() == NODES.keys()
    assert second.pushed == [(2, "train-b")]


def test_when_every_link_breaks_then_the_run_ends_with_an_error(fleet: FlowerFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Scripted):
        def pull(self, messages: Sequence[str], within_s: float) -> Arrived | None:
            raise LinkError("gone")

    monkeypatch.setattr(module, "Link", lambda *_: Broken())
    with pytest.raises(UnreachableError, match="gone"):
        dict(fleet.run(TASKS, None))


def test_when_bytes_are_no_reply_then_the_sites_reply_is_an_error(fleet: FlowerFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Garbled(Scripted):
        def answer(self, message: str) -> Arrived | None:
            return Arrived(message, int(message.partition("-")[0]), b"garbled" * 100, None)

    linked(monkeypatch, Garbled())
    replies = dict(fleet.run(TASKS, 5.0))
    assert {reply.task for reply in replies.values()} == {"train-a", "train-b"}
    assert all(str(reply.error).startswith("wire") for reply in replies.values())

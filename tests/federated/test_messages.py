from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcast.errors import ScreenError, WireError
from fedcast.federated.messages import Reply, Task, screen, screen_task

META = {"samples": 10, "steps": 4, "loss": 0.5, "seconds": 1.0, "compute_seconds": 0.9, "metrics": {"task_loss": 0.4}}
SHAPES = {"shared": (4,), "prototype": (2,)}


def good(**changes: object) -> Reply:
    tensors = {"shared": torch.arange(4.0), "prototype": torch.ones(2)}
    return Reply({**tensors, **changes}, META)  # type: ignore[dict-item]


def meta(**changes: object) -> Reply:
    return Reply(good().tensors, {**META, **changes})


def test_when_a_task_crosses_a_wire_then_it_is_the_same() -> None:
    task = Task("train", 3, {"shared": torch.randn(5), "empty": torch.zeros(0)}, {"export": True, "name": "é"})
    back = Task.decode(task.encode())
    assert (back.kind, back.round, back.meta) == ("train", 3, {"export": True, "name": "é"})
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in task.tensors.items())
    assert back.nbytes == 20


def test_when_a_reply_crosses_a_wire_then_it_is_the_same() -> None:
    back = Reply.decode(good().encode())
    assert torch.equal(back.tensors["shared"], torch.arange(4.0))
    assert back.meta == META
    assert Reply.decode(Reply(error="data: no series").encode()).error == "data: no series"


@given(st.binary(max_size=200))
def test_when_bytes_are_no_message_then_one_error_says_so(payload: bytes) -> None:
    with pytest.raises(WireError):
        Reply.decode(payload)


@given(st.data())
def test_when_a_byte_of_a_message_is_cut_off_then_it_is_refused(data: st.DataObject) -> None:
    payload = good().encode()
    with pytest.raises(WireError):
        Reply.decode(payload[: data.draw(st.integers(0, len(payload) - 1))])


@pytest.mark.parametrize(
    "header", [{"kind": "shell", "round": 1}, {"kind": "train", "round": "1"}, {"kind": "train", "round": 1, "meta": []}, [], None]
)
def test_when_a_header_is_no_task_then_it_is_refused(header: object) -> None:
    inner = json.dumps({"__metadata__": {"fedcast": json.dumps(header)}}).encode()
    with pytest.raises(WireError):
        Task.decode(struct.pack("<Q", len(inner)) + inner)


def test_when_a_reply_is_as_declared_then_it_passes() -> None:
    screen(good(), SHAPES, largest_samples=10)


BAD = {
    "NaN": good(shared=torch.tensor([0.0, float("nan"), 0, 0])),
    "inf": good(shared=torch.tensor([0.0, float("inf"), 0, 0])),
    "other length": good(shared=torch.zeros(5)),
    "length 1": good(shared=torch.zeros(1)),
    "other dtype": good(shared=torch.zeros(4, dtype=torch.float64)),
    "other key": good(extra=torch.zeros(1)),
    "missing key": Reply({"shared": torch.zeros(4)}, META),
    "negative weight": meta(samples=-59),
    "huge weight": meta(samples=10**300),
    "weight NaN": meta(samples=float("nan")),
    "weight True": meta(samples=True),
    "no weight": Reply(good().tensors, {}),
    "loss NaN": meta(loss=float("nan")),
    "no loss": meta(loss=None),
    "negative steps": meta(steps=-5),
    "metric NaN": meta(metrics={"accuracy": float("nan")}),
    "metric that hides steps": meta(metrics={"steps": -5}),
    "metrics no dict": meta(metrics=[1.0]),
    "error": Reply(error="ValueError at site a"),
}


@pytest.mark.parametrize("name", BAD)
def test_when_a_reply_is_not_as_declared_then_it_is_dropped_by_name(name: str) -> None:
    with pytest.raises(ScreenError):
        screen(BAD[name], SHAPES, largest_samples=10)


TASK_SHAPES = {"shared": (4,), "experts": (None, 2)}


def test_when_a_task_is_as_declared_then_a_site_takes_it() -> None:
    screen_task(Task("train", 1, {"shared": torch.zeros(4)}), TASK_SHAPES)
    screen_task(Task("evaluate", 1, {"shared": torch.zeros(4), "experts": torch.zeros(7, 2)}), TASK_SHAPES)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"shared": torch.zeros(1)},
        {"shared": torch.full((4,), float("nan"))},
        {"shared": torch.zeros(4, dtype=torch.float64)},
        {"shared": torch.zeros(4), "code": torch.zeros(1)},
        {"shared": torch.zeros(4), "experts": torch.zeros(2)},
    ],
)
def test_when_a_task_is_not_as_declared_then_a_site_refuses_it(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ScreenError):
        screen_task(Task("train", 1, tensors), TASK_SHAPES)

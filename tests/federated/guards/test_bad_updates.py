"""Thirteen bad updates, from the first or the last site, under every method: dropped, named, and as if the site had never answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.federated.guards.rounds import Recorded, same
from torch import Tensor

import fedcast.methods  # noqa: F401 - registers the methods
from fedcast.errors import QuorumError
from fedcast.federated.messages import Reply
from fedcast.methods.base import METHODS
from fedcast.methods.zero_shot import ZeroShot

FAST = ("fedavg", "fedtrl", "scaffold")
TRAINING = sorted(name for name, method in METHODS.items() if method().federated_rounds(1))
SITES = {"first": 0, "last": -1}


@dataclass
class Draft:
    """A reply before it is written."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]

    @property
    def largest(self) -> str:
        """The name of the longest tensor."""
        return max(sorted(self.tensors), key=lambda name: self.tensors[name].numel())

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}

    def last_value(self, value: float) -> None:
        self.tensors[self.largest].view(-1)[-1] = value

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors[self.largest] = change(self.tensors[self.largest])

    def rename(self) -> None:
        self.tensors["weights"] = self.tensors.pop(self.largest)

    def claim(self, samples: object) -> None:
        self.header["meta"]["samples"] = samples


def drafted(payload: bytes) -> Draft:
    reply = Reply.decode(payload)
    tensors = {name: tensor.clone() for name, tensor in reply.tensors.items()}
    return Draft(tensors, {"error": None, "meta": dict(reply.meta), "task": reply.task})


# What a bad site does to its reply; `others` is what the honest sites weigh together.
BAD: dict[str, Callable[[Draft, int], None]] = {
    "NaN": lambda draft, others: draft.last_value(float("nan")),
    "infinity": lambda draft, others: draft.last_value(float("inf")),
    "times 1e6": lambda draft, others: draft.each(lambda tensor: tensor * 1e6),
    "times -100": lambda draft, others: draft.each(lambda tensor: tensor * -100),
    "another length": lambda draft, others: draft.replace(lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()[:1]])),
    "length 1": lambda draft, others: draft.replace(lambda tensor: tensor.flatten()[:1]),
    "another key": lambda draft, others: draft.rename(),
    "weight -59": lambda draft, others: draft.claim(-59),
    "weights that cancel": lambda draft, others: draft.claim(-others),
    "weight NaN": lambda draft, others: draft.claim(float("nan")),
    "weight 1e300": lambda draft, others: draft.claim(1e300),
    "beyond float32": lambda draft, others: draft.each(lambda tensor: torch.full_like(tensor, 1e300, dtype=torch.float64)),
    "truncated": lambda draft, others: None,
}


def spoilt(payload: bytes, bad: str, others: int) -> bytes:
    """Return the bytes of a bad reply: written as an attacker would, past every check of the sender."""
    draft = drafted(payload)
    BAD[bad](draft, others)
    written = save({name: tensor.contiguous() for name, tensor in draft.tensors.items()}, metadata={"fedcast": json.dumps(draft.header)})
    return written[: len(written) // 2] if bad == "truncated" else written


def check(round_: Recorded, bad: str, position: str) -> None:
    site = round_.sites[SITES[position]]
    others = sum(samples for name, samples in round_.prepared.samples.items() if name != site)
    honest = {name: payload for name, payload in round_.replies.items() if name != site}
    replies = {**honest, site: spoilt(round_.replies[site], bad, others)}
    if not honest:
        # The pooled client of a centralised control is alone: without it there is no round, and it is named all the same.
        with pytest.raises(QuorumError, match=f"{site}: (?!no reply)"):
            round_.play(replies)
        return
    after, row = round_.play(replies)
    assert list(row["dropped"]) == [site]
    assert row["dropped"][site] not in ("", "no reply before the deadline")
    assert sorted(row["sites"]) == sorted(honest)
    without, _ = round_.play(honest)
    assert same(after, without)
    assert not same(after, round_.before)


@pytest.mark.parametrize("position", SITES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", FAST)
def test_when_a_site_sends_a_bad_update_then_it_is_dropped_and_named_and_nothing_of_it_is_left(
    method: str, bad: str, position: str, recorded: Callable[..., Recorded]
) -> None:
    check(recorded(method), bad, position)


@pytest.mark.slow
@pytest.mark.parametrize("position", SITES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", sorted(set(TRAINING) - set(FAST)))
def test_when_a_site_sends_a_bad_update_under_any_method_then_it_is_dropped_and_named(
    method: str, bad: str, position: str, recorded: Callable[..., Recorded]
) -> None:
    check(recorded(method), bad, position)


@pytest.mark.parametrize("method", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(TRAINING) - set(FAST)))])
def test_when_all_sites_are_honest_then_none_is_dropped_and_the_round_is_that_of_the_run(
    method: str, recorded: Callable[..., Recorded]
) -> None:
    round_ = recorded(method)
    after, row = round_.play(round_.replies)
    assert row["dropped"] == {}
    assert sorted(row["sites"]) == round_.sites
    assert not same(after, round_.before)


def test_when_two_sites_claim_weights_that_cancel_then_both_are_dropped(recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedavg")
    one, two, _ = round_.sites
    replies = dict(round_.replies)
    for site, sign in ((one, 1), (two, -1)):
        draft = drafted(replies[site])
        draft.claim(sign * 10**9)
        replies[site] = save(draft.tensors, metadata={"fedcast": json.dumps(draft.header)})
    # One of three is below the quorum: the round ends with both names, and no mean of nothing.
    with pytest.raises(QuorumError, match=rf"{one}: claims 1000000000 .* {two}: claims -1000000000 "):
        round_.play(replies)


def test_when_a_site_answers_numbers_that_no_log_can_hold_then_it_is_dropped(recorded: Callable[..., Recorded]) -> None:
    round_ = recorded("fedavg")
    site = round_.sites[0]
    huge = int("9" * 400)
    for name, value in {"seconds": 1e308, "compute_seconds": -1.0, "steps": 10**18, "loss": huge, "metrics": {"a": huge}}.items():
        draft = drafted(round_.replies[site])
        draft.header["meta"][name] = value
        payload = save(draft.tensors, metadata={"fedcast": json.dumps(draft.header)})
        _, row = round_.play({**round_.replies, site: payload})
        assert list(row["dropped"]) == [site], name


def test_when_methods_are_counted_then_all_but_the_one_without_rounds_are_in_the_grid() -> None:
    assert set(METHODS) - set(TRAINING) == {ZeroShot.name}

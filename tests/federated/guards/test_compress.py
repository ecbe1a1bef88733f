"""The guard `compress`: in real federations, against hostile codes, and what it does not go with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.federations import DOMAINS, small_spec
from torch import Tensor

from fedcast.errors import ScreenError, SpecError
from fedcast.federated.guards.base import GUARDS as GUARDS_KNOWN
from fedcast.federated.guards.base import Arrival, Guard, GuardRound, Guards, Outgoing
from fedcast.federated.guards.compress import Compress
from fedcast.federated.messages import Task
from fedcast.federated.plan import Plan
from fedcast.federated.rounds import Silent
from fedcast.methods.base import build_method
from fedcast.run.pretrain import Run, pretrain
from fedcast.spec import EvaluationSpec, GuardSpec, RunSpec

GUARDS: dict[str, dict[str, Any]] = {
    "bf16": {"codec": "bf16"},
    "int8": {"codec": "int8"},
    "int8 stochastic": {"codec": "int8", "rounding": "stochastic"},
    "int8 zstd": {"codec": "int8", "zstd": 3},
    "top_k": {"codec": "top_k", "share": 0.05},
    "top_k zstd": {"codec": "top_k", "share": 0.05, "zstd": 1},
    "zstd": {"codec": "none", "zstd": 3},
    "both": {"codec": "int8", "direction": "both"},
}


def brief(**options: Any) -> RunSpec:
    spec = small_spec("fedavg", rounds=2, local_steps=2, **options)
    return spec.model_copy(update={"evaluation": EvaluationSpec(every=2, windows=2, validation_windows=2, baselines=())})


def compressed(spec: RunSpec, **options: Any) -> RunSpec:
    return spec.model_copy(update={"guards": (GuardSpec(name="compress", options=options),)})


def loss(run: Run) -> float:
    return float(run.rows("validation")[-1]["mean"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pretrain(brief(), output=tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Return a run with each guard."""
    folder = tmp_path_factory.mktemp("compressed")
    return {name: pretrain(compressed(brief(), **options), output=folder / name) for name, options in GUARDS.items()}


def weights(run: Run) -> str:
    return str(run.results().weights_sha256.iloc[0])


# Of lossless zstd: what these few steps leave alike.
SHRINKS = {"bf16": 2.0, "int8": 3.9, "int8 zstd": 3.93, "top_k": 20.0, "top_k zstd": 20.0, "zstd": 1.2, "both": 3.9}


@pytest.mark.parametrize("name", sorted(SHRINKS))
def test_when_updates_are_compressed_then_fewer_bytes_travel(name: str, plain: Run, runs: dict[str, Run]) -> None:
    before, now = plain.rows("round"), runs[name].rows("round")
    assert all(not row["dropped"] for row in now)
    assert all(b["bytes_up"] / n["bytes_up"] >= SHRINKS[name] for b, n in zip(before, now, strict=True))
    down = 2.0 if name == "both" else 1.0
    assert all(b["bytes_down"] / n["bytes_down"] == down for b, n in zip(before, now, strict=True))


def test_when_zstd_is_all_there_is_then_the_weights_are_the_same_to_the_bit(plain: Run, runs: dict[str, Run]) -> None:
    assert weights(runs["zstd"]) == weights(plain)
    assert weights(runs["int8 zstd"]) == weights(runs["int8"])
    assert len({weights(run) for run in runs.values()}) == len(GUARDS) - 2  # the two with zstd over int8 and over top_k


@pytest.mark.parametrize("fleet", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["int8 stochastic", "top_k zstd", "both"])
def test_when_the_fleet_or_the_number_of_workers_changes_then_the_bytes_do_not(
    name: str, fleet: str, runs: dict[str, Run], tmp_path: Path
) -> None:
    spec = compressed(brief(fleet=fleet, workers=1 if fleet == "threads" else 2), **GUARDS[name])
    assert weights(pretrain(spec, output=tmp_path / "run")) == weights(runs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "int8", "top_k", "both"])
def test_when_training_goes_on_for_long_then_compressed_updates_learn_as_much(name: str, tmp_path: Path) -> None:
    spec = small_spec("fedavg", rounds=12, local_steps=20)
    before = loss(pretrain(spec, output=tmp_path / "plain"))
    # Three seeds without any guard are further apart.
    assert loss(pretrain(compressed(spec, **GUARDS[name]), output=tmp_path / "run")) < 1.03 * before


class Stop(Silent):
    """Ends a run in its second round."""

    def __init__(self, at: str) -> None:
        self._at = at

    def phase(self, name: str, round: int) -> None:
        """Raise when the phase has come."""
        if name == self._at and round == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["int8 stochastic", "top_k", "both"])
def test_when_a_run_is_resumed_then_what_was_left_out_is_not_lost_and_the_bytes_are_equal(
    name: str, runs: dict[str, Run], tmp_path: Path
) -> None:
    spec = compressed(brief(), **GUARDS[name])
    with pytest.raises(KeyboardInterrupt):
        pretrain(spec, output=tmp_path / "run", observer=Stop("aggregate"))  # sites have worked on round 2 already
    states = [sorted((tmp_path / "run" / "sites" / site).glob("state-*"))[-1] for site in DOMAINS]
    assert all(load_file(state)["guard.compress.residual"].any() for state in states)
    assert weights(pretrain(spec, output=tmp_path / "run")) == weights(runs[name])


@pytest.mark.parametrize("method", ["fedtrl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scaffold", "fedgroup", "fedper"))])
def test_when_a_method_has_its_own_tensors_or_private_weights_then_its_updates_compress_too(method: str, tmp_path: Path) -> None:
    spec = compressed(small_spec(method, rounds=2, local_steps=2, **({"groups": "energy"} if method == "fedgroup" else {})))
    run = pretrain(spec, output=tmp_path / "run")
    assert all(not row["dropped"] and sorted(row["sites"]) == sorted(DOMAINS) for row in run.rows("round"))


def outgoing(weights: Tensor, received: Tensor, state: dict[str, Tensor] | None = None) -> Outgoing:
    return Outgoing(
        site="a",
        round=1,
        tensors={"shared": weights, "own": torch.ones(2)},
        received={"shared": received},
        samples=1,
        meta={},
        state={} if state is None else state,
        memory={},
        rng=np.random.default_rng(0),
        simulated=True,
    )


def arrive(guard: Guard, tensors: dict[str, Tensor], sent: Tensor) -> Tensor:
    arrival = Arrival("a", dict(tensors), {}, {"shared": sent}, 1)
    guard.decode(arrival)
    assert arrival.tensors.keys() == {"shared", "own"}
    return arrival.tensors["shared"]


@pytest.mark.parametrize("name", sorted(GUARDS))
def test_when_a_reply_is_encoded_then_it_holds_what_the_guard_declares(name: str) -> None:
    guard, reply = Compress(**GUARDS[name]), outgoing(torch.randn(1000), torch.zeros(1000))
    guard.encode(reply)
    declared = guard.declare({"shared": ((1000,), torch.float32), "own": ((2,), torch.float32)})
    assert declared.keys() == reply.tensors.keys()
    for tensor_name, (shape, dtype) in declared.items():
        tensor = reply.tensors[tensor_name]
        assert tensor.dtype == dtype
        assert len(tensor) <= shape[0] if tensor_name in ("shared.zstd", "shared.gaps") else tuple(tensor.shape) == shape


HOSTILE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "weights in plain": ("int8", lambda tensors: tensors.update(shared=torch.zeros(1000))),
    "no codes": ("int8", lambda tensors: [tensors.pop("shared.int8"), tensors.pop("shared.scales")]),
    "codes of another codec": ("bf16", lambda tensors: tensors.update({"shared.int8": torch.zeros(1000, dtype=torch.int8)})),
    "codes beside the frame": ("int8 zstd", lambda tensors: tensors.update({"shared.int8": torch.zeros(1000, dtype=torch.int8)})),
    "no frame": ("int8 zstd", lambda tensors: tensors.pop("shared.zstd")),
    "a broken frame": ("zstd", lambda tensors: tensors.update({"shared.zstd": torch.zeros(90, dtype=torch.uint8)})),
    "codes of another length": ("top_k", lambda tensors: tensors.update({"shared.values": torch.zeros(9, dtype=torch.bfloat16)})),
    "codes not finite": ("bf16", lambda tensors: tensors["shared.bfloat16"].fill_(float("inf"))),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_when_codes_are_malformed_then_the_reply_is_dropped(case: str) -> None:
    name, change = HOSTILE[case]
    guard, reply, sent = Compress(**GUARDS[name]), outgoing(torch.randn(1000), torch.zeros(1000)), torch.zeros(1000)
    guard.encode(reply)
    assert len(arrive(guard, reply.tensors, sent)) == 1000
    change(reply.tensors)
    with pytest.raises(ScreenError):
        arrive(guard, reply.tensors, sent)


def test_when_updates_are_below_half_a_step_of_bfloat16_then_both_directions_still_add_them_up() -> None:
    guard, server, state = Compress(codec="int8", direction="both"), torch.ones(512), dict[str, Tensor]()
    for round_ in range(50):
        task = guard.pack({"a": Task("train", round_ + 1, {"shared": server})})["a"]
        tensors = dict(task.tensors)
        guard.unpack(tensors)
        reply = outgoing(tensors["shared"] + 1e-4, tensors["shared"], state)  # half a step of bfloat16 at 1 is 0.004
        guard.encode(reply)
        server = arrive(guard, reply.tensors, server)
    assert torch.allclose(server, torch.full((512,), 1.005), atol=1e-5)


def test_when_sites_are_sent_the_same_weights_then_their_halves_are_one_tensor() -> None:
    shared = torch.randn(64)
    packed = Compress(direction="both").pack({site: Task("train", 1, {"shared": shared, "own": shared}) for site in "ab"})
    assert packed["a"].tensors["shared"] is packed["b"].tensors["shared"]
    assert packed["a"].tensors["own"] is shared
    with pytest.raises(ScreenError, match="bfloat16"):
        Compress(direction="both").unpack({"shared": shared})


def refuse(spec: RunSpec, *guards: Guard) -> str:
    with pytest.raises(SpecError) as caught:
        Guards(guards).check(Plan(spec, build_method(spec.method)))
    return caught.value.message


def test_when_an_option_makes_no_sense_then_it_is_refused() -> None:
    with pytest.raises(SpecError, match="does nothing"):
        Compress(codec="none")
    with pytest.raises(SpecError, match="lossless"):
        Compress(codec="none", zstd=3, direction="both")


def test_when_a_guard_would_work_on_codes_then_the_spec_is_refused() -> None:
    class Changes(Guard):
        name = "changes"

        def encode(self, outgoing: Outgoing) -> None:
            """Change nothing."""

    class Adds(Guard):
        name = "adds"

        def accumulator(self, round: GuardRound, sizes: Mapping[str, int]) -> None:
            """Add up nothing."""

    for name in ("changes", "adds"):
        del GUARDS_KNOWN[name]
    spec = small_spec("fedavg")
    assert "would change codes" in refuse(spec, Compress(), Changes())
    assert "codes do not add up" in refuse(spec, Adds(), Compress())
    Guards((Changes(), Compress())).check(Plan(spec, build_method(spec.method)))


def test_when_weights_change_places_then_error_feedback_is_refused() -> None:
    spec = small_spec("fedpm")
    assert "by place" in refuse(spec, Compress())
    Guards((Compress(feedback=False),)).check(Plan(spec, build_method(spec.method)))

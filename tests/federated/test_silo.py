"""A site that trains over several ranks: the same result as one process, and what happens when a rank or the site ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federations import DOMAINS, small_spec

from fedcast.data.store import SeriesStore
from fedcast.errors import SpecError
from fedcast.federated.guards.base import GUARDS, Guard
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import Plan
from fedcast.federated.silo import check_ranks
from fedcast.federated.site import Site
from fedcast.federated.workspace import Workspaces
from fedcast.methods.base import build_method
from fedcast.run.prepare import prepare
from fedcast.run.pretrain import pretrain
from fedcast.spec import RunSpec, parse_spec

SITE = DOMAINS[1]


def over(ranks: int, method: str = "fedavg", **training: Any) -> RunSpec:
    spec = small_spec(method, local_steps=3)
    return spec.model_copy(update={"training": spec.training.model_copy(update={"ranks": ranks, **training})})


def gappy(store: SeriesStore) -> SeriesStore:
    """Return a store of which a fifth of the points is missing."""
    values = np.where(np.random.default_rng(0).random(len(store.values)) < 0.2, np.float32("nan"), store.values)
    return replace(store, values=values.astype(np.float32))


def site_of(spec: RunSpec, folder: Path) -> Site:
    plan = Plan(spec, build_method(spec.method))
    check_ranks(plan)
    prepared = prepare(plan.spec, plan.method)
    return Site(prepared.roles[SITE], gappy(prepared.stores[SITE]), plan, folder / SITE, simulated=True)


def message(spec: RunSpec, round_: int, shared: torch.Tensor | None = None, **meta: Any) -> Task:
    plan = Plan(spec, build_method(spec.method))
    size = plan.layout.shared_size
    tensors = {"shared": plan.initial[:size] if shared is None else shared}
    if spec.method.name == "scaffold":
        tensors["control"] = torch.zeros(size)
    return Task("train", round_, tensors, {"counted": round_ - 1, **meta})


def two_rounds(spec: RunSpec, folder: Path) -> list[Reply]:
    """Train a site for two rounds, each from what the one before gave."""
    site, workspaces, replies = site_of(spec, folder), Workspaces(), list[Reply]()
    for round_ in (1, 2):
        shared = replies[0].tensors["shared"] if replies else None
        replies.append(site.run(message(spec, round_, shared, export=spec.method.name == "fedper"), workspaces))
        assert replies[-1].error is None
    return replies


def ranks_alive(folder: Path) -> list[int]:
    """Return the processes that were started for a folder of ranks below this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if b"fedcast.federated.rank" in command and str(folder).encode() in command:
            found.append(int(entry.name))
    return found


def wait_for(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "training"),
    [
        ("fedavg", {}),
        ("fedavg", {"batch_size": 7}),
        ("fedper", {}),
        ("scaffold", {}),
        ("fedprox", {"schedule": "constant"}),
    ],
)
def test_when_two_ranks_share_the_batches_then_the_result_is_that_of_one_process(
    method: str, training: dict[str, Any], tmp_path: Path
) -> None:
    one, two = (two_rounds(over(ranks, method, **training), tmp_path / str(ranks)) for ranks in (1, 2))
    for first, second in zip(one, two, strict=True):
        assert first.tensors.keys() == second.tensors.keys()
        assert first.meta["loss"] == pytest.approx(second.meta["loss"], rel=1e-6)
        assert first.meta["metrics"].keys() == second.meta["metrics"].keys()
        for name, tensor in first.tensors.items():
            # Where a weight has next to no gradient, AdamW divides rounding errors by their own size: the few beyond 1e-6 are such, and
            # one process differs as much from itself when the rows of its batches are reversed (docs/silo.md).
            off = (second.tensors[name] - tensor).abs()
            assert (off <= 1e-6).float().mean() > 0.999, name
            assert off.max() <= 1e-4, name
            assert off.norm() <= 2e-6 * tensor.norm(), name
    assert not ranks_alive(tmp_path)  # they ended with their site
    assert not list((tmp_path / "2" / SITE).glob("ranks-*"))


@pytest.mark.slow
def test_when_a_whole_federation_trains_over_ranks_then_its_scores_are_those_of_one_process_and_a_resume_gives_its_bytes(
    tmp_path: Path,
) -> None:
    runs = [pretrain(over(ranks), output=tmp_path / str(ranks)) for ranks in (1, 2)]
    one, two = (run.results() for run in runs)
    assert np.allclose(one.mase, two.mase, rtol=1e-5)
    for name in ("results.parquet", "checkpoints/round-000003/manifest.json"):
        (tmp_path / "2" / name).unlink()
    again = pretrain(over(2), output=tmp_path / "2")
    assert again.results().weights_sha256.iloc[0] == two.weights_sha256.iloc[0]
    assert not ranks_alive(tmp_path)


@pytest.fixture
def at_work(tmp_path: Path) -> Iterator[tuple[Site, threading.Thread, list[Reply]]]:
    """Give a site whose ranks are at work on a task that takes them hours, the thread that waits for it, and where its reply comes."""
    spec = over(2)
    spec = spec.model_copy(update={"federation": spec.federation.model_copy(update={"local_steps": 10**6})})
    site, replies = site_of(spec, tmp_path), list[Reply]()
    thread = threading.Thread(target=lambda: replies.append(site.run(message(spec, 1), Workspaces())))
    thread.start()
    assert wait_for(lambda: len(ranks_alive(tmp_path)) == 3, 60)
    time.sleep(1)
    yield site, thread, replies
    site.give_up("")
    thread.join(30)


@pytest.mark.slow
def test_when_a_round_is_over_then_the_ranks_end(at_work: tuple[Site, threading.Thread, list[Reply]], tmp_path: Path) -> None:
    site, thread, replies = at_work
    site.give_up("")
    thread.join(30)
    assert [reply.error for reply in replies] == ["site: the round is over"]
    assert not ranks_alive(tmp_path)
    assert not list((tmp_path / SITE).glob("ranks-*"))


@pytest.mark.slow
def test_when_a_rank_dies_then_the_reply_says_so_and_no_other_is_left(
    at_work: tuple[Site, threading.Thread, list[Reply]], tmp_path: Path
) -> None:
    _, thread, replies = at_work
    os.kill(max(ranks_alive(tmp_path)), signal.SIGKILL)
    thread.join(60)
    assert [reply.error for reply in replies] == [f"site: a rank of site {SITE} failed"]
    assert not ranks_alive(tmp_path)


@pytest.mark.slow
def test_when_the_site_is_killed_then_its_ranks_end_and_what_they_left_is_removed_by_the_next(tmp_path: Path) -> None:
    script = "import sys; from tests.federated.test_silo import work; work(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert wait_for(lambda: len(ranks_alive(tmp_path)) == 3, 90)
    process.kill()
    process.wait()
    assert wait_for(lambda: not ranks_alive(tmp_path), 30)
    (left,) = (tmp_path / SITE).glob("ranks-*")
    assert left.stat().st_mode & 0o777 == 0o700
    two_rounds(over(2), tmp_path)
    assert not list((tmp_path / SITE).glob("ranks-*"))


def work(folder: str) -> None:
    """Train for hours; run by a test in a process of its own."""
    spec = over(2)
    spec = spec.model_copy(update={"federation": spec.federation.model_copy(update={"local_steps": 10**6})})
    site_of(spec, Path(folder)).run(message(spec, 1), Workspaces())


def refusal(spec: RunSpec) -> str:
    with pytest.raises(SpecError) as caught:
        check_ranks(Plan(spec, build_method(spec.method)))
    return caught.value.message


def test_when_a_batch_cannot_be_split_exactly_then_the_spec_is_refused() -> None:
    for method in ("fedtrl", "ffts", "fedal", "fedpm"):
        assert "need the whole batch" in refusal(over(2, method))
        check_ranks(Plan(over(1, method), build_method(over(1, method).method)))
    assert "without a window" in refusal(over(9))
    assert "one shape" in refusal(over(2, compile=True))
    reconstruct = over(2).model_copy(update={"model": over(2).model.model_copy(update={"objective": "reconstruct"})})
    assert "masks over the whole batch" in refusal(reconstruct)


def test_when_methods_add_to_the_gradient_alone_then_their_batches_split() -> None:
    for method in ("fedavg", "fedavg_encoder", "fedper", "fedprox", "fedla", "scaffold", "feddyn", "local", "central"):
        check_ranks(Plan(over(2, method), build_method(over(2, method).method)))


def test_when_a_guard_computes_gradients_then_ranks_are_refused() -> None:
    class Computes(Guard):
        name = "computes"

        @property
        def takes_steps(self) -> bool:
            """True."""
            return True

    try:
        spec = over(2)
        guarded = RunSpec.model_validate({**spec.model_dump(mode="json"), "guards": [{"name": "computes"}]})
        assert "guard computes" in refusal(guarded)
    finally:
        del GUARDS["computes"]


def test_when_there_is_one_rank_then_it_is_the_run_it_always_was() -> None:
    without = over(1).to_dict()
    del without["training"]["ranks"]
    assert parse_spec(without).fingerprint() == over(1).fingerprint() != over(2).fingerprint()

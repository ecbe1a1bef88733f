"""A site with several devices: its training runs in a process a device, started by torchrun.

The site hands tasks over as files in a folder of its own that only its user may read: what to run as JSON, the series as a store,
each task as the bytes that brought it; what comes back is one safetensors file. Evaluation, guards and the writing of the site's states
stay with the site's own process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedcast.data.store import SeriesStore
from fedcast.errors import SiteError, SpecError
from fedcast.federated.messages import Task
from fedcast.models.contract import OwnLossModel
from fedcast.tensors import Content, read_file, write_file

if TYPE_CHECKING:
    from fedcast.federated.plan import Plan

ANSWER, TASK, WHAT, STORE, MEETING = "answer", "task", "what.json", "store", "meeting"
LOOK_S = 0.02
"""Seconds between two looks for a file."""
_PATIENCE_S = 10.0
_SENT, _KEPT, _ABOUT = "sent.", "kept.", "about"
_SEE = "see ranks.log in the site's own folder"


@dataclass(frozen=True)
class Trained:
    """What local training gave.

    Attributes
    ----------
    tensors
        What the reply holds, before any guard.
    meta
        The reply's JSON values.
    kept
        What the site keeps until its next round, but for the guards' own.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    kept: dict[str, Tensor]

    def write(self, path: Path) -> None:
        """Write everything into one file."""
        named = {f"{_SENT}{name}": tensor for name, tensor in self.tensors.items()}
        named |= {f"{_KEPT}{name}": tensor for name, tensor in self.kept.items()}
        put(path, lambda aside: write_file(aside, named, {_ABOUT: json.dumps({"meta": self.meta})}))


def write_error(path: Path, message: str) -> None:
    """Write one sentence that says why there is nothing."""
    put(path, lambda aside: write_file(aside, {}, {_ABOUT: json.dumps({"error": message})}))


class Silo:
    """A site's ranks: started by torchrun with its first task, and kept for the next ones, since starting takes seconds.

    Parameters
    ----------
    role
        The site's part in the run, as JSON values.
    store
        Its series.
    plan
        What the run trains.
    folder
        The site's own folder.
    """

    def __init__(self, role: Mapping[str, Any], store: SeriesStore, plan: Plan, folder: Path) -> None:
        self._role, self._store, self._spec, self._site = dict(role), store, plan.spec, folder
        self._ranks: _RunningRanks | None = None

    def train(self, task: Task, given_up: threading.Event) -> Trained:
        """Train a task. Where it fails or is given up, the ranks are ended, and the next task starts new ones.

        Raises
        ------
        SiteError
            When a rank fails, or the task is given up.
        """
        if self._ranks is None:
            self._site.mkdir(parents=True, exist_ok=True)
            what = {"spec": self._spec.model_dump(mode="json"), "role": self._role, "site": str(self._site.absolute())}
            self._ranks = _RunningRanks(what, self._store, self._site, self._spec.training.ranks)
        try:
            answer = self._ranks.ask(task, given_up)
            about = json.loads(answer.metadata[_ABOUT])
            if "error" in about:
                raise SiteError(about["error"], hint=_SEE)
        except BaseException:
            self._ranks.end()
            self._ranks = None
            raise
        sent, kept = ({n.removeprefix(p): t for n, t in answer.tensors.items() if n.startswith(p)} for p in (_SENT, _KEPT))
        return Trained(sent, about["meta"], kept)


class _RunningRanks:
    """Processes that wait for tasks in a folder; they end with this object, or with this process."""

    def __init__(self, what: Mapping[str, Any], store: SeriesStore, site: Path, ranks: int) -> None:
        for left in site.glob("ranks-*/"):
            shutil.rmtree(left)  # of a process that was killed
        shared = TemporaryDirectory(prefix="ranks-", dir=site)  # mode 0700
        self._folder, self._number, self._name = Path(shared.name), 0, what["role"]["name"]
        store.save(self._folder / STORE)
        (self._folder / WHAT).write_text(json.dumps(what), encoding="utf-8")
        # Files, not the TCP store of --standalone: that listens on every interface, and torchrun unpickles what it holds.
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(self._folder / "launch"), "--rdzv-conf", "store_type=file"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nnodes", "1", "--nproc-per-node", str(ranks)]
        with (site / "ranks.log").open("wb") as log:
            # The ranks read from the pipe, into which nobody writes: it closes when this process is killed, and they end.
            self._process = subprocess.Popen(
                [*launcher, "-m", "fedcast.federated.rank", shared.name],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,  # an interrupt from the keyboard is for the site's own process
            )
        self.end = weakref.finalize(self, _end, self._process, shared)

    def ask(self, task: Task, given_up: threading.Event) -> Content:
        """Return the answer to a task; :class:`~fedcast.errors.SiteError` when there is none."""
        self._number += 1
        asked, answer = self._folder / f"{TASK}-{self._number}", self._folder / f"{ANSWER}-{self._number}"
        put(asked, lambda aside: aside.write_bytes(task.encode()))
        while not answer.is_file():
            if given_up.wait(LOOK_S):
                raise SiteError("the round is over", hint="nothing is to be done: its work does not count")
            if self._process.poll() is not None and not answer.is_file():
                raise SiteError(f"a rank of site {self._name} failed", hint=_SEE)
        content = read_file(answer)
        for done in (asked, answer):  # every rank has read the task: its last step needed them all
            done.unlink()
        return content


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside and rename it, so that whoever waits for it finds it whole."""
    aside = path.with_name(f"{path.name}.aside")
    write(aside)
    os.replace(aside, path)


def _end(process: subprocess.Popen[bytes], folder: TemporaryDirectory[str]) -> None:
    if process.stdin is not None:
        process.stdin.close()  # ends ranks that torchrun does not reach: they are in process groups of their own
    process.terminate()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    folder.cleanup()


def _environment() -> dict[str, str]:
    """Return this process's environment; ranks are of one machine, so they talk over its loopback, and compute on one core each."""
    own = {"OMP_NUM_THREADS": "1"}
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        own |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return {**own, **os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def check_ranks(plan: Plan) -> None:
    """Refuse what several ranks cannot train as one process does, before data are read.

    The losses of a batch's parts add up to its own only where it is a mean over observed targets.

    Raises
    ------
    SpecError
        Naming what does not go with ``training.ranks``.
    """
    spec, method = plan.spec, plan.method
    training = spec.training
    if training.ranks == 1:
        return
    model = plan.build()
    own_loss = isinstance(model, OwnLossModel) and not model.splits
    stepping = plan.guards.stepping
    reasons = {
        f"method {method.name!r} has terms in its loss that need the whole batch": not method.splits,
        "masked reconstruction draws its masks over the whole batch": spec.model.objective == "reconstruct",
        f"the loss of {model.config.architecture!r} is no mean over observed targets": own_loss,
        f"the guard {stepping.name if stepping else ''} computes the gradient of the whole batch": stepping is not None,
        "training.compile compiles one shape of batch": training.compile,
        f"training.batch_size = {training.batch_size} leaves a rank without a window": training.batch_size < training.ranks,
    }
    for reason, holds in reasons.items():
        if holds:
            raise SpecError(f"training.ranks = {training.ranks} splits batches, and {reason}", hint="leave training.ranks at 1")

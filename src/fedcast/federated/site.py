"""Client work: what a site does with a task. It knows neither the fleet that brought the task nor the round loop behind it."""

from __future__ import annotations

import copy
import itertools
import os
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcast.data.splits import split_store
from fedcast.data.store import SeriesStore
from fedcast.data.windows import Batch, WindowSampler
from fedcast.errors import CheckpointError, FedcastError, ModelError, ScreenError, SiteError, SpecError
from fedcast.federated.audit import NAME as AUDIT
from fedcast.federated.audit import AuditLog, record_answer
from fedcast.federated.conflict import GradientProbe
from fedcast.federated.guards.base import LocalSteps, Outgoing, prefix_of
from fedcast.federated.messages import Reply, Task, all_finite, is_local, screen_task
from fedcast.federated.plan import TUNING, Plan
from fedcast.federated.scoring import SiteScores
from fedcast.federated.silo import Silo, Trained
from fedcast.federated.state import SiteStates
from fedcast.federated.workspace import Workspace, Workspaces, build_extra
from fedcast.methods.base import Client
from fedcast.safe import UnsafeError, check_name
from fedcast.tasks.objectives import build_task
from fedcast.training.backend import Backend
from fedcast.training.loop import learning_rate, train
from fedcast.training.ranks import Ranks

_MOMENTS = "moments."
METHOD = "method."
"""What a method keeps stands under this prefix in a site's state."""
COUNTED = "counted"
"""A task's value of this name says which round of the site was the last to count at the server."""
_ADAPTED, _ANCHOR = "adapted", "anchor"
_AHEAD = 8


@dataclass(frozen=True)
class _Stage:
    """Whether a site adapts the model to itself, after the federation; the weights it starts from, and those it may be pulled to."""

    local: bool
    weights: Tensor
    anchor: Tensor

    @classmethod
    def of(cls, task: Task, state: Mapping[str, Tensor]) -> _Stage:
        if "shared" in task.tensors:
            return cls(is_local(task), task.tensors["shared"], task.tensors["shared"])
        if _ADAPTED not in state:
            raise CheckpointError("the site has no weights of its own to go on from", hint="remove the run folder and start again")
        return cls(True, state[_ADAPTED], state[_ANCHOR])


@dataclass(frozen=True)
class SiteRole:
    """A site's part in a run.

    Attributes
    ----------
    name
        The site's own name.
    trains
        Whether it may be selected for training.
    evaluates
        Whether it scores models on its own windows.
    held_out
        Whether its domain is never trained on.
    step_multiplier
        Local steps for each of the spec's: 1, and for the pooled client of a centralised control the number of sites it stands for.
    epoch_share
        Share of a local epoch: 1, and for the pooled client the share of sites that a federation would select.
    """

    name: str
    trains: bool = True
    evaluates: bool = True
    held_out: bool = False
    step_multiplier: int = 1
    epoch_share: float = 1.0

    def __post_init__(self) -> None:
        try:
            check_name(self.name)  # it becomes the name of the site's folder
        except UnsafeError as error:
            raise SpecError(f"a site has no usable name: {error}", hint="rename the file or folder of that domain") from error


class Site:
    """One site: its series, its private state, and the two kinds of task it runs.

    Parameters
    ----------
    role
        The site's part in the run.
    store
        Its series; they never leave it.
    plan
        What the run trains.
    folder
        The site's own folder for private state.
    simulated
        Whether all sites are on one machine: guards then draw noise from seeds, so that runs can be repeated.
    ranks
        This process's place among those that train for the site; ``None`` in the site's own process.
    """

    def __init__(
        self, role: SiteRole, store: SeriesStore, plan: Plan, folder: Path, *, simulated: bool = False, ranks: Ranks | None = None
    ) -> None:
        self.role = role
        self._plan, self._spec, self._method = plan, plan.spec, plan.method
        self._folder = folder
        self._states = SiteStates(folder)
        self._memory: dict[str, Any] = {}
        self._simulated = simulated
        self._audit = AuditLog(folder / AUDIT)
        self._guard_prefixes = tuple(prefix_of(guard) for guard in plan.guards)
        self._guard_memory: dict[str, dict[str, Any]] = {guard.name: {} for guard in plan.guards}
        self._shapes: tuple[tuple[str, tuple[int, ...]], ...] | None = None
        # One task at a time: a late reply's work must not meet the next round's.
        self._busy = threading.Lock()
        self._tickets = itertools.count(1)
        self._newest = 0
        self._given_up = threading.Event()
        self._current: str | None = None
        self._over: str | None = None
        self._ranks = ranks
        self._silo = Silo(asdict(role), store, plan, folder) if plan.spec.training.ranks > 1 and ranks is None else None
        spec = plan.spec
        model, data = spec.model, spec.data
        splits = split_store(store, data, model.horizon)
        self._sampler = WindowSampler(store, splits, context=model.context, horizon=model.horizon, balance=plan.method.balance)
        self._scores = SiteScores(role.name, store, splits, self._sampler, spec)
        self._probe = GradientProbe(self._sampler, spec)
        self._task = build_task(model.objective)
        self._backend = Backend.resolve(spec.training)
        for memory in self._guard_memory.values():
            memory["rate"], memory["steps"] = float(self._sampler.rates(spec.training.batch_size).max(initial=0.0)), self._steps()

    @property
    def samples(self) -> int:
        """What the site weighs in means: its training points, or 1 where all sites weigh alike."""
        return 1 if self._spec.federation.weights == "equal" else self._sampler.n_points

    def validation_batches(self, device: torch.device, size: int) -> Sequence[Batch]:
        """Return the site's validation windows in batches of at most ``size``."""
        return self._scores.validation_batches(device, size)

    def run(self, task: Task, workspaces: Workspaces) -> Reply:
        """Run a task; an exception becomes a reply with an error and no traceback, which stays in the site's error.log."""
        reply = replace(self._run(task, workspaces), task=task.id)
        if self._simulated:
            record_answer(self._audit, task, reply)  # elsewhere by whoever sends the bytes
        return reply

    def give_up(self, task: str) -> None:
        """Let training for the task of this id, under way or about to begin, end in an error at its next step; its round is over."""
        self._over = task
        if self._current == task:
            self._given_up.set()
            self._over = None

    def _run(self, task: Task, workspaces: Workspaces) -> Reply:
        start = time.perf_counter()
        ticket = next(self._tickets)
        if task.kind == "train":
            self._newest = ticket
        try:
            with self._busy:
                if task.kind == "train" and ticket < self._newest:
                    return Reply(error=f"round {task.round} is over")
                # In this order: a call of `give_up` at any time either sets the flag after this or is seen here.
                self._given_up.clear()
                self._current = task.id
                over, self._over = self._over, None
                if over == task.id:
                    return Reply(error=f"round {task.round} is over")
                reply = self._answer_guard(task) if task.kind == "guard" else self._work(task, workspaces)
        except FedcastError as error:
            return Reply(error=f"{error.code}: {error.message}")
        except Exception as error:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
            return Reply(error=f"{type(error).__name__} at site {self.role.name}; details are in the site's own error.log")
        return Reply(
            reply.tensors, {**reply.meta, "seconds": time.perf_counter() - start, "worker": f"{os.getpid()}-{threading.get_ident()}"}
        )

    def _work(self, task: Task, workspaces: Workspaces) -> Reply:
        if task.kind not in ("train", "evaluate"):
            raise ScreenError(f"a site's model has no part in a task of kind {task.kind!r}", hint="send it to the site's own process")
        alone = self._plan.federated_rounds < task.round <= self._method.federated_rounds(self._spec.federation.rounds)
        if task.kind == "train" and is_local(task) != alone:
            # Nothing passes a guard where a site goes on alone: when that is, the spec says, and no task.
            how = "with the others" if is_local(task) else "alone"
            raise ScreenError(f"in round {task.round} the site goes on {how}", hint="check that both sides run the same spec")
        workspace = self._workspace(workspaces)
        if task.kind == "train" and not is_local(task):
            task = replace(task, tensors=self._plan.guards.unpack(task.tensors))
        screen_task(task, self._message_shapes(workspace), self._guard_prefixes)
        with workspace.computing():
            return self._train(task, workspace) if task.kind == "train" else self._evaluate(task, workspace)

    def train(self, task: Task, workspaces: Workspaces) -> Trained:
        """Train as one of several ranks; the task was screened by the site's own process, which does everything else."""
        workspace = self._workspace(workspaces)
        with workspace.computing():
            return self._fit(task, workspace, self._states.of(_counted(task, task.round - 1)), {})

    def _answer_guard(self, task: Task) -> Reply:
        guard = self._plan.guards.named(task.meta.get("guard"))
        return guard.answer(task, self.role.name, self._guard_memory[guard.name])

    def _workspace(self, workspaces: Workspaces) -> Workspace:
        def make() -> dict[str, torch.nn.Module]:
            return build_extra(lambda: self._method.modules(self._plan.shape, self._sampler), self._spec.seed)

        if self._shapes is None:
            self._shapes = tuple((name, tuple(p.shape)) for name, module in sorted(make().items()) for p in module.parameters())
        return workspaces.get(self._shapes, self._plan, make, self._backend)

    def _message_shapes(self, workspace: Workspace) -> dict[str, tuple[int | None, ...]]:
        layout = workspace.parameters.layout
        private = workspace.model_size - layout.shared_size
        fixed: dict[str, tuple[int | None, ...]] = {"shared": (layout.shared_size,), "private": (private,), "fallback": (private,)}
        experts: dict[str, tuple[int | None, ...]] = {"experts": (None, private), "expert_shared": (None, layout.shared_size)}
        return {**fixed, **experts, **self._plan.state_shapes, **self._method.message_shapes(self._plan.shape)}

    def _steps(self) -> int:
        federation, training = self._spec.federation, self._spec.training
        if federation.local_epochs is None:
            return federation.local_steps * self.role.step_multiplier
        # A pass over the points: every step reads batch_size targets of `horizon` points.
        points = training.batch_size * self._spec.model.horizon
        return ceil(federation.local_epochs * self.role.epoch_share * self._sampler.n_points / points)

    def _train(self, task: Task, workspace: Workspace) -> Reply:
        counted = _counted(task, task.round - 1)
        state, draws = self._states.of(counted), self._draws(task.round)
        trained = self._fit(task, workspace, state, draws) if self._silo is None else self._silo.train(task, self._given_up)
        guards = {} if is_local(task) else self._guard(task, trained.tensors, trained.meta, state, draws)
        self._states.save(task.round, {**guards, **trained.kept}, counted)
        return Reply(trained.tensors, trained.meta)

    def _fit(self, task: Task, workspace: Workspace, state: Mapping[str, Tensor], draws: Mapping[str, np.random.Generator]) -> Trained:
        """Take a task's steps."""
        stage = _Stage.of(task, state)
        workspace.load(stage.weights, state.get("private"))
        workspace.tune(task.tensors)
        keeps = self._spec.training.moments == "keep"
        moments = {name.removeprefix(_MOMENTS): value for name, value in state.items() if name.startswith(_MOMENTS)}
        if keeps and moments:
            workspace.optimiser.load(moments)
            if self._method.reorders:
                workspace.optimiser.forget_shared()
        else:
            workspace.optimiser.reset()
        client = self._client(task, workspace, state, stage)
        if self._spec.training.compile:
            training, model = self._spec.training, self._spec.model
            client.record("compile_seconds", workspace.compile(training.batch_size, model.context, model.horizon))
        steps, guarded = self._steps(), self._guarded(client, workspace, draws)
        done, total = (task.round - 1) * steps, self._spec.federation.rounds * steps
        restarts = self._spec.training.schedule_over == "round"
        record = train(
            workspace.parameters,
            workspace.optimiser,
            self._batches(client.rng, steps, workspace.device, guarded),
            lambda batch: self._loss(client, workspace, batch),
            steps=steps,
            rate=lambda step: learning_rate(self._spec.training, *((step, steps) if restarts else (done + step, total))),
            correction=lambda: self._method.correction(client),
            backward=self._backward(client, workspace, guarded),
        )
        if not (isfinite(record.loss) and all_finite(workspace.parameters.vector)):
            # Kept, such weights would spoil every later round of the site.
            raise ModelError("training diverged: a weight or the loss is not finite", hint="lower training.learning_rate or clip_norm")
        reply = {} if stage.local else {**self._method.reply(client), **self._answers(task, workspace)}
        tensors = {} if stage.local else {"shared": workspace.parameters.shared, **reply}
        if client.exporting:
            tensors["private"] = workspace.private_of_model
        # Copies, on the CPU: the workspace goes on to the next site, and only workspaces lie on another device.
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        meta: dict[str, Any] = {
            "samples": self.samples,
            "steps": steps,
            "loss": record.loss,
            "compute_seconds": record.compute_seconds,
            "metrics": client.records(),
        }
        return Trained(tensors, meta, self._kept(client, workspace, keeps))

    def _draws(self, round_: int) -> dict[str, np.random.Generator]:
        """Return a generator for each guard, the same for a repeated round."""
        seeds = [self._spec.seed, zlib.crc32(self.role.name.encode()), round_]
        return {guard.name: np.random.default_rng([*seeds, zlib.crc32(guard.name.encode())]) for guard in self._plan.guards}

    def _backward(self, client: Client, workspace: Workspace, guarded: LocalSteps | None) -> Callable[[Batch], Tensor | None]:
        """Return what computes the gradient of a step where a guard does, or several ranks, and else what leaves it to the loop."""

        def loss_of(part: Batch) -> Tensor:
            return self._loss(client, workspace, part)

        def backward(batch: Batch) -> Tensor | None:
            if self._ranks is not None:
                return self._ranks.backward(loss_of, batch, workspace.parameters)
            guard = self._plan.guards.stepping
            return None if guard is None or guarded is None else guard.backward(guarded, batch)

        return backward

    def _guarded(self, client: Client, workspace: Workspace, draws: Mapping[str, np.random.Generator]) -> LocalSteps | None:
        """Return what a guard that takes the steps itself is given; none does where the site goes on alone."""
        guard = self._plan.guards.stepping
        if guard is None or client.adapting:
            return None
        return LocalSteps(
            model=workspace.model,
            parameters=workspace.parameters,
            loss=lambda batch: self._loss(client, workspace, batch),
            sampler=self._sampler,
            size=self._spec.training.batch_size,
            rng=draws[guard.name],
            memory=self._guard_memory[guard.name],
            simulated=self._simulated,
        )

    def _guard(
        self,
        task: Task,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        state: Mapping[str, Tensor],
        draws: Mapping[str, np.random.Generator],
    ) -> dict[str, Tensor]:
        """Let every guard change a reply on its way out; return what they keep at the site."""
        kept: dict[str, Tensor] = {}
        for guard in self._plan.guards:
            prefix = prefix_of(guard)
            outgoing = Outgoing(
                site=self.role.name,
                round=task.round,
                tensors=tensors,
                received=task.tensors,
                samples=self.samples,
                meta=meta,
                state={name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)},
                memory=self._guard_memory[guard.name],
                rng=draws[guard.name],
                simulated=self._simulated,
            )
            guard.encode(outgoing)
            kept |= {f"{prefix}{name}": value for name, value in outgoing.state.items()}
        return kept

    def _loss(self, client: Client, workspace: Workspace, batch: Batch) -> Tensor:
        with workspace.stepping():
            return self._method.local_loss(client, batch)

    def _answers(self, task: Task, workspace: Workspace) -> dict[str, Tensor]:
        """Return what the tuning has a site answer after its steps."""
        if not self._plan.answer_shapes:
            return {}
        # Whatever a loss draws, it draws alike for all that is compared.
        answers = self._plan.tuning.answer(
            workspace.model,
            lambda batch: self._task.step(workspace.model, batch, torch.Generator)[0],
            lambda: self.validation_batches(workspace.device, self._spec.training.batch_size),
            round=task.round,
            rounds=self._plan.federated_rounds,
            seed=self._spec.seed,
        )
        return {f"{TUNING}{name}": tensor.float() for name, tensor in answers.items()}

    def _client(self, task: Task, workspace: Workspace, state: Mapping[str, Tensor], stage: _Stage) -> Client:
        seed = np.random.SeedSequence([self._spec.seed, zlib.crc32(self.role.name.encode()), task.round])
        return Client(
            site=self.role.name,
            round=task.round,
            rounds=self._spec.federation.rounds,
            model=workspace.model,
            extra=workspace.extra,
            task=self._task,
            parameters=workspace.parameters,
            received={
                name: tensor.to(workspace.device)
                for name, tensor in {**task.tensors, "shared": stage.anchor}.items()
                if not (self._guard_prefixes and name.startswith(self._guard_prefixes))
            },
            sampler=self._sampler,
            state={name.removeprefix(METHOD): value.to(workspace.device) for name, value in state.items() if name.startswith(METHOD)},
            rng=np.random.default_rng(seed),
            exporting=bool(task.meta.get("export", False)),
            adapting=stage.local,
            _memory=self._memory,
        )

    def _batches(self, rng: np.random.Generator, steps: int, device: torch.device, guarded: LocalSteps | None) -> Iterator[Batch]:
        size, guard = self._spec.training.batch_size, self._plan.guards.stepping
        for start in range(0, steps, _AHEAD):
            # Several steps' windows at once: a draw costs as much for eight batches as for one. On CUDA they are drawn, and copied
            # from pinned memory, while the device still works through the steps before.
            count = min(_AHEAD, steps - start)
            if guard is None or guarded is None:
                batches = self._sampler.gather(self._sampler.draw(size * count, rng)).to(device).split(size)
            else:
                batches = (self._sampler.gather(guard.draw(guarded)).to(device) for _ in range(count))
            for batch in batches:
                if self._given_up.is_set():
                    raise SiteError("the round is over", hint="nothing is to be done: its work does not count")
                yield batch

    def _kept(self, client: Client, workspace: Workspace, keeps: bool) -> dict[str, Tensor]:
        state = {f"{METHOD}{name}": value for name, value in client.state.items()}
        if workspace.parameters.private.numel():
            state["private"] = workspace.parameters.private
        if client.adapting:
            state |= {_ADAPTED: workspace.parameters.shared, _ANCHOR: client.received["shared"]}
        if keeps:
            state |= {f"{_MOMENTS}{name}": value for name, value in workspace.optimiser.state().items()}
        # Copies, as the reply's are: on the CPU these are the workspace's own.
        return {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}

    def _evaluate(self, task: Task, workspace: Workspace) -> Reply:
        private = task.tensors.get("private")
        own = self._states.of(_counted(task, task.round)) if self.role.trains else {}
        if private is None and self.role.trains:
            # A site that was never selected has no private weights of its own yet.
            private = own.get("private", task.tensors.get("fallback"))
        workspace.load(own.get(_ADAPTED, task.tensors["shared"]), private)
        workspace.tune(task.tensors)
        if task.meta.get("part") == "validation":
            return Reply(meta={"loss": self._scores.loss(workspace.twin, self._task)})
        if task.meta.get("part") == "gradient":
            return Reply(self._probe.answer(workspace.twin, self._task))
        if task.meta.get("personal", False):
            self._plan.tuning.save(copy.deepcopy(workspace.twin), self._folder / "model")
        experts = task.tensors.get("experts")
        model = workspace.twin if experts is None else workspace.mixture(task.tensors.get("expert_shared", task.tensors["shared"]), experts)
        return Reply(meta=self._scores.test(model, baselines=bool(task.meta.get("baselines", False))))


def _counted(task: Task, latest: int) -> int:
    """Return the last round of this site that counted at the server: it goes on from there, and not from work that came too late."""
    counted = task.meta.get(COUNTED, latest)
    if isinstance(counted, bool) or not isinstance(counted, int) or not 0 <= counted <= latest:
        hint = "check that both sides run the same version of fedcast"
        raise ScreenError(f"the task says that round {counted!r} counted last", hint=hint)
    return counted

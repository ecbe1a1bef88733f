"""The round loop, written once: select, send, collect, screen, aggregate, validate, checkpoint, log.

The loop owns sampling, seeds, deadlines, quorum and checkpoints. It does not know which fleet carries it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import numpy as np
import torch

from fedcast.errors import QuorumError, SiteError
from fedcast.federated.checkpoint import Checkpoints, Progress
from fedcast.federated.conflict import conflict_row
from fedcast.federated.fleet import Fleet
from fedcast.federated.intake import Intake
from fedcast.federated.messages import Reply, Task
from fedcast.federated.plan import TUNING, Plan, tuning_state
from fedcast.federated.site import SiteRole
from fedcast.methods.base import Method, Server
from fedcast.spec import RunSpec
from fedcast.training.memory import peak_bytes

_ADAPTS = "adapts."
"""The server's tensors have a name with this prefix for each site that goes on alone."""


class Observer(Protocol):
    """Whoever watches a run: a progress bar, a log, a test."""

    def start(self, rounds: int, sites: Sequence[str]) -> None:
        """Hear that training starts."""

    def site_done(self, round: int, site: str) -> None:
        """Hear that a site has answered."""

    def row(self, row: dict[str, Any]) -> None:
        """Hear of a row that was logged."""

    def phase(self, name: str, round: int) -> None:
        """Hear that a phase of a round begins."""

    def finish(self) -> None:
        """Hear that the run is over."""


class Silent:
    """An observer that does nothing."""

    def start(self, rounds: int, sites: Sequence[str]) -> None:
        """Do nothing."""

    def site_done(self, round: int, site: str) -> None:
        """Do nothing."""

    def row(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def phase(self, name: str, round: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


@dataclass
class RoundLoop:
    """Everything one run needs to go from round to round.

    Attributes
    ----------
    plan
        What is run, and what it trains.
    roles
        The sites by name.
    samples
        Declared training points of each training site.
    server
        The server's state; changed in place.
    checkpoints
        Where it is kept.
    log
        Appends a row to the run's log.
    keep_best
        Called when the validation loss is the smallest so far.
    """

    plan: Plan
    fleet: Fleet
    roles: Mapping[str, SiteRole]
    samples: Mapping[str, int]
    server: Server
    checkpoints: Checkpoints
    log: Callable[[dict[str, Any]], None]
    keep_best: Callable[[Server], None]
    observer: Observer

    @property
    def spec(self) -> RunSpec:
        """The run's spec."""
        return self.plan.spec

    @property
    def method(self) -> Method:
        """The run's method."""
        return self.plan.method

    def run(self, progress: Progress) -> Progress:
        """Run the rounds that are left after ``server.round``."""
        trainers = [name for name, role in sorted(self.roles.items()) if role.trains]
        self.observer.start(self.server.rounds, trainers)
        for number in range(self.server.round + 1, self.server.rounds + 1):
            self._round(number, trainers, progress)
        return progress

    def _round(self, number: int, trainers: Sequence[str], progress: Progress) -> None:
        start = time.perf_counter()
        self.server.round, self.server.log = number, {}
        self.observer.phase("select", number)
        selected = self._select(trainers, number)
        validates = self._validates(number)
        tasks = {name: self._task(name, number) for name in selected}
        self.observer.phase("client", number)
        intake = self._collect(tasks, number)
        self._check_quorum(intake, selected, number)
        self.observer.phase("aggregate", number)
        if self._local(number):
            self.server.tensors |= {f"{_ADAPTS}{site}": torch.ones(1) for site in intake.meta}
        else:
            self._decide(intake, number)
            intake.aggregate(self.server)
        trained = time.perf_counter()
        rows = []
        if validates:
            self.observer.phase("evaluate", number)
            rows.append(self._validate(number, progress))
        validated = time.perf_counter()
        row = self._row(number, intake, sum(task.nbytes for task in tasks.values()))
        progress.bytes_up += row["bytes_up"]
        progress.bytes_down += row["bytes_down"]
        seconds = trained - start + time.perf_counter() - validated
        progress.seconds += time.perf_counter() - start
        row["seconds"], row["overhead_seconds"] = seconds, seconds - _critical_path(intake)
        progress.rows = [row, *rows, *self._conflict(number)]
        progress.peak_memory = max(progress.peak_memory, peak_bytes())
        self.observer.phase("checkpoint", number)
        writing = time.perf_counter()
        self.checkpoints.save(self.server, progress, before_rename=lambda: self.observer.phase("checkpoint-rename", number))
        row["checkpoint_seconds"] = time.perf_counter() - writing
        self.observer.phase("log", number)
        for logged in progress.rows:
            self.log(logged)
            self.observer.row(logged)

    def _local(self, number: int) -> bool:
        """Whether sites go on alone in this round."""
        return number > self.plan.federated_rounds

    def _task(self, site: str, number: int) -> Task:
        if not self._local(number):
            return Task("train", number, {**self.method.message(self.server, site), **self._tuned()}, {"export": self._exports(number)})
        # Sent until the site has gone on from them: then it has weights of its own.
        shared = {} if f"{_ADAPTS}{site}" in self.server.tensors else {"shared": self.server.shared_of(site)}
        return Task("train", number, {**shared, **self._tuned()}, {"stage": "local"})

    def _tuned(self) -> dict[str, torch.Tensor]:
        """Return what the tuning sends with the weights."""
        return {name: tensor for name, tensor in self.server.tensors.items() if name.startswith(TUNING)}

    def _decide(self, intake: Intake, number: int) -> None:
        """Let the tuning bring the sites' answers into its state."""
        answers = intake.answers(TUNING)
        if not answers:
            return
        sites = sorted(answers)
        weights = [float(intake.meta[site]["samples"]) for site in sites]
        state = self.plan.tuning.decide(
            tuning_state(self.server.tensors),
            [tuning_state(answers[site]) for site in sites],
            weights,
            round=number,
            rounds=self.plan.federated_rounds,
            seed=self.spec.seed,
        )
        self.server.tensors |= {f"{TUNING}{name}": tensor for name, tensor in state.items()}

    def _exports(self, number: int) -> bool:
        """Whether sites send the private part: for the shadow when the model is scored, for each site's own model at the end."""
        when = self.method.exports()
        wanted = number == self.server.rounds if when == "last" else self._validates(number)
        # Where only some take part, a site hands its part in whenever it trained, or it would be missing or stale at the end.
        return when != "never" and (wanted or self.spec.federation.participation < 1) and self.server.layout.private_size > 0

    def _validates(self, number: int) -> bool:
        return number % self.spec.evaluation.every == 0 or number == self.server.rounds

    def _select(self, trainers: Sequence[str], number: int) -> list[str]:
        if self._local(number):
            return sorted(trainers)  # each for itself: nobody waits for the others, and all are to be adapted
        count = self.spec.federation.selected(len(trainers))
        rng = np.random.default_rng([self.spec.seed, number])
        return sorted(rng.choice(np.array(trainers, dtype=object), size=count, replace=False))

    def _collect(self, tasks: Mapping[str, Task], number: int) -> Intake:
        layout = self.server.layout
        shapes: dict[str, tuple[int, ...]] = {}
        if not self._local(number):
            shapes = {"shared": (layout.shared_size,), **self.method.reply_shapes(self.plan.shape), **self.plan.answer_shapes}
        if self._exports(number) and shapes:
            shapes["private"] = (layout.private_size,)
        intake = Intake(self.method, {site: self.samples[site] for site in tasks}, shapes, self.checkpoints.folder)
        for site, reply in self.fleet.run(tasks, self.spec.federation.deadline_s):
            intake.take(site, reply)
            # Or it would be kept while the next one is awaited.
            del reply
            self.observer.site_done(number, site)
        return intake

    def _check_quorum(self, intake: Intake, selected: Sequence[str], number: int) -> None:
        needed = self.spec.federation.needed(len(selected))
        if len(intake.meta) < needed:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in intake.dropped.items())
            raise QuorumError(
                f"round {number} has {len(intake.meta)} usable replies and needs {needed} ({reasons})",
                hint="mend the sites and run the same command again: it resumes from the last round",
            )

    def _row(self, number: int, intake: Intake, bytes_down: int) -> dict[str, Any]:
        weights = self.server.log.pop("weights", {})
        sites = {
            site: {
                **{name: meta[name] for name in ("loss", "steps", "samples", "seconds")},
                **meta["metrics"],
                **({"weight": weights[site]} if site in weights else {}),
            }
            for site, meta in sorted(intake.meta.items())
        }
        return {
            "kind": "round",
            "round": number,
            "bytes_up": intake.nbytes,
            "bytes_down": bytes_down,
            "sites": sites,
            "dropped": intake.dropped,
            "server": dict(self.server.log),
        }

    def _seen(self) -> list[str]:
        """Return the domains that evaluate and are not held out."""
        return [name for name, role in sorted(self.roles.items()) if role.evaluates and not role.held_out]

    def _conflict(self, number: int) -> list[dict[str, Any]]:
        """Return the row on how the domains' gradients conflict, where one is due; its seconds and bytes are no cost of the method."""
        every = self.spec.evaluation.conflict
        if not every or (number % every and number not in (1, self.server.rounds)):
            return []
        self.observer.phase("probe", number)
        sites = self._seen()
        answers = self.evaluate(sites, {"part": "gradient"})
        sent = sum(Task("evaluate", number, self._model_for(site, None)).nbytes for site in sites)
        return [conflict_row(number, answers, self.server.layout, sent)]

    def _validate(self, number: int, progress: Progress) -> dict[str, Any]:
        answers = self.evaluate(self._seen(), {"part": "validation"})
        losses = {
            site: float(reply.meta["loss"])
            for site, reply in answers.items()
            if reply.meta["loss"] is not None and isfinite(reply.meta["loss"])
        }
        # Without any validation window the last round is the best there is.
        mean = sum(losses.values()) / len(losses) if losses else None
        if mean is None or mean < progress.best_loss:
            progress.best_loss, progress.best_round = float("inf") if mean is None else mean, number
            self.keep_best(self.server)
        return {"kind": "validation", "round": number, "sites": {s: {"loss": v} for s, v in losses.items()}, "mean": mean}

    def evaluate(self, sites: Sequence[str], meta: Mapping[str, Any], expert: str | None = None) -> dict[str, Reply]:
        """Let sites score the server's model: on their own domain with their own private weights, else with the model for unseen domains.

        Parameters
        ----------
        sites
            Who scores.
        meta
            The task's JSON values.
        expert
            A site whose model is to be scored instead.

        Raises
        ------
        SiteError
            When a site cannot score.
        """
        tasks = {name: Task("evaluate", self.server.round, self._model_for(name, expert), meta) for name in sites}
        replies = dict(self.fleet.run(tasks, None))
        for site in sites:
            error = replies[site].error
            if error is not None:
                raise SiteError(f"site {site} cannot evaluate: {error}", hint="mend the site's data and run the same command again")
        return {site: replies[site] for site in sites}

    def _model_for(self, site: str, expert: str | None) -> dict[str, torch.Tensor]:
        server = self.server
        if expert is not None:
            return {"shared": server.shared_of(expert), "private": server.experts[expert], **self._tuned()}
        tensors = {"shared": server.shared_of(site), **self._tuned()}
        if not self.roles[site].trains and server.experts:
            names = sorted(server.experts)
            tensors["experts"] = torch.stack([server.experts[name] for name in names])
            if server.own:
                tensors["expert_shared"] = torch.stack([server.shared_of(name) for name in names])
        if server.private.numel():
            # Beside experts too: a domain that does not train itself is validated on their mean.
            tensors["fallback" if self.roles[site].trains else "private"] = server.private
        return tensors


def _critical_path(intake: Intake) -> float:
    """Seconds in forward, backward and optimiser of the busiest worker: the round cannot be shorter."""
    busy: dict[str, float] = {}
    for meta in intake.meta.values():
        worker = str(meta.get("worker"))
        busy[worker] = busy.get(worker, 0.0) + float(meta["compute_seconds"])
    return max(busy.values(), default=0.0)

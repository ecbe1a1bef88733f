"""The round loop, written once: select, send, collect, screen, aggregate, validate, checkpoint, log.

The loop owns sampling, seeds, deadlines, quorum and checkpoints. It does not know which fleet carries it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Protocol

import numpy as np
import torch

from fedcast.errors import QuorumError, ScreenError, SiteError
from fedcast.federated.answers import screen_answer
from fedcast.federated.audit import unrecorded
from fedcast.federated.checkpoint import Checkpoints, Progress
from fedcast.federated.conflict import conflict_row
from fedcast.federated.fleet import Fleet
from fedcast.federated.gate import Gate, GuardedRound
from fedcast.federated.intake import LATE, Intake
from fedcast.federated.messages import Reply, Task
from fedcast.federated.once import Once, grown
from fedcast.federated.plan import TUNING, Plan, tuning_state
from fedcast.federated.site import COUNTED, SiteRole
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
    record
        Keeps the audit log (:meth:`fedcast.federated.audit.AuditLog.append`).
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
    record: Callable[..., None] = unrecorded
    _once: Once = field(init=False)
    _progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        """Put what makes replies count once between the loop and its fleet."""
        self._once = Once(self.fleet, self.spec.fingerprint(), self.record)
        self._progress = Progress()

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
        self._progress, self._once.history = progress, progress.history
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
        guarded = self._guarded(number, selected)
        if guarded is not None:
            tasks = guarded.begin(tasks)
        intake = self._collect(tasks, number, guarded)
        for site, reason in intake.dropped.items():
            self.record("reply-dropped", site=site, round=number, reason=reason)
        self._check_quorum(intake, selected, number)
        progress.counted |= dict.fromkeys(intake.meta, number)
        progress.history = self._once.history = grown(progress.history, number, sorted(intake.meta))
        self.observer.phase("aggregate", number)
        if self._local(number):
            self.server.tensors |= {f"{_ADAPTS}{site}": torch.ones(1) for site in intake.meta}
        else:
            self._decide(intake, number)
            before = self.server.shared.clone() if guarded else None
            intake.aggregate(self.server)
            if guarded is not None and before is not None:
                guarded.finish(before, sorted(intake.meta))
        trained = time.perf_counter()
        rows = []
        if validates:
            self.observer.phase("evaluate", number)
            rows.append(self._validate(number, progress))
        validated = time.perf_counter()
        row = self._row(number, intake, sum(task.nbytes for task in tasks.values()))
        if guarded is not None:
            row["bytes_up"] += guarded.bytes_up
            row["bytes_down"] += guarded.bytes_down
        progress.bytes_up += row["bytes_up"]
        progress.bytes_down += row["bytes_down"]
        seconds = trained - start + time.perf_counter() - validated
        progress.seconds += time.perf_counter() - start
        row["seconds"], row["overhead_seconds"] = seconds, seconds - _critical_path(intake)
        progress.rows = [row, *rows, *self._conflict(number)]
        progress.peak_memory = max(progress.peak_memory, peak_bytes())
        self.observer.phase("checkpoint", number)
        writing = time.perf_counter()
        kept = self.checkpoints.save(self.server, progress, before_rename=lambda: self.observer.phase("checkpoint-rename", number))
        self.record("checkpoint", durable=True, round=number, sha256=kept)
        if "epsilon" in row["server"]:
            self.record("privacy-spent", round=number, server=row["server"])
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
            tensors = {**self.method.message(self.server, site), **self._tuned()}
            return Task("train", number, tensors, {"export": self._exports(number), **self._counted(site)})
        # Sent until the site has gone on from them: then it has weights of its own.
        shared = {} if f"{_ADAPTS}{site}" in self.server.tensors else {"shared": self.server.shared_of(site)}
        return Task("train", number, {**shared, **self._tuned()}, {"stage": "local", **self._counted(site)})

    def _counted(self, site: str) -> dict[str, int]:
        """Return what tells a site which of its rounds was the last to count."""
        return {COUNTED: self._progress.counted.get(site, 0)}

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

    def _guarded(self, number: int, selected: Sequence[str]) -> GuardedRound | None:
        """Return the guards' part in a round; in rounds in which sites go on alone, nothing passes a guard."""
        if not len(self.plan.guards) or self._local(number):
            return None
        federation = self.spec.federation
        counted = federation.local_epochs is not None
        return GuardedRound(
            self.plan.guards,
            self.server,
            self.plan.initial,
            {site: self.samples[site] for site in selected},
            seed=self.spec.seed,
            folder=self.checkpoints.folder.parent,
            simulated=self.fleet.simulated,
            send=lambda tasks: self._once.ask(tasks, federation.deadline_s),
            run=self.spec.fingerprint(),
            steps={} if counted else {site: federation.local_steps * self.roles[site].step_multiplier for site in selected},
        )

    def _collect(self, tasks: Mapping[str, Task], number: int, guarded: GuardedRound | None) -> Intake:
        layout = self.server.layout
        shapes: dict[str, tuple[int, ...]] = {}
        if not self._local(number):
            shapes = {"shared": (layout.shared_size,), **self.method.reply_shapes(self.plan.shape), **self.plan.answer_shapes}
        if self._exports(number) and shapes:
            shapes["private"] = (layout.private_size,)
        samples = {site: self.samples[site] for site in tasks}
        gate = None if guarded is None else Gate(guarded, shapes, {site: task.tensors for site, task in tasks.items()})
        intake = Intake(self.method, samples, shapes, self.checkpoints.folder, gate)
        for site, reply in self._once.ask(tasks if guarded is None else guarded.pack(tasks), self.spec.federation.deadline_s):
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
                hint=f"mend the sites{self._or_wait(intake.dropped)} and run the same command again: it resumes from the last round",
            )

    def _or_wait(self, reasons: Mapping[str, str]) -> str:
        """Return what else helps where sites were too slow."""
        return ", or raise federation.deadline_s," if LATE in reasons.values() else ""

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
            "ignored": self._once.ignored(),
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
        answers, missing = self._score(sites, {"part": "gradient"})
        sent = sum(Task("evaluate", number, self._model_for(site, None)).nbytes for site in sites)
        row = conflict_row(number, answers, self.server.layout, sent)
        return [{**row, "dropped": dict(sorted((row["dropped"] | missing).items()))}]

    def _validate(self, number: int, progress: Progress) -> dict[str, Any]:
        answers, missing = self._score(self._seen(), {"part": "validation"})
        # A site without validation windows answers that it has no loss.
        found = {site: reply.meta["loss"] for site, reply in answers.items()}
        losses = {site: float(loss) for site, loss in found.items() if isinstance(loss, int | float) and isfinite(loss)}
        # Without any validation window the last round is the best there is.
        mean = sum(losses.values()) / len(losses) if losses else None
        # Means over other sites do not compare: the fewer are missing the better, and only then the smaller the loss.
        rank = (len(missing), float("inf") if mean is None else mean)
        if rank < (progress.best_missing, progress.best_loss) or (mean is None and not missing):
            (progress.best_missing, progress.best_loss), progress.best_round = rank, number
            self.keep_best(self.server)
        sites = {site: {"loss": loss} for site, loss in losses.items()}
        return {"kind": "validation", "round": number, "sites": sites, "mean": mean, "missing": missing}

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
            When a site cannot score, does not in time, or answers something else than scores.
        """
        replies, missing = self._score(sites, meta, expert)
        if missing:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in missing.items())
            raise SiteError(
                f"{len(missing)} of {len(sites)} sites did not score the model ({reasons})",
                hint="every round is kept: mend those sites, or raise federation.evaluation_deadline_s, and run the same command again",
            )
        return replies

    def _score(self, sites: Sequence[str], meta: Mapping[str, Any], expert: str | None = None) -> tuple[dict[str, Reply], dict[str, str]]:
        """Return the sites' answers, and why others have none, both in the order of ``sites``."""
        tasks = {
            name: Task("evaluate", self.server.round, self._model_for(name, expert), {**meta, **self._counted(name)}) for name in sites
        }
        replies = dict(self._once.ask(tasks, self.spec.federation.scoring_deadline_s))
        missing = {}
        for site in sites:
            try:
                if site in replies:
                    screen_answer(replies[site], meta, site, self.spec)
                else:
                    missing[site] = LATE
            except ScreenError as error:
                missing[site] = error.message
        return {site: replies[site] for site in sites if site not in missing}, missing

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

"""Differential privacy: clipped updates or gradients, Gaussian noise, and an account of what is spent (docs/privacy.md)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedcast.data.windows import Batch, Windows
from fedcast.errors import FederationError, PrivacyBudgetError, ResumeError, ScreenError, SpecError
from fedcast.federated.guards.base import Arrival, Guard, GuardRound, LocalSteps, Outgoing
from fedcast.federated.messages import Reply, Task
from fedcast.federated.privacy import Ledger, Release, accounting
from fedcast.registry import hyper
from fedcast.training.private import Looped, PerSample, add_noise, choose, clip_update, private_gradient, system_generator

if TYPE_CHECKING:
    from fedcast.federated.plan import Plan

_NORM, _ACCOUNTED, _WITHIN = "norm", "accounted", "within"
_RELEASES = "guard.dp.releases"
_ALMOST = 1 - 1e-5
"""An update that was clipped comes out this much shorter than the bound, or less."""
_MORE = 1 + 1e-6
_MOST_STEPS = 10**8
"""Steps of a round that a site may claim: beyond, the account of many rounds takes minutes."""
_VERSIONS = "check that both sides run the same version of fedcast and the same spec"


@dataclass(frozen=True)
class Dp(Guard):
    """Noise that hides a site's part in the model, or a window's.

    ``central`` hides a site from whoever sees the model; the server sees updates. Every update is clipped to C, at its site and again at
    the server, and counts alike; the new weights are the old ones plus ``(sum + N(0, (z C)^2)) / m``. The divisor m is the number of
    sites that were asked, not of those that answered: a site whose update is taken away then moves the result by ``C / m`` at most,
    also where its data decide whether it answers. By the number that answered it could be ``2 C / m``.

    ``local`` hides a site's data from the server too: each site clips its update and adds ``N(0, (z C)^2)`` itself. Any two updates are
    to look alike, and these differ by up to ``2 C``: the noise multiplier that is accounted is ``z / 2``.

    ``sample`` hides a single window of a site from the server, by DP-SGD (Abadi et al., 2016) in every local step: the gradients of single
    windows are clipped to C and summed, ``N(0, (z C)^2)`` is added, and the sum divided by the batch size. A step's windows are drawn by
    Poisson sampling, which is what the account of sampled steps holds for. One time step is in many windows, and a patient in more: neither
    is what is hidden.

    There is no gain from drawing sites at random: who takes part follows from the seed and stands in the log. Instead a site pays for
    the rounds in which it was asked, and no others; what is logged is the epsilon of the site that has paid most.

    Nothing hides what else leaves a site: validation losses and test scores, how many steps it took, mean training losses (unless
    ``losses = false``), and in ``sample`` how many windows it has.
    """

    name: ClassVar[str] = "dp"
    summary: ClassVar[str] = "differential privacy: clipping and noise for sites or windows, with an account, a ledger and a budget"

    level: Literal["central", "local", "sample"] = hyper("central", "where noise is added: by the server, by each site, or in every step")
    norm: Annotated[float, Field(gt=0)] = hyper(1.0, "bound C on the length of an update, or in 'sample' of a window's gradient")
    noise: Annotated[float, Field(gt=0)] = hyper(1.0, "noise multiplier z: standard deviation of the noise over C")
    delta: Annotated[float, Field(gt=0, lt=1)] = hyper(1e-5, "delta of epsilon: well below one over the number of records")
    budget: Annotated[float, Field(ge=0)] = hyper(0.0, "largest epsilon: the run stops before a round that would exceed it; 0: no limit")
    clipping: Literal["fixed", "adaptive"] = hyper("fixed", "adaptive: C follows a quantile of the updates' lengths ('central' alone)")
    quantile: Annotated[float, Field(gt=0, lt=1)] = hyper(0.5, "share of updates within the bound that adaptive clipping aims at")
    rate: Annotated[float, Field(gt=0)] = hyper(0.2, "how fast the adaptive bound follows")
    bit_noise: Annotated[float, Field(ge=0)] = hyper(0.0, "noise on the count of updates within the bound; 0: max(sites / 20, z)")
    per_sample: Literal["auto", "opacus", "micro_batch"] = hyper(
        "auto", "windows' gradients: by opacus where they are right, or one by one"
    )
    accountant: Literal["pld", "rdp"] = hyper(
        "pld", "accountant of sampled steps: privacy loss distributions, or Renyi divergences (looser)"
    )
    noise_source: Literal["auto", "system", "seeded"] = hyper("auto", "auto: from seeds where all sites are simulated, else the system's")
    losses: bool = hyper(True, "whether sites send their training losses, which no noise hides; else 0 is logged")

    @property
    def takes_steps(self) -> bool:
        """Whether every training step is private."""
        return self.level == "sample"

    @property
    def blind(self) -> bool:
        """Whether it goes without reading single replies at the server, such as where sums are secure; sites then clip unwatched."""
        return self.level != "central" or self.clipping == "fixed"

    def check(self, plan: Plan, guards: Sequence[Guard]) -> None:
        """Refuse what would leave a site unprotected beside what is protected, and options that contradict each other."""
        accounting()
        spec, method = plan.spec, plan.method
        if self.noise_source == "seeded" and spec.federation.fleet == "flower":
            raise _seeded()
        if spec.evaluation.samples or spec.evaluation.conflict:
            raise SpecError(
                "the guard 'dp' would protect updates while windows or sketches of gradients leave the sites in the clear",
                hint="set evaluation.samples = 0 and evaluation.conflict = 0",
            )
        sent = sorted({*method.reply_shapes(plan.shape), *plan.answer_shapes})
        if sent:
            raise SpecError(
                f"method {method.name!r} or tuning {plan.tuning.name!r} has sites send {', '.join(sent)} as well, without noise",
                hint="choose a method that sends weights alone, such as fedavg",
            )
        if self.clipping == "adaptive" and self.level != "central":
            raise SpecError("adaptive clipping is for level = 'central'", hint="set clipping = 'fixed' in the guard 'dp'")
        if self.clipping == "adaptive" and self.bit_noise and 2 * self.bit_noise <= self.noise:
            raise SpecError(
                f"bit_noise = {self.bit_noise:g} spends all that noise = {self.noise:g} allows",
                hint=f"set it above {self.noise / 2:g}, or 0",
            )
        if self.level == "sample":
            self._check_steps(plan)
        elif plan.layout.private_size and method.exports() != "never":
            raise SpecError(
                f"method {method.name!r} has sites hand in their private weights, without noise",
                hint="set level = 'sample', or choose a method that keeps nothing private, such as fedavg",
            )
        if self.level == "central":
            self._check_mean(plan, guards)

    def _check_mean(self, plan: Plan, guards: Sequence[Guard]) -> None:
        if plan.spec.federation.weights != "equal":
            raise SpecError(
                "the guard 'dp' adds central noise, which is for sites that weigh alike", hint="set federation.weights = 'equal'"
            )
        if not plan.method.streams:
            raise SpecError(
                f"the server step of method {plan.method.name!r} is no plain mean, for which central noise is made",
                hint="choose fedavg, or level = 'local' or 'sample'",
            )
        for guard in guards:
            if type(guard).mean is not Guard.mean:
                raise SpecError(
                    f"the guard {guard.name!r} takes the place of the mean, for which central noise is made", hint="leave one of them out"
                )

    def _check_steps(self, plan: Plan) -> None:
        method = plan.method
        if not method.splits:
            raise SpecError(
                f"the loss of method {method.name!r} has terms that are not of single windows", hint="choose fedavg, fedprox or fedper"
            )
        if plan.spec.training.compile:
            raise SpecError("gradients of single windows are not for compiled models", hint="leave training.compile out")

    # --- the server ---

    def begin(self, round: GuardRound) -> dict[str, dict[str, Tensor]]:
        """Stop before a round beyond the budget; write to the ledger what sites are about to send; send the adaptive bound.

        Raises
        ------
        PrivacyBudgetError
            When the round would exceed the budget. The model is not changed.
        ResumeError
            When the ledger has lost lines.
        """
        self._source(round.simulated, None)
        ledger = Ledger(round.folder)
        known = int(round.server.tensors.get(_RELEASES, torch.zeros(1)))
        if len(ledger) < known:
            raise ResumeError(
                f"the ledger in {round.folder} has {len(ledger)} releases, and the checkpoint knows of {known}",
                hint="restore the file privacy.jsonl, or start another run in another folder",
            )
        release = Release(round.number, self.level, self._accounted(round), self._records(round, ledger), self._is_seeded(round.simulated))
        spent = ledger.epsilon(self.delta, self.accountant, also=release)
        if self.budget and spent > self.budget:
            before = ledger.epsilon(self.delta, self.accountant)
            raise PrivacyBudgetError(
                f"round {round.number} would spend epsilon {spent:.4g} at delta {self.delta:g}, the budget is {self.budget:g} "
                f"and {before:.4g} is spent{self._largest(release)}",
                hint="final/ holds the model of the rounds done; for more of them start a run with more noise or a larger budget",
            )
        if self.level != "central":
            # A site's noise is drawn at the site: from here on its reply may be under way, whether this process lives to see it or not.
            ledger.add(release)
        round.memory[self.name] = {"ledger": ledger, "release": release}
        if self.level == "sample":
            return {site: {_ACCOUNTED: torch.tensor([rate, steps])} for site, (rate, steps) in release.sites.items()}
        if self.clipping == "adaptive":
            return {site: {_NORM: self._norm(round.server.tensors)} for site in round.selected}
        return {}

    def _largest(self, release: Release) -> str:
        """Say which site claims most of a round: what a site says of its steps can end a run."""
        if self.level != "sample":
            return ""
        site, (rate, steps) = max(release.sites.items(), key=lambda item: (item[1][1] * item[1][0] ** 2, item[0]))
        return f"; site {site} claims the most for it, {steps} steps that take a window with a chance of {rate:.3g}"

    def inspect(self, arrival: Arrival) -> None:
        """Clip an update at the server, where it can be seen."""
        if self.level != "central" or "shared" not in arrival.tensors or "shared" not in arrival.sent:
            return
        before, after = arrival.sent["shared"], arrival.tensors["shared"]
        bound = self._bound(arrival.sent)
        within = arrival.memory.setdefault(self.name, {}).setdefault(_WITHIN, {})
        within[arrival.site] = float(torch.linalg.vector_norm(after.double() - before)) < bound * _ALMOST
        arrival.tensors["shared"] = clip_update(after, before, bound)

    def finish(self, round: GuardRound, before: Tensor) -> None:
        """Put noise on the mean and move the bound; log what is spent."""
        memory = round.memory[self.name]
        ledger: Ledger = memory["ledger"]
        server, log = round.server, {"delta": self.delta, "clip_norm": float(self._norm(round.server.tensors))}
        if self.level == "central":
            seed = np.random.default_rng([round.seed, round.number, zlib.crc32(self.name.encode())])
            rng = self._source(round.simulated, seed)
            asked = len(round.selected)
            total = (server.shared.double() - before.double()) * len(round.taken)
            add_noise(total, self._update_noise(asked) * log["clip_norm"], rng)
            if self.clipping == "adaptive":
                log["within_norm"] = self._follow(round, memory.get(_WITHIN, {}), rng)
            ledger.add(memory["release"])
            server.shared = (before.double() + total / asked).float()
        server.tensors[_RELEASES] = torch.tensor([float(len(ledger))])
        spent = ledger.epsilon(self.delta, self.accountant)
        server.log |= {"epsilon": spent if isfinite(spent) else None, **log}

    def _follow(self, round: GuardRound, within: Mapping[str, bool], rng: np.random.Generator | None) -> float:
        """Move the bound towards the quantile (Andrew et al., NeurIPS 2021, arXiv 1905.03871); return the noised share within it."""
        asked = len(round.selected)
        # Less one half, a site's bit moves the sum by one half at most; a site that is not there is neither within nor beyond.
        count = torch.tensor([sum(within[site] - 0.5 for site in round.taken if site in within)], dtype=torch.float64)
        add_noise(count, self._bit_noise(asked), rng)
        share = min(1.0, max(0.0, 0.5 + float(count) / asked))
        moved = self._norm(round.server.tensors) * math.exp(-self.rate * (share - self.quantile))
        round.server.tensors[f"guard.{self.name}.{_NORM}"] = moved.clamp(1e-30, 1e30)
        return share

    def _bit_noise(self, asked: int) -> float:
        return self.bit_noise or max(asked / 20, self.noise)

    def _update_noise(self, asked: int) -> float:
        """Return the multiplier for updates: with that of the bits, which move by one half, the two together are ``noise``."""
        if self.clipping == "fixed":
            return self.noise
        return float((self.noise**-2 - (2 * self._bit_noise(asked)) ** -2) ** -0.5)

    def _accounted(self, round: GuardRound) -> float:
        return self.noise / 2 if self.level == "local" else self.noise

    def _records(self, round: GuardRound, ledger: Ledger) -> dict[str, tuple[float, int]]:
        """Return rate and steps of each site's records in this round."""
        if self.level != "sample":
            return dict.fromkeys(round.selected, (1.0, 1))
        known = ledger.latest()
        task = Task("guard", round.number, {}, {"guard": self.name})
        replies = round.exchange({site: task for site in round.selected if site not in known})
        told = {site: _sampling(reply.meta) for site, reply in replies.items() if reply.error is None}
        # Who does not say how windows are drawn has no account, and then sends nothing: see `encode`.
        # Nor does who claims other steps than the spec says: they would be spent of everybody's budget.
        fits = {site: sampling for site, sampling in told.items() if sampling and sampling[1] == round.steps.get(site, sampling[1])}
        every = {**known, **fits}
        return {site: every[site] for site in round.selected if site in every}

    # --- the site ---

    def answer(self, task: Task, site: str, memory: dict[str, Any]) -> Reply:
        """Say how a site draws the windows of its steps: the largest chance of a window, and how many steps a round has."""
        return Reply(meta={"rate": memory["rate"], "steps": memory["steps"]})

    def draw(self, steps: LocalSteps) -> Windows:
        """Draw the windows of a step by Poisson sampling, from a generator that nobody else can repeat unless all is simulated."""
        rng = self._source(steps.simulated, steps.rng)
        return steps.sampler.poisson(steps.size, steps.memory.setdefault("draws", system_generator()) if rng is None else rng)

    def backward(self, steps: LocalSteps, batch: Batch) -> Tensor:
        """Compute the noised sum of clipped gradients; before the first one, see how gradients of single windows are to be had.

        Raises
        ------
        ModelError
            When ``per_sample = "opacus"`` and its gradients are wrong for this model.
        """
        source: PerSample | None = steps.scratch.get("source")
        if source is None and len(batch.windows):
            named = steps.model.config.architecture
            source = steps.scratch["source"] = choose(self.per_sample, steps.model, steps.parameters, steps.loss, batch, named)
        return private_gradient(
            source or Looped(steps.parameters, steps.loss),
            batch,
            steps.parameters,
            norm=self.norm,
            noise=self.noise,
            size=steps.size,
            rng=self._source(steps.simulated, steps.rng),
        )

    def encode(self, outgoing: Outgoing) -> None:
        """Clip an update, and under ``local`` put noise on it; withhold losses where they are not to be sent."""
        if not self.losses:
            outgoing.meta |= {"loss": 0.0, "metrics": {}}
        if self.level == "sample":
            self._check_account(outgoing)
            return
        if "shared" not in outgoing.tensors:
            return
        before = outgoing.received["shared"]
        update = clip_update(outgoing.tensors["shared"], before, self._bound(outgoing.received))
        if self.level == "local":
            noised = update.double()
            add_noise(noised, self.noise * self.norm, self._source(outgoing.simulated, outgoing.rng))
            update = noised.float()
        outgoing.tensors["shared"] = update

    def _check_account(self, outgoing: Outgoing) -> None:
        """Let nothing leave a site whose steps the server does not account for as they were."""
        accounted = outgoing.received.get(f"guard.{self.name}.{_ACCOUNTED}")
        rate, steps = outgoing.memory["rate"], outgoing.memory["steps"]
        if accounted is None or accounted.shape != (2,) or float(accounted[0]) * _MORE < rate or int(accounted[1]) != steps:
            raise FederationError(f"the steps of site {outgoing.site} are not accounted for", hint=_VERSIONS)

    def _norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the bound of this round, float32 ``[1]``."""
        return tensors.get(f"guard.{self.name}.{_NORM}", torch.tensor([self.norm]))

    def _bound(self, tensors: Mapping[str, Tensor]) -> float:
        """Return the bound of this round, out of a task."""
        norm = self._norm(tensors)
        if norm.shape != (1,) or norm.dtype != torch.float32 or not 0 < float(norm) < math.inf:
            raise ScreenError("the bound on updates is no positive number", hint=_VERSIONS)
        return float(norm) if self.clipping == "adaptive" else self.norm

    # --- noise ---

    def _is_seeded(self, simulated: bool) -> bool:
        return simulated and self.noise_source != "system"

    def _source(self, simulated: bool, rng: np.random.Generator | None) -> np.random.Generator | None:
        """Return the generator of noise; ``None`` for the operating system's.

        Raises
        ------
        SpecError
            When noise is to come from the run's seed, which every site knows, and sites are not simulated.
        """
        if self.noise_source == "seeded" and not simulated:
            raise _seeded()
        return rng if self._is_seeded(simulated) else None


def _seeded() -> SpecError:
    return SpecError(
        "noise that is drawn from the run's seed hides nothing from who knows the seed, as every site does",
        hint="set noise_source = 'auto' in the guard 'dp'",
    )


def _sampling(meta: Mapping[str, Any]) -> tuple[float, int] | None:
    """Return a site's rate and steps out of its answer, or ``None`` where it says something else."""
    rate, steps = meta.get("rate"), meta.get("steps")
    fits = isinstance(rate, float) and 0 < rate <= 1 and type(steps) is int and 0 <= steps <= _MOST_STEPS
    return (float(rate), int(steps)) if fits and rate is not None and steps is not None else None

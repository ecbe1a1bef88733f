"""The contract of a guard: a step around any method, at the sites, at the server, or at both.

A guard is one file: a frozen dataclass of its options and the hooks it needs; every hook does nothing by default. The guards of a run
are a list in its spec. On its way out a reply passes ``encode`` of each in the order of the list; at the server it passes ``decode`` in
reverse order, then the screen of every run, then ``inspect`` in the order of the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcast.data.windows import Batch, Windows, WindowSampler
from fedcast.errors import ScreenError, SpecError
from fedcast.federated.messages import Reply, Task
from fedcast.methods.base import Mean, Server
from fedcast.models.contract import Model
from fedcast.registry import build, register
from fedcast.spec import GuardSpec
from fedcast.training.flat import FlatParameters

if TYPE_CHECKING:
    from fedcast.federated.plan import Plan

GUARDS: dict[str, type[Guard]] = {}
Declared = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Names of a reply's tensors, each with its shape and type."""


@dataclass
class Outgoing:
    """A training reply that is about to leave its site.

    Attributes
    ----------
    site
        The site's own name.
    round
        The round, from 1.
    tensors
        What will travel, on the CPU; changed in place.
    received
        What the site began from, on the CPU; ``"shared"`` are the shared weights before its steps, ``"guard.<name>.x"`` what the
        guard's server side sent along.
    samples
        What the site weighs in means.
    meta
        JSON values that travel with it; a guard may add some under its own name.
    state
        The guard's tensors at this site that outlive the task.
    memory
        What the guard keeps at this site while the process lives.
    rng
        Seeded by run, site, round and guard.
    simulated
        Whether all sites are on one machine, where noise is drawn from seeds so that runs can be repeated.
    """

    site: str
    round: int
    tensors: dict[str, Tensor]
    received: Mapping[str, Tensor]
    samples: int
    meta: dict[str, Any]
    state: dict[str, Tensor]
    memory: dict[str, Any]
    rng: np.random.Generator
    simulated: bool


@dataclass
class LocalSteps:
    """The training steps of one task at a site, for a guard that takes them itself (:attr:`Guard.takes_steps`).

    Attributes
    ----------
    model
        The model in its compute precision.
    parameters
        Flat weights and gradients.
    loss
        Scalar loss of a batch.
    sampler
        The site's training windows.
    size
        Windows a step.
    rng
        Seeded by run, site, round and guard.
    memory
        What the guard keeps at this site while the process lives.
    simulated
        Whether all sites are on one machine.
    scratch
        What the guard keeps for this task.
    """

    model: Model
    parameters: FlatParameters
    loss: Callable[[Batch], Tensor]
    sampler: WindowSampler
    size: int
    rng: np.random.Generator
    memory: dict[str, Any]
    simulated: bool
    scratch: dict[str, Any] = field(default_factory=dict)


@dataclass
class Arrival:
    """A training reply that reached the server.

    Attributes
    ----------
    site
        Who sent it.
    tensors
        What it holds; changed in place.
    meta
        Its JSON values; nothing in them is checked before ``inspect``.
    sent
        What the site had been sent.
    samples
        What the site may weigh at most.
    initial
        The model's weights before any training, float32 ``[size]``, shared ones first.
    memory
        What guards keep at the server in this round: :attr:`GuardRound.memory`.
    """

    site: str
    tensors: dict[str, Tensor]
    meta: Mapping[str, Any]
    sent: Mapping[str, Tensor]
    samples: int
    initial: Tensor = field(default_factory=lambda: torch.zeros(0))
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass
class GuardRound:
    """What a guard sees of a round at the server.

    Attributes
    ----------
    number, rounds
        The round, from 1, and how many there are.
    selected
        The sites that were asked, sorted.
    samples
        What each of them may weigh at most.
    server
        The server's state. A guard keeps tensors of its own in ``server.tensors`` under ``guard.<name>.``: they are checkpointed.
    seed
        The run's.
    folder
        The run folder.
    simulated
        Whether all sites are on one machine.
    exchange
        Sends one task a site and returns the replies that came before the deadline, by site.
    taken
        The sites whose replies are part of the round, sorted; known from the aggregation on.
    run
        The run's fingerprint.
    steps
        Local steps of each site, where the spec says how many; empty where they follow from a site's data (``local_epochs``).
    memory
        What guards keep at the server from one hook of this round to the next, by name.
    """

    number: int
    rounds: int
    selected: Sequence[str]
    samples: Mapping[str, int]
    server: Server
    seed: int
    folder: Path
    simulated: bool
    exchange: Callable[[Mapping[str, Task]], dict[str, Reply]]
    taken: Sequence[str] = ()
    run: str = ""
    steps: Mapping[str, int] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


class Accumulator(Protocol):
    """Takes the model's vectors of one reply after another and gives their weighted means."""

    def add(self, site: str, vectors: Mapping[str, Tensor], weight: float) -> None:
        """Add the vectors of a site; :class:`~fedcast.errors.ScreenError` where they cannot be, and nothing is added then."""
        ...

    def means(self) -> dict[str, Tensor]:
        """Return the means, float32, by name."""
        ...


@dataclass(frozen=True)
class Guard:
    """Base of all guards; subclass it in a file of its own and it is registered under ``name``.

    Class attributes
    ----------------
    name
        The name in a spec.
    summary
        One line for ``fedcast guards``.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass; a duplicate or empty name is refused."""
        super().__init_subclass__(**kwargs)
        register("guard", cls, cls.name, GUARDS)

    def check(self, plan: Plan, guards: Sequence[Guard]) -> None:
        """Refuse by :class:`~fedcast.errors.SpecError` what does not go together, before data are read; ``guards`` is the whole list."""

    def check_sites(self, plan: Plan, sites: Sequence[str]) -> None:
        """Refuse by :class:`~fedcast.errors.SpecError` a run whose training sites, by name, are too few or not the right ones."""

    @property
    def takes_steps(self) -> bool:
        """Whether it draws the windows of a site's training steps and computes their gradients itself."""
        return False

    def draw(self, steps: LocalSteps) -> Windows:
        """Return the windows of one training step, where :attr:`takes_steps` is True."""
        return steps.sampler.draw(steps.size, steps.rng)

    def backward(self, steps: LocalSteps, batch: Batch) -> Tensor:
        """Compute the gradient of one training step into ``steps.parameters``, where :attr:`takes_steps` is True; return the loss."""
        loss = steps.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def encode(self, outgoing: Outgoing) -> None:
        """Change a reply at its site before it leaves."""

    def declare(self, shapes: Declared) -> Declared:
        """Return what a reply holds after ``encode``, from what it held before."""
        return shapes

    def begin(self, round: GuardRound) -> dict[str, dict[str, Tensor]]:
        """Prepare a round at the server; return tensors to send with the task, by site.

        Such a tensor ``x`` reaches the site as ``guard.<name>.x``, beside what the method sends.
        """
        return {}

    def pack(self, tasks: Mapping[str, Task]) -> Mapping[str, Task]:
        """Change what travels to the sites in a round, by site; ``decode`` and ``inspect`` still see what it stands for as ``sent``."""
        return tasks

    def unpack(self, tensors: dict[str, Tensor]) -> None:
        """Undo ``pack`` at a site, in place; :class:`~fedcast.errors.ScreenError` refuses the task."""

    def decode(self, arrival: Arrival) -> None:
        """Undo ``encode`` at the server; :class:`~fedcast.errors.ScreenError` drops the reply."""

    def inspect(self, arrival: Arrival) -> None:
        """Judge or change a screened reply at the server; :class:`~fedcast.errors.ScreenError` drops it."""

    def accumulator(self, round: GuardRound, sizes: Mapping[str, int]) -> Accumulator | None:
        """Return what adds up the replies of this round in place of the streaming mean."""
        return None

    def mean(self, round: GuardRound) -> Mean | None:
        """Return the rule that takes the place of the weighted mean in this round."""
        return None

    def finish(self, round: GuardRound, before: Tensor) -> None:
        """Change the server's state after the round was aggregated; ``before`` are the shared weights before it."""

    def answer(self, task: Task, site: str, memory: dict[str, Any]) -> Reply:
        """Answer at a site what this guard's server side asks by a task of kind ``"guard"``."""
        return Reply(error=f"the guard {self.name} asks nothing of sites")


@dataclass(frozen=True)
class Guards:
    """The guards of a run, in the order of its spec."""

    guards: tuple[Guard, ...] = field(default=())

    def __iter__(self) -> Iterator[Guard]:
        """Iterate over them."""
        return iter(self.guards)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.guards)

    @classmethod
    def of(cls, specs: Sequence[GuardSpec]) -> Guards:
        """Return the guards a spec lists, their options checked; see :func:`fedcast.registry.build`.

        Raises
        ------
        SpecError
            When a guard is listed twice: its state would be one.
        """
        names = [spec.name for spec in specs]
        for name in names:
            if names.count(name) > 1:
                raise SpecError(f"the guard {name!r} is listed twice", hint="list every guard once")
        return cls(tuple(build("guard", spec.name, spec.options, GUARDS, help=f"see `fedcast guards {spec.name}`") for spec in specs))

    def named(self, name: object) -> Guard:
        """Return the guard of that name; :class:`~fedcast.errors.ScreenError` where the run has none."""
        for guard in self.guards:
            if guard.name == name:
                return guard
        raise ScreenError("the task is for a guard that this run has not", hint="check that both sides run the same spec")

    def overriding(self, hook: str) -> tuple[Guard, ...]:
        """Return the guards that have a hook of that name of their own."""
        return tuple(guard for guard in self.guards if getattr(type(guard), hook) is not getattr(Guard, hook))

    @property
    def stepping(self) -> Guard | None:
        """The guard that takes the training steps itself, if there is one."""
        return next((guard for guard in self.guards if guard.takes_steps), None)

    def unpack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a round's task holds after every guard's ``unpack``, in reverse order."""
        unpacked = dict(tensors)
        for guard in reversed(self.guards):
            guard.unpack(unpacked)
        return unpacked

    def rule(self, round: GuardRound) -> Mean | None:
        """Return the rule that takes the place of the weighted mean in this round, if there is one."""
        rules = (guard.mean(round) for guard in self.guards)
        return next((rule for rule in rules if rule is not None), None)

    def check(self, plan: Plan) -> None:
        """Refuse what does not go together, before data are read.

        Raises
        ------
        SpecError
            Naming the guards, or the guard and what it does not go with.
        """
        sums = {guard.name for hook in ("mean", "accumulator") for guard in self.overriding(hook)}
        for rivals in (sorted(sums), sorted(guard.name for guard in self if guard.takes_steps)):
            if len(rivals) > 1:
                raise SpecError(f"the guards {' and '.join(rivals)} would take each other's place", hint="list one of them")
        keeps_private = plan.method.unseen() != "shadow" and plan.method.exports() != "never" and plan.layout.private_size > 0
        for guard in self.overriding("accumulator"):
            if not plan.method.streams or keeps_private:
                raise SpecError(
                    f"the guard {guard.name!r} adds replies up unseen, and method {plan.method.name!r} needs each site's own",
                    hint="choose a method that takes means alone, such as fedavg",
                )
        for guard in self.guards:
            guard.check(plan, self.guards)


def prefix_of(guard: Guard) -> str:
    """Return what the names of a guard's tensors begin with, in tasks, in a site's state and in the server's."""
    return f"guard.{guard.name}."

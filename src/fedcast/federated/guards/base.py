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

from fedcast.data.windows import Batch
from fedcast.federated.messages import Reply, Task
from fedcast.methods.base import Mean, Server
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
        What the site began from, on the CPU; ``"shared"`` are the shared weights before its steps.
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
    """

    site: str
    tensors: dict[str, Tensor]
    meta: Mapping[str, Any]
    sent: Mapping[str, Tensor]
    samples: int


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

    def backward(
        self, loss: Callable[[Batch], Tensor], batch: Batch, parameters: FlatParameters, rng: np.random.Generator
    ) -> Tensor | None:
        """Compute the gradient of a training step into ``parameters`` and return the loss; ``None`` leaves it to the training loop."""
        return None

    def encode(self, outgoing: Outgoing) -> None:
        """Change a reply at its site before it leaves."""

    def declare(self, shapes: Declared) -> Declared:
        """Return what a reply holds after ``encode``, from what it held before."""
        return shapes

    def begin(self, round: GuardRound) -> dict[str, dict[str, Tensor]]:
        """Prepare a round at the server; return tensors to send with the task, by site."""
        return {}

    def decode(self, arrival: Arrival) -> None:
        """Undo ``encode`` at the server; :class:`~fedcast.errors.ScreenError` drops the reply."""

    def inspect(self, arrival: Arrival) -> None:
        """Judge or change a screened reply at the server; :class:`~fedcast.errors.ScreenError` drops it."""

    def accumulator(self, round: GuardRound, sizes: Mapping[str, int]) -> Accumulator | None:
        """Return what adds up the replies of this round in place of the streaming mean."""
        return None

    def mean(self, server: Server) -> Mean | None:
        """Return the rule that takes the place of the weighted mean."""
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
        """Return the guards a spec lists, their options checked; see :func:`fedcast.registry.build`."""
        return cls(tuple(build("guard", spec.name, spec.options, GUARDS, help=f"see `fedcast guards {spec.name}`") for spec in specs))

"""The contract of a federated method, and the registry that finds every method.

A method is one file: a frozen dataclass of its hyper-parameters and the hooks it needs. Every hook has FedAvg's behaviour by
default, so FedAvg itself is an empty class. ``docs/adding-a-method.md`` has a complete example of forty lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedcast.data.windows import Batch, WindowSampler
from fedcast.errors import SpecError
from fedcast.models.base import ModelConfig, Output
from fedcast.models.contract import Encoding, Model, ModelShape
from fedcast.models.patch import ARCHITECTURES
from fedcast.registry import build, register
from fedcast.registry import hyper as hyper
from fedcast.spec import MethodSpec, ModelSpec
from fedcast.tasks.objectives import Objective
from fedcast.training.aggregate import Vectors, weighted_mean
from fedcast.training.flat import FlatParameters, Layout

METHODS: dict[str, type[Method]] = {}
T = TypeVar("T")
Mean = Callable[[str, Sequence[Tensor], Sequence[float], Sequence[str]], Tensor]
"""Brings the vectors of several sites together: name of the tensor, vectors, weights, sites -> one vector."""
Unseen = Literal["shadow", "mixture", "each"]
MODEL_PARTS = ("shared", "private")
"""The tensors of a reply that hold the model's weights; the method's own stand beside them."""


@dataclass
class Client:
    """What a method sees of a site while the site works on a task.

    Attributes
    ----------
    site
        The site's own name.
    round, rounds
        This round (from 1) and how many there are.
    model
        The model in its compute precision; its parameters are views into ``parameters``.
    extra
        The method's own modules (:meth:`Method.modules`), trained beside the model and never sent.
    parameters
        Flat weights and gradients of model and extra modules.
    received
        Tensors the server sent, such as ``"shared"`` (the shared weights) and the method's own.
    sampler
        The site's training windows.
    state
        The method's tensors that outlive the task; they stay at the site.
    rng
        Seeded by run, site and round.
    exporting
        Whether the server asked for the private part of the model, to serve domains that no site has seen.
    adapting
        Whether the federation is over and the site adapts the model to itself; ``received["shared"]`` is then where that began.
    """

    site: str
    round: int
    rounds: int
    model: Model
    extra: nn.ModuleDict
    task: Objective
    parameters: FlatParameters
    received: Mapping[str, Tensor]
    sampler: WindowSampler
    state: dict[str, Tensor]
    rng: np.random.Generator
    exporting: bool = False
    adapting: bool = False
    scratch: dict[str, Any] = field(default_factory=dict)
    _memory: dict[str, Any] = field(default_factory=dict)
    _records: dict[str, list[Tensor | float]] = field(default_factory=dict)

    def task_loss(self, batch: Batch) -> tuple[Tensor, Output | Encoding]:
        """Return the task's loss (a scalar) and the model's output for a batch; published models give their features alone."""
        return self.task.step(self.model, batch, self.generator)

    def generator(self) -> torch.Generator:
        """Return a generator for this task's tensors, on the CPU, seeded from ``rng`` when it is first asked for."""
        if "generator" not in self.scratch:
            self.scratch["generator"] = torch.Generator().manual_seed(int(self.rng.integers(2**62)))
        generator: torch.Generator = self.scratch["generator"]
        return generator

    def record(self, name: str, value: Tensor | float) -> None:
        """Note a scalar of this step; its mean over the steps goes into the round's row."""
        self._records.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def records(self) -> dict[str, float]:
        """Return the mean of every recorded scalar."""
        return {name: float(sum(float(v) for v in values) / len(values)) for name, values in self._records.items()}

    def memo(self, name: str, make: Callable[[], T]) -> T:
        """Return a value made once a site and kept while the process lives; it must depend on nothing but the site's data and spec."""
        if name not in self._memory:
            self._memory[name] = make()
        value: T = self._memory[name]
        return value


@dataclass(frozen=True)
class Update:
    """A screened reply, as a method's server step sees it.

    Attributes
    ----------
    site
        Who sent it.
    tensors
        ``"shared"`` (float32 ``[shared_size]``), on exporting rounds ``"private"`` (float32 ``[private_size]``), and the method's own.
    samples
        Training points at the site.
    """

    site: str
    tensors: Mapping[str, Tensor]
    samples: int


@dataclass
class Server:
    """The server's state, checkpointed every round.

    Attributes
    ----------
    layout
        Layout of the model's parameters.
    shared
        Shared weights, float32 ``[shared_size]``.
    private
        Weights of the private part for domains that no site has seen (the shadow decoder), float32 ``[private_size]``; empty
        until a round exports one.
    tensors
        The method's own tensors.
    own
        Shared weights of a site's own, float32 ``[shared_size]``, where the method makes some for each; the other sites have ``shared``.
    experts
        Private weights of each site as it last exported them, float32 ``[private_size]``, where :meth:`Method.unseen` wants them.
    round, rounds
        The round just being aggregated (from 1) and how many there are.
    sites
        How many sites train, whether they are selected this round or not.
    log
        JSON values for the round's row.
    config
        Shape of the model, for a method that trains at the server; a run sets it.
    parts
        Name of each parameter in the layout with its part of the model in front (:meth:`fedcast.models.contract.Model.part`).
    rule
        What takes the place of the weighted mean; a guard may set one.
    """

    layout: Layout
    shared: Tensor
    private: Tensor
    tensors: dict[str, Tensor]
    round: int
    rounds: int
    sites: int = 1
    own: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)
    config: ModelConfig | None = None
    parts: dict[str, str] = field(default_factory=dict)
    rule: Mean | None = None

    def mean(self, name: str, updates: Sequence[Update], weights: Sequence[float]) -> Tensor:
        """Return the mean of a tensor of the updates, flattened: the weighted one, or what the run's robust rule takes for it."""
        vectors = [update.tensors[name].flatten() for update in updates]
        if self.rule is None:
            return weighted_mean(Vectors(vectors), weights)
        return self.rule(name, vectors, weights, [update.site for update in updates])

    def shared_of(self, site: str) -> Tensor:
        """Return the shared weights that a site has after the round, ``[shared_size]``."""
        return self.own.get(site, self.shared)

    def settle(self, means: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Take over the round's means, ``"shared"`` and on exporting rounds ``"private"``, and log each site's share of the weight."""
        self.shared = means["shared"]
        self.private = means.get("private", self.private)
        mass = math.fsum(weights.values())
        self.log["weights"] = {site: weight / mass for site, weight in weights.items()}


@dataclass(frozen=True)
class Method:
    """Base of all methods; subclass it in a file of its own and it is registered under ``name``.

    Class attributes
    ----------------
    name
        The name in a spec.
    summary
        One line for ``fedcast methods``.
    pooled
        True for centralised controls: one client holds all domains.
    balance
        How a client draws windows: over all windows, or first over its data sets or domains.
    architecture
        The model it trains; see :mod:`fedcast.models.architectures`.
    reorders
        Whether shared weights come back in another order than they were sent in; a site then forgets their moments.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    pooled: ClassVar[bool] = False
    balance: ClassVar[Literal["none", "dataset", "domain"]] = "dataset"
    architecture: ClassVar[str] = "patch"
    reorders: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass; a duplicate or empty name is refused."""
        super().__init_subclass__(**kwargs)
        register("method", cls, cls.name, METHODS)

    def check(self, sites: Sequence[str]) -> None:
        """Refuse a run over sites of these names, by :class:`~fedcast.errors.SpecError`, where an option does not fit them."""

    def model_config(self, model: ModelSpec) -> ModelConfig:
        """Return the configuration of the model it trains, from a spec's ``[model]`` section.

        A method whose paper has no model of its own trains the patch transformer, or the causal one where the objective is masked
        reconstruction.

        Raises
        ------
        SpecError
            When the objective is reconstruction and the method's own model reconstructs nothing.
        """
        own = "causal" if self.architecture == "patch" and model.objective == "reconstruct" else self.architecture
        if model.objective == "reconstruct" and not hasattr(ARCHITECTURES[own], "fill"):
            raise SpecError(f"the model of method {self.name!r} reconstructs nothing", hint="leave model.objective at 'forecast'")
        return replace(ModelConfig.of(model), architecture=own)

    def federated_rounds(self, rounds: int) -> int:
        """Return how many of the spec's rounds are run: all, but for controls that train nothing."""
        return rounds

    def adaptation(self, rounds: int) -> int:
        """Return how many of the rounds, at the end, each site trains alone from the federation's model; nothing travels in them.

        The site is then scored with weights of its own; domains that no site has seen keep the federation's model.
        """
        return 0

    def unseen(self) -> Unseen:
        """Return which model forecasts a domain that no site has seen.

        ``"shadow"``: the shared weights with the mean of the sites' private ones, where there are any; ``"mixture"``: the sites'
        models, mixed window by window (:class:`fedcast.models.mixture.DomainMixture`); ``"each"``: each site's model in turn, their
        scores averaged.
        """
        return "shadow"

    def exports(self) -> Literal["scored", "last", "never"]:
        """Return after which rounds sites hand in their private weights for domains that no site has seen.

        All scored ones; the last alone, before which the method has no model for unseen domains, so that its run keeps no best one;
        or never, where :meth:`aggregate` sets ``server.private`` from other tensors.
        """
        return "last" if self.unseen() == "each" else "scored"

    def shares(self, name: str) -> bool:
        """Return whether the parameter of that name travels; the others never leave their site."""
        return True

    def modules(self, shape: ModelShape, sampler: WindowSampler) -> dict[str, nn.Module]:
        """Return modules that are trained beside the model at this site and never sent."""
        return {}

    def local_loss(self, client: Client, batch: Batch) -> Tensor:
        """Return the loss of a batch: the task's, plus the method's terms."""
        loss, _ = client.task_loss(batch)
        return loss

    def correction(self, client: Client) -> Tensor | None:
        """Return what is added to the gradient of this step, float32 ``[size]``, before it is clipped; ``None``: nothing."""
        return None

    def reply(self, client: Client) -> dict[str, Tensor]:
        """Return further tensors to send beside the shared weights; declared by :meth:`reply_shapes`."""
        return {}

    def reply_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the further tensors of a reply: what the screen lets pass."""
        return {}

    def message_shapes(self, shape: ModelShape) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the tensors a message may hold beside the shared weights: what a site lets pass."""
        return {}

    def message(self, server: Server, site: str) -> dict[str, Tensor]:
        """Return the tensors sent to a site at the start of a round."""
        return {"shared": server.shared_of(site)}

    def aggregate(self, server: Server, updates: Sequence[Update]) -> None:
        """Combine the updates (in the order of the sites' names) into the server's state.

        A method that keeps this default needs no update as a whole, so the round loop averages them as they arrive
        (:attr:`streams`). A method with its own gets all of them at once.
        """
        self.combine(server, updates, [float(update.samples) for update in updates])

    def combine(self, server: Server, updates: Sequence[Update], weights: Sequence[float]) -> None:
        """Set the shared weights, and on exporting rounds the shadow of the private part, to weighted means; log the weights."""
        names = [name for name in MODEL_PARTS if all(name in update.tensors for update in updates)]
        means = {name: server.mean(name, updates, weights) for name in names}
        server.settle(means, {update.site: weight for update, weight in zip(updates, weights, strict=True)})

    @property
    def averages(self) -> bool:
        """Whether all that the server takes over from replies is means by :meth:`Server.mean`, in whose place a robust rule may stand."""
        return True

    @property
    def streams(self) -> bool:
        """Whether the server may average replies as they arrive, weighted by training points, and keep none of them."""
        cls = type(self)
        return cls.aggregate is Method.aggregate and cls.combine is Method.combine

    @property
    def splits(self) -> bool:
        """Whether the loss of a batch is the task's alone, so that several ranks may share one (:mod:`fedcast.training.ranks`)."""
        return type(self).local_loss is Method.local_loss


def build_method(spec: MethodSpec) -> Method:
    """Return the method a spec names, its hyper-parameters checked; see :func:`fedcast.registry.build`."""
    return build("method", spec.name, spec.options, METHODS, help=f"see `fedcast methods {spec.name}`")


def empty() -> Tensor:
    """Return an empty float32 vector."""
    return torch.zeros(0)

"""What a run trains: its model, as a tuning prepares it and as a method divides it into what travels and what stays."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

import fedcast.tuning  # noqa: F401 - registers the tunings
from fedcast.errors import SpecError
from fedcast.federated.guards import Guards
from fedcast.methods.base import Method
from fedcast.models.architectures import build_model
from fedcast.models.base import ModelConfig
from fedcast.models.checkpoints import load_checkpoint, locate
from fedcast.models.contract import Model, ModelShape
from fedcast.models.mixture import DomainMixture
from fedcast.models.patch import ARCHITECTURES, PatchTransformer
from fedcast.models.seeding import seeded
from fedcast.spec import RunSpec, TrainingSpec
from fedcast.training.flat import Layout
from fedcast.tuning.base import Tuning, build_tuning

Shapes = dict[str, tuple[int, ...]]
_TUNING_STREAM = 1
TUNING = "tuning."
"""What a tuning sends stands under this prefix in messages, replies and the server's tensors."""


class _Facts(NamedTuple):
    """What is read off the model once."""

    layout: Layout
    initial: Tensor
    shape: ModelShape
    parameters: int
    state: Shapes
    answer: Shapes
    native: bool
    parts: dict[str, str]
    config: ModelConfig | None
    size: str


class Plan:
    """A run's model in the making: the same at the server and at every site.

    Parameters
    ----------
    spec, method
        The run.
    """

    def __init__(self, spec: RunSpec, method: Method) -> None:
        self.spec, self.method = spec, method
        self.tuning: Tuning = build_tuning(spec.tuning)
        self.guards = Guards.of(spec.guards)

    def build(self) -> Model:
        """Return the model before any training, tuned; parameters that do not require a gradient are frozen.

        Raises
        ------
        SpecError
            When method, tuning and checkpoint do not go together.
        CheckpointError, MissingExtraError
            When the checkpoint cannot be read.
        """
        # A seed of the tuning's own: with the run's, what it draws anew could be what the checkpoint began with.
        seed = int(np.random.SeedSequence([self.spec.seed, _TUNING_STREAM]).generate_state(1)[0]) % 2**31
        if self.federated_rounds:
            self.tuning.check(self.federated_rounds)
        with seeded(seed):
            model = self.tuning.prepare(self.start(), seed)
        self._check_serving(model)
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        if frozen and model.config.architecture in ARCHITECTURES and model.config.architecture != "patch":
            raise SpecError(
                f"method {self.method.name!r} needs all weights of its model, of which tuning {self.tuning.name!r} trains some",
                hint="set tuning.name = 'full', or choose a method that fits any model, such as fedavg",
            )
        if self.spec.training.compile and not (isinstance(model, PatchTransformer) and self.tuning.name in ("full", "sff")):
            raise SpecError("training.compile is for native models all of whose weights train", hint="leave training.compile out")
        most, asked = model.config.horizon, self.spec.model.horizon
        if asked > most:
            raise SpecError(
                f"{self.spec.model.checkpoint or 'the model'} forecasts {most} steps a pass and cannot be trained on {asked}",
                hint=f"set model.horizon to at most {most}, or for a new head tuning.horizon; evaluation.horizons may be longer",
            )
        return model

    @cached_property
    def folder(self) -> Path:
        """Where the checkpoint lies; one of the hub is looked up once, so that all read the same."""
        return locate(self.spec.model.checkpoint or "")

    def start(self) -> Model:
        """Return the model that is tuned: drawn from the seed, or the spec's checkpoint."""
        spec, method = self.spec, self.method
        if spec.model.checkpoint is None:
            return build_model(method.model_config(spec.model), spec.seed)
        model = load_checkpoint(self.folder)
        if isinstance(model, DomainMixture):
            raise SpecError(
                f"{spec.model.checkpoint} is a mixture of models, which is not fine-tuned as one",
                hint="give the model of one site, such as <run>/sites/<site>/model",
            )
        self._check_method(model)
        return model

    def _check_method(self, model: Model) -> None:
        method, spec = self.method, self.spec
        own = method.model_config(spec.model).architecture
        found = model.config.architecture
        if isinstance(model, PatchTransformer):
            if found != own:
                raise SpecError(
                    f"method {method.name!r} trains the architecture {own!r}, and {spec.model.checkpoint} is {found!r}",
                    hint="give a checkpoint of that architecture, or another method",
                )
            if own != "patch" and (spec.model.context, spec.model.horizon) != (model.config.context, model.config.horizon):
                raise SpecError(
                    f"method {method.name!r} trains on windows of its model's own lengths, which is {spec.model.checkpoint}",
                    hint=f"set model.context = {model.config.context} and model.horizon = {model.config.horizon}",
                )
        elif spec.model.objective == "reconstruct":
            raise SpecError(f"a published model ({found}) is not trained to reconstruct", hint="leave model.objective at 'forecast'")
        elif own != "patch":
            raise SpecError(
                f"method {method.name!r} trains a model of its own, not a published one ({found})",
                hint="choose a method that fits any model, such as fedavg",
            )

    def _check_serving(self, model: Model) -> None:
        whole = all(parameter.requires_grad for parameter in model.parameters())
        if self.method.unseen() != "mixture" or (isinstance(model, PatchTransformer) and whole and not self.tuning.rewires):
            return
        if all(self.shares(model, name) for name, parameter in model.named_parameters() if parameter.requires_grad):
            return
        raise SpecError(
            f"method {self.method.name!r} serves unseen domains by a mixture of native models all of whose weights train",
            hint="set method.serving = 'shadow'",
        )

    @property
    def federated_rounds(self) -> int:
        """Rounds in which weights travel."""
        rounds = self.method.federated_rounds(self.spec.federation.rounds)
        return rounds - self.method.adaptation(rounds)

    def shares(self, model: Model, name: str) -> bool:
        """Return whether a parameter of the model travels."""
        return self.method.shares(model.part(name))

    @property
    def training(self) -> TrainingSpec:
        """The spec's training section; published models compute in float32 unless the spec says otherwise."""
        training = self.spec.training
        if self._facts.native or training.precision != "auto":
            return training
        return training.model_copy(update={"precision": "float32"})

    def computing_with(self, training: TrainingSpec) -> Plan:
        """Return the plan with what a machine computes with, and where its checkpoint lies, written into its spec."""
        plan = copy.copy(self)
        model = self.spec.model
        if model.checkpoint is not None:
            model = model.model_copy(update={"checkpoint": str(self.folder)})
        plan.spec = self.spec.model_copy(update={"training": training, "model": model})
        return plan

    @cached_property
    def _facts(self) -> _Facts:
        model = self.build()
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not named:
            raise SpecError(f"tuning {self.tuning.name!r} leaves nothing of this model to train", hint="see `fedcast tunings`")
        layout = Layout.of(named, lambda name: self.shares(model, name))
        total = sum(parameter.numel() for parameter in model.parameters())
        state, answer = (
            {f"{TUNING}{name}": shape for name, shape in shapes.items()}
            for shapes in (self.tuning.state_shapes(model), self.tuning.answer_shapes(model))
        )
        native = isinstance(model, PatchTransformer)
        parts = {name: model.part(name) for name in layout.names}
        if answer and not layout.shared_size and self.federated_rounds:
            raise SpecError(
                f"tuning {self.tuning.name!r} has sites agree on what is kept, and under method {self.method.name!r} nothing travels",
                hint="choose another method, such as fedavg, or another tuning, such as lora",
            )
        config = model.config if isinstance(model, PatchTransformer) else None
        return _Facts(
            layout, layout.flatten(named), model.shape(layout.shared_size), total, state, answer, native, parts, config, model.config.size
        )

    @property
    def layout(self) -> Layout:
        """Where each trained parameter lies in the flat vector."""
        return self._facts.layout

    @property
    def initial(self) -> Tensor:
        """Trained parameters before any training, float32 ``[size]``."""
        return self._facts.initial

    @property
    def shape(self) -> ModelShape:
        """What the method may know of the model."""
        return self._facts.shape

    @property
    def parameters(self) -> int:
        """How many parameters the model has, frozen ones included."""
        return self._facts.parameters

    @property
    def state_shapes(self) -> Shapes:
        """Names and shapes of what the tuning sends to sites."""
        return self._facts.state

    @property
    def answer_shapes(self) -> Shapes:
        """Names and shapes of what the tuning has sites answer."""
        return self._facts.answer

    @property
    def size(self) -> str:
        """Name of the model's size, for people."""
        return self._facts.size

    @property
    def config(self) -> ModelConfig | None:
        """Shape of a native model; ``None`` for others."""
        return self._facts.config

    @property
    def parts(self) -> dict[str, str]:
        """Name of each trained parameter with its part of the model in front."""
        return self._facts.parts

    def load(self, weights: Tensor, tensors: Mapping[str, Tensor]) -> Model:
        """Return a model with trained weights ``[size]``, shared ones first, and the tuning's state among ``tensors``."""
        model = self.build()
        views = self.layout.views(weights)
        for name, parameter in model.named_parameters():
            if name in views:
                parameter.data.copy_(views[name])
        self.tuning.apply(model, tuning_state(tensors))
        return model

    def save(self, weights: Tensor, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write such a model as a folder that ``Forecaster.from_pretrained`` loads."""
        self.tuning.save(self.load(weights, tensors), folder)


def tuning_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tuning's tensors out of a message or the server's, by their own names."""
    return {name.removeprefix(TUNING): tensor for name, tensor in tensors.items() if name.startswith(TUNING)}

"""A worker's own copy of model, flat parameters and optimiser, reused for every site of the same shape."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fedcast.federated.plan import Plan, tuning_state
from fedcast.models.base import ModelConfig
from fedcast.models.contract import Model
from fedcast.models.mixture import DomainMixture
from fedcast.models.patch import PatchTransformer
from fedcast.models.seeding import GLOBAL_STATE, seeded
from fedcast.training.backend import Backend
from fedcast.training.flat import FlatAdamW, FlatParameters, Layout


@dataclass
class Workspace:
    """Model in compute precision, its float32 twin for evaluation, the method's modules, and what trains them.

    Attributes
    ----------
    plan
        What the run trains.
    initial
        Weights before any training ``[size]``: the same at every site and at the server.
    model_size
        Length of the part of the vector that is the model; the method's own modules come after it.
    stream
        The CUDA stream of everything the workspace does; ``None`` on the CPU.
    mixed
        Whether training steps compute in bfloat16 by autocast, the parameters being float32: so published models do.
    """

    plan: Plan
    model: Model
    twin: Model
    extra: nn.ModuleDict
    parameters: FlatParameters
    optimiser: FlatAdamW
    initial: Tensor
    model_size: int
    stream: torch.cuda.Stream | None = None
    mixed: bool = False
    _compiled: bool = False

    @property
    def device(self) -> torch.device:
        """Where model, flat vectors and optimiser lie."""
        return self.parameters.vector.device

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Let this thread's work run on the workspace's own stream, beside that of other threads; does nothing on the CPU."""
        with torch.cuda.stream(self.stream):
            yield

    def compile(self, windows: int, context: int, horizon: int) -> float:
        """Compile forward and backward of the model for batches of this shape, the first time; return the seconds that took.

        One thread at a time: the next one finds the code made. It hardly pays on a CPU (``benchmarks/compile.py``): steps of the sizes
        micro and mini were 2 to 4 % faster in bfloat16 and no faster in float32, for half a minute of compiling.
        """
        if self._compiled:
            return 0.0
        with GLOBAL_STATE:
            start = time.perf_counter()
            model = cast(PatchTransformer, self.model)
            model.packs = False
            embedding = model.encoder.embedding
            # Two of its biases have the same gradient, of which torch 2.13 makes C++ in bfloat16 that no compiler takes.
            embedding.forward = torch.compiler.disable(embedding.forward)  # type: ignore[method-assign, no-untyped-call]
            for part in (model.encoder, model.decoder, model.heads):
                part.compile(dynamic=False)
            values = torch.zeros(windows, context, device=self.device)
            output = model.normalised(values, torch.ones_like(values, dtype=torch.bool), horizon)
            (output.point.sum() + output.quantiles.sum()).backward()  # type: ignore[no-untyped-call]
            self.parameters.gradient.zero_()
        self._compiled = True
        return time.perf_counter() - start

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Compute a training step's forward pass in the run's precision."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.mixed):
            yield

    def tune(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring the tuning's state in a message into model and twin."""
        state = {name: tensor.to(self.device) for name, tensor in tuning_state(tensors).items()}
        for model in (self.model, self.twin):
            self.plan.tuning.apply(model, state)

    def load(self, shared: Tensor, private: Tensor | None) -> None:
        """Take over shared weights and, where given, private ones (of the model, or of model and extra modules)."""
        self.parameters.shared.copy_(shared)
        self.parameters.private.copy_(self.initial[self.parameters.layout.shared_size :])
        if private is not None:
            self.parameters.private[: private.numel()].copy_(private)
        self.parameters.publish()

    def mixture(self, shared: Tensor, experts: Tensor) -> DomainMixture:
        """Return the mixture of models with weights ``shared [shared_size]`` or ``[K, shared_size]`` and ``experts [K, private_size]``."""
        layout = self.parameters.layout
        count = sum(not name.startswith("extra.") for name in layout.names)
        of_model = Layout(layout.names[:count], layout.shapes[:count], layout.shared)
        vectors = torch.cat([shared.expand(len(experts), -1), experts], dim=1)
        named = {str(i): vector for i, vector in enumerate(vectors)}
        return build_mixture(cast(ModelConfig, self.twin.config), of_model, named).to(self.device)

    @property
    def private_of_model(self) -> Tensor:
        """The private weights without those of the extra modules, as a view."""
        return self.parameters.vector[self.parameters.layout.shared_size : self.model_size]


def build_mixture(config: ModelConfig, layout: Layout, experts: Mapping[str, Tensor]) -> DomainMixture:
    """Build the mixture of models with these weights, shared ones first, by name."""
    states = {name: layout.views(vector) for name, vector in experts.items()}
    return DomainMixture.of(config, states, layout.names[: layout.shared])


def build_workspace(plan: Plan, extra: Mapping[str, nn.Module], backend: Backend) -> Workspace:
    """Build a workspace for sites whose extra modules have these shapes."""
    spec = plan.spec
    stream = torch.cuda.Stream() if backend.device == "cuda" else None  # type: ignore[no-untyped-call]
    # Built on its own stream: no kernel of it can then run before those that fill its tensors.
    with torch.cuda.stream(stream):
        model = plan.build().to(backend.device)
        twin = copy.deepcopy(model)
        modules = nn.ModuleDict(dict(extra)).to(backend.device)
        native = isinstance(model, PatchTransformer)
        dtype = backend.dtype if native else torch.float32
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        own = {f"extra.{name}": p for name, p in modules.named_parameters()}
        shared = {name for name in trained if plan.shares(model, name)}
        named = {**trained, **own}
        parameters = FlatParameters(named, Layout.of(named, shared.__contains__), dtype)
        parameters.bind({name: p for name, p in twin.named_parameters() if name in trained})
        _freeze(model, twin, dtype)
        kernels = backend.kernels == "native"
        # A native block reads its weights directly: it would not see an adapter, and computes gradients for all of them.
        model.use_native(kernels and not plan.tuning.rewires and len(trained) == len(list(model.parameters())))
        training = spec.training
        optimiser = FlatAdamW(
            parameters,
            beta1=training.beta1,
            beta2=training.beta2,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            native=kernels,
        )
        model_size = parameters.layout.size - sum(p.numel() for p in own.values())
        model.train()
        twin.eval()
        mixed = not native and backend.precision == "bfloat16"
        return Workspace(plan, model, twin, modules, parameters, optimiser, parameters.vector.clone(), model_size, stream, mixed)


def _freeze(model: Model, twin: Model, dtype: torch.dtype) -> None:
    """Let frozen weights be in the compute type, and held once where the twin computes in it too."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    twins = dict(twin.named_parameters())
    for name, parameter in frozen.items():
        twins[name].requires_grad_(False)
        if parameter.dtype == dtype:
            twins[name].data = parameter.data
        else:
            parameter.data = parameter.data.to(dtype)


class Workspaces(threading.local):
    """One set of workspaces a thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._made: dict[object, Workspace] = {}

    def get(self, key: object, plan: Plan, make_extra: Callable[[], dict[str, nn.Module]], backend: Backend) -> Workspace:
        """Return this thread's workspace for a key, building it (with extra modules of its own) the first time."""
        if key not in self._made:
            self._made[key] = build_workspace(plan, make_extra(), backend)
        return self._made[key]


def build_extra(make: Callable[[], dict[str, nn.Module]], seed: int) -> dict[str, nn.Module]:
    """Build a method's own modules reproducibly, without moving torch's global random stream."""
    with seeded(seed):
        return make()

"""A worker's own copy of model, flat parameters and optimiser, reused for every site of the same shape."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcast.methods.base import Method
from fedcast.models.architectures import build_model
from fedcast.models.base import ModelConfig
from fedcast.models.mixture import DomainMixture
from fedcast.models.patch import PatchTransformer
from fedcast.spec import RunSpec
from fedcast.training.backend import Backend
from fedcast.training.flat import FlatAdamW, FlatParameters, Layout

# Building modules draws from torch's global random stream, and compiling fills torch's global caches; threads share both.
_BUILD = threading.Lock()


@dataclass
class Workspace:
    """Model in compute precision, its float32 twin for evaluation, the method's modules, and what trains them.

    Attributes
    ----------
    initial
        Weights before any training ``[size]``: the same at every site and at the server.
    model_size
        Length of the part of the vector that is the model; the method's own modules come after it.
    stream
        The CUDA stream of everything the workspace does; ``None`` on the CPU.
    """

    model: PatchTransformer
    twin: PatchTransformer
    extra: nn.ModuleDict
    parameters: FlatParameters
    optimiser: FlatAdamW
    initial: Tensor
    model_size: int
    stream: torch.cuda.Stream | None = None
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
        with _BUILD:
            start = time.perf_counter()
            self.model.packs = False
            embedding = self.model.encoder.embedding
            # Two of its biases have the same gradient, of which torch 2.13 makes C++ in bfloat16 that no compiler takes.
            embedding.forward = torch.compiler.disable(embedding.forward)  # type: ignore[method-assign, no-untyped-call]
            for part in (self.model.encoder, self.model.decoder, self.model.heads):
                part.compile(dynamic=False)
            values = torch.zeros(windows, context, device=self.device)
            output = self.model.normalised(values, torch.ones_like(values, dtype=torch.bool), horizon)
            (output.point.sum() + output.quantiles.sum()).backward()  # type: ignore[no-untyped-call]
            self.parameters.gradient.zero_()
        self._compiled = True
        return time.perf_counter() - start

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
        return build_mixture(self.twin.config, of_model, {str(i): vector for i, vector in enumerate(vectors)}).to(self.device)

    @property
    def private_of_model(self) -> Tensor:
        """The private weights without those of the extra modules, as a view."""
        return self.parameters.vector[self.parameters.layout.shared_size : self.model_size]


def model_layout(spec: RunSpec, method: Method) -> tuple[Layout, Tensor]:
    """Return the layout of the model's parameters and their initial values ``[size]``."""
    with _BUILD:
        model = build_model(method.model_config(spec.model), spec.seed)
    named = dict(model.named_parameters())
    layout = Layout.of(named, method.shares)
    return layout, layout.flatten(named)


def build_mixture(config: ModelConfig, layout: Layout, experts: Mapping[str, Tensor]) -> DomainMixture:
    """Build the mixture of models with these weights, shared ones first, by name."""
    states = {name: layout.views(vector) for name, vector in experts.items()}
    return DomainMixture.of(config, states, layout.names[: layout.shared])


def build_workspace(spec: RunSpec, method: Method, extra: Mapping[str, nn.Module], backend: Backend) -> Workspace:
    """Build a workspace for sites whose extra modules have these shapes."""
    stream = torch.cuda.Stream() if backend.device == "cuda" else None  # type: ignore[no-untyped-call]
    # Built on its own stream: no kernel of it can then run before those that fill its tensors.
    with torch.cuda.stream(stream):
        with _BUILD:
            model, twin = (build_model(method.model_config(spec.model), spec.seed).to(backend.device) for _ in range(2))
        modules = nn.ModuleDict(dict(extra)).to(backend.device)
        shared = {name: p for name, p in model.named_parameters() if method.shares(name)}
        private = {name: p for name, p in model.named_parameters() if name not in shared}
        own = {f"extra.{name}": p for name, p in modules.named_parameters()}
        named = {**shared, **private, **own}
        layout = Layout.of(named, lambda name: name in shared)
        parameters = FlatParameters(named, layout, backend.dtype)
        parameters.bind(dict(twin.named_parameters()))
        training, native = spec.training, backend.kernels == "native"
        model.use_native(native)
        optimiser = FlatAdamW(
            parameters,
            beta1=training.beta1,
            beta2=training.beta2,
            weight_decay=training.weight_decay,
            clip_norm=training.clip_norm,
            native=native,
        )
        model_size = layout.size - sum(p.numel() for p in own.values())
        model.train()
        twin.eval()
        return Workspace(model, twin, modules, parameters, optimiser, parameters.vector.clone(), model_size, stream)


class Workspaces(threading.local):
    """One set of workspaces a thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._made: dict[object, Workspace] = {}

    def get(
        self, key: object, spec: RunSpec, method: Method, make_extra: Callable[[], dict[str, nn.Module]], backend: Backend
    ) -> Workspace:
        """Return this thread's workspace for a key, building it (with extra modules of its own) the first time."""
        if key not in self._made:
            self._made[key] = build_workspace(spec, method, make_extra(), backend)
        return self._made[key]


def build_extra(make: Callable[[], dict[str, nn.Module]], seed: int) -> dict[str, nn.Module]:
    """Build a method's own modules reproducibly, without moving torch's global random stream."""
    with _BUILD, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()

"""What a run computes with: number format, library of float32 products, device, compiled or not.

Chosen once, by whoever starts a run, and recorded in ``run.json``: a resumed run and every worker take what stands there.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch

from fedcast.errors import SpecError
from fedcast.kernels import library
from fedcast.models.precision import native_bfloat16
from fedcast.spec import TrainingSpec

Precision = Literal["float32", "bfloat16"]
Products = Literal["default", "onednn"]
Kernels = Literal["torch", "native"]
Device = Literal["cpu", "cuda"]

_GAIN = 1.2  # a library or format must be this much faster: on the processors at hand the ratio is either about 1.0 or above 2
_ACCURACY = 1e-5  # float32 products err by about 3e-7, bfloat16 ones by 3e-3
_REPEATS = 9
_SHAPE = (512, 256, 1024)


@dataclass(frozen=True)
class Probe:
    """Fastest of nine products ``[512, 256] x [256, 1024]`` on one thread, and how far oneDNN's is off.

    Attributes
    ----------
    default_ms, onednn_ms, bfloat16_ms
        Milliseconds in float32 with the default library, in float32 through oneDNN, and in bfloat16; ``None`` where the processor
        has no bfloat16 products of its own (emulated ones are slow).
    onednn_error
        Relative error of oneDNN's product against float64.
    """

    default_ms: float
    onednn_ms: float
    bfloat16_ms: float | None
    onednn_error: float

    @property
    def products(self) -> Products:
        """The faster library of float32 products."""
        return "onednn" if self.onednn_error < _ACCURACY and self.default_ms >= _GAIN * self.onednn_ms else "default"

    def precision(self, products: Products) -> Precision:
        """Return the faster number format beside float32 products by that library."""
        float32 = self.onednn_ms if products == "onednn" else self.default_ms
        return "bfloat16" if self.bfloat16_ms is not None and float32 >= _GAIN * self.bfloat16_ms else "float32"


@dataclass(frozen=True)
class Backend:
    """What a run computes with.

    Attributes
    ----------
    precision
        Number format of forward and backward. Master weights, optimiser moments, losses and whatever travels are float32 either way.
    products
        Library of float32 matrix products on the CPU: torch's default, or oneDNN.
    kernels
        What computes a block and the optimiser's step in bfloat16 on the CPU: torch, or the native kernels.
    device
        Where models are trained and scored; everything else stays on the CPU.
    """

    precision: Precision
    products: Products = "default"
    kernels: Kernels = "torch"
    device: Device = "cpu"

    @classmethod
    def resolve(cls, training: TrainingSpec) -> Backend:
        """Choose for this machine; only where the spec says ``"auto"`` is anything measured.

        Raises
        ------
        SpecError
            When the machine lacks what the spec asks for: a CUDA device, exact float32 products by oneDNN, or a C++ compiler; or
            when its keys exclude each other.
        MissingExtraError
            When the spec asks for native kernels and they are not compiled.
        """
        if training.compile:
            _check_compiler()
        if _device(training.device) == "cuda":
            return cls._on_cuda(training)
        if training.products == "onednn":
            _check_onednn()
        products = probe().products if training.products == "auto" else training.products
        precision = probe().precision(products) if training.precision == "auto" else training.precision
        return cls(precision, products, _kernels(training, precision))

    @classmethod
    def _on_cuda(cls, training: TrainingSpec) -> Backend:
        if training.products == "onednn":
            raise SpecError(
                "training.products = 'onednn' is a library for the CPU, and the run computes on CUDA",
                hint="leave training.products out, or set training.device = 'cpu'",
            )
        if training.kernels == "native":
            raise SpecError("the native kernels are for the CPU, and the run computes on CUDA", hint="leave training.kernels out")
        native: Precision = "bfloat16" if native_bfloat16(torch.device("cuda")) else "float32"
        return cls(native if training.precision == "auto" else training.precision, device="cuda")

    @classmethod
    def recorded(cls, about: Mapping[str, Any]) -> Backend:
        """Return what ``run.json`` says; a run older than a key computed with its first choice.

        Raises
        ------
        SpecError, MissingExtraError
            When the run computed on CUDA and this machine has none, or with native kernels that are not compiled here.
        """
        chosen = {name: about[name] for name in ("products", "kernels", "device") if name in about}
        backend = cls(about["precision"], **chosen)
        if backend.device == "cuda":
            _device("cuda")
        if backend.kernels == "native":
            library.kernels()
        return backend

    @property
    def dtype(self) -> torch.dtype:
        """The number format as torch calls it."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` keeps of it."""
        return asdict(self)

    def written_into(self, training: TrainingSpec) -> TrainingSpec:
        """Return the spec's section with these choices in place of ``"auto"``."""
        return training.model_copy(update=asdict(self))

    def use(self) -> None:
        """Route float32 products of this process accordingly; torch keeps one setting for all threads."""
        torch.set_float32_matmul_precision("medium" if self.products == "onednn" else "highest")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Do as :meth:`use`, and restore afterwards what the process had set."""
        before = torch.get_float32_matmul_precision()
        self.use()
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@cache
def probe() -> Probe:
    """Measure this processor's matrix products, once a process; takes about 0.1 seconds.

    torch's default library reaches 41 % of the float32 peak of an AMD EPYC (Zen 5), oneDNN 91 %; on Intel processors the two are
    alike. ``"medium"`` routes float32 products to oneDNN, which computes in bfloat16 instead where the processor has AMX: that is
    why the error is measured too.
    """
    rows, inner, columns = _SHAPE
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator)
    b = torch.randn(inner, columns, generator=generator)
    exact = a.double() @ b.double()
    native = native_bfloat16(torch.device("cpu"))
    short_a, short_b = a.bfloat16(), b.bfloat16()
    default, onednn = Backend("float32"), Backend("float32", "onednn")
    times: dict[str, list[float]] = {"default": [], "onednn": [], "bfloat16": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with onednn.in_use():
            error = float((a @ b - exact).norm() / exact.norm())
        # In turns: another process on the same cores then slows all of them alike.
        for _ in range(_REPEATS):
            for name, backend in (("default", default), ("onednn", onednn)):
                with backend.in_use():
                    times[name].append(_milliseconds(lambda: a @ b))
            if native:
                times["bfloat16"].append(_milliseconds(lambda: short_a @ short_b))
    finally:
        torch.set_num_threads(threads)
    return Probe(min(times["default"]), min(times["onednn"]), min(times["bfloat16"], default=None), error)


def _milliseconds(product: Callable[[], object]) -> float:
    start = time.perf_counter()
    product()
    return 1e3 * (time.perf_counter() - start)


def _device(asked: Literal["auto", "cpu", "cuda"]) -> Device:
    if asked == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise SpecError(
            "the run computes on CUDA, and torch finds no CUDA device here",
            hint="install torch with CUDA on a machine that has one, or set training.device = 'cpu' and choose another --output",
        )
    return "cpu"


def _kernels(training: TrainingSpec, precision: Precision) -> Kernels:
    if training.kernels == "auto":
        return "native" if precision == "bfloat16" and not training.compile and library.built() else "torch"
    if training.kernels == "native":
        if precision != "bfloat16":
            raise SpecError(
                f"the native kernels compute in bfloat16, and the run in {precision}",
                hint="leave out one of the two keys",
            )
        if training.compile:
            raise SpecError("native kernels and training.compile exclude each other", hint="leave one of the two out")
        library.kernels()
    return training.kernels


def _check_onednn() -> None:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise SpecError("this build of torch has no oneDNN", hint="leave training.products out")
    if probe().onednn_error >= _ACCURACY:
        raise SpecError("oneDNN computes float32 products of this processor in bfloat16", hint="leave training.products out")


def _check_compiler() -> None:
    # As torch.compile itself looks for one.
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise SpecError(
            f"training.compile needs a C++ compiler, and there is no {name}",
            hint=f"install {name} (or name another in CXX), or leave training.compile out",
        )

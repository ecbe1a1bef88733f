"""Where a training step goes: plain PyTorch, fedcast in each number format, and the matrix products of the blocks alone.

One thread, CPU milliseconds (``time.process_time``), medians, variants in turn on one batch of full contexts from the same weights.
Shares are of the matrix-product ceiling of one thread in the step's own number format, measured in the same run: the products of the
floor over the time of the whole step. "Products alone" are forward, input gradient and weight gradient of the linear layers of all
blocks, operands and results allocated before. Gradients are compared with those of plain PyTorch in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import floor, machine
from benchmarks.tables import markdown, write_json
from fedcast.data.windows import Batch, Windows
from fedcast.errors import MissingExtraError
from fedcast.kernels import blocks, library
from fedcast.models.base import ModelConfig, Output
from fedcast.models.patch import PatchTransformer
from fedcast.tasks.forecast import ForecastTask
from fedcast.training import flat
from fedcast.training.flat import FlatAdamW, FlatParameters, Layout

Format = Literal["float32", "float32, oneDNN", "bfloat16"]


@dataclass(frozen=True)
class Variant:
    """A way of computing a step: number format and back end, and whether parameters are flat and kernels native."""

    name: str
    format: Format
    flat: bool = True
    native: bool = False


PLAIN = Variant("plain PyTorch", "float32", flat=False)
NATIVE = Variant("bfloat16, native kernels", "bfloat16", native=True)
VARIANTS = (PLAIN, Variant("float32", "float32"), Variant("float32, oneDNN", "float32, oneDNN"), Variant("bfloat16", "bfloat16"), NATIVE)
FORMATS: tuple[Format, ...] = ("float32", "float32, oneDNN", "bfloat16")

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
GROUPS = {
    "attention": ("attention_forward", "attention_backward"),
    "GELU": ("gelu_forward", "gelu_backward", "aten::gelu", "aten::gelu_backward"),
    "layer norm": ("layer_norm_forward", "layer_norm_backward", "aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "bias sums": ("column_sums",),
    "optimiser": ("sum_of_squares", "adamw"),
}


def full_batch(batch: int, context: int, horizon: int) -> Batch:
    """Return random walks without a gap."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(batch, context + horizon, generator=generator).cumsum(1)
    places, zeros = np.arange(batch), torch.zeros(batch, dtype=torch.long)
    return Batch(
        context=values[:, :context].contiguous(),
        mask=torch.ones(batch, context, dtype=torch.bool),
        target=values[:, context:].contiguous(),
        target_mask=torch.ones(batch, horizon, dtype=torch.bool),
        windows=Windows(places, places),
        dataset=zeros,
        domain=zeros,
    )


def why_not_native() -> str | None:
    """Compile the native kernels; return why that cannot be done, in a few words."""
    try:
        library.build()
    except MissingExtraError as error:
        return error.message
    return None


def route(number_format: Format) -> None:
    """Send float32 products to torch's default library, or to oneDNN."""
    torch.set_float32_matmul_precision("medium" if number_format == "float32, oneDNN" else "highest")


class Trainee:
    """A model, its optimiser and a batch: calling it takes one training step."""

    def __init__(self, variant: Variant, config: ModelConfig, batch: Batch) -> None:
        self.variant, self._batch, self._task = variant, batch, ForecastTask()
        self._model = PatchTransformer(config).train()
        self._named = dict(self._model.named_parameters())
        if variant.flat:
            self._flat = FlatParameters(self._named, Layout.of(self._named, lambda _: True), dtype_of(variant.format))
            self._optimiser = FlatAdamW(self._flat, beta1=0.9, beta2=0.99, weight_decay=0.01, clip_norm=1.0, native=variant.native)
            self._model.use_native(variant.native)
        else:
            self._adamw = torch.optim.AdamW(self._model.parameters(), lr=1e-4)

    def __call__(self) -> None:
        """Take a step: forward, backward, optimiser."""
        self._backward()
        if self.variant.flat:
            self._optimiser.step(1e-4)
        else:
            self._adamw.step()

    def gradient(self) -> Tensor:
        """Return the gradient of the batch's loss at the present weights, float32 and flat."""
        self._backward()
        return torch.cat([p.grad.flatten().float() for p in self._named.values() if p.grad is not None])

    def loss_alone(self) -> Callable[[], None]:
        """Return what computes the loss, forward and backward, from a finished model output."""
        with torch.no_grad():
            output = self._forward()
        point, quantiles = output.point.detach().requires_grad_(), output.quantiles.detach().requires_grad_()

        def loss() -> None:
            self._task.loss(output._replace(point=point, quantiles=quantiles), self._batch).backward()  # type: ignore[no-untyped-call]

        return loss

    def _forward(self) -> Output:
        return self._model.normalised(self._batch.context, self._batch.mask, self._batch.target.shape[1])

    def _backward(self) -> None:
        if self.variant.flat:
            self._flat.gradient.zero_()
        else:
            self._adamw.zero_grad()
        self._task.loss(self._forward(), self._batch).backward()  # type: ignore[no-untyped-call]


def dtype_of(number_format: Format) -> torch.dtype:
    """Return torch's type of a number format."""
    return torch.bfloat16 if number_format == "bfloat16" else torch.float32


def products_of_blocks(config: ModelConfig, batch: int) -> list[tuple[int, int, int, int]]:
    """Return (times, rows, inner, columns) of the linear layers of all blocks."""
    d, tokens, asked = config.d_model, batch * config.context_patches, batch * config.horizon_patches
    encoder = [(tokens, d, 3 * d), (tokens, d, d), (tokens, d, 4 * d), (tokens, 4 * d, d)]
    decoder = [(asked, d, d), (tokens, d, 2 * d), (asked, d, d), (asked, d, 2 * d), (asked, 2 * d, d)]
    return [(config.encoder_layers, *shape) for shape in encoder] + [(config.decoder_layers, *shape) for shape in decoder]


def products_alone(config: ModelConfig, batch: int, number_format: Format) -> Callable[[], None]:
    """Return what computes the linear layers' products of a step: forward, input gradient, weight gradient."""
    dtype = dtype_of(number_format)
    layers: list[tuple[int, tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    for times, rows, inner, columns in products_of_blocks(config, batch):
        x, weight, gradient = (torch.randn(shape).to(dtype) for shape in ((rows, inner), (columns, inner), (rows, columns)))
        layers.append((times, (x, weight, gradient), (torch.empty_like(gradient), torch.empty_like(x), torch.empty_like(weight))))

    def multiply() -> None:
        for times, (x, weight, gradient), (y, d_x, d_weight) in layers:
            for _ in range(times):
                torch.mm(x, weight.t(), out=y)
                torch.mm(gradient, weight, out=d_x)
                torch.mm(gradient.t(), x, out=d_weight)

    return multiply


def cpu_seconds(work: Callable[[], object], times: int) -> float:
    """Return the CPU seconds of one of several calls."""
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def measure(config: ModelConfig, size_of_batch: int, variants: Sequence[Variant], repeats: int, steps: int) -> dict[str, Any]:
    """Return milliseconds and gradient error of each variant, milliseconds of the products alone, and the native step's profile."""
    batch = full_batch(size_of_batch, config.context, config.horizon)
    trainees = {variant.name: Trainee(variant, config, batch) for variant in variants}
    gradients = {}
    for name, trainee in trainees.items():
        route(trainee.variant.format)
        gradients[name] = trainee.gradient()
    exact = gradients[PLAIN.name]
    errors = {name: float((gradient - exact).norm() / exact.norm()) for name, gradient in gradients.items()}
    work: dict[str, tuple[Format, Callable[[], None]]] = {name: (t.variant.format, t) for name, t in trainees.items()}
    work |= {f"products, {name}": (name, products_alone(config, size_of_batch, name)) for name in FORMATS}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, (number_format, step) in work.items():
            route(number_format)
            times[name].append(cpu_seconds(step, steps))
    medians = {name: 1e3 * statistics.median(values[1:]) for name, values in times.items()}
    route("float32")
    shares = profiled(trainees[NATIVE.name], repeats * steps) if NATIVE.name in trainees else None
    return {"ms": medians, "gradient_error": errors, "profile_ms": shares}


class TimedKernels:
    """The native kernels, with the CPU seconds of each added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._library = library.kernels()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a kernel that is timed."""
        function = getattr(self._library, name)

        def timed(*arguments: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments)
            self.seconds[name] += time.thread_time() - start
            return result

        return timed


def profiled(step: Trainee, count: int) -> dict[str, float]:
    """Return milliseconds of a native step by group; ``rest`` is what is left of the step.

    Kernels are timed inside steps, torch's operators by torch.profiler in steps of their own, the loss alone.
    """
    timed = TimedKernels()
    with patch.object(blocks, "kernels", lambda: timed), patch.object(flat, "kernels", lambda: timed):
        whole = 1e3 * cpu_seconds(step, count)
    seconds = timed.seconds.copy()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(count):
            step()
    for event in record.key_averages():
        seconds[event.key] += event.self_cpu_time_total / 1e6
    groups = {"matrix products": PRODUCTS, **GROUPS}
    found = {group: 1e3 * sum(seconds[name] for name in names) / count for group, names in groups.items()}
    loss = step.loss_alone()
    found["loss"] = 1e3 * statistics.median(cpu_seconds(loss, 1) for _ in range(count + 2))
    return {**found, "rest": whole - sum(found.values())}


def tables(rows: Sequence[dict[str, Any]], variants: Sequence[Variant]) -> str:
    """Return the tables of steps, of what stands beside the products alone, and of the native step's parts."""
    keys = ["size", "batch"]
    steps, beside, parts = [], [], []
    for row in rows:
        first, ms = [row["size"], str(row["batch"])], row["ms"]
        plain = ms[PLAIN.name]
        steps.append([*first, *(f"{ms[v.name]:.1f} (x{plain / ms[v.name]:.2f}, {100 * row['share'][v.name]:.0f} %)" for v in variants)])
        floors = [f"{ms[f'products, {name}']:.1f}" for name in FORMATS]
        over = [f"{ms[v.name] / ms[f'products, {v.format}']:.2f}, {row['gradient_error'][v.name]:.1g}" for v in variants]
        beside.append([*first, *floors, *over])
        if row["profile_ms"]:
            whole = sum(row["profile_ms"].values())
            parts.append([*first, f"{whole:.1f}", *(f"{t:.2f} ({100 * t / whole:.0f} %)" for t in row["profile_ms"].values())])
    names = [v.name for v in variants]
    text = "CPU ms a step (times faster than plain PyTorch, share of the ceiling in its number format):\n\n"
    text += markdown([*keys, *names], steps)
    text += "\n\nms of the blocks' products alone by number format; then each step over them, and the relative error of its gradient:\n\n"
    text += markdown([*keys, *(f"products, {name}" for name in FORMATS), *names], beside)
    if parts:
        groups = next(row["profile_ms"] for row in rows)
        text += "\n\nThe native bfloat16 step by group, ms (share):\n\n" + markdown([*keys, "step", *groups], parts)
    return text


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["nano", "micro", "tiny", "mini"])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps in turn")
    parser.add_argument("--quick", action="store_true", help="the smallest model, a short context, one repeat")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.sizes, arguments.batches, arguments.context, arguments.horizon = ["nano"], [2], 64, 16
        arguments.repeats = arguments.steps = 1
    reason = why_not_native()
    variants = VARIANTS if reason is None else VARIANTS[:-1]
    rows = []
    with machine.settings(1, "highest"):
        ceilings = machine.measure(quick=arguments.quick)
        for size, batch in product(arguments.sizes, arguments.batches):
            config = floor.configuration(size, arguments.context, arguments.horizon)
            row = {"size": size, "batch": batch, **measure(config, batch, variants, arguments.repeats, arguments.steps)}
            rows.append({**row, "products": floor.step(config, batch).products})
        ceilings = ceilings.best(machine.measure(quick=arguments.quick))
    peaks = {dtype: max(way["1"] for name, way in ceilings.flops.items() if name.startswith(dtype)) for dtype in ("float32", "bfloat16")}
    for row in rows:
        row["share"] = {v.name: row["products"] / (1e-3 * row["ms"][v.name]) / peaks[v.format.partition(",")[0]] for v in variants}
    print(
        f"Context {arguments.context}, horizon {arguments.horizon}, one thread, medians of {arguments.repeats} x {arguments.steps} steps.\n"
    )
    print(tables(rows, variants))
    if reason is not None:
        print(f"\n{NATIVE.name}: not run, {reason}.")
    one = ", ".join(f"{peak / 1e9:.0f} GFLOP/s {name}" for name, peak in peaks.items())
    print(f"\n{ceilings.sentence()} One thread: {one}.")
    missing = {} if reason is None else {NATIVE.name: reason}
    write_json(arguments.output, {"machine": ceilings.to_dict(), "one_thread": peaks, "missing": missing, "rows": rows})


if __name__ == "__main__":
    main()

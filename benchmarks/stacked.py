"""Many small clients at once: their weights stacked in one batched product, beside workers that take one client each.

Eight clients with weights and windows of their own take local steps in bfloat16 with float32 masters, clipping and AdamW, on both
cores. Workers are two threads that train one client after the other, as fedcast does. Stacked, ``torch.func.vmap`` turns the products of
all clients into batched ones, and one fused AdamW updates all weights: either one stack whose products torch splits over both cores, or
two threads with a stack of half the clients each. All ways are taken in turn; the figures are medians of steps of a client a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks import floor, machine
from benchmarks.step import NATIVE, VARIANTS, Trainee, full_batch, why_not_native
from benchmarks.tables import markdown, write_json
from fedcast.data.windows import Batch
from fedcast.models.base import ModelConfig
from fedcast.models.patch import PatchTransformer
from fedcast.tasks.forecast import ForecastTask
from fedcast.training.flat import Layout

CLIP, RATE, WORKERS = 1.0, 1e-4, 2
TORCH = next(variant for variant in VARIANTS if variant.format == "bfloat16" and not variant.native)
Ways = dict[str, Callable[[], None]]


class _Loss(nn.Module):
    """The model with its loss as ``forward``, which is what ``functional_call`` calls."""

    def __init__(self, config: ModelConfig, batch: Batch) -> None:
        super().__init__()
        self.model = PatchTransformer(config).to(torch.bfloat16)
        self.model.packs = False  # vmap cannot look at a mask
        self._batch, self._task = batch, ForecastTask()

    def forward(self, context: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a client's windows; masks are full, and the same for all."""
        output = self.model.normalised(context, self._batch.mask, target.shape[1])
        batch = Batch(
            context, self._batch.mask, target, self._batch.target_mask, self._batch.windows, self._batch.dataset, self._batch.domain
        )
        return self._task.loss(output, batch)


class Stack:
    """Clients whose weights are the rows of one matrix; calling it takes a step of each."""

    def __init__(self, config: ModelConfig, batch: Batch, clients: int) -> None:
        module = _Loss(config, batch)
        named = dict(module.named_parameters())
        layout = Layout.of(named, lambda _: True)
        self._vectors = nn.Parameter(layout.flatten(named).repeat(clients, 1))  # float32 [C, P]
        self._vectors.grad = torch.zeros_like(self._vectors)
        self._compute = self.weights.to(torch.bfloat16)
        self._weights, self._places = (_views(layout, matrix) for matrix in (self._compute, self._vectors.grad))
        # Clients differ by the level of their series.
        shift = torch.arange(clients, dtype=torch.float32)[:, None, None]
        self._context, self._target = batch.context + shift, batch.target + shift
        self._adamw = torch.optim.AdamW([self._vectors], lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

        def loss(weights: dict[str, Tensor], context: Tensor, target: Tensor) -> Tensor:
            return cast(Tensor, functional_call(module, weights, (context, target)))

        with torch.no_grad():
            module(batch.context, batch.target)  # fills the cached tables outside of vmap
        self._gradients = vmap(grad(loss))

    def __call__(self) -> None:
        """Take a step of every client."""
        gradient = self.gradients()
        norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient.mul_((CLIP / (norms + 1e-6)).clamp_(max=1.0))
        self._adamw.step()
        self._compute.copy_(self.weights)

    @property
    def weights(self) -> Tensor:
        """The clients' master weights, float32 ``[C, P]``."""
        return self._vectors.detach()

    def gradients(self) -> Tensor:
        """Return the gradient of each client, float32 ``[C, P]``; the next call overwrites it."""
        found = self._gradients(self._weights, self._context, self._target)
        for name, gradient in found.items():
            self._places[name].copy_(gradient)
        return cast(Tensor, self._vectors.grad)


def _views(layout: Layout, matrix: Tensor) -> dict[str, Tensor]:
    """Return the named parameters of every row of ``matrix`` [C, P] as views [C, ...]."""
    edges = zip(layout.names, layout.shapes, layout.offsets, layout.offsets[1:], strict=False)
    return {name: matrix[:, start:stop].view(len(matrix), *shape) for name, shape, start, stop in edges}


@contextmanager
def ways_of(config: ModelConfig, batch_size: int, clients: int, native: bool) -> Iterator[Ways]:
    """Give, by name, what takes one step of every client."""
    batch = full_batch(batch_size, config.context, config.horizon)
    variants = {"workers": TORCH} | ({"workers, native kernels": NATIVE} if native else {})
    share = clients // WORKERS
    whole, halves = Stack(config, batch, clients), [Stack(config, batch, share) for _ in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def side_by_side(work: Sequence[Callable[[], None]], times: int) -> None:
            def repeat(one: Callable[[], None]) -> None:
                for _ in range(times):
                    one()

            list(pool.map(repeat, work))

        def split() -> None:
            torch.set_num_threads(WORKERS)
            whole()

        ways: Ways = {}
        for name, variant in variants.items():
            trainees = [Trainee(variant, config, batch) for _ in range(WORKERS)]
            ways[name] = lambda t=trainees: side_by_side(t, share)  # type: ignore[misc]
        ways["one stack, products split"] = split
        ways[f"{WORKERS} stacks of {share}"] = lambda: side_by_side(halves, 1)
        yield ways


def measure(config: ModelConfig, batch: int, clients: int, native: bool, repeats: int, seconds: float) -> dict[str, float]:
    """Return the median of clients' steps a second by way."""
    rates: dict[str, list[float]] = {}
    with ways_of(config, batch, clients, native) as ways:
        for _ in range(repeats + 1):
            for name, work in ways.items():
                count, start = 0, time.perf_counter()
                while (now := time.perf_counter()) - start < seconds or count == 0:
                    work()
                    count += 1
                rates.setdefault(name, []).append(clients * count / (now - start))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def main(words: Sequence[str] | None = None) -> None:
    """Print the table and what follows from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["nano", "micro"])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 32, 64], help="windows a client")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each way in turn")
    parser.add_argument("--quick", action="store_true", help="the smallest model, two clients, one repeat")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.sizes, arguments.batches, arguments.clients, arguments.context, arguments.horizon = ["nano"], [2], 2, 64, 16
        arguments.repeats, arguments.seconds = 1, 0.0
    reason = why_not_native()
    rows = []
    with machine.settings(WORKERS, "highest"):
        for size, batch in product(arguments.sizes, arguments.batches):
            config = floor.configuration(size, arguments.context, arguments.horizon)
            rates = measure(config, batch, arguments.clients, reason is None, arguments.repeats, arguments.seconds)
            workers, stacked = (max(rate for name, rate in rates.items() if name.startswith("workers") == of) for of in (True, False))
            rows.append({"size": size, "batch": batch, "rates": rates, "stacked_over_workers": stacked / workers})
    names = list(rows[0]["rates"])
    lines = []
    for row in rows:
        over_torch = max(rate for name, rate in row["rates"].items() if not name.startswith("workers")) / row["rates"]["workers"]
        cells = [row["size"], str(row["batch"]), *(f"{row['rates'][name]:.1f}" for name in names)]
        lines.append([*cells, f"{over_torch:.2f}", f"{row['stacked_over_workers']:.2f}"])
    print(f"{machine.processor_name()}, torch {torch.__version__}, {arguments.clients} clients, context {arguments.context}\n")
    columns = ["size", "windows a client", *names, "stacked / workers", "stacked / best workers"]
    print("Steps of a client a second, both cores:\n\n" + markdown(columns, lines))
    wins = [f"{row['size']} at {row['batch']}" for row in rows if row["stacked_over_workers"] > 1]
    if reason is not None:
        print(f"\nWorkers with native kernels: not run, {reason}.")
    won = f"{len(wins)} of {len(rows)} settings" + (f" ({', '.join(wins)})" if wins else "")
    print(f"\nThe better stack beats the best workers in {won}. fedcast does not stack clients today.")
    document = {"processor": machine.processor_name(), "torch": torch.__version__, "clients": arguments.clients, "rows": rows}
    write_json(arguments.output, {**document, "wins": wins})


if __name__ == "__main__":
    main()

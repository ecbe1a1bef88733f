"""Packing uneven lengths against padding them: windows a second of a training step (forward, backward, optimiser), one thread.

Both run the same model on the same batches in turns. ``tokens`` says how many times fewer slots the encoder reads: what the ratio
could be at most, if a step cost nothing else. Lengths are in patches of 16 steps, out of a context of 32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from benchmarks.tables import markdown, write_json
from fedcast.data.catalogue import load_domains
from fedcast.data.splits import split_by_time
from fedcast.data.store import SeriesStore
from fedcast.data.windows import Batch, Windows, WindowSampler
from fedcast.models import patch
from fedcast.models.packing import arrange
from fedcast.spec import DataSpec, ModelSpec, TrainingSpec
from fedcast.tasks.forecast import ForecastTask
from fedcast.training.flat import FlatAdamW, FlatParameters, Layout

LONGEST = 32
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes
    ----------
    lengths, format
        Name of the lengths and number format.
    tokens
        Slots that the encoder reads when batches are padded, over those when they are packed.
    padded, packed
        Windows a second.
    ratio
        Median over the repeats of seconds padded over seconds packed.
    """

    lengths: str
    format: str
    tokens: float
    padded: float
    packed: float
    ratio: float


def _geometric(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.geometric(1 - 0.5 ** (1 / 8), count)  # median 8


LENGTHS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "equal": lambda rng, count: np.full(count, LONGEST),
    "uniform": lambda rng, count: rng.integers(4, LONGEST + 1, count),
    "geometric": _geometric,
    "log-normal": lambda rng, count: rng.lognormal(np.log(8), 0.5, count).round(),  # median 8, a thinner tail
}


def synthetic(name: str, model: ModelSpec, size: int, seed: int) -> Batch:
    """Return a batch of random walks whose lengths in patches are drawn from a distribution."""
    rng = np.random.default_rng(seed)
    patches = np.clip(LENGTHS[name](rng, size), 1, LONGEST).astype(int)
    mask = np.arange(model.context) >= model.context - model.patch * patches[:, None]
    values = rng.standard_normal((size, model.context + model.horizon), dtype=np.float32).cumsum(axis=1)
    none = np.zeros(size, dtype=np.int64)
    return Batch(
        context=torch.from_numpy(np.where(mask, values[:, : model.context], 0.0)),
        mask=torch.from_numpy(mask),
        target=torch.from_numpy(values[:, model.context :].copy()),
        target_mask=torch.ones(size, model.horizon, dtype=torch.bool),
        windows=Windows(none, none),
        dataset=torch.from_numpy(none),
        domain=torch.from_numpy(none),
    )


def bundled(model: ModelSpec, size: int, count: int, domains: int | None) -> dict[str, list[Batch]]:
    """Return train batches of bundled data, data sets drawn evenly: ``count`` of all domains pooled, and one of each domain."""
    data = DataSpec(source="bundled")
    rng = np.random.default_rng(0)

    def draw(store: SeriesStore) -> Batch:
        splits = split_by_time(store, horizon=model.horizon, validation=data.validation, test=data.test)
        sampler = WindowSampler(store, splits, context=model.context, horizon=model.horizon, balance="dataset")
        return sampler.gather(sampler.draw(size, rng))

    stores = load_domains(data)
    single = [draw(store) for store in list(stores.values())[:domains]]
    pool = SeriesStore.concat([(store, np.arange(len(store.ids))) for store in stores.values()])
    return {"bundled data, all domains in a batch": [draw(pool) for _ in range(count)], "bundled data, a domain a batch": single}


@contextmanager
def padding() -> Iterator[None]:
    """Pad every window to the context for a while."""
    patch.arrange = lambda mask: (mask.shape[1], None)
    try:
        yield
    finally:
        patch.arrange = arrange


class Trainer:
    """A model and its optimiser; :meth:`run` takes a step on each of several batches."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self.model = patch.PatchTransformer.from_spec(spec, seed=0)
        named = dict(self.model.named_parameters())
        self.flat = FlatParameters(named, Layout.of(named, lambda _: True), dtype)
        training = TrainingSpec()
        self.optimiser = FlatAdamW(
            self.flat, beta1=training.beta1, beta2=training.beta2, weight_decay=training.weight_decay, clip_norm=training.clip_norm
        )
        self.task, self.horizon = ForecastTask(), spec.horizon

    def run(self, batches: Sequence[Batch]) -> float:
        """Return the seconds of a step on each batch."""
        start = time.perf_counter()
        for batch in batches:
            self.flat.gradient.zero_()
            self.task.loss(self.model.normalised(batch.context, batch.mask, self.horizon), batch).backward()
            self.optimiser.step(1e-4)
        return time.perf_counter() - start

    def saved(self, batches: Sequence[Batch]) -> float:
        """Return slots that the encoder reads when padded over slots when packed."""
        masks = [self.model.tokens(batch.context, batch.mask).mask for batch in batches]
        slots = 0
        for mask in masks:
            width, packing = arrange(mask)
            slots += len(mask) * width if packing is None else packing.source.numel()
        return sum(mask.numel() for mask in masks) / slots


def compare(name: str, batches: Sequence[Batch], spec: ModelSpec, number_format: str, repeats: int) -> Row:
    """Time both ways in turns."""
    trainer = Trainer(spec, FORMATS[number_format])
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    for repeat in range(repeats + 1):
        ways = ["padded", "packed"] if repeat % 2 else ["packed", "padded"]
        for way in ways:
            with padding() if way == "padded" else nullcontext():
                taken = trainer.run(batches)
            if repeat:  # the first one warms up
                seconds[way].append(taken)
    windows = sum(len(batch.windows) for batch in batches)
    ratio = statistics.median(a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True))
    rates = (windows / statistics.median(seconds[way]) for way in ("padded", "packed"))
    return Row(name, number_format, trainer.saved(batches), *rates, ratio)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="micro")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batches", type=int, default=4, help="different batches of the same kind in a repeat")
    parser.add_argument("--quick", action="store_true", help="a small model and few repeats")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.batch, options.repeats, options.batches = "nano", 8, 1, 1
    spec = ModelSpec(size=options.size, context=16 * LONGEST, patch=16)
    cases = {name: [synthetic(name, spec, options.batch, seed) for seed in range(options.batches)] for name in LENGTHS}
    cases |= bundled(spec, options.batch, options.batches, 2 if options.quick else None)
    with machine.settings(1, torch.get_float32_matmul_precision()):
        rows = [compare(name, batches, spec, f, options.repeats) for name, batches in cases.items() for f in FORMATS]
    print(f"{machine.processor_name()}, torch {torch.__version__}, one thread, size {options.size}, batches of {options.batch} windows.\n")
    cells = [
        [row.lengths, row.format, f"{row.tokens:.2f}", f"{row.padded:.0f}", f"{row.packed:.0f}", f"**{row.ratio:.2f}**"] for row in rows
    ]
    print(markdown(["lengths", "format", "tokens", "padded, windows/s", "packed, windows/s", "ratio"], cells))
    write_json(options.output, {"processor": machine.processor_name(), "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
